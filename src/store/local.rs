//! Files below a directory, read with `pread` (never mapped: a file that shrinks under a map is a SIGBUS).
//!
//! Direct reads (`O_DIRECT`) go past the page cache, which a data set many times larger than memory would churn
//! through to no use. They are of whole blocks, into page-aligned leases. Where a file system refuses them the file
//! is read through the page cache, its pages are given up at once, and [`RangeRead::refused_direct`] says so.
//! Metadata documents are always read through the page cache.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::files::{OpenFile, OpenFiles};
use super::{Entry, IoShape, OpenObject, RangeRead, ReadFuture, Standing, Store};
use crate::base::error::{Error, Result};

/// Metadata documents beyond this are not read (consolidated metadata of a large store is a few MiB).
const MAX_METADATA_BYTES: u64 = 256 << 20;

/// The files of one array or group on a local or network file system.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    files: Arc<OpenFiles>,
    /// Handles belong to one store: a store opened later at the same path may find other files there.
    number: u64,
    /// Reads are direct, of whole blocks of this many bytes.
    direct_block: Option<u64>,
    /// The file that the root must be.
    pinned: OnceLock<Identity>,
}

/// What tells a file from one that took its place, or from itself before it was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(meta: &std::fs::Metadata) -> Self {
        Self { device: meta.dev(), inode: meta.ino(), bytes: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()) }
    }
}

fn replaced() -> io::Error {
    io::Error::other("it was replaced or changed after it was opened; open it again")
}

static STORES: AtomicU64 = AtomicU64::new(0);

impl Drop for LocalStore {
    fn drop(&mut self) {
        self.files.forget(self.number);
    }
}

/// `open` flag of direct reads, where there is one.
#[cfg(target_os = "linux")]
const O_DIRECT: libc::c_int = libc::O_DIRECT;
#[cfg(not(target_os = "linux"))]
const O_DIRECT: libc::c_int = 0;

/// Opens a regular file; a pipe or a device in its place would block or never end.
fn open_regular(path: &Path, flags: libc::c_int) -> io::Result<(File, std::fs::Metadata)> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | flags).open(path)?;
    let meta = file.metadata()?;
    if meta.is_file() {
        return Ok((file, meta));
    }
    Err(io::Error::other("is not a regular file"))
}

impl LocalStore {
    /// The files below `root`, with handles kept in `files`.
    pub fn new(root: impl Into<PathBuf>, files: Arc<OpenFiles>) -> Self {
        Self {
            root: root.into(),
            files,
            number: STORES.fetch_add(1, Ordering::Relaxed),
            direct_block: None,
            pinned: OnceLock::new(),
        }
    }

    /// Has reads go past the page cache where the file system allows it.
    pub fn set_direct(&mut self) {
        // SAFETY: sysconf only reads a constant of the system.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0);
        // a page suits every file system that has direct reads (Lustre asks for pages, others for disk sectors)
        self.direct_block = Some(page.max(4096));
    }

    fn open(&self, path: &Path) -> io::Result<OpenFile> {
        if self.direct_block.is_some() && O_DIRECT != 0 {
            match open_regular(path, O_DIRECT) {
                Err(e) if refuses_direct(&e) => {}
                opened => return self.checked(opened?, true),
            }
        }
        self.checked(open_regular(path, 0)?, false)
    }

    /// The opened file, if it is the one that it must be.
    fn checked(&self, (file, meta): (File, std::fs::Metadata), direct: bool) -> io::Result<OpenFile> {
        match self.pinned.get() {
            Some(pinned) if *pinned != Identity::of(&meta) => Err(replaced()),
            _ => Ok(OpenFile::new(file, direct)),
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        if key.is_empty() { self.root.clone() } else { self.root.join(key) }
    }
}

/// Whether this is how a file system says that it has no direct reads, or none of this alignment.
fn refuses_direct(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

fn truncated() -> io::Error {
    io::Error::other("the file ends before this range; it was truncated or replaced")
}

fn read_buffered(file: &OpenFile, read: &mut RangeRead) -> io::Result<()> {
    let at = read.range.start;
    file.file.read_exact_at(read.wanted_mut(), at).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => truncated(),
        _ => e,
    })
}

/// Reads whole blocks directly; where that is refused, through the page cache without leaving anything there.
fn read_past_cache(file: &OpenFile, read: &mut RangeRead, block: usize) -> io::Result<()> {
    if file.is_direct() {
        match read_direct(file, read, block) {
            Err(e) if refuses_direct(&e) => file.give_up_direct(),
            done => return done,
        }
    }
    read.refused_direct = true;
    read_buffered(file, read)?;
    #[cfg(target_os = "linux")]
    // SAFETY: advice on a descriptor that `file` keeps open; it may be ignored.
    unsafe {
        let (start, len) = (read.range.start as libc::off_t, (read.range.end - read.range.start) as libc::off_t);
        libc::posix_fadvise(file.file.as_raw_fd(), start, len, libc::POSIX_FADV_DONTNEED)
    };
    Ok(())
}

fn read_direct(file: &OpenFile, read: &mut RangeRead, block: usize) -> io::Result<()> {
    let (start, needed) = (read.span.start, (read.range.end - read.span.start) as usize);
    let buffer = read.buffer.as_mut_slice();
    let mut have = 0;
    while have < needed {
        // a short read is the end of the file or a hiccup: only the read after it tells, and that begins at a block
        let from = have / block * block;
        let n = match file.file.read_at(&mut buffer[from..], start + from as u64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            done => done?,
        };
        if from + n <= have {
            return Err(truncated());
        }
        have = from + n;
    }
    Ok(())
}

/// A file that small parts are read of, through the page cache.
#[derive(Debug)]
struct SmallReads {
    file: File,
    path: PathBuf,
}

impl OpenObject for SmallReads {
    fn read_at(&self, start: u64, into: &mut [u8]) -> Result<()> {
        let range = start..start.saturating_add(into.len() as u64);
        self.file.read_exact_at(into, start).map_err(|e| Error::io(self.path.display(), Some(&range), e))
    }
}

impl Store for LocalStore {
    fn io_shape(&self) -> IoShape {
        IoShape { alignment_bytes: self.direct_block.unwrap_or(1), ..IoShape::LOCAL }
    }

    fn look(&self, key: &str) -> Result<Option<Standing>> {
        // what cannot be looked at is not there for us, as for `Path::is_file`
        let Ok(meta) = std::fs::metadata(self.path(key)) else { return Ok(None) };
        let object = meta.is_file().then_some(Standing::Object(meta.len()));
        Ok(object.or(meta.is_dir().then_some(Standing::Prefix)))
    }

    fn list(&self, prefix: &str, depth: usize, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Entry>> {
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
                // directories that nobody asked for are not walked: there may be many, or links in a circle
                if !wanted(&name) {
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
            open_regular(&path, 0)?.0.take(MAX_METADATA_BYTES + 1).read_to_end(&mut bytes)?;
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

    fn open(&self, key: &str) -> Result<Box<dyn OpenObject>> {
        let path = self.path(key);
        let (file, meta) = open_regular(&path, 0).map_err(|e| Error::io(path.display(), None, e))?;
        match self.pinned.get() {
            Some(pinned) if *pinned != Identity::of(&meta) => Err(Error::io(path.display(), None, replaced())),
            _ => Ok(Box::new(SmallReads { file, path })),
        }
    }

    fn pin(&self) -> Result<u64> {
        let fail = |e| Error::io(self.root.display(), None, e);
        let now = Identity::of(&std::fs::metadata(&self.root).map_err(fail)?);
        if *self.pinned.get_or_init(|| now) == now { Ok(now.bytes) } else { Err(fail(replaced())) }
    }

    fn read_ranges(self: Arc<Self>, key: Arc<str>, mut reads: Vec<RangeRead>) -> ReadFuture {
        Box::pin(async move {
            let joined = tokio::task::spawn_blocking(move || {
                let fail = |range, e| Error::io(self.path(&key).display(), range, e);
                let file = self.files.get(self.number, &key, || self.open(&self.path(&key))).map_err(|e| fail(None, e))?;
                if let Some(pinned) = self.pinned.get() {
                    // a handle shows what is written into the file after it was opened
                    let now = file.file.metadata().map(|meta| Identity::of(&meta)).map_err(|e| fail(None, e))?;
                    if *pinned != now {
                        return Err(fail(None, replaced()));
                    }
                }
                for read in &mut reads {
                    let done = match self.direct_block {
                        None => read_buffered(&file, read),
                        Some(block) => read_past_cache(&file, read, block as usize),
                    };
                    done.map_err(|e| fail(Some(&read.range), e))?;
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

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::arena::Pool;
    use proptest::prelude::*;

    fn read(store: &Arc<LocalStore>, key: &str, ranges: &[Range<u64>]) -> Result<Vec<(Vec<u8>, bool)>> {
        let pool = Pool::new(0);
        let reads = ranges.iter().map(|r| RangeRead::new(&**store, r.clone(), &pool)).collect::<Result<_>>()?;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let reads = runtime.block_on(Arc::clone(store).read_ranges(key.into(), reads))?;
        Ok(reads.into_iter().map(|mut r| (r.wanted_mut().to_vec(), r.refused_direct)).collect())
    }

    fn store(root: &Path, block: Option<u64>) -> Arc<LocalStore> {
        let mut store = LocalStore::new(root, OpenFiles::new(2));
        store.direct_block = block;
        Arc::new(store)
    }

    fn write(len: usize) -> (tempfile::TempDir, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
        std::fs::write(dir.path().join("0"), &bytes).unwrap();
        (dir, bytes)
    }

    proptest! {
        #![proptest_config(crate::base::fuzz::cases(40))]
        #[test]
        fn direct_reads_give_the_bytes_of_buffered_ones(
            len in 0usize..300_000, raw in prop::collection::vec((0.0f64..=1.0, 0.0f64..=1.0), 1..8), block in prop::sample::select(vec![None, Some(4096u64), Some(16384)]),
        ) {
            let (dir, bytes) = write(len);
            let mut direct = LocalStore::new(dir.path(), OpenFiles::new(2));
            direct.set_direct();
            direct.direct_block = block.or(direct.direct_block);
            let at = |x: f64| (x * len as f64) as u64;
            let ranges: Vec<Range<u64>> = raw.iter().map(|&(a, b)| at(a.min(b))..at(a.max(b))).collect();
            for ((got, _), range) in read(&Arc::new(direct), "0", &ranges).unwrap().into_iter().zip(&ranges) {
                prop_assert_eq!(got, &bytes[range.start as usize..range.end as usize]);
            }
        }
    }

    #[test]
    fn a_direct_read_past_the_end_is_an_error_that_names_the_range() {
        for len in [0, 100, 4096, 5000, 8192] {
            let (dir, _) = write(len);
            for block in [None, Some(4096)] {
                let end = len as u64 + 1;
                let range = (end - 1).min(10)..end;
                let error = read(&store(dir.path(), block), "0", std::slice::from_ref(&range)).unwrap_err().to_string();
                assert!(error.contains("truncated") && error.contains(&format!("bytes {}..{end}", range.start)), "{error}");
            }
        }
    }

    #[test]
    fn a_pinned_file_that_was_replaced_or_changed_is_refused() {
        let (dir, bytes) = write(5000);
        let path = dir.path().join("0");
        // a file that takes another's place is seen once that is opened again, what is written into it at once
        for (change, while_open) in [
            (&|| std::fs::write(&path, &bytes[..4999]).unwrap(), true),
            (
                &|| {
                    std::fs::write(dir.path().join("1"), &bytes).unwrap();
                    std::fs::rename(dir.path().join("1"), &path).unwrap();
                },
                false,
            ),
            (&|| File::options().write(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap(), true),
        ] as [(&dyn Fn(), bool); 3]
        {
            std::fs::write(&path, &bytes).unwrap();
            let files = OpenFiles::new(1);
            let store = Arc::new(LocalStore::new(&path, Arc::clone(&files)));
            assert_eq!(store.pin().unwrap(), 5000);
            let range = 1000..2000;
            let whole = read(&store, "", std::slice::from_ref(&range)).unwrap();
            assert_eq!(whole[0].0, bytes[1000..2000]);
            if !while_open {
                files.forget(store.number);
            }
            change();
            for error in [read(&store, "", std::slice::from_ref(&range)).unwrap_err(), store.pin().unwrap_err()] {
                let error = error.to_string();
                assert!(error.contains(&path.display().to_string()) && error.contains("replaced or changed"), "{error}");
            }
        }
    }

    #[test]
    fn spans_are_whole_blocks() {
        let direct = store(Path::new("/"), Some(4096));
        assert_eq!(direct.io_shape().span(&(5000..9000)), 4096..12288);
        assert_eq!(direct.io_shape().span(&(4096..8192)), 4096..8192);
        assert_eq!(store(Path::new("/"), None).io_shape().span(&(5..9)), 5..9);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_refusal_falls_back_to_buffered_reads_and_is_reported() {
        // the kernel's own files have no direct reads: refused when opened
        let version = read(&store(Path::new("/proc"), Some(4096)), "version", &[1..5, 0..5]).unwrap();
        assert_eq!(version, [(b"inux".to_vec(), true), (b"Linux".to_vec(), true)]);
        // blocks that no disk has: refused when read, at least where the file system is on a disk
        let (dir, bytes) = write(10_000);
        let odd = read(&store(dir.path(), Some(3)), "0", &[1000..2000, 5000..10_000]).unwrap();
        assert_eq!((&odd[0].0[..], &odd[1].0[..]), (&bytes[1000..2000], &bytes[5000..10_000]));
    }
}
