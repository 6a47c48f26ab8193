//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, even if a thread panicked while it had it locked. Tasks catch panics, which become errors of their batch; what lies
/// behind a lock of this crate is whole between any two statements, so that the others can go on with it.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_one_thread_does_not_stop_the_others() {
        let number = Mutex::new(3);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _held = lock(&number);
            panic!("while it is locked");
        }));
        assert!(panicked.is_err() && number.is_poisoned());
        assert_eq!(*lock(&number), 3);
    }
}
