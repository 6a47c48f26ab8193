//! One LZ4 block, decoded as far as it is wanted.
//!
//! Counts and sorted column indices, split into byte planes by Blosc's shuffle, become LZ4 blocks of very many short
//! sequences: no literals, a match of 4 to 16 bytes, any distance. A decoder that branches on distance and length
//! mispredicts once per sequence. This one does the same work for nearly all: sixteen match bytes are gathered by a byte
//! shuffle that repeats the last `offset` bytes where the match overlaps itself, and literals, where there are any, are
//! sixteen bytes too, or, where they are many, 32 at a time. What was written too much is overwritten by what follows.
//!
//! Format: "LZ4 Block Format Description" (lz4 project, `doc/lz4_Block_format.md`).

use std::ops::Range;

/// Bytes that a destination must have behind its end: copies go up to 32 bytes at a time.
pub(super) const SLACK: usize = 64;

/// Input bytes before the end from where sequences are decoded with every access checked.
const TAIL: usize = 40;
const _: () = assert!(SLACK >= 2 * LANES && TAIL >= 2 * LANES, "long literals overshoot by less than this");

/// Match lengths are stored less this.
const MIN_MATCH: usize = 4;

/// "The last 5 bytes are always literals", "the last match must start at least 12 bytes before the end of block"
/// (End of block conditions); so behind the literals before a match come its two bytes, a token and five literals.
const LAST_LITERALS: usize = 5;
const MATCH_MARGIN: usize = 12;
const MIN_REST: usize = 8;

/// Bytes of one copy.
const LANES: usize = 16;

/// Why the block is no valid LZ4.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Damaged {
    /// A match of offset 0, which the format forbids and the reference decoder takes for zeros.
    OffsetZero,
    /// A match that begins before the block.
    Offset,
    /// The input ends within a sequence.
    Truncated,
    /// Sequences that do not end where the block does.
    Length,
}

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::OffsetZero => "an LZ4 match has offset 0",
            Self::Offset => "an LZ4 match begins before its block",
            Self::Truncated => "an LZ4 block is truncated",
            Self::Length => "an LZ4 block does not have the expected length",
        })
    }
}

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
#[cfg_attr(target_arch = "aarch64", expect(dead_code, reason = "every aarch64 has one"))]
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

/// One block to decode: `n` decoded bytes, of which at least the first `wanted` are to be produced.
#[derive(Debug, Clone)]
pub(super) struct StreamJob {
    /// Where the compressed block lies.
    pub(super) src: Range<usize>,
    /// First byte in the destination; `n + SLACK` bytes from there belong to this job.
    pub(super) at: usize,
    /// Decoded bytes of the whole block.
    pub(super) n: usize,
    /// Decoded bytes that are wanted.
    pub(super) wanted: usize,
}

/// Decodes blocks of `encoded` into `dst`, each at least as far as it is wanted; returns the bytes produced. What follows them in a
/// job's part of `dst` is unspecified. A block decoded to its end must have exactly `n` bytes.
///
/// Two blocks are decoded at a time: a match that copies what was written a moment ago waits for it to reach the
/// cache, and meanwhile the other block goes on.
///
/// # Panics
/// Where the parts of `dst` overlap, do not lie in it, or more is wanted than a block has.
pub(super) fn decode(encoded: &[u8], jobs: &[StreamJob], dst: &mut [u8]) -> Result<usize, Damaged> {
    let mut free = 0;
    for job in jobs {
        assert!(job.at >= free && job.wanted <= job.n, "jobs lie one behind the other");
        free = job.at.checked_add(job.n).and_then(|end| end.checked_add(SLACK)).expect("an address");
    }
    assert!(free <= dst.len(), "jobs up to {free} in {} bytes", dst.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("ssse3") {
        // SAFETY: the parts were checked, and the CPU has SSSE3.
        return unsafe { decode_ssse3(encoded, jobs, dst) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the parts were checked; NEON is part of every aarch64.
    return unsafe { decode_lanes::<std::arch::aarch64::uint8x16_t>(encoded, jobs, dst) };
    #[cfg(not(target_arch = "aarch64"))]
    // SAFETY: the parts were checked.
    unsafe {
        decode_lanes::<Plain>(encoded, jobs, dst)
    }
}

/// # Safety
/// As for [`decode_lanes`], and the CPU has SSSE3.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "ssse3")]
unsafe fn decode_ssse3(encoded: &[u8], jobs: &[StreamJob], dst: &mut [u8]) -> Result<usize, Damaged> {
    // SAFETY: the caller's promise.
    unsafe { decode_lanes::<std::arch::x86_64::__m128i>(encoded, jobs, dst) }
}

/// # Safety
/// The jobs' parts of `dst` are disjoint and lie in it, and the CPU has the instructions of `V`.
#[inline(always)]
unsafe fn decode_lanes<V: Lanes>(encoded: &[u8], jobs: &[StreamJob], dst: &mut [u8]) -> Result<usize, Damaged> {
    let base = dst.as_mut_ptr();
    let mut waiting = jobs.iter();
    let mut produced = 0;
    // SAFETY: each stream gets its own part of `dst`, which has `n + SLACK` bytes.
    let mut next = || waiting.next().map(|job| unsafe { Stream::new(&encoded[job.src.clone()], job, base.add(job.at)) });
    let (mut one, mut two) = (next(), next());
    while let (Some(a), Some(b)) = (&mut one, &mut two) {
        while a.is_fast() && b.is_fast() {
            // SAFETY: both are fast, and the CPU has the instructions.
            unsafe {
                a.step::<V>()?;
                b.step::<V>()?;
            }
        }
        let ended = if a.is_fast() { &mut two } else { &mut one };
        if let Some(stream) = ended {
            // SAFETY: the CPU has the instructions.
            produced += unsafe { stream.finish::<V>()? };
        }
        *ended = next();
    }
    for mut stream in one.into_iter().chain(two) {
        // SAFETY: fast where it steps, and the CPU has the instructions.
        unsafe {
            while stream.is_fast() {
                stream.step::<V>()?;
            }
            produced += stream.finish::<V>()?;
        }
    }
    Ok(produced)
}

/// A block being decoded. Between steps `done <= n + 30`, and all bytes before `done` are decoded.
struct Stream<'a> {
    src: &'a [u8],
    dst: *mut u8,
    n: usize,
    wanted: usize,
    /// Positions in `src` and `dst`.
    at: usize,
    done: usize,
    /// Steps begin before this position in `src`.
    fast_end: usize,
}

impl<'a> Stream<'a> {
    /// # Safety
    /// `dst` is initialised and writable for `n + SLACK` bytes, by nobody else as long as the stream lives.
    unsafe fn new(src: &'a [u8], job: &StreamJob, dst: *mut u8) -> Self {
        let fast_end = src.len().saturating_sub(TAIL);
        Self { src, dst, n: job.n, wanted: job.wanted, at: 0, done: 0, fast_end }
    }

    /// Whether a [`Stream::step`] is possible.
    #[inline(always)]
    fn is_fast(&self) -> bool {
        self.at < self.fast_end && self.done < self.wanted
    }

    /// Decodes one sequence.
    ///
    /// # Safety
    /// The stream [is fast](Stream::is_fast), and the CPU has the instructions of `V`.
    #[inline(always)]
    unsafe fn step<V: Lanes>(&mut self) -> Result<(), Damaged> {
        let Self { src, dst, n, .. } = *self;
        let (mut at, mut done) = (self.at, self.done);
        let input = src.as_ptr();
        // SAFETY: reads. `at` grows by at most 1 + 14 + 2, and the last sixteen bytes are read from the second of these
        // on: all below `fast_end + TAIL = src.len()`. Longer lengths are checked where they are read; long literals end
        // before `fast_end`, and are read in at most 31 bytes too many.
        // Writes. `done < wanted <= n` at first; sixteen bytes are written there, then sixteen at most 14 further on:
        // below n + 13 + 16 + 16 < n + SLACK. Longer copies are checked to end at `n` and overshoot by less than
        // 32. Match sources lie `offset <= done` behind, and sixteen bytes from there end below `done + 16`.
        unsafe {
            let token = usize::from(*input.add(at));
            let literals = token >> 4;
            at += 1;
            if literals > 0 {
                if literals == 15 {
                    let (length, first) = long_length(src, at, 15)?;
                    // the last sequence has no match: leave it to the checked loop
                    if first + length >= self.fast_end {
                        self.fast_end = 0;
                        return Ok(());
                    }
                    if length > n - done {
                        return Err(Damaged::Length);
                    }
                    for i in (0..length).step_by(2 * LANES) {
                        let halves = [V::load(input.add(first + i)), V::load(input.add(first + i + LANES))];
                        halves[0].store(dst.add(done + i));
                        halves[1].store(dst.add(done + i + LANES));
                    }
                    at = first + length;
                    done += length;
                } else {
                    V::load(input.add(at)).store(dst.add(done));
                    at += literals;
                    done += literals;
                }
            }
            let offset = usize::from(input.add(at).cast::<u16>().read_unaligned().to_le());
            at += 2;
            // offset 0 is none
            if offset.wrapping_sub(1) >= done {
                return Err(wrong_offset(offset));
            }
            let length = (token & 15) + MIN_MATCH;
            if length <= LANES {
                V::load(dst.add(done - offset)).repeat(offset.min(LANES)).store(dst.add(done));
                done += length;
            } else {
                let (length, next) = if token & 15 == 15 { long_length(src, at, length)? } else { (length, at) };
                at = next;
                if length + LAST_LITERALS > n.saturating_sub(done) {
                    return Err(Damaged::Length);
                }
                copy_match::<V>(dst, done, offset, length);
                done += length;
            }
        }
        (self.at, self.done) = (at, done);
        Ok(())
    }

    /// Decodes what is wanted beyond the last step, every access checked; returns the bytes decoded in all.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`.
    unsafe fn finish<V: Lanes>(&mut self) -> Result<usize, Damaged> {
        let Self { src, dst, n, wanted, mut at, mut done, .. } = *self;
        // the last short match may have gone too far
        if done > n {
            return Err(Damaged::Length);
        }
        while done < wanted {
            let token = usize::from(*src.get(at).ok_or(Damaged::Truncated)?);
            let (literals, first) = if token >> 4 == 15 { long_length(src, at + 1, 15)? } else { (token >> 4, at + 1) };
            let bytes = src.get(first..).and_then(|rest| rest.get(..literals)).ok_or(Damaged::Truncated)?;
            if literals > n - done {
                return Err(Damaged::Length);
            }
            // SAFETY: `done + literals <= n`.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), dst.add(done), literals) };
            done += literals;
            at = first + literals;
            if at == src.len() {
                break;
            }
            // what is followed by a match is not the end of the block
            if done + MATCH_MARGIN > n || at + MIN_REST > src.len() {
                return Err(Damaged::Length);
            }
            let offset = usize::from(u16::from_le_bytes([src[at], src[at + 1]]));
            at += 2;
            let short = (token & 15) + MIN_MATCH;
            let (length, next) = if token & 15 == 15 { long_length(src, at, short)? } else { (short, at) };
            at = next;
            if offset.wrapping_sub(1) >= done {
                return Err(wrong_offset(offset));
            }
            if done + length + LAST_LITERALS > n {
                return Err(Damaged::Length);
            }
            // SAFETY: `1 <= offset <= done` and `done + length <= n`, behind which there is slack.
            unsafe { copy_match::<V>(dst, done, offset, length) };
            done += length;
        }
        if done < wanted || (wanted == n && at != src.len()) {
            return Err(Damaged::Length);
        }
        Ok(done)
    }
}

#[cold]
fn wrong_offset(offset: usize) -> Damaged {
    if offset == 0 { Damaged::OffsetZero } else { Damaged::Offset }
}

/// Whether the block is `n` zeros, said as encoders say it: one, a match that repeats it, and the literals of the end.
pub(super) fn is_all_zero(src: &[u8], n: usize) -> bool {
    let [0x1f, 0, 1, 0, ..] = *src else { return false };
    // a hostile chunk may name one long stream for very many blocks
    if src.len() > n / 255 + 24 {
        return false;
    }
    let Ok((length, at)) = long_length(src, 4, 15 + MIN_MATCH) else { return false };
    match src.get(at..) {
        Some([token, last @ ..]) => {
            usize::from(*token) == last.len() << 4
                && (LAST_LITERALS..15).contains(&last.len())
                && 1 + length + last.len() == n
                && last.iter().all(|byte| *byte == 0)
        }
        _ => false,
    }
}

/// A length that continues in the bytes from `at`, and where it ends.
#[inline(always)]
fn long_length(src: &[u8], mut at: usize, mut length: usize) -> Result<(usize, usize), Damaged> {
    loop {
        let more = *src.get(at).ok_or(Damaged::Truncated)?;
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
