//! Bytes of ranges of named objects.
//!
//! Decides how bytes leave a storage system; knows nothing of arrays. A [`Store`] lists its objects once,
//! at open, and reads ranges of them afterwards; it fills buffers that the caller leases, so that the same
//! memory carries every read. Reads are futures: `fetch` keeps as many in flight as its depth allows,
//! however many threads decode.

mod files;
mod local;

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

pub use files::OpenFiles;
pub use local::LocalStore;

use crate::arena::{Lease, Pool};
use crate::base::error::{Error, Result};

/// What [`Store::list`] found under a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path relative to the listed prefix, parts joined by `/`.
    pub key: String,
    /// Bytes, or `None` for what is no object: a directory, a pipe, a device.
    pub size: Option<u64>,
}

/// One contiguous read.
#[derive(Debug)]
pub struct RangeRead {
    /// The bytes of the object that are wanted.
    pub range: Range<u64>,
    /// The bytes that are read for them, as [`Store::span`] says.
    pub span: Range<u64>,
    /// As long as `span`; the store fills at least what is wanted of it.
    pub buffer: Lease,
    /// Set by a store that was to bypass the page cache and could not.
    pub refused_direct: bool,
}

impl RangeRead {
    /// A read of `range` from `store`, into memory from `pool`.
    pub fn new(store: &dyn Store, range: Range<u64>, pool: &Arc<Pool>) -> Result<Self> {
        let span = store.span(&range);
        let len = usize::try_from(span.end - span.start).map_err(|_| Error::Internal { message: "read too large".into() })?;
        Ok(Self { range, span, buffer: pool.lease(len)?, refused_direct: false })
    }

    /// The part of the buffer that is wanted.
    pub fn wanted_mut(&mut self) -> &mut [u8] {
        let (start, end) = (self.range.start - self.span.start, self.range.end - self.span.start);
        &mut self.buffer.as_mut_slice()[start as usize..end as usize]
    }
}

/// What a store broke that gives back fewer reads than it took.
pub(crate) fn lost() -> Error {
    Error::Internal { message: "a store lost a read".into() }
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

    /// What a read of `range` takes in: the same bytes, unless this store reads whole blocks.
    fn span(&self, range: &Range<u64>) -> Range<u64> {
        range.clone()
    }

    /// For a store that is one object (its key is empty): every read from now on is of the object that is there now, or an
    /// error. Answers its bytes; asked again, it is an error if another has taken its place.
    ///
    /// # Errors
    /// [`Unsupported`](crate::Error::Unsupported) for stores that cannot tell.
    fn pin(&self) -> Result<u64> {
        Err(Error::unsupported(
            self.display(""),
            "lies in a store that cannot tell when a file was replaced; copy it to a file system",
        ))
    }

    /// Reads every range of one object and gives them back in the same order. A range past the object's end is an error, never a short buffer.
    fn read_ranges(self: Arc<Self>, key: Arc<str>, reads: Vec<RangeRead>) -> ReadFuture;

    /// `key` as a person would write it in an error message.
    fn display(&self, key: &str) -> String;
}
