//! Bytes of ranges of named objects.
//!
//! Decides how bytes leave a storage system; knows nothing of arrays. A [`Store`] lists its objects once,
//! at open, and reads ranges of them afterwards; it fills buffers that the caller leases, so that the same
//! memory carries every read. Reads are futures: `fetch` keeps as many in flight as its depth allows,
//! however many threads decode.

mod local;

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

pub use local::{LocalStore, OpenFiles};

use crate::arena::Lease;
use crate::error::Result;

/// What [`Store::list`] found under a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path relative to the listed prefix, parts joined by `/`.
    pub key: String,
    /// Bytes, or `None` for what is no object: a directory, a pipe, a device.
    pub size: Option<u64>,
}

/// One contiguous read into a buffer of exactly the range's length.
#[derive(Debug)]
pub struct RangeRead {
    /// Bytes of the object.
    pub range: Range<u64>,
    /// Filled from its start.
    pub buffer: Lease,
}

/// A pending [`Store::read_ranges`].
pub type ReadFuture = Pin<Box<dyn Future<Output = Result<Vec<RangeRead>>> + Send>>;

/// A place that holds named objects.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// The objects and directories at most `depth` names below `prefix` that may be chunks, in no order: those whose
    /// names are made of `c`, digits and dots only need be given.
    ///
    /// # Errors
    /// [`NotFound`](crate::Error::NotFound) when the prefix does not exist, [`Io`](crate::Error::Io) otherwise.
    fn list(&self, prefix: &str, depth: usize) -> Result<Vec<Entry>>;

    /// All bytes of a small object such as metadata, or `None` where it does not exist.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>>;

    /// Reads every range of one object. A range past the object's end is an error, never a short buffer.
    fn read_ranges(self: Arc<Self>, key: Arc<str>, reads: Vec<RangeRead>) -> ReadFuture;

    /// `key` as a person would write it in an error message.
    fn display(&self, key: &str) -> String;
}
