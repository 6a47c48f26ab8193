//! Survival of `fork()`.
//!
//! A child inherits memory but no threads: a mutex that another thread held stays locked for ever, a pool
//! has no workers. Every table, pool and lease therefore remembers the generation it was made in and is
//! abandoned, never locked, in a later one.
//!
//! What libraries make once per process (the collector of rayon's queues, zarrs' tables of names) has no generation, and a
//! child would wait for ever for the thread that was making it. A fork waits for such a thread instead: [`uninterrupted`].

use std::sync::Once;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

static GENERATION: AtomicU64 = AtomicU64::new(0);
static HOOK: Once = Once::new();

/// Set while a fork waits or happens.
const FORK: u32 = 1 << 31;
/// How many calls of [`uninterrupted`] are under way, and [`FORK`]. No lock: a fork begins in one process and ends in two.
static UNDER_WAY: AtomicU32 = AtomicU32::new(0);

extern "C" fn before() {
    // one fork at a time; nothing begins after this, so that what is under way comes to an end
    while UNDER_WAY.fetch_or(FORK, Ordering::Acquire) & FORK != 0 {
        thread::yield_now();
    }
    while UNDER_WAY.load(Ordering::Acquire) != FORK {
        thread::yield_now();
    }
}

extern "C" fn in_parent() {
    UNDER_WAY.store(0, Ordering::Release);
}

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    UNDER_WAY.store(0, Ordering::Release);
}

/// What `work` returns, of which no child of a fork sees the half: forks in other threads wait until it is done. It should
/// take no longer than a start of threads does, and may neither fork nor call this again.
pub(crate) fn uninterrupted<T>(work: impl FnOnce() -> T) -> T {
    struct UnderWay;
    impl Drop for UnderWay {
        fn drop(&mut self) {
            UNDER_WAY.fetch_sub(1, Ordering::Release);
        }
    }
    generation();
    loop {
        let n = UNDER_WAY.load(Ordering::Relaxed) & !FORK;
        if UNDER_WAY.compare_exchange_weak(n, n + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            break;
        }
        thread::yield_now();
    }
    let _under_way = UnderWay;
    work()
}

/// Number of forks between the process that first asked and this one.
pub(crate) fn generation() -> u64 {
    HOOK.call_once(|| {
        // SAFETY: the handlers only touch lock-free atomics, which is allowed after a fork.
        unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
    GENERATION.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;

    /// What `code` gives in a child.
    fn in_a_child(code: impl FnOnce() -> i32) -> i32 {
        // SAFETY: the child looks at atomics and ends.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        if child == 0 {
            // SAFETY: nothing of the parent's is torn down.
            unsafe { libc::_exit(code()) };
        }
        let mut status = 0;
        // SAFETY: a child of this process, and a place for its status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(libc::WIFEXITED(status), "{status:#x}");
        libc::WEXITSTATUS(status)
    }

    #[test]
    #[cfg_attr(miri, ignore = "forks")]
    fn no_child_sees_the_half_of_what_is_made_once() {
        let (begun, half) = (Barrier::new(2), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                uninterrupted(|| {
                    half.store(true, Ordering::SeqCst);
                    begun.wait();
                    thread::sleep(Duration::from_millis(50));
                    half.store(false, Ordering::SeqCst);
                });
            });
            begun.wait();
            let mine = generation();
            let seen = in_a_child(|| {
                let usable = uninterrupted(|| generation() == mine + 1);
                i32::from(half.load(Ordering::SeqCst)) + 2 * i32::from(!usable)
            });
            assert_eq!(seen, 0);
        });
    }

    #[test]
    #[cfg_attr(miri, ignore = "forks")]
    fn forks_and_what_they_wait_for_in_many_threads() {
        let made = AtomicU64::new(0);
        assert!(std::panic::catch_unwind(|| uninterrupted(|| panic!("on purpose"))).is_err());
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..20).for_each(|_| assert_eq!(in_a_child(|| uninterrupted(|| 7)), 7)));
                scope.spawn(|| {
                    for _ in 0..200 {
                        uninterrupted(|| made.fetch_add(1, Ordering::Relaxed));
                    }
                });
            }
        });
        assert_eq!(made.into_inner(), 600);
    }
}
