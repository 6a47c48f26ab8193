//! Batches as [`tch::Tensor`]s, for Rust programs that train with libtorch.
//!
//! `tch` ties a binary to one libtorch, so the op library never contains it. Its tensors cannot own memory
//! of ours (no deleter), so each batch is copied once.

use ::tch::{Kind, Tensor};

use crate::base::error::{Error, Result};
use crate::batch::HostBatch;
use crate::schema::DType;

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
        DType::BFloat16 => Kind::BFloat16,
        DType::UInt16 | DType::UInt32 | DType::UInt64 => {
            return Err(Error::unsupported("batch", format!("tch has no {dtype}; open the element with dtype \"torch\"")));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collection::Buffer;
    use crate::{Collection, Next, OpenConfig, Pipeline, Runtime};

    fn lend<T>(values: &[T], dtype: DType) -> Buffer {
        Buffer { address: values.as_ptr().addr(), dtype, shape: vec![values.len() as u64] }
    }

    #[test]
    fn batches_become_tensors_of_their_types_and_shapes() {
        let (indptr, indices, data) = ([0i32, 2, 2, 3], [1u16, 4, 0], [1.5f32, 2.5, 3.5]);
        let buffers = [lend(&indptr, DType::Int32), lend(&indices, DType::UInt16), lend(&data, DType::Float32)];
        let config = OpenConfig::parse(
            r#"{"elements":[{"name":"X"}],
                "datasets":[{"sources":{"X":{"csr":{"indptr":0,"indices":1,"data":2,"shape":[3,5]}}}}],
                "sampling":{"kind":"sequential","chunk_size":3,"preload_nchunks":1,"batch_size":3}}"#,
        )
        .unwrap();
        let collection = Collection::open(&config, &buffers, Runtime::start(1, 1).unwrap().into()).unwrap();
        let pipeline = Pipeline::new(collection, config.stream()).unwrap();
        pipeline.start(0, 0).unwrap();
        let Next::Batch(batch) = pipeline.next(None).unwrap() else { panic!("a batch") };
        let tensors = batch.into_tch().unwrap();
        let kinds: Vec<Kind> = tensors.iter().map(Tensor::kind).collect();
        assert_eq!(kinds, [Kind::Int64, Kind::Int, Kind::Int, Kind::Float]);
        assert_eq!(Vec::<i64>::try_from(&tensors[0]).unwrap(), [0, 1, 2]);
        assert_eq!(Vec::<i32>::try_from(&tensors[1]).unwrap(), [0, 2, 2, 3]);
        assert_eq!(Vec::<i32>::try_from(&tensors[2]).unwrap(), [1, 4, 0]);
        assert_eq!(Vec::<f32>::try_from(&tensors[3]).unwrap(), data);
        pipeline.close();
    }
}
