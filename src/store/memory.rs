//! Named objects in memory, which never change.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{Entry, IoShape, OpenObject, RangeRead, ReadFuture, Standing, Store};
use crate::base::error::{Error, Result};

/// Objects in memory, by key. One whose key is empty is all of the store, as a file is.
#[derive(Debug)]
pub struct MemoryStore {
    name: String,
    objects: BTreeMap<String, Arc<[u8]>>,
}

/// One object, and what it is called.
#[derive(Debug)]
struct Held {
    name: String,
    bytes: Arc<[u8]>,
}

impl Held {
    fn range(&self, range: &Range<u64>) -> Result<&[u8]> {
        self.bytes.get(range.start as usize..range.end as usize).ok_or_else(|| {
            let ends = io::Error::other(format!("the object of {} bytes ends before this range", self.bytes.len()));
            Error::io(&self.name, Some(range), ends)
        })
    }
}

impl OpenObject for Held {
    fn read_at(&self, start: u64, into: &mut [u8]) -> Result<()> {
        into.copy_from_slice(self.range(&(start..start.saturating_add(into.len() as u64)))?);
        Ok(())
    }
}

impl MemoryStore {
    /// These objects; errors call the store `name`.
    pub fn new(name: impl Into<String>, objects: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        Self { name: name.into(), objects: objects.into_iter().map(|(key, bytes)| (key, bytes.into())).collect() }
    }

    fn held(&self, key: &str) -> Result<Held> {
        match self.objects.get(key) {
            Some(bytes) => Ok(Held { name: self.display(key), bytes: Arc::clone(bytes) }),
            None => Err(Error::io(self.display(key), None, io::ErrorKind::NotFound.into())),
        }
    }

    /// Keys below `prefix`, without it.
    fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Arc<[u8]>)> {
        self.objects.iter().filter_map(move |(key, bytes)| {
            let rest = key.strip_prefix(prefix)?;
            let rest = if prefix.is_empty() { rest } else { rest.strip_prefix('/')? };
            (!rest.is_empty()).then_some((rest, bytes))
        })
    }
}

impl Store for MemoryStore {
    fn io_shape(&self) -> IoShape {
        IoShape::MEMORY
    }

    fn look(&self, key: &str) -> Result<Option<Standing>> {
        Ok(match self.objects.get(key) {
            Some(bytes) => Some(Standing::Object(bytes.len() as u64)),
            None => (key.is_empty() || self.below(key).next().is_some()).then_some(Standing::Prefix),
        })
    }

    fn list(&self, prefix: &str, depth: usize, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Entry>> {
        if self.look(prefix)? != Some(Standing::Prefix) {
            return Err(Error::io(self.display(prefix), None, io::ErrorKind::NotFound.into()));
        }
        let mut found = Vec::new();
        let mut prefixes = BTreeSet::new();
        for (key, bytes) in self.below(prefix) {
            let names: Vec<&str> = key.split('/').collect();
            let n = names.iter().take(depth).take_while(|name| wanted(name)).count();
            (1..=n.min(names.len() - 1)).for_each(|n| {
                prefixes.insert(names[..n].join("/"));
            });
            if n == names.len() {
                found.push(Entry { key: key.to_owned(), size: Some(bytes.len() as u64) });
            }
        }
        found.extend(prefixes.into_iter().map(|key| Entry { key, size: None }));
        Ok(found)
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.objects.get(key).map(|bytes| bytes.to_vec()))
    }

    fn open(&self, key: &str) -> Result<Box<dyn OpenObject>> {
        Ok(Box::new(self.held(key)?))
    }

    fn pin(&self) -> Result<u64> {
        Ok(self.held("")?.bytes.len() as u64)
    }

    fn read_ranges(self: Arc<Self>, key: Arc<str>, mut reads: Vec<RangeRead>) -> ReadFuture {
        Box::pin(async move {
            let held = self.held(&key)?;
            for read in &mut reads {
                let from = held.range(&read.range)?;
                read.wanted_mut().copy_from_slice(from);
            }
            Ok(reads)
        })
    }

    fn display(&self, key: &str) -> String {
        if key.is_empty() { self.name.clone() } else { format!("{}/{key}", self.name) }
    }
}
