//! The elements of a compact dataset, which libhdf5 keeps among its metadata: at most 64 KiB, held in memory.

use std::sync::Arc;

use crate::base::error::{Error, Result};
use crate::store::{Entry, RangeRead, ReadFuture, Store};

/// One object, in memory.
#[derive(Debug)]
pub(super) struct Compact {
    pub(super) bytes: Vec<u8>,
    /// The dataset, as errors name it.
    pub(super) at: String,
}

impl Store for Compact {
    fn list(&self, _: &str, _: usize) -> Result<Vec<Entry>> {
        Ok(Vec::new())
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        Ok(key.is_empty().then(|| self.bytes.clone()))
    }

    fn read_ranges(self: Arc<Self>, _: Arc<str>, mut reads: Vec<RangeRead>) -> ReadFuture {
        Box::pin(async move {
            for read in &mut reads {
                let range = read.range.start as usize..read.range.end as usize;
                let part = self.bytes.get(range).ok_or_else(|| {
                    Error::corrupt(&self.at, format!("bytes {:?} of {} were asked for", read.range, self.bytes.len()))
                })?;
                read.wanted_mut().copy_from_slice(part);
            }
            Ok(reads)
        })
    }

    fn display(&self, _: &str) -> String {
        self.at.clone()
    }
}
