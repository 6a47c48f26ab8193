//! zlib (RFC 1950) and gzip (RFC 1952) streams by libdeflate.

use std::cell::RefCell;
use std::ptr::NonNull;

use libdeflate_sys::{
    libdeflate_alloc_decompressor, libdeflate_decompressor, libdeflate_free_decompressor, libdeflate_gzip_decompress_ex,
    libdeflate_result, libdeflate_result_LIBDEFLATE_INSUFFICIENT_SPACE, libdeflate_result_LIBDEFLATE_SUCCESS,
    libdeflate_zlib_decompress_ex,
};

use super::limits::{damaged, expect_len};
use crate::base::error;

/// Inflates the zlib stream that `src` begins with, its checksum included; answers how many bytes that were, and how many of
/// `out` they filled.
///
/// # Errors
/// What is wrong with the stream.
pub(super) fn zlib(src: &[u8], out: &mut [u8]) -> Result<(usize, usize), &'static str> {
    with_inflater(|inflater| inflater.stream(libdeflate_zlib_decompress_ex, src, out))
}

/// Inflates the gzip members that `src` is, one behind the other or behind zeros, as Python's `gzip` reads them; answers how many
/// bytes of `out` they filled.
///
/// # Errors
/// As for [`zlib`].
pub(super) fn gzip(src: &[u8], out: &mut [u8]) -> Result<usize, &'static str> {
    with_inflater(|inflater| {
        let (mut left, mut filled) = (src, 0);
        loop {
            let (read, written) = inflater
                .stream(libdeflate_gzip_decompress_ex, left, &mut out[filled..])
                .map_err(|why| if filled > 0 && why == NO_STREAM { "what follows its end is no gzip member" } else { why })?;
            filled += written;
            left = &left[read..];
            left = &left[left.iter().take_while(|&&byte| byte == 0).count()..];
            if left.is_empty() {
                return Ok(filled);
            }
        }
    })
}

/// Inflates a zlib stream to as many bytes as `out` has. What follows the stream is not looked at, as by zlib itself.
pub(super) fn decode_zlib(src: &[u8], out: &mut [u8], what: &str) -> error::Result<()> {
    inflated(zlib(src, out).map(|(_, filled)| filled), out.len(), what)
}

/// The same for gzip members, as [`gzip`] reads them.
pub(super) fn decode_gzip(src: &[u8], out: &mut [u8], what: &str) -> error::Result<()> {
    inflated(gzip(src, out), out.len(), what)
}

/// Checks that inflating gave the `n` bytes that were expected.
fn inflated(written: Result<usize, &'static str>, n: usize, what: &str) -> error::Result<()> {
    expect_len(written.map_err(|why| damaged(what, &format_args!("{why} ({n} bytes were expected)")))?, n, what)
}

const NO_STREAM: &str = "it is no deflated stream, is cut off, or has another checksum";

/// The tables of one thread that inflates.
struct Inflater(NonNull<libdeflate_decompressor>);

/// A function of libdeflate that inflates one stream and says how much it has read and written.
type Inflate = unsafe extern "C" fn(
    *mut libdeflate_decompressor,
    *const libc::c_void,
    usize,
    *mut libc::c_void,
    usize,
    *mut usize,
    *mut usize,
) -> libdeflate_result;

fn with_inflater<T>(inflate: impl FnOnce(&mut Inflater) -> Result<T, &'static str>) -> Result<T, &'static str> {
    thread_local! {
        static INFLATER: RefCell<Option<Inflater>> = const { RefCell::new(None) };
    }
    INFLATER.with_borrow_mut(|slot| {
        let inflater = match slot {
            Some(inflater) => inflater,
            none => none.insert(Inflater::new().ok_or("there is no memory to inflate it")?),
        };
        inflate(inflater)
    })
}

impl Inflater {
    /// `None` without memory.
    fn new() -> Option<Self> {
        // SAFETY: has no conditions.
        NonNull::new(unsafe { libdeflate_alloc_decompressor() }).map(Self)
    }

    /// Inflates, by a function of libdeflate, the stream that `src` begins with; answers how many bytes that were, before and after.
    fn stream(&mut self, inflate: Inflate, src: &[u8], out: &mut [u8]) -> Result<(usize, usize), &'static str> {
        let (mut read, mut written) = (0, 0);
        // SAFETY: libdeflate reads at most `src.len()` and writes at most `out.len()` bytes; the last two are places for
        // its answers.
        let result = unsafe {
            let (from, to) = (src.as_ptr().cast(), out.as_mut_ptr().cast());
            inflate(self.0.as_ptr(), from, src.len(), to, out.len(), &raw mut read, &raw mut written)
        };
        #[expect(non_upper_case_globals, reason = "libdeflate's names")]
        match result {
            libdeflate_result_LIBDEFLATE_SUCCESS => Ok((read, written)),
            libdeflate_result_LIBDEFLATE_INSUFFICIENT_SPACE => Err("it holds more than was expected"),
            _ => Err(NO_STREAM),
        }
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: allocated by libdeflate, and not used any more.
        unsafe { libdeflate_free_decompressor(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn gzipped(raw: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(raw).unwrap();
        encoder.finish().unwrap()
    }

    proptest! {
        #[test]
        fn members_are_one_stream(
            parts in prop::collection::vec(prop::collection::vec(0u8..9, 0..2000), 1..5), short in 1usize..9, padding in 0usize..9,
        ) {
            let raw = parts.concat();
            let padded = |part: &Vec<u8>| [gzipped(part), vec![0; padding]].concat();
            let encoded: Vec<u8> = parts.iter().flat_map(padded).collect();
            let end = encoded.len() - padding;
            let mut out = vec![7; raw.len()];
            prop_assert_eq!(gzip(&encoded, &mut out), Ok(raw.len()));
            prop_assert_eq!(&out, &raw);
            let room = raw.len().saturating_sub(short);
            prop_assert!(room == raw.len() || gzip(&encoded, &mut out[..room]).unwrap_err().contains("more than was expected"));
            // cut off, with something behind, and with another byte in its last checksum or length
            prop_assert!(gzip(&encoded[..end - short], &mut out).is_err());
            prop_assert!(gzip(&[&encoded[..], &[3; 3]].concat(), &mut out).is_err());
            let mut damaged = encoded.clone();
            damaged[end - short.min(8)] ^= 1;
            prop_assert!(gzip(&damaged, &mut out).is_err());
        }
    }

    #[test]
    fn what_follows_a_stream_is_told() {
        let encoded = [gzipped(b"cells"), b"genes".to_vec()].concat();
        assert_eq!(gzip(&encoded, &mut [0; 9]), Err("what follows its end is no gzip member"));
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"cells").unwrap();
        let mut encoded = encoder.finish().unwrap();
        let n = encoded.len();
        encoded.extend(b"genes");
        assert_eq!(zlib(&encoded, &mut [0; 9]), Ok((n, 5)));
        assert!(zlib(&encoded[..n - 1], &mut [0; 9]).is_err());
    }
}
