//! Outlines of chunks at hand: where the blocks of a chunk lie is known once it was read whole.
//!
//! Rows drawn one by one need a block or two of a large chunk. To learn where these lie from the chunk itself would take a
//! read that the next has to wait for; but each chunk is drawn from again and again, so that the first read, which takes all
//! of it, teaches the others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::base::lock::lock;
use crate::decode::Outline;

/// Bytes of memory that the outlines of a collection may take: those of some 200,000 chunks. What is beyond is read whole.
const MAX_BYTES: usize = 64 << 20;
/// What one entry takes beside the outline itself.
const ENTRY_BYTES: usize = 64;

/// Bytes that the outlines of all arrays of a collection take.
#[derive(Debug, Default)]
pub(super) struct OutlineBytes(AtomicUsize);

/// Outlines of an array's chunks.
#[derive(Debug, Default)]
pub(super) struct Outlines {
    by_chunk: Mutex<HashMap<u64, Arc<Outline>>>,
    taken: Arc<OutlineBytes>,
}

fn cost(outline: &Outline) -> usize {
    outline.footprint() + ENTRY_BYTES
}

impl Outlines {
    /// Those of an array whose collection's take `taken`.
    pub(super) fn within(taken: &Arc<OutlineBytes>) -> Self {
        Self { by_chunk: Mutex::default(), taken: Arc::clone(taken) }
    }

    fn by_chunk(&self) -> MutexGuard<'_, HashMap<u64, Arc<Outline>>> {
        lock(&self.by_chunk)
    }

    /// The outline of a chunk, if it is known.
    pub(super) fn get(&self, chunk: u64) -> Option<Arc<Outline>> {
        self.by_chunk().get(&chunk).cloned()
    }

    /// Keeps an outline while there is room.
    pub(super) fn keep(&self, chunk: u64, outline: Outline) {
        let bytes = cost(&outline);
        if self.taken.0.fetch_add(bytes, Ordering::Relaxed) + bytes > MAX_BYTES {
            self.taken.0.fetch_sub(bytes, Ordering::Relaxed);
        } else if let Some(before) = self.by_chunk().insert(chunk, Arc::new(outline)) {
            self.taken.0.fetch_sub(cost(&before), Ordering::Relaxed);
        }
    }

    /// Drops the outline of a chunk.
    pub(super) fn remove(&self, chunk: u64) {
        if let Some(outline) = self.by_chunk().remove(&chunk) {
            self.taken.0.fetch_sub(cost(&outline), Ordering::Relaxed);
        }
    }
}
