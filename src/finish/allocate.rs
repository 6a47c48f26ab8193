//! Memory for what is read of a batch.

use std::sync::Arc;

use super::on_device::OnDevice;
use crate::arena::Pool;
use crate::base::error::Result;
use crate::batch::{BatchElement, BatchLayout, HostBatch, Tensor};
use crate::collection::Collection;
use crate::schema::{DType, ElementKind};

/// Buffers for what is read of a batch of this layout: rows and row pointers written, values and indices not yet.
/// With `on_device`, indices are uint16 where every column has such a number and nobody has to look at them before
/// they are there: half of what goes over the bus. Values have the type that those before them fitted.
pub(crate) fn allocate(
    collection: &Collection,
    layout: &BatchLayout,
    pool: &Arc<Pool>,
    on_device: Option<&OnDevice>,
) -> Result<HostBatch> {
    let rows = Tensor::filled(pool, DType::Int64, layout.rows.iter().copied())?;
    let elements = collection
        .elements()
        .iter()
        .zip(&layout.elements)
        .enumerate()
        .map(|(number, (element, sizes))| match &element.kind {
            ElementKind::Csr { .. } => {
                let nnz = sizes.indptr[layout.rows.len()];
                let index = sizes.index_dtype();
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
    Ok(HostBatch { rows, elements })
}
