//! zstd frames (RFC 8878): whole ones, and only as far as rows need them.

use std::cell::RefCell;

use ::zstd::zstd_safe::{
    DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, find_frame_compressed_size, get_error_name, get_frame_content_size,
};

use super::limits::{damaged, expect_len};
use crate::base::error::Result;

/// A frame's first bytes.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Of the byte behind them: a checksum of all that was compressed ends the frame.
const HAS_CHECKSUM: u8 = 1 << 2;
/// Frames are made of blocks that hold at most so much.
const BLOCK_BYTES: usize = 128 << 10;
/// 8 MiB: as much as the format asks every decoder to support.
const MAX_WINDOW_LOG: u32 = 23;

/// Decodes frames that hold as many bytes as `out` has room for.
///
/// # Errors
/// [`Corrupt`](crate::Error::Corrupt), for `what`.
pub(super) fn decode(src: &[u8], out: &mut [u8], what: &str) -> Result<()> {
    expect_len(decode_up_to(src, out, what)?, out.len(), what)
}

/// Decodes at most as many bytes as there is room for; answers how many there were.
///
/// # Errors
/// As for [`decode`].
pub(super) fn decode_up_to(src: &[u8], out: &mut [u8], what: &str) -> Result<usize> {
    with_context(|context| context.decompress(out, src).map_err(|code| damaged(what, &get_error_name(code))))
        .unwrap_or_else(|| Err(damaged(what, &"there is no memory to decode it")))
}

/// Decodes at least the first `wanted` of the bytes that fill `out`; answers how many. What is behind them need not be decoded,
/// which saves half of the time where rows are drawn one by one: blocks come one after the other, each from those before.
/// Damage that only the number of all bytes would show goes unnoticed then, as it does in blocks of Blosc.
///
/// # Errors
/// As for [`decode`], of what was looked at.
pub(super) fn decode_first(src: &[u8], out: &mut [u8], wanted: usize, what: &str) -> Result<usize> {
    if pays(src, out.len(), wanted) && with_context(|context| first(context, src, &mut out[..wanted])).flatten().is_some() {
        return Ok(wanted);
    }
    // also what could not be decoded so: this says what is wrong
    decode(src, out, what)?;
    Ok(out.len())
}

/// Whether to decode only the first `wanted` of `n` bytes. Frames that end with a checksum are decoded whole, to verify it, and so
/// is what is not one frame that says that it holds as much.
fn pays(src: &[u8], n: usize, wanted: usize) -> bool {
    // blocks are decoded whole, the next one begun as soon as one is given out, and copied once more than the whole frame is
    let saved = n.saturating_sub((wanted + 1).next_multiple_of(BLOCK_BYTES));
    saved >= n / 4
        && saved > 0
        && src.starts_with(&MAGIC)
        && src.get(4).is_some_and(|descriptor| descriptor & HAS_CHECKSUM == 0)
        && matches!(get_frame_content_size(src), Ok(Some(size)) if size == n as u64)
        // nothing is missing, and nothing follows
        && find_frame_compressed_size(src) == Ok(src.len())
}

/// Fills `out` with the first bytes of a frame that holds more; `None` where that fails.
fn first(context: &mut DCtx, src: &[u8], out: &mut [u8]) -> Option<()> {
    context.reset(ResetDirective::SessionOnly).ok()?;
    let mut input = InBuffer::around(src);
    let mut output = OutBuffer::around(out);
    while output.pos() < output.capacity() {
        let before = (input.pos(), output.pos());
        // 0: the frame has ended before its time
        let ended = context.decompress_stream(&mut output, &mut input).ok()? == 0;
        if ended || before == (input.pos(), output.pos()) {
            return None;
        }
    }
    Some(())
}

/// `None` without memory.
fn with_context<T>(decode: impl FnOnce(&mut DCtx) -> T) -> Option<T> {
    thread_local! {
        static CONTEXT: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|slot| {
        if slot.is_none() {
            let mut context = DCtx::try_create()?;
            // what a frame says that it looks back is memory that is taken; those that look further are decoded whole, into
            // their own bytes
            context.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).ok()?;
            *slot = Some(context);
        }
        slot.as_mut().map(decode)
    })
}

#[cfg(test)]
mod tests {
    use ::zstd::bulk::Compressor;
    use ::zstd::zstd_safe::CParameter;
    use proptest::prelude::*;

    use super::*;

    /// Numbers that compress somewhat.
    fn raw(n: usize, seed: u32) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 28) as u8
        };
        (0..n).map(|_| next()).collect()
    }

    fn encoded(raw: &[u8], level: i32, checksum: bool, says_size: bool) -> Vec<u8> {
        let mut compressor = Compressor::new(level).unwrap();
        compressor.set_parameter(CParameter::ChecksumFlag(checksum)).unwrap();
        compressor.set_parameter(CParameter::ContentSizeFlag(says_size)).unwrap();
        compressor.compress(raw).unwrap()
    }

    proptest! {
        #![proptest_config(crate::base::fuzz::cases(64))]

        #[test]
        fn what_comes_first_is_what_the_whole_begins_with(
            n in 1usize..900_000,
            wanted in any::<prop::sample::Index>(),
            (level, checksum, says_size) in (prop::sample::select(vec![-5, 0, 1, 9]), any::<bool>(), any::<bool>()),
            seed: u32,
        ) {
            let (raw, wanted) = (raw(n, seed), wanted.index(n) + 1);
            let frame = encoded(&raw, level, checksum, says_size);
            let mut out = vec![0xaa; n];
            let got = decode_first(&frame, &mut out, wanted, "chunk").unwrap();
            prop_assert!(got >= wanted);
            prop_assert_eq!(&out[..got], &raw[..got]);
            // only blocks that are wanted, where that is allowed and pays
            let saves = n - (wanted + 1).next_multiple_of(BLOCK_BYTES).min(n) >= (n / 4).max(1);
            prop_assert_eq!(got < n, saves && !checksum && says_size);
            // and the next frame is decoded from its beginning
            prop_assert!(decode(&frame, &mut out, "chunk").is_ok());
            prop_assert_eq!(out, raw);
        }

        /// What is decoded whole without an error begins so; what is cut off or has something behind it is an error.
        #[test]
        fn damage_is_no_other_bytes_than_the_whole_has(
            at in any::<prop::sample::Index>(), bit in 0u32..8, cut in any::<prop::sample::Index>(), seed: u32,
        ) {
            let (n, wanted) = (500_000, 100_000);
            let raw = raw(n, seed);
            let mut frame = encoded(&raw, 1, false, true);
            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
            let (mut whole, mut first) = (vec![0; n], vec![0; n]);
            let all = decode(&frame, &mut whole, "chunk");
            let got = decode_first(&frame, &mut first, wanted, "chunk");
            if all.is_ok() {
                let got = got.unwrap();
                prop_assert!(got >= wanted);
                prop_assert_eq!(&first[..got], &whole[..got]);
            }
            frame[at] ^= 1 << bit;
            prop_assert!(decode_first(&[&frame[..], b"more"].concat(), &mut first, wanted, "chunk").is_err());
            frame.truncate(cut.index(frame.len()));
            prop_assert!(decode_first(&frame, &mut first, wanted, "chunk").is_err());
        }
    }

    #[test]
    fn frames_that_hold_another_size_are_errors() {
        let frame = encoded(&raw(600_000, 5), 3, false, true);
        for n in [599_999, 600_001, 1_200_000] {
            let error = decode_first(&frame, &mut vec![0; n], 10, "zstd chunk").unwrap_err();
            assert!(error.to_string().contains("zstd chunk"), "{error}");
        }
        // two frames behind each other are one stream, as for the reference decoder
        let (mut both, raw) = ([frame.clone(), frame].concat(), raw(600_000, 5));
        let mut out = vec![0; 1_200_000];
        assert_eq!(decode_first(&both, &mut out, 10, "chunk").unwrap(), 1_200_000);
        assert_eq!(out, [raw.clone(), raw].concat());
        both.truncate(5);
        assert!(decode_first(&both, &mut out, 10, "chunk").is_err());
        assert!(decode_first(&[], &mut out, 10, "chunk").is_err());
    }

    #[test]
    fn frames_that_look_back_further_than_is_allowed_are_decoded_whole() {
        // in one segment: it may look back to its beginning
        let raw = raw(20 << 20, 9);
        let mut compressor = Compressor::new(1).unwrap();
        compressor.set_parameter(CParameter::WindowLog(25)).unwrap();
        let frame = compressor.compress(&raw).unwrap();
        let mut out = vec![0; raw.len()];
        assert_eq!(decode_first(&frame, &mut out, 10, "chunk").unwrap(), raw.len());
        assert_eq!(out, raw);
        assert!(decode_first(&frame[..frame.len() - 1], &mut out, raw.len(), "chunk").is_err());
    }
}
