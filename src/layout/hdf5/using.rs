//! Which threads use libhdf5, so that the child of a fork knows whether one was in the middle of it.
//!
//! The child would wait for ever for a lock that such a thread held, or find the library's tables half changed. It is told
//! so instead.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::error::{Error, Result};
use crate::base::fork;

/// The generation (see [`fork`]) in its upper half, how many use libhdf5 in it in its lower one.
static USERS: AtomicU64 = AtomicU64::new(0);

/// Held while libhdf5 may be called.
#[derive(Debug)]
pub(super) struct Using {
    generation: u64,
}

/// `users` with one more in `generation`; `None` if some of an earlier one never ended.
fn one_more(users: u64, generation: u64) -> Option<u64> {
    let generation = generation & 0xffff_ffff;
    match (users >> 32 == generation, users & 0xffff_ffff) {
        (true, _) => Some(users + 1),
        (false, 0) => Some(generation << 32 | 1),
        (false, _) => None,
    }
}

impl Using {
    /// # Errors
    /// [`Closed`](Error::Closed) in a process that was forked while another thread of its parent used libhdf5.
    pub(super) fn begin() -> Result<Self> {
        let generation = fork::generation();
        let counted = USERS.fetch_update(Ordering::AcqRel, Ordering::Acquire, |users| one_more(users, generation));
        counted.map(|_| Self { generation }).map_err(|_| {
            Error::closed(
                "this process was forked while another thread was opening an HDF5 file, so it cannot open any; fork before or \
                 after that, or start processes with \"spawn\"",
            )
        })
    }
}

impl Drop for Using {
    fn drop(&mut self) {
        if self.generation == fork::generation() {
            USERS.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_knows_whether_its_parent_was_in_the_middle_of_it() {
        let two = one_more(one_more(0, 0).unwrap(), 0).unwrap();
        assert_eq!((two, one_more(two, 1)), (2, None));
        let child = one_more(0, 1).unwrap();
        assert_eq!((child, one_more(child, 1)), (1 << 32 | 1, Some(1 << 32 | 2)));
        assert_eq!(one_more(1 << 32, 2), Some(2 << 32 | 1));
    }
}
