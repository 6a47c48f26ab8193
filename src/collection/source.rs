//! Where one element of one dataset lies: chunks of a store, or memory lent by the caller.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::layout::{ChunkedArray, RowPointers};
use crate::schema::DType;

/// A contiguous tensor lent by the caller, who keeps it alive and unchanged until every stream over the
/// collection is closed.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// Address of the first element.
    pub address: usize,
    /// Element type.
    pub dtype: DType,
    /// Elements per dimension, row-major.
    pub shape: Vec<u64>,
}

impl Buffer {
    /// Number of elements.
    pub fn len(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of the elements.
    ///
    /// # Safety
    /// The lender's promise above must hold for as long as the slice lives.
    pub unsafe fn bytes<'a>(&self) -> &'a [u8] {
        if self.is_empty() {
            return &[];
        }
        // SAFETY: the caller's promise; torch tensors of this size exist, so it fits isize.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.len() as usize * self.dtype.size()) }
    }
}

/// An array that lies in memory, read in place.
#[derive(Debug, Clone)]
pub struct MemoryArray {
    /// The lent elements.
    pub buffer: Buffer,
}

/// An array of elements, wherever it is.
#[derive(Debug, Clone)]
pub enum ArraySource {
    /// In a store.
    Chunked(Arc<ChunkedArray>),
    /// In memory.
    Memory(MemoryArray),
}

impl ArraySource {
    /// Stored type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Chunked(array) => array.dtype,
            Self::Memory(array) => array.buffer.dtype,
        }
    }

    /// Elements per dimension.
    pub fn shape(&self) -> &[u64] {
        match self {
            Self::Chunked(array) => &array.shape,
            Self::Memory(array) => &array.buffer.shape,
        }
    }

    /// First and last chunk along the first axis that hold `[start, stop)`, or null in memory.
    fn chunk_span(&self, start: u64, stop: u64) -> Value {
        match self {
            Self::Chunked(array) if start < stop => {
                let len = array.chunk_shape[0];
                json!([start / len, (stop - 1) / len])
            }
            Self::Chunked(_) => json!([]),
            Self::Memory(_) => Value::Null,
        }
    }
}

/// A CSR matrix: row pointers in memory, indices and values anywhere.
#[derive(Debug)]
pub struct CsrSource {
    /// Entries of each row.
    pub rows: RowPointers,
    /// Column of each entry.
    pub indices: ArraySource,
    /// Value of each entry.
    pub data: ArraySource,
}

/// One element of one dataset.
#[derive(Debug)]
pub enum Source {
    /// Sparse rows.
    Csr(CsrSource),
    /// Dense rows: the first axis is the observations.
    Dense(ArraySource),
}

impl Source {
    /// Stored type of the values.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Csr(csr) => csr.data.dtype(),
            Self::Dense(array) => array.dtype(),
        }
    }

    /// Number of rows.
    pub fn n_obs(&self) -> u64 {
        match self {
            Self::Csr(csr) => csr.rows.n_obs(),
            Self::Dense(array) => array.shape()[0],
        }
    }

    /// Entries of a row; a dense one has all of its columns.
    pub fn entries_of(&self, row: u64) -> u64 {
        match self {
            Self::Csr(csr) => csr.rows.len_of(row),
            Self::Dense(array) => array.shape()[1..].iter().product(),
        }
    }

    /// Entries of all rows.
    pub(super) fn nnz(&self) -> u64 {
        match self {
            Self::Csr(csr) => csr.rows.start(csr.rows.n_obs()),
            Self::Dense(array) => array.shape().iter().product(),
        }
    }

    /// Chunks that hold a row, per array.
    pub(super) fn chunks_of_row(&self, row: u64) -> Value {
        match self {
            Self::Csr(csr) => {
                let (start, stop) = csr.rows.range(row);
                json!({"data": csr.data.chunk_span(start, stop), "indices": csr.indices.chunk_span(start, stop)})
            }
            Self::Dense(array) => json!({"data": array.chunk_span(row, row + 1)}),
        }
    }
}
