//! Values in the smallest type that holds every one of them exactly, for the way over a bus.
//!
//! Counts are stored and delivered as floats or wide integers and fit a byte or two. Whether they do is seen batch by
//! batch, from every value: one that does not lets the batch cross as it is.

use std::sync::Arc;

use crate::arena::Pool;
use crate::batch::Tensor;
use crate::dtype::DType;
use crate::error::Result;

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

/// Values that are looked at before it is decided whether to go on.
const BLOCK: usize = 4096;

/// A value and whether it is the same in the smaller type `D`, to the last bit.
trait Narrow<D>: Copy {
    fn narrow(self) -> (D, bool);
}

macro_rules! narrows {
    ($($s:ty => $($d:ty),+: |$value:ident| $low_bits:expr;)+) => { $($(impl Narrow<$d> for $s {
        #[inline(always)]
        fn narrow(self) -> ($d, bool) {
            let $value = self;
            let small = $low_bits as $d;
            // bits: of the zeros the negative one would lose its sign
            (small, <$s>::from(small).to_ne_bytes() == self.to_ne_bytes())
        }
    })+)+ };
}
narrows! {
    // Added to the number from which on floats are whole, a small whole one stands in the lowest bits; what becomes of others
    // does not matter. A cast would do, at three times the time: it has to saturate.
    f32 => u8, u16: |value| (value + 8_388_608.0).to_bits();
    f64 => u8, u16: |value| (value + 4_503_599_627_370_496.0).to_bits();
    i32 => u8, u16: |value| value;
    i64 => u8, u16: |value| value;
}

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
        let try_one = match (tensor.dtype, to) {
            (DType::Float32, DType::UInt8) => copy::<f32, u8>,
            (DType::Float32, _) => copy::<f32, u16>,
            (DType::Float64, DType::UInt8) => copy::<f64, u8>,
            (DType::Float64, _) => copy::<f64, u16>,
            (DType::Int32, DType::UInt8) => copy::<i32, u8>,
            (DType::Int32, _) => copy::<i32, u16>,
            (DType::Int64, DType::UInt8) => copy::<i64, u8>,
            (DType::Int64, _) => copy::<i64, u16>,
            _ => return Ok(None),
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
        if try_one(bytes, small.lease.as_mut_slice()) {
            small.delivered = tensor.delivered;
            return Ok(Some(small));
        }
    }
    Ok(None)
}

/// Copies all values, or stops at a block with one that does not fit.
fn copy<S: Narrow<D>, D: Copy>(from: &[u8], to: &mut [u8]) -> bool {
    // SAFETY: numbers have no invalid bits, and leases are aligned to any of them.
    let ((before, from, _), (ahead, to, _)) = unsafe { (from.align_to::<S>(), to.align_to_mut::<D>()) };
    debug_assert!(before.is_empty() && ahead.is_empty() && from.len() == to.len(), "both are aligned and as long");
    from.chunks(BLOCK).zip(to.chunks_mut(BLOCK)).all(|(from, to)| copy_block(from, to))
}

fn copy_block<S: Narrow<D>, D: Copy>(from: &[S], to: &mut [D]) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide<S: Narrow<D>, D: Copy>(from: &[S], to: &mut [D]) -> bool {
            copy_block_body(from, to)
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the instructions that the function is compiled for.
            return unsafe { wide(from, to) };
        }
    }
    copy_block_body(from, to)
}

#[inline(always)]
fn copy_block_body<S: Narrow<D>, D: Copy>(from: &[S], to: &mut [D]) -> bool {
    let mut all = true;
    for (from, to) in from.iter().zip(to) {
        let (small, same) = from.narrow();
        *to = small;
        all &= same;
    }
    all
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
