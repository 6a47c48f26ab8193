//! Blosc chunks whole, by C-Blosc: those that [`blosc`](super::blosc) has no decoder for.

use super::limits::damaged;
use crate::base::error::Result;

/// Decoded bytes that a Blosc header claims, once it agrees with the length of the chunk.
pub(super) fn claim(src: &[u8]) -> Result<usize> {
    let mut claimed = 0usize;
    // SAFETY: `src` is valid for `src.len()` bytes, of which only the header is read.
    let valid = unsafe { blosc_src::blosc_cbuffer_validate(src.as_ptr().cast(), src.len(), &raw mut claimed) };
    if valid != 0 {
        return Err(damaged("Blosc chunk", &"its header is damaged or it is truncated"));
    }
    Ok(claimed)
}

/// Decodes a chunk that [`claim`] has found consistent.
pub(super) fn decode(src: &[u8], out: &mut [u8]) -> Result<()> {
    // an empty buffer is valid Blosc, and decompresses to nothing
    if out.is_empty() {
        return Ok(());
    }
    // SAFETY: the header's compressed size equals `src.len()` (`claim`), so C-Blosc, which checks
    // every block offset against that size, stays within `src`; it writes at most `out.len()` bytes.
    let got = unsafe { blosc_src::blosc_decompress_ctx(src.as_ptr().cast(), out.as_mut_ptr().cast(), out.len(), 1) };
    if usize::try_from(got) == Ok(out.len()) {
        return Ok(());
    }
    Err(damaged("Blosc chunk", &format_args!("decompression stopped with {got}, expected {} bytes", out.len())))
}
