//! Values in the smallest type that holds every one of them exactly, for the way over a bus.
//!
//! Counts are stored and delivered as floats or wide integers and fit a byte or two. Whether they do is seen batch by
//! batch, from every value: one that does not lets the batch cross as it is.

use std::sync::Arc;

use crate::arena::Pool;
use crate::base::error::Result;
use crate::batch::{BatchElement, HostBatch, Tensor};
use crate::decode::scatter::{Stored, copy_whole_values, publish};
use crate::schema::DType;

/// Types that values may become, smallest first; column indices become the last.
pub(crate) const TYPES: [DType; 2] = [DType::UInt8, DType::UInt16];

/// Whether values of this type are looked at.
pub(crate) fn can_be_narrow(dtype: DType) -> bool {
    matches!(dtype, DType::Float32 | DType::Float64 | DType::Int32 | DType::Int64)
}

/// Whether all columns of so many have a number that is a uint16.
pub(crate) fn fits_columns(n_var: u64) -> bool {
    n_var <= 1 << 16
}

/// Whether values of the batch are of a type that is looked at.
pub(crate) fn may_be_narrowed(batch: &HostBatch) -> bool {
    batch.elements.iter().map(BatchElement::values).any(|values| can_be_narrow(values.dtype))
}

/// Values that are looked at before it is decided whether to go on.
const BLOCK: usize = 4096;

/// The tensor's values in a smaller type, in memory of `pool`, to be delivered in the type that they have; `None` where one
/// does not fit. Every byte of the tensor has been written.
///
/// # Safety
/// Nobody writes to the tensor meanwhile.
///
/// # Errors
/// When there is no memory.
pub(crate) unsafe fn narrowed(tensor: &Tensor, pool: &Arc<Pool>) -> Result<Option<Tensor>> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { tensor.lease.as_slice() };
    for to in TYPES {
        let Some(copy) = copy_whole_values(tensor.dtype, to).filter(|_| can_be_narrow(tensor.dtype)) else { return Ok(None) };
        let try_one = |from: &[u8], out: &mut [u8]| {
            let blocks = from.chunks(BLOCK * tensor.dtype.size()).zip(out.chunks_mut(BLOCK * to.size()));
            // SAFETY: a block of each has as many elements, and leases are aligned to any of them, as blocks are then.
            blocks.into_iter().all(|(from, out)| unsafe { copy.run(Stored::Items(from), out.as_mut_ptr(), out.len() / to.size()) })
        };
        // page-locked memory is not taken to find that real numbers are none
        let some = bytes.len().min(BLOCK * tensor.dtype.size());
        let mut tried = [0u64; BLOCK / 4];
        // SAFETY: any bits are bytes.
        let tried = unsafe { tried.align_to_mut::<u8>().1 };
        if !try_one(&bytes[..some], &mut tried[..some / tensor.dtype.size() * to.size()]) {
            continue;
        }
        let mut small = Tensor::new(pool, to, tensor.shape.clone())?;
        let all = try_one(bytes, small.lease.as_mut_slice());
        publish();
        if all {
            small.delivered = tensor.delivered;
            return Ok(Some(small));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    trait Number: Copy + std::fmt::Debug {
        const DTYPE: DType;
        fn bytes(self) -> Vec<u8>;
        fn real(self) -> f64;
    }
    macro_rules! numbers {
        ($($t:ty: $dtype:ident),+) => { $(impl Number for $t {
            const DTYPE: DType = DType::$dtype;
            fn bytes(self) -> Vec<u8> { self.to_ne_bytes().to_vec() }
            #[allow(clippy::cast_lossless)]
            fn real(self) -> f64 { self as f64 }
        })+ };
    }
    numbers! { f32: Float32, f64: Float64, i32: Int32, i64: Int64 }

    /// The slow twin: the smallest of the types that all values are whole numbers of.
    fn check<T: Number>(values: &[T]) {
        let pool = Pool::new(1 << 20);
        let mut tensor = Tensor::new(&pool, T::DTYPE, vec![values.len() as u64]).unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.bytes()).collect();
        tensor.lease.as_mut_slice().copy_from_slice(&bytes);
        let fits = |limit: f64| {
            values.iter().all(|v| {
                let v = v.real();
                v.fract() == 0.0 && v <= limit && v >= 0.0 && !(v == 0.0 && v.is_sign_negative())
            })
        };
        let expected = [(255.0, DType::UInt8), (65_535.0, DType::UInt16)].into_iter().find(|(limit, _)| fits(*limit));
        // SAFETY: nobody else has the tensor.
        let small = unsafe { narrowed(&tensor, &pool) }.unwrap();
        assert_eq!(small.as_ref().map(|t| t.dtype), expected.map(|e| e.1), "{values:?}");
        if let Some(small) = small {
            assert_eq!((small.delivered, &small.shape), (T::DTYPE, &tensor.shape));
            // SAFETY: as above.
            let bytes = unsafe { small.lease.as_slice() };
            let got: Vec<f64> = bytes
                .chunks(small.dtype.size())
                .map(|b| if let [b] = b { f64::from(*b) } else { f64::from(u16::from_ne_bytes([b[0], b[1]])) })
                .collect();
            assert!(got.iter().zip(values).all(|(a, b)| a.total_cmp(&b.real()).is_eq()));
        }
    }

    proptest! {
        #[test]
        fn what_fits_crosses_in_few_bytes(
            limit in prop::sample::select(vec![1u32, 255, 256, 65_535, 65_536]),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..50),
            odd in prop::option::weighted(0.3, prop::sample::select(vec![
                0.5, -1.0, -0.0, 1e9, 254.999, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 65_535.0, 255.0, 256.0, 65_536.0,
            ])),
            long in any::<bool>(),
        ) {
            let mut values: Vec<f64> = picks.iter().map(|p| p.index(limit as usize + 1) as f64).collect();
            if long {
                values.splice(0..0, std::iter::repeat_n(7.0, 3 * BLOCK));
            }
            values.extend(odd);
            check(&values);
            check(&values.iter().map(|&v| v as f32).collect::<Vec<_>>());
            check(&values.iter().map(|&v| v as i32).collect::<Vec<_>>());
            check(&values.iter().map(|&v| v as i64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn other_types_cross_as_they_are() {
        let pool = Pool::new(0);
        for dtype in [DType::Bool, DType::UInt8, DType::Float16, DType::BFloat16, DType::Int8] {
            let mut tensor = Tensor::new(&pool, dtype, vec![3]).unwrap();
            tensor.lease.as_mut_slice().fill(0);
            // SAFETY: nobody else has the tensor.
            assert!(unsafe { narrowed(&tensor, &pool) }.unwrap().is_none());
        }
    }
}
