//! One batch in host memory.

use crate::arena::{Lease, Pool};
use crate::base::error::{Error, Result};
use crate::collection::{Collection, ElementKind};
use crate::finish::narrow::{can_be_narrow, narrowed};
use crate::finish::seal::{OnDevice, Seal};
use crate::plan::{BatchLayout, index_dtype};
use crate::schema::DType;
use std::sync::Arc;

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
    /// Buffers for what is read of a batch of this layout: rows and row pointers written, values and indices not yet.
    /// With `on_device`, indices are uint16 where every column has such a number and nobody has to look at them before
    /// they are there: half of what goes over the bus. Values have the type that those before them fitted.
    pub fn allocate(collection: &Collection, layout: &BatchLayout, pool: &Arc<Pool>, on_device: Option<&OnDevice>) -> Result<Self> {
        let rows = Tensor::filled(pool, DType::Int64, layout.rows.iter().copied())?;
        let elements = collection
            .elements()
            .iter()
            .zip(&layout.elements)
            .enumerate()
            .map(|(number, (element, sizes))| match &element.kind {
                ElementKind::Csr { .. } => {
                    let nnz = sizes.indptr[layout.rows.len()];
                    let index = index_dtype(sizes);
                    let narrow = on_device.is_some_and(|device| device.narrows_columns(number, element));
                    let mut indices = Tensor::new(pool, if narrow { DType::UInt16 } else { index }, vec![nnz])?;
                    indices.delivered = index;
                    let narrow = on_device.and_then(|device| device.narrow_type(number, element));
                    let mut data = Tensor::new(pool, narrow.unwrap_or(element.dtype), vec![nnz])?;
                    data.delivered = element.dtype;
                    let indptr = Tensor::filled(pool, index, sizes.indptr.iter().copied())?;
                    Ok(BatchElement::Csr { indptr, indices, data })
                }
                ElementKind::Dense { tail } => {
                    let mut shape = vec![layout.rows.len() as u64];
                    shape.extend(tail);
                    Ok(BatchElement::Dense(Tensor::new(pool, element.dtype, shape)?))
                }
            })
            .collect::<Result<_>>()?;
        Ok(Self { rows, elements })
    }

    /// Values in as few bytes as hold them, where the batch goes to a device that widens them again.
    ///
    /// # Safety
    /// All of the batch has been written, and nobody writes to it.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) unsafe fn narrow_values(&mut self, collection: &Collection, pool: &Arc<Pool>, device: &OnDevice) -> Result<()> {
        for (number, (element, known)) in self.elements.iter_mut().zip(collection.elements()).enumerate() {
            if !device.looks_at_values(number, known) {
                continue;
            }
            let values = element.values_mut();
            // SAFETY: the caller's promise.
            if let Some(narrow) = unsafe { narrowed(values, pool)? } {
                *values = narrow;
            }
            device.habit(number).learn(values);
        }
        Ok(())
    }

    /// Whether [`narrow_values`](Self::narrow_values) has something to look at.
    pub(crate) fn may_be_narrowed(&self) -> bool {
        self.elements.iter().map(BatchElement::values).any(|values| can_be_narrow(values.dtype))
    }

    /// A batch of no rows, as delivered: the end of an epoch.
    pub fn empty(collection: &Collection, pool: &Arc<Pool>) -> Result<Self> {
        let layout = crate::plan::measure(collection, Vec::new(), None)?;
        let read = Self::allocate(collection, &layout, pool, None)?;
        Ok(Seal::new(collection, read, Vec::new(), pool, None)?.finish(collection))
    }

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
