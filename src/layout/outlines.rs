//! Outlines of chunks at hand: where the blocks of a chunk lie is known once it was read whole.
//!
//! Rows drawn one by one need a block or two of a large chunk. To learn where these lie from the chunk itself would take a
//! read that the next has to wait for; but each chunk is drawn from again and again, so that the first read, which takes all
//! of it, teaches the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::decode::Outline;

/// Bytes of memory that the outlines of one array may take: those of some 200,000 chunks. What is beyond is read whole.
const MAX_BYTES: usize = 32 << 20;
/// What one entry takes beside the outline itself.
const ENTRY_BYTES: usize = 64;

/// Outlines of an array's chunks.
#[derive(Debug, Default)]
pub(super) struct Outlines(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    by_chunk: HashMap<u64, Arc<Outline>>,
    bytes: usize,
}

impl Outlines {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The outline of a chunk, if it is known.
    pub(super) fn get(&self, chunk: u64) -> Option<Arc<Outline>> {
        self.kept().by_chunk.get(&chunk).cloned()
    }

    /// Keeps an outline while there is room.
    pub(super) fn keep(&self, chunk: u64, outline: Outline) {
        let mut kept = self.kept();
        let bytes = kept.bytes + outline.footprint() + ENTRY_BYTES;
        if bytes <= MAX_BYTES && kept.by_chunk.insert(chunk, Arc::new(outline)).is_none() {
            kept.bytes = bytes;
        }
    }
}
