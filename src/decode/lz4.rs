//! One LZ4 block, decoded as far as it is wanted.
//!
//! Counts and sorted column indices, split into byte planes by Blosc's shuffle, become LZ4 blocks of very many short
//! sequences: no literals, a match of 4 to 16 bytes, any distance. A decoder that branches on distance and length
//! mispredicts once per sequence. This one does the same work for each: sixteen literal bytes are copied whatever
//! their number, and sixteen match bytes are gathered by a byte shuffle that repeats the last `offset` bytes where the
//! match overlaps itself. What was written too much is overwritten by what follows.
//!
//! Format: "LZ4 Block Format Description" (lz4 project, `doc/lz4_Block_format.md`).

/// Bytes that a destination must have behind its end: copies go sixteen bytes at a time.
pub(super) const SLACK: usize = 64;

/// Input bytes before the end from where sequences are decoded with every access checked.
const TAIL: usize = 40;

/// Match lengths are stored less this.
const MIN_MATCH: usize = 4;

/// Bytes of one copy.
const LANES: usize = 16;

/// The block is no valid LZ4, or does not have the size claimed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Damaged;

/// `REPEAT[o][i]` is `i mod o`: where byte `i` of a match comes from, relative to its source, when the match is `o`
/// bytes behind; from 16 on nothing repeats within sixteen bytes.
static REPEAT: [[u8; LANES]; LANES + 1] = {
    let mut table = [[0u8; LANES]; LANES + 1];
    let mut offset = 1;
    while offset <= LANES {
        let mut i = 0;
        while i < LANES {
            table[offset][i] = (i % offset) as u8;
            i += 1;
        }
        offset += 1;
    }
    table
};

/// Sixteen bytes at once.
trait Lanes: Copy {
    /// # Safety
    /// Sixteen bytes are readable at `p`; the CPU has the instructions.
    unsafe fn load(p: *const u8) -> Self;
    /// # Safety
    /// Sixteen bytes are writable at `p`; the CPU has the instructions.
    unsafe fn store(self, p: *mut u8);
    /// The first `offset` bytes over and over; `offset` is 1 to 16.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn repeat(self, offset: usize) -> Self;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_shuffle_epi8, _mm_storeu_si128};

    use super::{Lanes, REPEAT};

    impl Lanes for __m128i {
        #[inline(always)]
        unsafe fn load(p: *const u8) -> Self {
            // SAFETY: the caller's promise.
            unsafe { _mm_loadu_si128(p.cast()) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut u8) {
            // SAFETY: the caller's promise.
            unsafe { _mm_storeu_si128(p.cast(), self) }
        }
        #[inline(always)]
        unsafe fn repeat(self, offset: usize) -> Self {
            // SAFETY: the table's rows are sixteen bytes; the caller has seen to the instructions (SSSE3).
            unsafe { _mm_shuffle_epi8(self, _mm_loadu_si128(REPEAT[offset].as_ptr().cast())) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::{uint8x16_t, vld1q_u8, vqtbl1q_u8, vst1q_u8};

    use super::{Lanes, REPEAT};

    impl Lanes for uint8x16_t {
        #[inline(always)]
        unsafe fn load(p: *const u8) -> Self {
            // SAFETY: the caller's promise.
            unsafe { vld1q_u8(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut u8) {
            // SAFETY: the caller's promise.
            unsafe { vst1q_u8(p, self) }
        }
        #[inline(always)]
        unsafe fn repeat(self, offset: usize) -> Self {
            // SAFETY: the table's rows are sixteen bytes.
            unsafe { vqtbl1q_u8(self, vld1q_u8(REPEAT[offset].as_ptr())) }
        }
    }
}

/// For CPUs without a byte shuffle.
#[derive(Clone, Copy)]
struct Plain([u8; LANES]);

impl Lanes for Plain {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { p.cast::<[u8; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u8; LANES]>().write_unaligned(self.0) };
    }
    #[inline(always)]
    unsafe fn repeat(self, offset: usize) -> Self {
        if offset == LANES { self } else { Self(REPEAT[offset].map(|i| self.0[usize::from(i)])) }
    }
}

/// Decodes `src`, a block of `n` decoded bytes, into `dst` until at least `wanted` bytes are there; returns how many
/// are. What follows those is unspecified. A block decoded to its end must have exactly `n` bytes.
///
/// `dst` has `n + SLACK` bytes.
pub(super) fn decode(src: &[u8], dst: &mut [u8], n: usize, wanted: usize) -> Result<usize, Damaged> {
    assert!(dst.len() >= n + SLACK && wanted <= n, "a destination of {} bytes for {n}", dst.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("ssse3") {
        // SAFETY: `dst` has room for n + SLACK bytes, and the CPU has SSSE3.
        return unsafe { decode_ssse3(src, dst.as_mut_ptr(), n, wanted) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: `dst` has room for n + SLACK bytes; NEON is part of every aarch64.
    return unsafe { decode_lanes::<std::arch::aarch64::uint8x16_t>(src, dst.as_mut_ptr(), n, wanted) };
    #[cfg(not(target_arch = "aarch64"))]
    // SAFETY: `dst` has room for n + SLACK bytes.
    unsafe {
        decode_lanes::<Plain>(src, dst.as_mut_ptr(), n, wanted)
    }
}

/// # Safety
/// As for [`decode_lanes`], and the CPU has SSSE3.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "ssse3")]
unsafe fn decode_ssse3(src: &[u8], dst: *mut u8, n: usize, wanted: usize) -> Result<usize, Damaged> {
    // SAFETY: the caller's promise.
    unsafe { decode_lanes::<std::arch::x86_64::__m128i>(src, dst, n, wanted) }
}

/// # Safety
/// `dst` is writable for `n + SLACK` bytes, `wanted <= n`, and the CPU has the instructions of `V`.
#[inline(always)]
unsafe fn decode_lanes<V: Lanes>(src: &[u8], dst: *mut u8, n: usize, wanted: usize) -> Result<usize, Damaged> {
    // Positions in `src` and `dst`. Invariants of the loop head: at <= fast_end, and done < wanted <= n.
    let (mut at, mut done) = (0usize, 0usize);
    let fast_end = src.len().saturating_sub(TAIL);
    let input = src.as_ptr();
    // SAFETY: reads. Within an iteration `at` grows by at most 1 + 14 + 2 before the last sixteen-byte read, which
    // begins at `at + 1`: all below `fast_end + TAIL = src.len()`. Longer lengths are checked where they are read.
    // Writes. `done < n` at the head; sixteen bytes are written there, then at most 14 further on, so that the highest
    // byte written is below n + 13 + 16 + 16 < n + SLACK; longer copies are checked to end at `n` and overshoot by less
    // than sixteen. Match sources lie `offset <= done` behind, and reading sixteen bytes from there stays below
    // `done + 16`; these bytes are initialised, because `dst` came from a slice.
    unsafe {
        while at < fast_end && done < wanted {
            let token = usize::from(*input.add(at));
            let literals = token >> 4;
            if literals == 15 {
                let (length, first) = long_length(src, at + 1, 15)?;
                // the last sequence has no match: leave it to the checked loop
                if first + length >= fast_end {
                    break;
                }
                if length > n - done {
                    return Err(Damaged);
                }
                std::ptr::copy_nonoverlapping(input.add(first), dst.add(done), length);
                at = first + length;
                done += length;
            } else {
                V::load(input.add(at + 1)).store(dst.add(done));
                at += 1 + literals;
                done += literals;
            }
            let offset = usize::from(u16::from_le_bytes([*input.add(at), *input.add(at + 1)]));
            at += 2;
            // offset 0 is no offset
            if offset.wrapping_sub(1) >= done {
                return Err(Damaged);
            }
            let length = (token & 15) + MIN_MATCH;
            if length <= LANES {
                V::load(dst.add(done - offset)).repeat(offset.min(LANES)).store(dst.add(done));
                done += length;
            } else {
                let (length, next) = if token & 15 == 15 { long_length(src, at, length)? } else { (length, at) };
                at = next;
                if length > n.saturating_sub(done) {
                    return Err(Damaged);
                }
                copy_match::<V>(dst, done, offset, length);
                done += length;
            }
        }
        // an overshoot of the last short match
        if done > n {
            return Err(Damaged);
        }
        // SAFETY: as above for writes, with every read checked.
        while done < wanted {
            let token = usize::from(*src.get(at).ok_or(Damaged)?);
            let (literals, first) = if token >> 4 == 15 { long_length(src, at + 1, 15)? } else { (token >> 4, at + 1) };
            let bytes = src.get(first..).and_then(|rest| rest.get(..literals)).ok_or(Damaged)?;
            if literals > n - done {
                return Err(Damaged);
            }
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), dst.add(done), literals);
            done += literals;
            at = first + literals;
            if at == src.len() {
                break;
            }
            let pair = src.get(at..at + 2).ok_or(Damaged)?;
            let offset = usize::from(u16::from_le_bytes([pair[0], pair[1]]));
            at += 2;
            let short = (token & 15) + MIN_MATCH;
            let (length, next) = if token & 15 == 15 { long_length(src, at, short)? } else { (short, at) };
            at = next;
            if offset.wrapping_sub(1) >= done || length > n - done {
                return Err(Damaged);
            }
            copy_match::<V>(dst, done, offset, length);
            done += length;
        }
    }
    if done < wanted || (done == n && wanted == n && !ends_here(src, at)) {
        return Err(Damaged);
    }
    Ok(done)
}

/// Whether the block begins with at least `wanted` zeros, said in its first sequence.
pub(super) fn is_all_zero(src: &[u8], wanted: usize) -> bool {
    match *src {
        // one literal, then a long match one byte behind
        [0x1f, 0, 1, 0, ..] => long_length(src, 4, 15 + MIN_MATCH).is_ok_and(|(length, _)| length + 1 >= wanted),
        _ => false,
    }
}

/// Whether nothing but an empty last sequence follows: a block may end with one after its last match.
fn ends_here(src: &[u8], at: usize) -> bool {
    at >= src.len() || (src[at] >> 4 == 0 && at + 1 == src.len())
}

/// A length that continues in the bytes from `at`, and where it ends.
#[inline(always)]
fn long_length(src: &[u8], mut at: usize, mut length: usize) -> Result<(usize, usize), Damaged> {
    loop {
        let more = *src.get(at).ok_or(Damaged)?;
        at += 1;
        length += usize::from(more);
        if more != 255 {
            return Ok((length, at));
        }
    }
}

/// Copies `length` bytes from `offset` behind `done` to `done`, which may overlap.
///
/// # Safety
/// `1 <= offset <= done`, and `dst` is writable for `done + length + LANES` bytes.
#[inline(always)]
unsafe fn copy_match<V: Lanes>(dst: *mut u8, done: usize, offset: usize, length: usize) {
    // SAFETY: each store begins below done + length; sources begin at or after done - offset and end below the store's.
    unsafe {
        let (to, from) = (dst.add(done), dst.add(done - offset));
        let mut i = 0;
        if offset >= LANES {
            while i < length {
                V::load(from.add(i)).store(to.add(i));
                i += LANES;
            }
        } else {
            // a whole number of repetitions at a time
            let (pattern, step) = (V::load(from).repeat(offset), LANES - LANES % offset);
            while i < length {
                pattern.store(to.add(i));
                i += step;
            }
        }
    }
}
