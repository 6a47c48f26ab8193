//! One batch in host memory: how large it is, and what it holds. Data only.

use std::sync::Arc;

use crate::arena::{Lease, Pool};
use crate::base::error::{Error, Result};
use crate::schema::DType;

/// Sizes of one element in one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElementLayout {
    /// CSR: row pointers of the batch, `[n + 1]`; dense: empty.
    pub indptr: Vec<u64>,
    /// CSR: whether indptr and indices are int64.
    pub wide: bool,
}

/// Rows and sizes of one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchLayout {
    /// Global rows in delivered order.
    pub rows: Vec<u64>,
    /// One per element.
    pub elements: Vec<ElementLayout>,
    /// Bytes of all buffers of the batch: those that are read and those that are delivered instead, and of very many tasks.
    pub bytes: u64,
    /// Chunks, or parts of uncompressed ones, that the batch touches, at most.
    pub chunks: u64,
}

impl ElementLayout {
    /// Type in which indptr and indices are delivered.
    pub fn index_dtype(&self) -> DType {
        if self.wide { DType::Int64 } else { DType::Int32 }
    }
}

/// A typed, shaped buffer on loan from the pool.
#[derive(Debug)]
pub struct Tensor {
    /// The bytes, row-major.
    pub lease: Lease,
    /// Element type.
    pub dtype: DType,
    /// The type that elements have once they are delivered: `dtype`, unless they are narrow for the way to a device.
    pub delivered: DType,
    /// Elements per dimension.
    pub shape: Vec<u64>,
}

/// One element of a batch.
#[derive(Debug)]
pub enum BatchElement {
    /// Sparse rows.
    Csr {
        /// `[n + 1]`, int32 or int64.
        indptr: Tensor,
        /// `[nnz]`, same type as `indptr`; on the way to a GPU they may be uint16.
        indices: Tensor,
        /// `[nnz]`
        data: Tensor,
    },
    /// Dense rows, `[n, …]`.
    Dense(Tensor),
}

/// Rows and elements of one batch; every element is over the same rows in the same order.
#[derive(Debug)]
pub struct HostBatch {
    /// Global rows, int64 `[n]`.
    pub rows: Tensor,
    /// In the order of the collection's elements.
    pub elements: Vec<BatchElement>,
}

/// What asking a bounded queue of batches for the next one gives.
#[derive(Debug)]
pub enum Taken<B> {
    /// The next batch.
    Batch(B),
    /// The epoch is over.
    End,
    /// Nothing within the timeout.
    Pending,
    /// The epoch was cancelled by `start` or `close`.
    Cancelled,
}

impl Tensor {
    /// A tensor whose content is whatever its memory last held.
    pub(crate) fn new(pool: &Arc<Pool>, dtype: DType, shape: Vec<u64>) -> Result<Self> {
        let len = shape
            .iter()
            .try_fold(dtype.size() as u64, |acc, &d| acc.checked_mul(d))
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| Error::Internal { message: format!("a buffer of shape {shape:?} overflows") })?;
        Ok(Self { lease: pool.lease(len)?, dtype, delivered: dtype, shape })
    }

    /// A tensor `[n]` of these, as int32 or int64.
    pub(crate) fn filled(pool: &Arc<Pool>, dtype: DType, values: impl ExactSizeIterator<Item = u64>) -> Result<Self> {
        let mut tensor = Self::new(pool, dtype, vec![values.len() as u64])?;
        let out = tensor.lease.as_mut_slice();
        match dtype {
            DType::Int32 => out.chunks_exact_mut(4).zip(values).for_each(|(o, v)| o.copy_from_slice(&(v as i32).to_ne_bytes())),
            _ => out.chunks_exact_mut(8).zip(values).for_each(|(o, v)| o.copy_from_slice(&(v as i64).to_ne_bytes())),
        }
        Ok(tensor)
    }
}

impl BatchElement {
    /// Values of sparse rows, or dense rows.
    pub fn values(&self) -> &Tensor {
        match self {
            Self::Csr { data, .. } => data,
            Self::Dense(values) => values,
        }
    }

    pub(crate) fn values_mut(&mut self) -> &mut Tensor {
        match self {
            Self::Csr { data, .. } => data,
            Self::Dense(values) => values,
        }
    }
}

impl HostBatch {
    /// Number of rows.
    pub fn n_rows(&self) -> u64 {
        self.rows.shape[0]
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        let of = |e: &BatchElement| match e {
            BatchElement::Csr { indptr, indices, data } => indptr.lease.len() + indices.lease.len() + data.lease.len(),
            BatchElement::Dense(tensor) => tensor.lease.len(),
        };
        (self.rows.lease.len() + self.elements.iter().map(of).sum::<usize>()) as u64
    }

    /// `rows`, then each element's tensors (CSR: indptr, indices, data).
    pub fn into_tensors(self) -> Vec<Tensor> {
        let mut out = vec![self.rows];
        for element in self.elements {
            match element {
                BatchElement::Csr { indptr, indices, data } => out.extend([indptr, indices, data]),
                BatchElement::Dense(tensor) => out.push(tensor),
            }
        }
        out
    }
}
