//! Bytes of ranges of named objects.
//!
//! Decides how bytes leave a storage system; knows nothing of arrays: what names mean is for those who ask. Everything that
//! is read goes through a [`Store`], which [`at`] makes of a place. A store lists its objects once,
//! at open, and reads ranges of them afterwards; it fills buffers that the caller leases, so that the same
//! memory carries every read. Reads are futures: `fetch` keeps as many in flight as its depth allows,
//! however many threads decode.

mod files;
mod local;
mod memory;
mod place;

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

pub use files::OpenFiles;
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use place::at;

use crate::arena::{Lease, Pool};
use crate::base::error::{Error, Result};
use crate::coalesce::CoalesceOptions;

/// How reads of a store should look. Each number trades one cost for another, which only the store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoShape {
    /// Which ranges are read together.
    pub joined: CoalesceOptions,
    /// Reads begin and end at multiples of this many bytes, at least 1. More is read than was asked for; direct reads need it.
    pub alignment_bytes: u64,
    /// Reads under way at once, unless the user says how many: enough to hide the latency, few enough for a spinning disk. Each
    /// holds memory. It is asked of a kind of store, not of one: see [`Runtime::get`](crate::Runtime::get).
    pub depth: usize,
}

/// Bytes in a KiB.
const KIB: u64 = 1024;

impl IoShape {
    /// Of a local or network file system. Gaps: a cached read of some KiB costs two microseconds, and reading over 64 KiB made
    /// single rows three times as slow. Depth: hides 2 ms of a network file system behind 64 MB/s per read.
    pub const LOCAL: Self =
        Self { joined: CoalesceOptions { max_gap_bytes: 16 * KIB, target_read_bytes: 1024 * KIB }, alignment_bytes: 1, depth: 32 };

    /// Of memory, where what is cut and joined as for files costs nothing.
    pub const MEMORY: Self = Self::LOCAL;

    /// What a read of `range` takes in.
    pub fn span(&self, range: &Range<u64>) -> Range<u64> {
        let block = self.alignment_bytes;
        range.start / block * block..range.end.div_ceil(block).saturating_mul(block)
    }

    /// Bytes that a read of `range` takes in.
    pub fn width(&self, range: &Range<u64>) -> u64 {
        let span = self.span(range);
        span.end - span.start
    }
}

/// What [`Store::list`] found under a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path relative to the listed prefix, parts joined by `/`.
    pub key: String,
    /// Bytes, or `None` for what is no object: a directory, a pipe, a device.
    pub size: Option<u64>,
}

/// What stands at a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// An object of so many bytes.
    Object(u64),
    /// Nothing by itself; objects below it, or a directory for some.
    Prefix,
}

/// An object of which small parts are read one by one, each where the last one said: its metadata.
pub trait OpenObject: Send + Sync + std::fmt::Debug {
    /// Fills `into` with the bytes from `start` on.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io) where they cannot be read, or the object ends before them.
    fn read_at(&self, start: u64, into: &mut [u8]) -> Result<()>;
}

/// One contiguous read.
#[derive(Debug)]
pub struct RangeRead {
    /// The bytes of the object that are wanted.
    pub range: Range<u64>,
    /// The bytes that are read for them, as [`IoShape::span`] says.
    pub span: Range<u64>,
    /// As long as `span`; the store fills at least what is wanted of it.
    pub buffer: Lease,
    /// Set by a store that was to bypass the page cache and could not.
    pub refused_direct: bool,
}

impl RangeRead {
    /// A read of `range` from `store`, into memory from `pool`.
    pub fn new(store: &dyn Store, range: Range<u64>, pool: &Arc<Pool>) -> Result<Self> {
        let span = store.io_shape().span(&range);
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
    /// How its reads should look.
    fn io_shape(&self) -> IoShape;

    /// What stands at `key`; `None` for nothing, or what is neither (a pipe, a device).
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io) where that cannot be told.
    fn look(&self, key: &str) -> Result<Option<Standing>>;

    /// The objects and directories at most `depth` names (1 or more) below `prefix`, in no order: those of which each name is `wanted`.
    ///
    /// # Errors
    /// [`NotFound`](crate::Error::NotFound) when the prefix does not exist, [`Io`](crate::Error::Io) otherwise.
    fn list(&self, prefix: &str, depth: usize, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Entry>>;

    /// All bytes of a small object such as metadata, or `None` where it does not exist.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>>;

    /// The object at `key`, to read small parts of it at once.
    ///
    /// # Errors
    /// [`NotFound`](crate::Error::NotFound) where there is none, [`Io`](crate::Error::Io) otherwise.
    fn open(&self, key: &str) -> Result<Box<dyn OpenObject>>;

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
