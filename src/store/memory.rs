//! Objects held in memory: small stores in tests, and the base of their failing and slow wrappers.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use super::{Entry, RangeRead, ReadFuture, Store};
use crate::error::{Error, Result};

/// Named byte strings.
#[derive(Debug, Default)]
pub struct MemoryStore {
    objects: RwLock<BTreeMap<String, Arc<[u8]>>>,
}

impl MemoryStore {
    /// Stores `bytes` under `key`, replacing what was there.
    pub fn put(&self, key: &str, bytes: impl Into<Arc<[u8]>>) {
        self.objects.write().expect("memory store lock").insert(key.to_owned(), bytes.into());
    }

    /// Removes `key`.
    pub fn remove(&self, key: &str) {
        self.objects.write().expect("memory store lock").remove(key);
    }
}

impl Store for MemoryStore {
    fn list(&self, prefix: &str) -> Result<Vec<Entry>> {
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let objects = self.objects.read().expect("memory store lock");
        let inside = objects
            .iter()
            .filter_map(|(key, bytes)| Some(Entry { key: key.strip_prefix(&prefix)?.to_owned(), size: Some(bytes.len() as u64) }));
        Ok(inside.collect())
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.objects.read().expect("memory store lock").get(key).map(|b| b.to_vec()))
    }

    fn read_ranges(self: Arc<Self>, key: Arc<str>, mut reads: Vec<RangeRead>) -> ReadFuture {
        Box::pin(async move {
            let object = self.objects.read().expect("memory store lock").get(&*key).cloned();
            let object = object.ok_or_else(|| Error::NotFound { at: self.display(&key), hint: String::new() })?;
            for read in &mut reads {
                let bytes = usize::try_from(read.range.start)
                    .ok()
                    .zip(usize::try_from(read.range.end).ok())
                    .and_then(|(a, b)| object.get(a..b))
                    .ok_or_else(|| {
                        let e = std::io::Error::other(format!("the object has only {} bytes", object.len()));
                        Error::io(self.display(&key), Some(&read.range), e)
                    })?;
                read.buffer.as_mut_slice().copy_from_slice(bytes);
            }
            Ok(reads)
        })
    }

    fn display(&self, key: &str) -> String {
        format!("memory:{key}")
    }
}
