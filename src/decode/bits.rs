//! Bytes put together from bits that were stored apart.
//!
//! A bit-shuffled plane of `n` bytes, `n` being a multiple of 8, holds the lowest bits of all its bytes, then their second bits,
//! and so on: eight rows of `n / 8` bytes. Source: the behaviour of `blosc_internal_bitunshuffle` in C-Blosc's `shuffle.c`.

/// Bytes of each row that are taken at once: a vector of AVX2.
#[cfg(target_arch = "x86_64")]
const LANES: usize = 32;

/// Puts the first bytes of a plane together, as many as `out` has, which is a multiple of 8.
pub(super) fn unshuffle(plane: &[u8], out: &mut [u8]) {
    let row = plane.len() / 8;
    assert!(out.len().is_multiple_of(8) && out.len() <= row * 8, "{} bytes of a plane of {}", out.len(), plane.len());
    let rows: [&[u8]; 8] = std::array::from_fn(|bit| &plane[bit * row..][..out.len() / 8]);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2; the rows are an eighth of `out` each.
        unsafe { unshuffle_avx2(rows, out) };
        return;
    }
    unshuffle_one_by_one(rows, out, 0);
}

/// Bytes from number `first * 8` on.
fn unshuffle_one_by_one(rows: [&[u8]; 8], out: &mut [u8], first: usize) {
    for (k, bytes) in out.chunks_exact_mut(8).enumerate().skip(first) {
        let bits = u64::from_le_bytes(std::array::from_fn(|bit| rows[bit][k]));
        bytes.copy_from_slice(&transposed(bits).to_le_bytes());
    }
}

/// Bit `j` of byte `i` as bit `i` of byte `j`: blocks of four, two and one change places with those across the diagonal.
fn transposed(mut bits: u64) -> u64 {
    for (shift, mask) in [(28, 0x0000_0000_f0f0_f0f0), (14, 0x0000_cccc_0000_cccc), (7, 0x00aa_00aa_00aa_00aa)] {
        let differ = (bits ^ (bits >> shift)) & mask;
        bits ^= differ ^ (differ << shift);
    }
    bits
}

/// # Safety
/// The CPU has AVX2, and each row holds an eighth of the bytes of `out`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn unshuffle_avx2(rows: [&[u8]; 8], out: &mut [u8]) {
    use std::arch::x86_64::{
        _mm256_and_si256, _mm256_loadu_si256, _mm256_permute2x128_si256, _mm256_set1_epi8, _mm256_slli_epi64, _mm256_srli_epi64,
        _mm256_storeu_si256, _mm256_unpackhi_epi8, _mm256_unpackhi_epi16, _mm256_unpackhi_epi32, _mm256_unpacklo_epi8,
        _mm256_unpacklo_epi16, _mm256_unpacklo_epi32, _mm256_xor_si256,
    };
    let whole = rows[0].len() / LANES;
    for block in 0..whole {
        // SAFETY: the block lies within the row.
        let mut v: [_; 8] = std::array::from_fn(|bit| unsafe { _mm256_loadu_si256(rows[bit].as_ptr().add(block * LANES).cast()) });
        // the transposition above, of a matrix in each byte of the vectors
        macro_rules! exchange {
            ($shift:literal, $mask:literal, $($low:literal $high:literal),+) => { $(
                let shifted = _mm256_srli_epi64::<$shift>(v[$low]);
                let differ = _mm256_and_si256(_mm256_xor_si256(shifted, v[$high]), _mm256_set1_epi8($mask));
                v[$high] = _mm256_xor_si256(v[$high], differ);
                v[$low] = _mm256_xor_si256(v[$low], _mm256_slli_epi64::<$shift>(differ));
            )+ };
        }
        exchange!(4, 0x0f, 0 4, 1 5, 2 6, 3 7);
        exchange!(2, 0x33, 0 2, 1 3, 4 6, 5 7);
        exchange!(1, 0x55, 0 1, 2 3, 4 5, 6 7);
        // Vector `j` now holds bytes `j`, `8 + j`, …: in twos, fours and eights they come together. Unpacking leaves the halves of
        // vectors apart.
        let twos: [_; 4] =
            std::array::from_fn(|i| [_mm256_unpacklo_epi8(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_epi8(v[2 * i], v[2 * i + 1])]);
        let fours: [_; 2] = std::array::from_fn(|i| {
            let [a, b] = [twos[2 * i], twos[2 * i + 1]];
            [
                _mm256_unpacklo_epi16(a[0], b[0]),
                _mm256_unpackhi_epi16(a[0], b[0]),
                _mm256_unpacklo_epi16(a[1], b[1]),
                _mm256_unpackhi_epi16(a[1], b[1]),
            ]
        });
        for (i, (&a, &b)) in fours[0].iter().zip(&fours[1]).enumerate() {
            let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            // SAFETY: 32 bytes each of the 256 that the block's rows are.
            unsafe {
                let to = out.as_mut_ptr().add(block * LANES * 8 + i * 32);
                _mm256_storeu_si256(to.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
                _mm256_storeu_si256(to.add(LANES * 4).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
            }
        }
    }
    unshuffle_one_by_one(rows, out, whole * LANES);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_come_from_their_bits(bytes in prop::collection::vec(any::<[u8; 8]>(), 0..200), fewer in 0usize..200) {
            let bytes = bytes.concat();
            let row = bytes.len() / 8;
            let mut plane = vec![0u8; bytes.len()];
            for (i, byte) in bytes.iter().enumerate() {
                (0..8).for_each(|bit| plane[bit * row + i / 8] |= (byte >> bit & 1) << (i % 8));
            }
            let wanted = (row - fewer.min(row)) * 8;
            let (mut out, mut slow) = (vec![7; wanted], vec![7; wanted]);
            unshuffle(&plane, &mut out);
            prop_assert_eq!(&out, &bytes[..wanted]);
            unshuffle_one_by_one(std::array::from_fn(|bit| &plane[bit * row..][..row]), &mut slow, 0);
            prop_assert_eq!(slow, out);
        }
    }
}
