//! One stretch of memory that is lent in whole pages: buffers of any size use each other's memory.
//!
//! Encoded bytes are read in pieces of a few KiB to many MiB and live for moments. Blocks kept by size would be the wrong
//! ones half of the time, and new ones are faults that the system takes in the middle of the read. Here a page that
//! comes back is free for whatever is asked for next, and all of them lie in huge pages.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Mutex;

use super::pages::{ALIGN as PAGE, HUGE_PAGE, acquire, release};
use crate::base::lock::lock;

/// The stretch, and which of its pages are free.
#[derive(Debug)]
pub(super) struct Region {
    /// `None` where the system had no memory for it, so that nothing is ever lent.
    base: Option<NonNull<u8>>,
    bytes: usize,
    pages: Mutex<Pages>,
}
// SAFETY: the region is plain memory; which part belongs to whom is kept behind the lock.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// At least `bytes`, of which the system gives those that are used, in huge pages.
    pub(super) fn new(bytes: u64) -> Self {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX / 4).max(1).next_multiple_of(HUGE_PAGE);
        let base = acquire(bytes);
        let bytes = base.map_or(0, |_| bytes);
        Self { base, bytes, pages: Mutex::new(Pages::new(bytes / PAGE)) }
    }

    /// `bytes`, which are whole pages, or `None` where no stretch of free pages is as long.
    pub(super) fn take(&self, bytes: usize) -> Option<NonNull<u8>> {
        let first = lock(&self.pages).take(bytes / PAGE)?;
        // SAFETY: the pages lie within the region.
        self.base.map(|base| unsafe { base.add(first * PAGE) })
    }

    /// Takes back what [`Region::take`] gave for as many `bytes`; whether it is this region's.
    pub(super) fn give_back(&self, ptr: NonNull<u8>, bytes: usize) -> bool {
        let start = self.base.map(|base| ptr.addr().get().wrapping_sub(base.addr().get()));
        let Some(start) = start.filter(|start| *start < self.bytes) else { return false };
        let first = start / PAGE;
        lock(&self.pages).set(first..first + bytes / PAGE, false);
        true
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some(base) = self.base {
            // SAFETY: this is what `acquire` gave, and leases keep their pool, so that none is out.
            unsafe { release(base, self.bytes) };
        }
    }
}

/// A bit for each page of a region, set while it is lent.
#[derive(Debug)]
struct Pages {
    lent: Vec<u64>,
    n: usize,
}

impl Pages {
    /// So many pages, all of them free.
    fn new(n: usize) -> Self {
        Self { lent: vec![0; n.div_ceil(64)], n }
    }

    /// The first of the first `n` free pages that lie behind each other, which are lent now. That those come first leaves
    /// pages that were never needed untouched.
    fn take(&mut self, n: usize) -> Option<usize> {
        let mut start = self.next(0, false);
        while start + n <= self.n {
            let end = self.next(start, true);
            if end - start >= n {
                self.set(start..start + n, true);
                return Some(start);
            }
            start = self.next(end, false);
        }
        None
    }

    /// The first page from `from` on that is lent, or that is not; how many there are where there is none.
    fn next(&self, from: usize, lent: bool) -> usize {
        let mut before = from % 64;
        for (i, &word) in self.lent.iter().enumerate().skip(from / 64) {
            let found = (if lent { word } else { !word }) >> before << before;
            before = 0;
            if found != 0 {
                return (i * 64 + found.trailing_zeros() as usize).min(self.n);
            }
        }
        self.n
    }

    /// Notes that pages are lent, or free again.
    fn set(&mut self, pages: Range<usize>, lent: bool) {
        let Range { mut start, end } = pages;
        while start < end {
            let n = (64 - start % 64).min(end - start);
            let bits = u64::MAX >> (64 - n) << (start % 64);
            let word = &mut self.lent[start / 64];
            *word = if lent { *word | bits } else { *word & !bits };
            start += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The slow twin has a flag for each page.
        #[test]
        fn no_page_is_lent_twice_or_lost(
            n_pages in 1usize..300,
            steps in prop::collection::vec((any::<bool>(), 1usize..140), 1..200),
        ) {
            let (mut pages, mut lent) = (Pages::new(n_pages), vec![false; n_pages]);
            let mut held: Vec<Range<usize>> = Vec::new();
            for (take, n) in steps {
                if take {
                    let first = (0..(n_pages + 1).saturating_sub(n)).find(|&i| lent[i..i + n].iter().all(|l| !l));
                    prop_assert_eq!(pages.take(n), first);
                    if let Some(first) = first {
                        lent[first..first + n].fill(true);
                        held.push(first..first + n);
                    }
                } else if !held.is_empty() {
                    let range = held.swap_remove(n % held.len());
                    lent[range.clone()].fill(false);
                    pages.set(range, false);
                }
                let bits: Vec<bool> = (0..n_pages).map(|i| pages.lent[i / 64] >> (i % 64) & 1 != 0).collect();
                prop_assert_eq!(&bits, &lent);
            }
        }
    }

    #[test]
    fn what_is_lent_can_be_written_and_is_told_from_others() {
        let region = Region::new(0);
        assert_eq!(region.bytes, HUGE_PAGE);
        let (first, second) = (region.take(3 * PAGE).unwrap(), region.take(PAGE).unwrap());
        assert_eq!(second.addr().get() - first.addr().get(), 3 * PAGE);
        // SAFETY: these bytes were just lent.
        unsafe { first.write_bytes(1, 3 * PAGE) };
        assert!(region.take(HUGE_PAGE).is_none());
        assert!(!region.give_back(NonNull::from(&0u8), PAGE));
        assert!(region.give_back(first, 3 * PAGE) && region.give_back(second, PAGE));
        assert_eq!(region.take(HUGE_PAGE), Some(first));
    }

    #[test]
    fn a_region_that_cannot_be_had_lends_nothing() {
        let region = Region::new(1 << 60);
        assert!(region.take(PAGE).is_none());
        assert!(!region.give_back(NonNull::dangling(), PAGE));
    }
}
