//! Survival of `fork()`.
//!
//! A child inherits memory but no threads: a mutex that another thread held stays locked for ever, a pool
//! has no workers. Every table, pool and lease therefore remembers the generation it was made in and is
//! abandoned, never locked, in a later one.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

static GENERATION: AtomicU64 = AtomicU64::new(0);
static HOOK: Once = Once::new();

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// Number of forks between the process that first asked and this one.
pub(crate) fn generation() -> u64 {
    HOOK.call_once(|| {
        // SAFETY: `in_child` only touches a lock-free atomic, which is allowed after a fork.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
    GENERATION.load(Ordering::Relaxed)
}
