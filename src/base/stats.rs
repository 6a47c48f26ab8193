//! Counters and gauges of one pipeline, cheap enough to be always on: relaxed atomics, no lock per chunk.

use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::Value;

use crate::base::nvtx;

macro_rules! stats {
    (counters { $($(#[$doc:meta])* $name:ident,)+ } gauges { $($(#[$gauge_doc:meta])* $gauge:ident,)+ }) => {
        /// Counters, which only grow, and gauges, which say how it is now. Times are nanoseconds summed over threads.
        #[derive(Debug, Default)]
        pub struct StageStats {
            $($(#[$doc])* pub $name: Counter,)+
            $($(#[$gauge_doc])* pub $gauge: Gauge,)+
        }

        impl StageStats {
            /// All of them by name.
            pub fn to_json(&self) -> Value {
                let all = [$((stringify!($name), self.$name.get()),)+ $((stringify!($gauge), self.$gauge.get()),)+];
                Value::Object(all.into_iter().map(|(name, n)| (name.to_owned(), n.into())).collect())
            }
        }
    };
}

stats! {
counters {
    /// Reads issued, shard indexes included.
    reads,
    /// Bytes read, gaps and whole blocks of direct reads included.
    bytes_read,
    /// Reads that were to bypass the page cache (`direct_io`), on a file system that refused: they went through it.
    direct_reads_refused,
    /// Bytes after decompression.
    bytes_decoded,
    /// Chunks decoded, and parts of uncompressed ones that were read by themselves.
    chunks_decoded,
    /// Of those, chunks that took the general path.
    chunks_general_path,
    /// How often a chunk of a store was planned that an earlier unit of the same epoch had planned already. A chunk is
    /// decoded once per unit, whatever number of its rows are in it, so this is what larger windows, a larger
    /// `memory_budget` or row ranges that keep to chunk borders could save. Counted when planned, fill values included;
    /// without uncompressed chunks, of which only the rows are read.
    chunks_decoded_again,
    /// Chunks made of the fill value.
    chunks_filled,
    /// Preload windows planned.
    windows_planned,
    /// Groups of batches planned together.
    units_planned,
    /// Batches whose last row arrived.
    batches_ready,
    /// Batches taken by consumers.
    batches_delivered,
    /// Rows taken by consumers.
    rows_delivered,
    /// Bytes of batches taken by consumers.
    bytes_delivered,
    /// Time consumers waited for a batch.
    consumer_wait_ns,
    /// Time spent planning.
    plan_ns,
    /// Time between issuing a read and its arrival.
    fetch_ns,
    /// Time the next read waited until decoding had freed encoded bytes; large where decoding is the bottleneck.
    fetch_budget_wait_ns,
    /// Time the next read waited for one in flight to end; large where storage is the bottleneck.
    fetch_depth_wait_ns,
    /// Time spent decoding and scattering.
    decode_ns,
    /// Time spent on filled batches: their transforms, and narrowing them for the way to a GPU.
    seal_ns,
    /// Time the planner waited for the consumer to free memory.
    budget_wait_ns,
    /// Batches for a GPU whose values were scattered in as few bytes as those before them, and did not all fit.
    batches_widened,
    /// Batches copied to the GPU.
    h2d_batches,
    /// Copies from host memory to the GPU that were issued.
    h2d_copies,
    /// Bytes of those.
    h2d_bytes,
    /// Time the copies of each batch took on the GPU's clock, from the first to begin to the last to end. Counted when their
    /// host memory is let go.
    h2d_ns,
    /// Time the transfer thread waited for the next batch in host memory; large where loading is the bottleneck.
    transfer_host_wait_ns,
    /// Time it waited for staging memory or for room in front of the consumer; large where the consumer is.
    transfer_room_wait_ns,
    /// Wall time during which at least one unit was being read or decoded, or waited for room.
    active_ns,
}
gauges {
    /// Bytes that batches not yet delivered may take; a default budget grows to two of the largest windows so far, up to
    /// an eighth of the memory that this process may use.
    memory_budget,
    /// Units (batches planned together) being read or decoded, or waiting for room.
    units_alive,
    /// Chunks that have arrived and wait for a decoding thread.
    decode_queued,
    /// Chunks being decoded and scattered.
    decode_running,
}
}

/// One relaxed atomic counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds the nanoseconds until the guard is dropped, which profilers see as a range of this name.
    pub fn time(&self, range: &'static CStr) -> impl Drop {
        struct Timed<'a> {
            counter: &'a Counter,
            start: Instant,
            _range: nvtx::Range,
        }
        impl Drop for Timed<'_> {
            fn drop(&mut self) {
                self.counter.add_since(self.start);
            }
        }
        Timed { counter: self, start: Instant::now(), _range: nvtx::range(range) }
    }

    /// Adds the nanoseconds since `start`.
    pub fn add_since(&self, start: Instant) {
        self.add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One relaxed atomic number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// One more.
    pub fn raise(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// At least `n`.
    pub fn raise_to(&self, n: u64) {
        self.0.fetch_max(n, Ordering::Relaxed);
    }

    /// One less.
    pub fn lower(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// One more until the guard is dropped.
    pub fn enter(&self) -> impl Drop {
        struct Raised<'a>(&'a Gauge);
        impl Drop for Raised<'_> {
            fn drop(&mut self) {
                self.0.lower();
            }
        }
        self.raise();
        Raised(self)
    }

    /// As it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
