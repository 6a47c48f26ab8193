//! Shard indexes at hand: read on first use, the least recently used dropped beyond a number of bytes.
//!
//! An index takes 16 bytes per inner chunk: 45 MB for 100 million cells in the chunks that writers choose, gigabytes
//! where every row is a chunk. So nothing may count on an index to stay: who needs one holds its `Arc`.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::ShardIndex;
use super::outlines::OutlineBytes;
use crate::base::lock::lock;

/// Bytes that a collection keeps unless its configuration says otherwise.
pub const DEFAULT_INDEX_BYTES: u64 = 256 << 20;

/// What one entry of the tables below takes beside the index itself.
const ENTRY_BYTES: u64 = 160;

/// Shard indexes of many arrays, at most so many bytes of them.
#[derive(Debug)]
pub struct IndexCache {
    limit_bytes: u64,
    arrays: AtomicU64,
    kept: Mutex<Kept>,
    /// What outlines of chunks take beside.
    pub(super) outlines: Arc<OutlineBytes>,
    /// Held while opening reads an index, so that threads in need of the same one read it once.
    pub(super) turn: Mutex<()>,
}

/// Number of the array in this cache, number of the shard in the array.
type IndexKey = (u64, u64);

#[derive(Debug, Default)]
struct Kept {
    indexes: HashMap<IndexKey, (Arc<ShardIndex>, u64)>,
    /// Oldest use first.
    uses: BTreeMap<u64, IndexKey>,
    clock: u64,
    bytes: u64,
}

impl IndexCache {
    /// A cache that keeps at most `limit_bytes`.
    pub fn new(limit_bytes: u64) -> Arc<Self> {
        let (arrays, kept, outlines, turn) = Default::default();
        Arc::new(Self { limit_bytes, arrays, kept, outlines, turn })
    }

    /// A number for one more array.
    pub(super) fn register(&self) -> u64 {
        self.arrays.fetch_add(1, Ordering::Relaxed)
    }

    /// The index, if it is at hand.
    pub(super) fn get(&self, place: IndexKey) -> Option<Arc<ShardIndex>> {
        let mut kept = lock(&self.kept);
        let kept = &mut *kept;
        let (index, used) = kept.indexes.get_mut(&place)?;
        kept.uses.remove(used);
        kept.clock += 1;
        *used = kept.clock;
        kept.uses.insert(kept.clock, place);
        Some(Arc::clone(index))
    }

    /// Keeps an index, and drops those not used for longest until all fit.
    pub(super) fn keep(&self, place: IndexKey, index: &Arc<ShardIndex>) {
        if cost(index) > self.limit_bytes {
            return;
        }
        let mut kept = lock(&self.kept);
        let kept = &mut *kept;
        kept.clock += 1;
        // two readers may race; both parsed the same bytes
        if let Some((_, used)) = kept.indexes.insert(place, (Arc::clone(index), kept.clock)) {
            kept.uses.remove(&used);
        } else {
            kept.bytes += cost(index);
        }
        kept.uses.insert(kept.clock, place);
        while kept.bytes > self.limit_bytes {
            let Some((_, oldest)) = kept.uses.pop_first() else { break };
            if let Some((index, _)) = kept.indexes.remove(&oldest) {
                kept.bytes -= cost(&index);
            }
        }
    }

    /// Bytes of the indexes at hand.
    pub fn bytes(&self) -> u64 {
        lock(&self.kept).bytes
    }
}

fn cost(index: &ShardIndex) -> u64 {
    index.bytes() + ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{IndexLocation, ShardIndexFormat};

    fn index(n_chunks: u64) -> Arc<ShardIndex> {
        let format = ShardIndexFormat { n_chunks, location: IndexLocation::Start, checksum: false };
        Arc::new(format.parse(&vec![0; n_chunks as usize * 16]).unwrap())
    }

    #[test]
    fn the_least_recently_used_go_first_and_the_bound_holds() {
        let one = cost(&index(10));
        let cache = IndexCache::new(3 * one);
        for shard in 0..3 {
            cache.keep((0, shard), &index(10));
        }
        assert!(cache.get((0, 0)).is_some(), "now shard 1 is the oldest");
        cache.keep((0, 2), &index(10));
        assert_eq!(cache.bytes(), 3 * one, "kept again, counted once");
        cache.keep((1, 0), &index(10));
        assert_eq!([(0, 0), (0, 1), (0, 2), (1, 0)].map(|p| cache.get(p).is_some()), [true, false, true, true]);
        cache.keep((2, 0), &index(20));
        assert!(cache.bytes() <= 3 * one && cache.get((2, 0)).is_some());
        cache.keep((2, 1), &index(1000));
        assert!(cache.get((2, 1)).is_none() && cache.get((2, 0)).is_some(), "what cannot fit drops nothing");
    }
}
