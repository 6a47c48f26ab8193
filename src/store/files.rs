//! Open file handles: shared by many stores, bounded in number.

use crate::base::lock::lock;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A file opened for reading.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    /// Whether reads bypass the page cache; turned off for good when the file system refuses one.
    direct: AtomicBool,
}

impl OpenFile {
    pub(super) fn new(file: File, direct: bool) -> Self {
        Self { file, direct: AtomicBool::new(direct) }
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire)
    }

    /// Reads through the page cache from now on.
    pub(super) fn give_up_direct(&self) {
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            let fd = self.file.as_raw_fd();
            // SAFETY: plain calls on a descriptor that `self` keeps open.
            unsafe {
                let flags = libc::fcntl(fd, libc::F_GETFL);
                libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_DIRECT);
            }
        }
        self.direct.store(false, Ordering::Release);
    }
}

type HandleKey = (u64, Arc<str>);

/// Open file handles shared by many stores and bounded, so that thousands of datasets fit `ulimit -n`.
#[derive(Debug)]
pub struct OpenFiles {
    limit: usize,
    open: Mutex<Handles>,
}

/// Handles by (store, key), and whom to close next: the clock algorithm, which spares once what was used since the
/// hand last passed (Corbató 1968). A miss costs the same however many are open.
#[derive(Debug, Default)]
struct Handles {
    by_place: HashMap<HandleKey, (Arc<OpenFile>, bool)>,
    clock: VecDeque<HandleKey>,
}

impl Handles {
    fn make_room(&mut self, limit: usize) {
        while self.by_place.len() >= limit {
            let Some(place) = self.clock.pop_front() else { return };
            match self.by_place.get_mut(&place) {
                Some((_, used)) if *used => {
                    *used = false;
                    self.clock.push_back(place);
                }
                _ => {
                    self.by_place.remove(&place);
                }
            }
        }
    }
}

impl OpenFiles {
    /// A table of at most `limit` open files.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit: limit.max(1), open: Mutex::default() })
    }

    /// A quarter of the process's limit on open files, at most 1,024: the rest is the host program's.
    pub fn for_this_process() -> Arc<Self> {
        let mut limit = libc::rlimit { rlim_cur: 256, rlim_max: 256 };
        // SAFETY: `limit` is a valid place for the answer; on failure the conservative default stays.
        unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
        Self::new(usize::try_from(limit.rlim_cur / 4).unwrap_or(1024).min(1024))
    }

    /// The handle of `key` in the store with this number, by `open` unless it is open already.
    pub(super) fn get(&self, store: u64, key: &Arc<str>, open: impl Fn() -> io::Result<OpenFile>) -> io::Result<Arc<OpenFile>> {
        let place = (store, Arc::clone(key));
        if let Some((file, used)) = lock(&self.open).by_place.get_mut(&place) {
            *used = true;
            return Ok(Arc::clone(file));
        }
        // opened outside the lock: a slow metadata server must not stop the other readers
        let file = match open() {
            // the host program opened more than the rest: give back what this table holds
            Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                *lock(&self.open) = Handles::default();
                open()?
            }
            opened => opened?,
        };
        let mut handles = lock(&self.open);
        if let Some((file, _)) = handles.by_place.get(&place) {
            // another reader was faster
            return Ok(Arc::clone(file));
        }
        handles.make_room(self.limit);
        let file = Arc::new(file);
        handles.by_place.insert(place.clone(), (Arc::clone(&file), false));
        handles.clock.push_back(place);
        Ok(file)
    }

    /// Lets go of a store's handles.
    pub(super) fn forget(&self, store: u64) {
        let mut handles = lock(&self.open);
        handles.by_place.retain(|(owner, _), _| *owner != store);
        handles.clock.retain(|(owner, _)| *owner != store);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stays_bounded_and_keeps_what_is_used() {
        let (files, dir) = (OpenFiles::new(4), tempfile::tempdir().unwrap());
        let path = |i: u32| dir.path().join(i.to_string());
        let opened = std::cell::Cell::new(0);
        let get = |store: u64, i: u32| {
            let open = || {
                opened.set(opened.get() + 1);
                Ok(OpenFile::new(File::open(path(i))?, false))
            };
            files.get(store, &i.to_string().into(), open).unwrap()
        };
        for i in 0..100 {
            std::fs::write(path(i), b"x").unwrap();
        }
        for i in 1..100 {
            get(0, 0);
            get(0, i);
            let handles = files.open.lock().unwrap();
            assert!(handles.by_place.len() <= 4 && handles.clock.len() == handles.by_place.len());
        }
        assert_eq!(opened.get(), 100, "the file used in between stayed open");
        get(1, 99);
        assert_eq!(opened.get(), 101, "handles belong to one store");
        files.forget(0);
        assert_eq!(files.open.lock().unwrap().by_place.len(), 1);
        assert!(files.get(0, &"none".into(), || Ok(OpenFile::new(File::open(dir.path().join("none"))?, false))).is_err());
    }

    #[test]
    fn a_full_process_gets_the_handles_of_the_table_back() {
        let (files, dir) = (OpenFiles::new(4), tempfile::tempdir().unwrap());
        let path = dir.path().join("f");
        std::fs::write(&path, b"x").unwrap();
        let open = || Ok(OpenFile::new(File::open(&path)?, false));
        let first = files.get(0, &"a".into(), open).unwrap();
        let full = std::cell::Cell::new(true);
        let when_full = || {
            if full.replace(false) {
                return Err(io::Error::from_raw_os_error(libc::EMFILE));
            }
            open()
        };
        files.get(0, &"b".into(), when_full).unwrap();
        assert_eq!(Arc::strong_count(&first), 1);
    }
}
