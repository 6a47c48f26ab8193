//! Stores past the caches: nobody reads a batch before it is complete, so its memory is not fetched first.

use std::mem::MaybeUninit;

/// Bytes of a [`LineBuffer`]: it stays in the nearest cache.
const LINE_BYTES: usize = 2048;
/// Bytes that go past the caches at a time: a line of theirs. One that is stored past them in part costs memory a read, and
/// the ends of rows are stored through them: 32 bytes at a time took twice as long on rows of 7 KiB.
pub(super) const STREAM_BYTES: usize = 64;
/// Runs of fewer delivered bytes are left in the caches.
pub const STREAMED_BYTES: usize = 2 * STREAM_BYTES;

#[repr(align(64))]
#[expect(dead_code, reason = "written and read through a pointer")]
struct LineBuffer(MaybeUninit<[u8; LINE_BYTES]>);

/// Lets `write(to, from, len)` write elements `from..from + len` of a run of `n` to `to`, part by part until all are at
/// `dst`. Where `STREAM`, long runs are written to a line in the nearest cache and stored past the caches from there:
/// nobody reads a batch before it is complete, and fetching its memory first would only cost bandwidth.
///
/// # Safety
/// `dst` is writable for `n` elements and aligned to them, `write` writes all elements it is asked for and no others,
/// and with `STREAM` the CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn in_lines<D, const STREAM: bool>(dst: *mut D, n: usize, mut write: impl FnMut(*mut D, usize, usize)) {
    let size = size_of::<D>();
    if !STREAM || n * size < STREAMED_BYTES {
        return write(dst, 0, n);
    }
    // up to the first whole store; elements are aligned, so that is a whole number of them
    let mut done = (dst.addr().next_multiple_of(STREAM_BYTES) - dst.addr()) / size;
    write(dst, 0, done);
    let mut line = LineBuffer(MaybeUninit::uninit());
    let out = (&raw mut line).cast::<D>();
    let whole = STREAM_BYTES / size;
    while n - done >= whole {
        let len = (n - done).min(LINE_BYTES / size) / whole * whole;
        write(out, done, len);
        // SAFETY: `len` elements were just written to the line, and `dst` has room for them and is aligned here.
        unsafe { stream(out.cast(), dst.add(done).cast(), len * size) };
        done += len;
    }
    // SAFETY: `done <= n`.
    write(unsafe { dst.add(done) }, done, n - done);
}

/// # Safety
/// `src` is readable and `dst` writable for `bytes`, of which [`STREAM_BYTES`] is a part as it is of `dst`'s address; the CPU
/// has AVX.
#[inline(always)]
pub(super) unsafe fn stream(src: *const u8, dst: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..bytes).step_by(STREAM_BYTES) {
        use std::arch::x86_64::{_mm256_loadu_si256, _mm256_stream_si256};
        // SAFETY: the caller's promise.
        unsafe {
            let halves = [_mm256_loadu_si256(src.add(at).cast()), _mm256_loadu_si256(src.add(at + 32).cast())];
            _mm256_stream_si256(dst.add(at).cast(), halves[0]);
            _mm256_stream_si256(dst.add(at + 32).cast(), halves[1]);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, bytes);
    }
}

/// Says that `bytes` at `dst` are copied to soon: lines that they fill only in part are fetched meanwhile.
#[inline(always)]
pub fn announce(dst: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for end in [dst, dst.wrapping_add(bytes)] {
        if bytes < STREAMED_BYTES || !end.addr().is_multiple_of(STREAM_BYTES) {
            // To be read, not written: every CPU has that, and hardly ever has another thread the line.
            // SAFETY: a hint, which touches no memory.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(end.cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (dst, bytes);
}

/// Makes what this thread has stored past the caches visible to threads that see what it writes next.
pub fn publish() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence of SSE, which every x86-64 has.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
