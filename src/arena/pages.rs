//! Memory of the system, in pages.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Alignment of every block: a page, which suits page-locking and non-temporal stores.
pub(super) const ALIGN: usize = 4096;
/// Blocks from this size on are mappings of their own.
pub(super) const MAP_FROM: usize = 128 << 10;

/// Blocks from this size on are made of huge pages where the system gives them: a batch is written in pieces of some
/// KiB in random order, each of which would otherwise miss the translation cache, after a fault per 4 KiB.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// A zeroed block of `class` bytes, or `None` when there is no memory.
pub(super) fn acquire(class: usize) -> Option<NonNull<u8>> {
    if is_mapped(class) {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let huge = class >= HUGE_PAGE;
        let length = if huge { class + HUGE_PAGE } else { class };
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        if !huge {
            return NonNull::new(start.cast());
        }
        // huge pages must be aligned: what lies before and behind the aligned block is given back
        let before = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
        // SAFETY: both ends lie within the mapping just made and nobody knows them; the advice changes no content, and
        // a system without huge pages may refuse it.
        unsafe {
            let block = start.byte_add(before);
            if before > 0 {
                libc::munmap(start, before);
            }
            libc::munmap(block.byte_add(class), HUGE_PAGE - before);
            #[cfg(target_os = "linux")]
            libc::madvise(block, class, libc::MADV_HUGEPAGE);
            return NonNull::new(block.cast());
        }
    }
    let layout = Layout::from_size_align(class, ALIGN).ok()?;
    // SAFETY: `class` is at least MIN_BLOCK, so the layout is not empty.
    NonNull::new(unsafe { alloc_zeroed(layout) })
}

/// Whether blocks of this class are mappings of their own. The C library's allocator keeps freed blocks of
/// up to 32 MiB in per-thread heaps that it rarely shrinks, so that every thread that ever allocated a batch
/// would hold on to the memory of one.
fn is_mapped(class: usize) -> bool {
    class >= MAP_FROM && !cfg!(miri)
}

/// # Safety
/// `ptr` was given by [`acquire`] for this `class` and is not used again.
pub(super) unsafe fn release(ptr: NonNull<u8>, class: usize) {
    if is_mapped(class) {
        // SAFETY: the caller's promise: exactly one whole mapping.
        unsafe { libc::munmap(ptr.as_ptr().cast(), class) };
    } else if let Ok(layout) = Layout::from_size_align(class, ALIGN) {
        // SAFETY: the caller's promise.
        unsafe { dealloc(ptr.as_ptr(), layout) };
    }
}
