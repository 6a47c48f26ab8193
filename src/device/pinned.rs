//! Page-locked blocks for a pool, or ordinary ones and the reason why.
//!
//! Only page-locked memory is copied to a GPU while everybody else goes on. Systems bound it (`ulimit -l`, a container's
//! limits), and a stream that is slower is better than none: a refusal is remembered, once, and from then on blocks are
//! ordinary ones.

use std::collections::HashSet;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::Device;
use super::numa::Preferring;
use crate::arena::{BlockSource, SystemBlocks};
use crate::base::lock::lock;

/// Blocks are at least as aligned as the stores of the decoding threads ask for.
const ALIGN: usize = 64;

/// A source of page-locked blocks.
#[derive(Debug)]
pub struct PageLocked {
    device: Arc<Device>,
    /// Addresses of the blocks that are page-locked; all others are ordinary.
    locked: Mutex<HashSet<usize>>,
    refused: OnceLock<String>,
}

impl PageLocked {
    /// Blocks that `device` can copy from.
    pub fn new(device: Arc<Device>) -> Self {
        Self { device, locked: Mutex::default(), refused: OnceLock::new() }
    }

    fn locked(&self) -> MutexGuard<'_, HashSet<usize>> {
        lock(&self.locked)
    }

    fn try_acquire(&self, bytes: usize) -> Result<NonNull<u8>, String> {
        let entered = self.device.enter().map_err(|e| e.to_string())?;
        let _near = entered.driver().numa_node().and_then(Preferring::node);
        let ptr = entered
            .driver()
            .host_alloc(bytes)
            .map_err(|fault| format!("page-locking {bytes} bytes was refused ({}); see `ulimit -l`", fault.reason))?;
        if !ptr.addr().get().is_multiple_of(ALIGN) {
            // SAFETY: just allocated, and known to nobody.
            let _ = unsafe { entered.driver().host_free(ptr) };
            return Err("page-locked memory is not aligned".to_owned());
        }
        // SAFETY: `bytes` of fresh memory. The driver does not promise to clear it, and pools promise initialised bytes.
        unsafe { ptr.write_bytes(0, bytes) };
        Ok(ptr)
    }
}

impl BlockSource for PageLocked {
    fn acquire(&self, bytes: usize) -> Option<NonNull<u8>> {
        if self.refused.get().is_none() {
            match self.try_acquire(bytes) {
                Ok(ptr) => {
                    self.locked().insert(ptr.addr().get());
                    return Some(ptr);
                }
                Err(reason) => {
                    // the first of several threads is the one that is told
                    let _ = self.refused.set(reason);
                }
            }
        }
        SystemBlocks.acquire(bytes)
    }

    unsafe fn release(&self, ptr: NonNull<u8>, bytes: usize) {
        if !self.locked().remove(&ptr.addr().get()) {
            // SAFETY: the caller's promise; what is not page-locked is an ordinary block.
            unsafe { SystemBlocks.release(ptr, bytes) };
            return;
        }
        // Where the driver cannot be called any more (the process ends) the system takes the memory back.
        if let Ok(entered) = self.device.enter() {
            // SAFETY: the caller's promise; the block came from `host_alloc`.
            let _ = unsafe { entered.driver().host_free(ptr) };
        }
    }

    fn is_locked(&self) -> Result<(), &str> {
        self.refused.get().map_or(Ok(()), |reason| Err(reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Pool;
    use crate::device::fake::Fake;

    fn pool(fake: &Arc<Fake>) -> Arc<Pool> {
        Pool::of(Arc::new(PageLocked::new(Device::with(Arc::clone(fake) as _, 0))), 8 << 20)
    }

    #[test]
    fn blocks_are_page_locked_cleared_and_used_again() {
        let fake = Fake::new();
        let pool = pool(&fake);
        let mut lease = pool.lease(200_000).unwrap();
        assert!(lease.as_mut_slice().iter().all(|b| *b == 0));
        #[cfg(target_os = "linux")]
        assert_eq!(fake.near(), u64::from(Preferring::node(0).is_some()), "near the device, where one may choose");
        let base = lease.base();
        drop(lease);
        let calls = fake.calls();
        assert_eq!(pool.lease(200_000).unwrap().base(), base);
        assert_eq!((fake.calls(), pool.is_locked()), (calls, Ok(())));
        drop(pool);
        assert!(fake.left().contains("0 host blocks"), "{}", fake.left());
        assert!(fake.violations().is_empty());
    }

    #[test]
    fn a_refusal_is_remembered_once_and_ordinary_blocks_follow() {
        let fake = Fake::new();
        fake.limit_host(300_000);
        let pool = pool(&fake);
        let mut leases: Vec<_> = (0..4).map(|_| pool.lease(200_000).unwrap()).collect();
        for lease in &mut leases {
            lease.as_mut_slice().fill(7);
        }
        let reason = pool.is_locked().unwrap_err().to_owned();
        assert!(reason.contains("CUDA_ERROR_OUT_OF_MEMORY") && reason.contains("ulimit -l"), "{reason}");
        // one that was granted, one that was refused, and nobody asked again
        assert_eq!(fake.calls(), 4);
        fake.limit_host(u64::MAX);
        leases.push(pool.lease(4 << 20).unwrap());
        assert_eq!((fake.calls(), pool.is_locked()), (4, Err(&*reason)));
        drop((leases, pool));
        assert!(fake.left().contains("0 host blocks"), "{}", fake.left());
        assert!(fake.violations().is_empty());
    }
}
