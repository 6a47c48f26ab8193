//! What every decoder checks: how much an encoded chunk may claim to hold, and that it holds what was expected.

use crate::base::error::{Error, Result};

/// Most bytes that one stored byte can stand for: zstd of one repeated value reaches 32,000; deflate cannot
/// exceed 1,032 (RFC 1951: 258 bytes for a pair of one-bit codes).
pub(super) const MAX_INFLATION: usize = 1 << 18;
pub(super) const MAX_DEFLATE_INFLATION: usize = 1032;
/// Decoded bytes that need no evidence.
const FREE_BYTES: usize = 1 << 20;

/// Decoded bytes that so many encoded ones are believed to hold.
pub(super) fn most_inflated(encoded: usize, factor: usize) -> usize {
    encoded.saturating_mul(factor).saturating_add(FREE_BYTES)
}

pub(super) fn expect_inflation(encoded: usize, n: usize, factor: usize) -> Result<()> {
    if n <= most_inflated(encoded, factor) {
        return Ok(());
    }
    Err(damaged("chunk", &format_args!("{encoded} bytes cannot hold the {n} that the metadata claims")))
}

pub(super) fn damaged(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::corrupt(what, format!("cannot be decoded: {why}; the data is damaged"))
}

pub(super) fn expect_len(got: usize, expected: usize, what: &str) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(damaged(what, &format_args!("it has {got} bytes, expected {expected}")))
}

/// The first `n` bytes of `buffer`, which grows if need be.
pub(super) fn room(buffer: &mut Vec<u8>, n: usize) -> Result<&mut [u8]> {
    if buffer.len() < n {
        buffer
            .try_reserve(n - buffer.len())
            .map_err(|_| Error::corrupt("chunk", format!("claims {n} decoded bytes, more than this machine's memory holds")))?;
        buffer.resize(n, 0);
    }
    Ok(&mut buffer[..n])
}
