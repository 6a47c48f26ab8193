//! Files below a directory, read with `pread` (never mapped: a file that shrinks under a map is a SIGBUS).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::{Entry, RangeRead, ReadFuture, Store};
use crate::error::{Error, Result};

/// Metadata documents beyond this are not read (consolidated metadata of a large store is a few MiB).
const MAX_METADATA_BYTES: u64 = 256 << 20;

/// The files of one array or group on a local or network file system.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    files: Arc<OpenFiles>,
    /// Handles belong to one store: a store opened later at the same path may find other files there.
    number: u64,
}

static STORES: AtomicU64 = AtomicU64::new(0);

/// Open file handles shared by many stores and bounded, so that thousands of datasets fit `ulimit -n`.
#[derive(Debug)]
pub struct OpenFiles {
    limit: usize,
    open: Mutex<Handles>,
}

#[derive(Debug, Default)]
struct Handles {
    by_path: HashMap<(u64, PathBuf), (Arc<File>, u64)>,
    clock: u64,
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

    fn get(&self, store: u64, path: &Path) -> io::Result<Arc<File>> {
        let place = (store, path.to_owned());
        {
            let mut open = self.open.lock().expect("file table lock");
            open.clock += 1;
            let now = open.clock;
            if let Some((file, used)) = open.by_path.get_mut(&place) {
                *used = now;
                return Ok(Arc::clone(file));
            }
        }
        // opened outside the lock: a slow metadata server must not stop the other readers
        let file = Arc::new(open_regular(path)?);
        let mut open = self.open.lock().expect("file table lock");
        if open.by_path.len() >= self.limit
            && let Some(oldest) = open.by_path.iter().min_by_key(|(_, (_, used))| *used).map(|(p, _)| p.clone())
        {
            open.by_path.remove(&oldest);
        }
        let now = open.clock;
        open.by_path.insert(place, (Arc::clone(&file), now));
        Ok(file)
    }

    fn forget(&self, store: u64) {
        if let Ok(mut open) = self.open.lock() {
            open.by_path.retain(|(owner, _), _| *owner != store);
        }
    }
}

impl Drop for LocalStore {
    fn drop(&mut self) {
        self.files.forget(self.number);
    }
}

/// Opens a regular file; a pipe or a device in its place would block or never end.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::other("is not a regular file"))
}

impl LocalStore {
    /// The files below `root`, with handles kept in `files`.
    pub fn new(root: impl Into<PathBuf>, files: Arc<OpenFiles>) -> Self {
        Self { root: root.into(), files, number: STORES.fetch_add(1, Ordering::Relaxed) }
    }

    fn path(&self, key: &str) -> PathBuf {
        if key.is_empty() { self.root.clone() } else { self.root.join(key) }
    }
}

impl Store for LocalStore {
    fn list(&self, prefix: &str, depth: usize) -> Result<Vec<Entry>> {
        let base = self.path(prefix);
        let mut found = Vec::new();
        // with each directory the identities of those above it: a link back to one of them leads in a circle
        let identity = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let root = std::fs::metadata(&base).map_err(|e| Error::io(base.display(), None, e))?;
        let mut pending = vec![(base, String::new(), vec![identity(root)])];
        while let Some((dir, key, above)) = pending.pop() {
            let fail = |e| Error::io(dir.display(), None, e);
            for entry in std::fs::read_dir(&dir).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let Ok(name) = entry.file_name().into_string() else { continue };
                // directories that hold no chunks are not walked: there may be many, or links in a circle
                if !name.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'c' | b'.')) {
                    continue;
                }
                let key = if key.is_empty() { name } else { format!("{key}/{name}") };
                // follows links; one that leads nowhere is kept as what is no object, so that a chunk behind
                // it is missed rather than taken for fill values
                let Ok(meta) = std::fs::metadata(entry.path()) else {
                    found.push(Entry { key, size: None });
                    continue;
                };
                if meta.is_dir() {
                    if above.len() < depth {
                        let identity = identity(meta);
                        if above.contains(&identity) {
                            let circle = io::Error::other("links back to a directory above it");
                            return Err(Error::io(entry.path().display(), None, circle));
                        }
                        let mut chain = above.clone();
                        chain.push(identity);
                        pending.push((entry.path(), key.clone(), chain));
                    }
                    found.push(Entry { key, size: None });
                } else {
                    found.push(Entry { key, size: meta.is_file().then_some(meta.len()) });
                }
            }
        }
        Ok(found)
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path(key);
        let read = || {
            let mut bytes = Vec::new();
            open_regular(&path)?.take(MAX_METADATA_BYTES + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > MAX_METADATA_BYTES {
                return Err(io::Error::other(format!("is larger than {MAX_METADATA_BYTES} bytes, which is no metadata")));
            }
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(Error::io(path.display(), None, e)),
        }
    }

    fn read_ranges(self: Arc<Self>, key: Arc<str>, mut reads: Vec<RangeRead>) -> ReadFuture {
        Box::pin(async move {
            let joined = tokio::task::spawn_blocking(move || {
                let path = self.path(&key);
                let file = self.files.get(self.number, &path).map_err(|e| Error::io(path.display(), None, e))?;
                for read in &mut reads {
                    let at = read.range.start;
                    file.read_exact_at(read.buffer.as_mut_slice(), at).map_err(|e| {
                        let short = e.kind() == io::ErrorKind::UnexpectedEof;
                        let e = if short {
                            io::Error::other("the file ends before this range; it was truncated or replaced")
                        } else {
                            e
                        };
                        Error::io(path.display(), Some(&read.range), e)
                    })?;
                }
                Ok(reads)
            });
            match joined.await {
                Ok(result) => result,
                Err(e) if e.is_panic() => Err(Error::from_panic(&*e.into_panic())),
                Err(_) => Err(Error::closed("reading was cancelled")),
            }
        })
    }

    fn display(&self, key: &str) -> String {
        self.path(key).display().to_string()
    }
}
