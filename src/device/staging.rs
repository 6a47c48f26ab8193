//! Device memory that batches are copied to ahead of time.
//!
//! A [`StagingBlock`] is taken for one batch, filled on the copy stream, read on the consumer's stream, and given back with the
//! events of those who still read it; the copy stream waits for them before it fills the block again, the host does not.
//! Blocks are bounded in number and bytes: the memory is missing from torch. A batch larger than the bound gets a block
//! while no other exists.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::driver::{DevicePtr, OUT_OF_MEMORY, Stream};
use super::{Device, Entered, Event};
use crate::base::error::Result;
use crate::base::lock::lock;

/// Blocks come in eighths of a power of two from here on, so that batches of nearly one size use the same ones.
const MIN_BLOCK: u64 = 1 << 20;

/// Bytes of device memory, and who may still be using them.
#[derive(Debug)]
pub struct StagingBlock {
    ptr: DevicePtr,
    capacity: u64,
    /// The last copy into the block.
    written: Option<Arc<Event>>,
    /// `reuse_ready`: points in consumers' streams after which they read the block no more.
    readers: SmallVec<[Arc<Event>; 2]>,
    /// Somebody uses it for a time that no event tells: it is not filled again.
    untold: bool,
}

#[derive(Debug, Default)]
struct StagingState {
    /// The one that was given back first is the first to be used again: its readers are the likeliest to be done.
    free: VecDeque<StagingBlock>,
    untold: Vec<StagingBlock>,
    blocks: usize,
    bytes: u64,
    /// How often a block was given back, so that nobody waits for one that has come.
    returns: u64,
}

/// The blocks of one stream of batches.
#[derive(Debug)]
pub struct Staging {
    device: Arc<Device>,
    inner: Mutex<StagingState>,
    returned: Condvar,
    max_blocks: usize,
    max_bytes: u64,
}

fn class_of(bytes: u64) -> u64 {
    let bytes = bytes.max(MIN_BLOCK);
    bytes.next_multiple_of(bytes.next_power_of_two() / 8)
}

impl StagingBlock {
    /// Where it begins; aligned to 256 bytes.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Lets `stream` wait until nobody reads the block any more; then it may be filled on that stream.
    pub(super) fn hold_for_readers(&self, entered: &Entered, stream: Stream) -> Result<()> {
        self.readers.iter().try_for_each(|reader| reader.hold(entered, stream))
    }

    /// Says that the block is being filled until `written`, after all earlier uses.
    pub(super) fn set_written(&mut self, written: Arc<Event>) {
        self.readers.clear();
        self.written = Some(written);
    }

    /// Says that the block is read until `reader`.
    pub(super) fn add_reader(&mut self, reader: Arc<Event>) {
        self.readers.push(reader);
    }

    /// Says that the block is used for a time that no event tells.
    pub(super) fn set_untold(&mut self) {
        self.untold = true;
    }
}

impl Staging {
    /// No block yet; `max_blocks` of `max_bytes` together at most.
    pub fn new(device: Arc<Device>, max_blocks: usize, max_bytes: u64) -> Arc<Self> {
        Arc::new(Self { device, inner: Mutex::default(), returned: Condvar::new(), max_blocks, max_bytes })
    }

    /// Where the blocks are.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn lock(&self) -> MutexGuard<'_, StagingState> {
        lock(&self.inner)
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// How often a block was given back; see [`Staging::wait`].
    pub(super) fn returns(&self) -> u64 {
        self.lock().returns
    }

    /// A block of at least `bytes`, or `None` while there is no room. May wait for the device (never with the lock, for
    /// which consumers wait), so this is for the transfer thread alone.
    pub(super) fn try_take(&self, entered: &Entered, bytes: u64) -> Result<Option<StagingBlock>> {
        let capacity = class_of(bytes);
        loop {
            let surplus = {
                let mut inner = self.lock();
                if let Some(i) = inner.free.iter().position(|block| block.capacity >= bytes) {
                    return Ok(inner.free.remove(i));
                }
                let room = inner.blocks < self.max_blocks && inner.bytes.saturating_add(capacity) <= self.max_bytes;
                if inner.blocks == 0 || room {
                    inner.blocks += 1;
                    inner.bytes += capacity;
                    None
                } else {
                    // too small for this batch: its memory makes room
                    let Some(block) = Self::pop(&mut inner) else { return Ok(None) };
                    Some(block)
                }
            };
            if let Some(block) = surplus {
                Self::free(entered, &block)?;
                continue;
            }
            let called = entered.driver().alloc(capacity);
            let ptr = match called {
                Ok(ptr) => ptr,
                Err(fault) => {
                    let small = {
                        let mut inner = self.lock();
                        inner.blocks -= 1;
                        inner.bytes -= capacity;
                        if fault.code == OUT_OF_MEMORY && inner.blocks > 0 {
                            // torch has the rest: fewer blocks do as well
                            let Some(block) = Self::pop(&mut inner) else { return Ok(None) };
                            Some(block)
                        } else {
                            None
                        }
                    };
                    match small {
                        Some(block) => {
                            Self::free(entered, &block)?;
                            continue;
                        }
                        None => return entered.check(&format!("has no {capacity} bytes for staging"), Err(fault)),
                    }
                }
            };
            return Ok(Some(StagingBlock { ptr, capacity, written: None, readers: SmallVec::new(), untold: false }));
        }
    }

    fn pop(inner: &mut StagingState) -> Option<StagingBlock> {
        let block = inner.free.pop_front()?;
        inner.blocks -= 1;
        inner.bytes -= block.capacity;
        Some(block)
    }

    /// Waits until a block was given back since `seen` (a former [`Staging::returns`]) or `cancelled`.
    pub(super) fn wait(&self, seen: u64, cancelled: &AtomicBool) {
        let mut inner = self.lock();
        while inner.returns == seen && !cancelled.load(Ordering::Acquire) {
            inner = self.returned.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Addresses of the free blocks in the order of their use, and how many streams have still to pass each.
    #[cfg(test)]
    pub(super) fn describe(&self) -> Vec<(u64, usize)> {
        self.lock().free.iter().map(|block| (block.ptr.0, block.readers.len())).collect()
    }

    /// Runs `f` while this thread holds the lock.
    #[cfg(test)]
    pub(crate) fn while_locked<R>(&self, f: impl FnOnce() -> R) -> R {
        let _held = self.lock();
        f()
    }

    /// Wakes who waits, to look at `cancelled` again.
    pub(super) fn wake(&self) {
        drop(self.lock());
        self.returned.notify_all();
    }

    /// Takes a block back; never waits for the device.
    pub(super) fn give_back(&self, block: StagingBlock) {
        if self.device.is_inherited() {
            // the lock may be held by a thread that stayed in the parent
            std::mem::forget(block);
            return;
        }
        let mut inner = self.lock();
        inner.returns += 1;
        if block.untold {
            inner.blocks -= 1;
            inner.bytes -= block.capacity;
            inner.untold.push(block);
        } else {
            inner.free.push_back(block);
        }
        drop(inner);
        self.returned.notify_all();
    }

    /// Gives a block's memory to the device, once all who use it are done. Where that cannot be known it stays.
    fn free(entered: &Entered, block: &StagingBlock) -> Result<()> {
        if block.untold {
            entered.check("failed", entered.driver().finish())?;
        }
        for event in block.written.iter().chain(&block.readers) {
            event.wait(entered)?;
        }
        // SAFETY: the block is ours, and every stream has passed its last use.
        entered.check("cannot free staging memory", unsafe { entered.driver().free(block.ptr) })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.device.is_inherited() {
            return;
        }
        let inner = std::mem::take(&mut *self.lock());
        let Ok(entered) = self.device.enter() else { return };
        for block in inner.free.into_iter().chain(inner.untold) {
            // a device that fails keeps its memory until the process ends
            let _ = Self::free(&entered, &block);
        }
    }
}
