//! Pooled memory for batches and for compressed bytes.
//!
//! Decides where bytes live. A [`Pool`] hands out [`Lease`]s: aligned blocks that go back to the pool when
//! the last holder drops them, on whatever thread, also after the pipeline that made them is gone. Block
//! sizes of batches come in classes (four per power of two), so that batches whose sizes vary a little reuse
//! memory; encoded bytes, whose sizes vary much, lie in one region.
//!
//! Several threads fill one lease at once, each its own disjoint part: [`Lease::base`] is the shared
//! pointer for that, and the contract is stated at each use.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use smallvec::SmallVec;

use crate::base::error::{Error, Result};
use crate::base::fork;
use crate::base::lock::lock;

mod pages;
mod region;

use pages::{ALIGN, MAP_FROM, acquire, release};
use region::Region;

/// Smaller blocks are not worth pooling in finer classes.
const MIN_BLOCK: usize = 4096;
/// Longer leases are refused, so that their classes are numbers.
const MAX_LEASE: usize = isize::MAX as usize / 2;

/// A source of reusable memory blocks.
#[derive(Debug)]
pub struct Pool {
    memory: Memory,
    leased_bytes: AtomicU64,
    leases: AtomicU64,
    generation: u64,
}

#[derive(Debug)]
enum Memory {
    /// Blocks of certain sizes.
    Classes(Classes),
    /// Pages of one stretch, and of the system where that has none that are free.
    Region(Region),
}

/// Free blocks by size.
#[derive(Debug)]
struct Classes {
    free: Mutex<Free>,
    /// A returned block is kept while leased and kept bytes together stay below this; else it goes back to
    /// the system.
    keep_bytes: AtomicU64,
    source: Arc<dyn BlockSource>,
}

/// Where a [`Pool`] gets its blocks.
pub trait BlockSource: Send + Sync + std::fmt::Debug {
    /// An initialised block of `bytes`, aligned to 64 bytes at least, or `None` when there is no memory.
    fn acquire(&self, bytes: usize) -> Option<NonNull<u8>>;

    /// Takes a block back.
    ///
    /// # Safety
    /// `ptr` was given by [`BlockSource::acquire`] of this source for as many `bytes` and is not used again.
    unsafe fn release(&self, ptr: NonNull<u8>, bytes: usize);

    /// Whether blocks are page-locked, or why they are not.
    fn is_locked(&self) -> std::result::Result<(), &str>;
}

/// Ordinary memory of the system.
#[derive(Debug)]
pub struct SystemBlocks;

impl BlockSource for SystemBlocks {
    fn acquire(&self, bytes: usize) -> Option<NonNull<u8>> {
        acquire(bytes)
    }

    unsafe fn release(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { release(ptr, bytes) };
    }

    fn is_locked(&self) -> std::result::Result<(), &str> {
        Err("batches in host memory need none")
    }
}

/// The pools of all streams over one collection: what one epoch has used, the next one uses again.
#[derive(Debug, Clone)]
pub struct Pools {
    budget_bytes: u64,
    fetch_bytes: u64,
    /// The GPU that batches are copied to.
    device: Option<u32>,
    /// Batches.
    pub batches: Arc<Pool>,
    /// Encoded bytes, as read.
    pub encoded: Arc<Pool>,
}

impl Pools {
    /// Pools for batches of `budget_bytes` in all that wait to be delivered, in blocks of `batches`, and `fetch_bytes` of
    /// encoded ones.
    pub fn new(budget_bytes: u64, fetch_bytes: u64, device: Option<u32>, batches: Arc<dyn BlockSource>) -> Self {
        Self {
            budget_bytes,
            fetch_bytes,
            device,
            batches: Pool::of(batches, with_margin(budget_bytes)),
            encoded: Pool::region(fetch_bytes + fetch_bytes / 2),
        }
    }

    /// Whether these are the pools that [`Pools::new`] would make.
    pub fn are_for(&self, budget_bytes: u64, fetch_bytes: u64, device: Option<u32>) -> bool {
        (self.budget_bytes, self.fetch_bytes, self.device) == (budget_bytes, fetch_bytes, device)
    }
}

#[derive(Debug, Default)]
struct Free {
    /// Sorted by class size; each holds blocks of exactly that size.
    classes: std::collections::BTreeMap<usize, SizeClass>,
    bytes: u64,
}

#[derive(Debug, Default)]
struct SizeClass {
    blocks: Vec<Block>,
    /// Blocks that there are, leased ones included: `blocks` has room for them all, so that giving back allocates nothing.
    made: usize,
}

#[derive(Debug)]
struct Block(NonNull<u8>);
// SAFETY: a block is plain memory owned by whoever holds the value.
unsafe impl Send for Block {}

/// One block on loan from a [`Pool`], `len` bytes of it in use.
#[derive(Debug)]
pub struct Lease {
    ptr: NonNull<u8>,
    class: usize,
    len: usize,
    pool: Arc<Pool>,
}
// SAFETY: a lease owns its block; shared access goes through `base`, whose contract forbids overlapping writes.
unsafe impl Send for Lease {}
// SAFETY: as above; `&Lease` alone gives no way to write.
unsafe impl Sync for Lease {}

fn class_of(bytes: usize) -> usize {
    // 64 KiB, the largest page of the supported systems, so that mappings are whole pages
    let bytes = bytes.max(MIN_BLOCK);
    let step = (bytes.next_power_of_two() / 8).max(if bytes < MAP_FROM { MIN_BLOCK } else { 64 << 10 });
    bytes.div_ceil(step) * step
}

/// Whole pages, as a region lends them.
fn pages_of(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGN)
}

impl Pool {
    /// A pool that keeps returned memory for reuse as long as it then holds no more than `keep_bytes` in all.
    pub fn new(keep_bytes: u64) -> Arc<Self> {
        Self::of(Arc::new(SystemBlocks), keep_bytes)
    }

    /// The same, in blocks of a source of its own.
    pub fn of(source: Arc<dyn BlockSource>, keep_bytes: u64) -> Arc<Self> {
        let keep_bytes = AtomicU64::new(keep_bytes);
        Self::with(Memory::Classes(Classes { free: Mutex::default(), keep_bytes, source }))
    }

    /// A pool for buffers whose sizes vary much and that live for moments: of `bytes`, which stay its own, and of the
    /// system's memory where these are not enough.
    pub fn region(bytes: u64) -> Arc<Self> {
        Self::with(Memory::Region(Region::new(bytes)))
    }

    fn with(memory: Memory) -> Arc<Self> {
        let (leased_bytes, leases) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { memory, leased_bytes, leases, generation: fork::generation() })
    }

    /// A block of at least `len` bytes; its content is whatever it last held.
    pub fn lease(self: &Arc<Self>, len: usize) -> Result<Lease> {
        let too_big = || Error::Internal { message: format!("cannot allocate a buffer of {len} bytes") };
        if len > MAX_LEASE {
            return Err(too_big());
        }
        let (ptr, class) = match &self.memory {
            Memory::Classes(classes) => classes.lease(class_of(len), self.leased_bytes()),
            Memory::Region(region) => {
                let (bytes, class) = (pages_of(len), class_of(len));
                region.take(bytes).map(|ptr| (ptr, bytes)).or_else(|| Some((acquire(class)?, class)))
            }
        }
        .ok_or_else(too_big)?;
        self.leases.fetch_add(1, Ordering::Relaxed);
        self.leased_bytes.fetch_add(class as u64, Ordering::Relaxed);
        Ok(Lease { ptr, class, len, pool: Arc::clone(self) })
    }

    /// Whether blocks are page-locked, or why they are not.
    pub fn is_locked(&self) -> std::result::Result<(), &str> {
        match &self.memory {
            Memory::Classes(classes) => classes.source.is_locked(),
            Memory::Region(_) => SystemBlocks.is_locked(),
        }
    }

    /// Leases not yet dropped.
    pub fn leases_out(&self) -> u64 {
        self.leases.load(Ordering::Relaxed)
    }

    /// Bytes of leases not yet dropped.
    pub fn leased_bytes(&self) -> u64 {
        self.leased_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that a lease of `len` bytes takes from the system.
    pub fn footprint(&self, len: u64) -> u64 {
        let class = |len| match &self.memory {
            Memory::Classes(_) => class_of(len),
            Memory::Region(_) => pages_of(len),
        };
        usize::try_from(len).ok().filter(|len| *len <= MAX_LEASE).map_or(len, |len| class(len) as u64)
    }

    /// The same for a pool of batches.
    pub fn batch_footprint(len: usize) -> u64 {
        class_of(len) as u64
    }

    /// The same for a region.
    pub fn read_footprint(len: usize) -> u64 {
        pages_of(len.min(MAX_LEASE)) as u64
    }

    /// Raises what the pool keeps to `budget_bytes` and what consumers hold: the batch they have just been given, and until
    /// then the one before, of `batch_bytes` each. A region stays as it is.
    pub fn keep_at_least(&self, budget_bytes: u64, batch_bytes: u64) {
        if let Memory::Classes(classes) = &self.memory {
            let held = batch_bytes.saturating_mul(2);
            let bytes = with_margin(budget_bytes).max(budget_bytes.saturating_add(held));
            classes.keep_bytes.fetch_max(bytes, Ordering::Relaxed);
        }
    }

    fn give_back(&self, ptr: NonNull<u8>, class: usize) {
        self.leases.fetch_sub(1, Ordering::Relaxed);
        let leased = self.leased_bytes.fetch_sub(class as u64, Ordering::Relaxed) - class as u64;
        match &self.memory {
            Memory::Classes(classes) => classes.give_back(ptr, class, leased),
            Memory::Region(region) => {
                if !region.give_back(ptr, class) {
                    // SAFETY: it came from the system then, with this size, and nobody else holds it.
                    unsafe { release(ptr, class) };
                }
            }
        }
    }
}

impl Classes {
    /// A block of this class or one that does as well, and its class, where `leased` bytes are leased already.
    fn lease(&self, class: usize, leased: u64) -> Option<(NonNull<u8>, usize)> {
        let pooled = {
            let mut free = lock(&self.free);
            // A somewhat larger block does as well, and a rather larger one where a new one would push it out in the end: the
            // last batches of an epoch are small and come once. Not any: consumers may keep a batch's row numbers for long.
            let full = leased + free.bytes + class as u64 > self.keep_bytes.load(Ordering::Relaxed);
            let largest = if full { class.saturating_mul(4) } else { class + class / 2 };
            let fitting = free.classes.range_mut(class..=largest).find(|(_, of_class)| !of_class.blocks.is_empty());
            let block = fitting.and_then(|(&class, of_class)| of_class.blocks.pop().map(|block| (block, class)));
            if let Some((_, class)) = block {
                free.bytes -= class as u64;
            }
            block
        };
        if let Some((Block(ptr), class)) = pooled {
            return Some((ptr, class));
        }
        let ptr = self.source.acquire(class)?;
        let mut free = lock(&self.free);
        let SizeClass { blocks, made } = free.classes.entry(class).or_default();
        *made += 1;
        blocks.reserve(*made - blocks.len());
        Some((ptr, class))
    }

    /// Keeps a block, or lets it or others go, where `leased` bytes are still leased.
    fn give_back(&self, ptr: NonNull<u8>, class: usize, leased: u64) {
        let keep_bytes = self.keep_bytes.load(Ordering::Relaxed);
        let mut surplus = SmallVec::<[(Block, usize); 8]>::new();
        {
            let mut free = lock(&self.free);
            // sizes that are asked for no longer make room for this one, which was asked for last
            while leased + class as u64 <= keep_bytes
                && leased + free.bytes + class as u64 > keep_bytes
                && let Some((&other, of_class)) =
                    free.classes.iter_mut().rev().find(|(c, of_class)| **c != class && !of_class.blocks.is_empty())
                && let Some(block) = of_class.blocks.pop()
            {
                of_class.made -= 1;
                free.bytes -= other as u64;
                surplus.push((block, other));
            }
            let keep = leased + free.bytes + class as u64 <= keep_bytes;
            let of_class = free.classes.entry(class).or_default();
            if keep {
                of_class.blocks.push(Block(ptr));
                free.bytes += class as u64;
            } else {
                of_class.made -= 1;
                surplus.push((Block(ptr), class));
            }
        }
        for (Block(ptr), class) in surplus {
            // SAFETY: the block came from the source with this class and nobody else holds it.
            unsafe { self.source.release(ptr, class) };
        }
    }
}

/// What consumers hold counts as leased: an eighth more, so that their batches' memory is used again.
fn with_margin(budget_bytes: u64) -> u64 {
    budget_bytes.saturating_add(budget_bytes / 8)
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        // a region lets go of itself
        let Memory::Classes(Classes { free, source, .. }) = &mut self.memory else { return };
        if let Ok(free) = free.get_mut() {
            for (class, of_class) in std::mem::take(&mut free.classes) {
                for Block(ptr) in of_class.blocks {
                    // SAFETY: free blocks are owned by the pool alone.
                    unsafe { source.release(ptr, class) };
                }
            }
        }
    }
}

impl Lease {
    /// Start of the block, for writers of disjoint parts; aligned to 4,096 bytes, a page-locked one to 64.
    pub fn base(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Bytes in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is in use.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes in use, for the only holder.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the block has `len` initialised bytes (zeroed when it was allocated), and `&mut self`
        // excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// The bytes in use; every one must have been written, and no thread may still be writing.
    ///
    /// # Safety
    /// As the summary says: initialised, and no concurrent writer through [`Lease::base`].
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // In a forked child the pool's lock may be held by a thread that does not exist here: leak instead.
        if self.pool.generation == fork::generation() {
            self.pool.give_back(self.ptr, self.class);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::pages::HUGE_PAGE;
    use super::*;

    impl Pool {
        fn free(&self) -> std::sync::MutexGuard<'_, Free> {
            let Memory::Classes(classes) = &self.memory else { panic!("a region has no classes") };
            classes.free.lock().unwrap()
        }
    }

    #[test]
    fn classes_waste_little() {
        for bytes in [1, 4095, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 1, 27_000_001] {
            let class = class_of(bytes);
            assert!(class >= bytes);
            assert!(bytes < MIN_BLOCK * 8 || class <= bytes + bytes / 3, "{bytes} -> {class}");
        }
    }

    #[test]
    fn blocks_are_reused_and_capped() {
        let pool = Pool::new(1 << 20);
        let first = pool.lease(10_000).unwrap();
        let address = first.base();
        drop(first);
        let second = pool.lease(10_100).unwrap();
        assert_eq!(second.base(), address);
        assert_eq!(pool.leases_out(), 1);
        drop(second);
        // larger than the pool may keep, so that nothing has to make room for it
        drop(pool.lease(4 << 20).unwrap());
        assert_eq!(pool.free().bytes, class_of(10_000) as u64);
    }

    /// Consumers may keep the row numbers of a batch for long: they must not keep the block of its values.
    #[test]
    fn a_full_pool_lends_no_block_of_more_than_four_times() {
        let pool = Pool::new(1 << 20);
        drop(pool.lease(1 << 20).unwrap());
        let (four, five) = (pool.lease(256 << 10).unwrap(), pool.lease((256 << 10) - 1).unwrap());
        assert_eq!((four.class, five.class), (1 << 20, class_of((256 << 10) - 1)));
        drop((four, five));
        drop(pool.lease(1 << 20).unwrap());
        assert_eq!(pool.lease(128 << 10).unwrap().class, 128 << 10);
    }

    #[test]
    fn a_full_pool_lends_larger_blocks_rather_than_new_ones() {
        let pool = Pool::new(1 << 20);
        drop((0..2).map(|_| pool.lease(512 << 10).unwrap()).collect::<Vec<_>>());
        let (small, smaller) = (pool.lease(400 << 10).unwrap(), pool.lease(128 << 10).unwrap());
        assert_eq!((small.class, smaller.class), (512 << 10, 512 << 10));
        assert_eq!((small.len(), smaller.len(), pool.leased_bytes()), (400 << 10, 128 << 10, 1 << 20));
        drop((small, smaller));
        assert_eq!(pool.free().bytes, 1 << 20);
        // where there is room for it a small one is made
        let roomy = Pool::new(4 << 20);
        drop(roomy.lease(512 << 10).unwrap());
        assert_eq!(roomy.lease(128 << 10).unwrap().class, 128 << 10);
    }

    #[test]
    fn sizes_asked_for_last_push_out_others() {
        let pool = Pool::new(1 << 20);
        drop((0..8).map(|_| pool.lease(128 << 10).unwrap()).collect::<Vec<_>>());
        assert_eq!(pool.free().bytes, 1 << 20);
        drop(pool.lease(512 << 10).unwrap());
        let free = pool.free();
        assert_eq!((free.bytes, free.classes[&(512 << 10)].blocks.len(), free.classes[&(128 << 10)].blocks.len()), (1 << 20, 1, 4));
    }

    #[test]
    fn what_a_region_has_no_room_for_comes_from_the_system() {
        let pool = Pool::region(1);
        let half = pool.lease(HUGE_PAGE / 2).unwrap();
        let (mut more, mut odd) = (pool.lease(HUGE_PAGE / 2 + 1).unwrap(), pool.lease(5000).unwrap());
        assert_eq!((more.class, odd.class), (class_of(HUGE_PAGE / 2 + 1), 8192));
        assert_eq!(odd.base().addr() - half.base().addr(), HUGE_PAGE / 2);
        more.as_mut_slice().fill(7);
        odd.as_mut_slice().fill(7);
        assert_eq!(pool.leased_bytes(), (HUGE_PAGE / 2 + more.class + 8192) as u64);
        let first = half.base();
        drop((half, more, odd));
        assert_eq!((pool.leased_bytes(), pool.leases_out()), (0, 0));
        assert_eq!(pool.lease(HUGE_PAGE).unwrap().base(), first, "all of it is free again");
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for pool in [Pool::new(0), Pool::region(1)] {
            assert!(pool.lease(usize::MAX).is_err());
            assert!(pool.lease(isize::MAX as usize / 4).is_err());
        }
    }

    #[test]
    fn leases_outlive_the_pool_handle() {
        let pool = Pool::new(0);
        let mut lease = pool.lease(16).unwrap();
        drop(pool);
        lease.as_mut_slice().fill(7);
    }
}
