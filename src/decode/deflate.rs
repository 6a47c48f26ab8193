//! zlib streams (RFC 1950) by libdeflate.

use std::ptr::NonNull;

use libdeflate_sys::{
    libdeflate_alloc_decompressor, libdeflate_decompressor, libdeflate_free_decompressor,
    libdeflate_result_LIBDEFLATE_INSUFFICIENT_SPACE, libdeflate_result_LIBDEFLATE_SUCCESS, libdeflate_zlib_decompress_ex,
};

/// The tables of one thread that inflates.
#[derive(Debug)]
pub(super) struct Inflater(NonNull<libdeflate_decompressor>);

// SAFETY: libdeflate's tables belong to no thread; every use is through `&mut self`.
unsafe impl Send for Inflater {}

impl Inflater {
    /// `None` without memory.
    pub(super) fn new() -> Option<Self> {
        // SAFETY: has no conditions.
        NonNull::new(unsafe { libdeflate_alloc_decompressor() }).map(Self)
    }

    /// Inflates the one stream that `src` is, its checksum included; answers how many bytes of `out` that filled.
    ///
    /// # Errors
    /// What is wrong with the stream; bytes behind its end are wrong too.
    pub(super) fn zlib(&mut self, src: &[u8], out: &mut [u8]) -> Result<usize, &'static str> {
        let (mut read, mut written) = (0, 0);
        // SAFETY: libdeflate reads at most `src.len()` and writes at most `out.len()` bytes; the last two are places for
        // its answers.
        let result = unsafe {
            libdeflate_zlib_decompress_ex(
                self.0.as_ptr(),
                src.as_ptr().cast(),
                src.len(),
                out.as_mut_ptr().cast(),
                out.len(),
                &raw mut read,
                &raw mut written,
            )
        };
        #[expect(non_upper_case_globals, reason = "libdeflate's names")]
        match result {
            libdeflate_result_LIBDEFLATE_SUCCESS if read == src.len() => Ok(written),
            libdeflate_result_LIBDEFLATE_SUCCESS => Err("bytes follow the end of the stream"),
            libdeflate_result_LIBDEFLATE_INSUFFICIENT_SPACE => Err("it holds more than was expected"),
            _ => Err("it is no zlib stream, or its checksum is wrong"),
        }
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: allocated by libdeflate, and not used any more.
        unsafe { libdeflate_free_decompressor(self.0.as_ptr()) };
    }
}
