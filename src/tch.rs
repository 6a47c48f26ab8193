//! Batches as [`tch::Tensor`]s, for Rust programs that train with libtorch.
//!
//! `tch` ties a binary to one libtorch, so the op library never contains it. Its tensors cannot own memory
//! of ours (no deleter), so each batch is copied once.

use ::tch::{Kind, Tensor};

use crate::batch::HostBatch;
use crate::dtype::DType;
use crate::error::{Error, Result};

impl HostBatch {
    /// `rows` (int64 `[n]`), then each element's tensors: CSR as indptr `[n + 1]`, indices `[nnz]`, data
    /// `[nnz]`; dense as `[n, …]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for uint16, uint32 and uint64 (open the element with dtype `torch`).
    pub fn into_tch(self) -> Result<Vec<Tensor>> {
        self.into_tensors()
            .into_iter()
            .map(|mut t| {
                let kind = kind_of(t.dtype)?;
                let shape: Vec<i64> = t.shape.iter().map(|&d| d as i64).collect();
                Tensor::f_from_data_size(t.lease.as_mut_slice(), &shape, kind)
                    .map_err(|e| Error::Internal { message: e.to_string() })
            })
            .collect()
    }
}

fn kind_of(dtype: DType) -> Result<Kind> {
    Ok(match dtype {
        DType::Bool => Kind::Bool,
        DType::Int8 => Kind::Int8,
        DType::Int16 => Kind::Int16,
        DType::Int32 => Kind::Int,
        DType::Int64 => Kind::Int64,
        DType::UInt8 => Kind::Uint8,
        DType::Float16 => Kind::Half,
        DType::Float32 => Kind::Float,
        DType::Float64 => Kind::Double,
        DType::UInt16 | DType::UInt32 | DType::UInt64 => {
            return Err(Error::unsupported("batch", format!("tch has no {dtype}; open the element with dtype \"torch\"")));
        }
    })
}
