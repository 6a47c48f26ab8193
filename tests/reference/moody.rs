//! A store around another one for tests and benches: it counts, waits and fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use annbatch::store::{Entry, IoShape, OpenObject, RangeRead, ReadFuture, Standing, Store};
use annbatch::{Error, Result};

/// Any store, told to hold back, delay or fail its reads, which it counts.
#[derive(Debug)]
pub struct Moody {
    pub inner: Arc<dyn Store>,
    pub mood: Arc<Mood>,
}

#[derive(Debug, Default)]
pub struct Mood {
    pub reads: AtomicU64,
    pub bytes: AtomicU64,
    /// Calls that the reads came in, and the most reads of one.
    pub calls: AtomicU64,
    pub most_per_call: AtomicU64,
    /// Reads are held back once there were this many; 0 means never.
    pub hold_from: AtomicU64,
    /// Of the reads, those as long as the index of a shard of `setup`, which no chunk is.
    pub index_reads: AtomicU64,
    pub hold: AtomicBool,
    /// Reads of chunks and indexes that are under way, and the most there were at once.
    pub in_flight: AtomicU64,
    pub peak: AtomicU64,
    /// What every read takes at least.
    pub latency_us: AtomicU64,
    /// What the reads took, and how many there were of them, since somebody set these to 0.
    pub took_ns: AtomicU64,
    pub done: AtomicU64,
    /// Reads of `data` that begin at or behind this byte fail; 0 means none do.
    pub fail_from: AtomicU64,
}

impl Store for Moody {
    fn look(&self, key: &str) -> Result<Option<Standing>> {
        self.inner.look(key)
    }

    fn list(&self, prefix: &str, depth: usize, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Entry>> {
        self.inner.list(prefix, depth, wanted)
    }

    fn open(&self, key: &str) -> Result<Box<dyn OpenObject>> {
        self.inner.open(key)
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.inner.get(key)
    }

    fn pin(&self) -> Result<u64> {
        self.inner.pin()
    }

    fn io_shape(&self) -> IoShape {
        self.inner.io_shape()
    }

    fn read_ranges(self: Arc<Self>, key: Arc<str>, reads: Vec<RangeRead>) -> ReadFuture {
        Box::pin(async move {
            let number = self.mood.reads.fetch_add(reads.len() as u64, Ordering::SeqCst);
            self.mood.calls.fetch_add(1, Ordering::SeqCst);
            self.mood.most_per_call.fetch_max(reads.len() as u64, Ordering::SeqCst);
            self.mood.bytes.fetch_add(reads.iter().map(|r| r.range.end - r.range.start).sum(), Ordering::SeqCst);
            let now = self.mood.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
            self.mood.peak.fetch_max(now, Ordering::SeqCst);
            let _ends = OnDrop(|| self.mood.in_flight.fetch_sub(1, Ordering::SeqCst));
            let indexes = reads.iter().filter(|r| r.range.end - r.range.start == 4 * 16 + 4).count();
            self.mood.index_reads.fetch_add(indexes as u64, Ordering::SeqCst);
            let late = || (1..=number).contains(&self.mood.hold_from.load(Ordering::SeqCst));
            while self.mood.hold.load(Ordering::SeqCst) || late() {
                tokio::task::yield_now().await;
            }
            let n = reads.len() as u64;
            let wait = Duration::from_micros(n * self.mood.latency_us.load(Ordering::SeqCst));
            let start = Instant::now();
            if !wait.is_zero() {
                // in a thread of those that read, so that a read in flight is a thread asleep
                tokio::task::spawn_blocking(move || std::thread::sleep(wait)).await.unwrap();
            }
            let limit = self.mood.fail_from.load(Ordering::SeqCst);
            if limit > 0 && self.inner.display("").ends_with("data") && reads.iter().any(|r| r.range.start >= limit) {
                return Err(Error::io(self.inner.display(&key), Some(&reads[0].range), std::io::Error::from_raw_os_error(5)));
            }
            let result = Arc::clone(&self.inner).read_ranges(key, reads).await;
            self.mood.took_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::SeqCst);
            self.mood.done.fetch_add(n, Ordering::SeqCst);
            result
        })
    }

    fn display(&self, key: &str) -> String {
        self.inner.display(key)
    }
}

struct OnDrop<T, F: Fn() -> T>(F);

impl<T, F: Fn() -> T> Drop for OnDrop<T, F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
