//! Counters of one pipeline, cheap enough to be always on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Cumulative counters; times are nanoseconds summed over threads.
        #[derive(Debug, Default)]
        pub struct StageStats {
            $($(#[$doc])* pub $name: Counter,)+
        }

        impl StageStats {
            /// All counters by name.
            pub fn to_json(&self) -> Value {
                json!({ $(stringify!($name): self.$name.get(),)+ })
            }
        }
    };
}

counters! {
    /// Reads issued, shard indexes included.
    reads,
    /// Bytes read, gaps included.
    bytes_read,
    /// Bytes after decompression.
    bytes_decoded,
    /// Chunks decoded.
    chunks_decoded,
    /// Of those, chunks that took the general path.
    chunks_general_path,
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
    /// Time spent decoding and scattering.
    decode_ns,
    /// Time the planner waited for the consumer to free memory.
    budget_wait_ns,
}

/// One relaxed atomic counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
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
