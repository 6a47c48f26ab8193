//! Chunks that sorted rows touch, each with its run of rows.

use std::ops::Range;

use super::slots::RowSlot;
use crate::coalesce::CoalesceOptions;
use crate::layout::{ChunkedArray, RowPointers};

/// Chunks that hold the same rows: each other columns of them.
pub(super) fn chunks_beside(array: &ChunkedArray) -> u64 {
    array.grid()[1..].iter().product()
}

/// Where the task of one chunk becomes several: only a verbatim chunk can be read in parts. They are cut as
/// [`coalesce`](mod@crate::coalesce) would join them.
pub(super) struct Cut {
    /// Between the rows of one task lie fewer items (entries of a CSR array, rows of a dense one) than this.
    pub(super) gap: u64,
    /// A task that spans this many takes no further row.
    pub(super) len: u64,
}

impl Cut {
    const WHOLE: Self = Self { gap: u64::MAX, len: u64::MAX };

    pub(super) fn of(array: &ChunkedArray) -> Self {
        if !array.is_verbatim() {
            return Self::WHOLE;
        }
        let CoalesceOptions { max_gap_bytes, target_read_bytes } = array.store().io_shape().joined;
        let size = array.chunk_shape[1..].iter().product::<u64>().saturating_mul(array.dtype.size() as u64).max(1);
        Self { gap: max_gap_bytes / size + 1, len: (target_read_bytes / size).max(1) }
    }

    /// Whether a task of `run` ends before an item at `start`.
    fn between(&self, run: &Range<u64>, start: u64) -> bool {
        start.saturating_sub(run.end) >= self.gap || run.end - run.start >= self.len
    }
}

/// Chunks of `chunk_len` entries that the slots' rows touch, each with its run of slots.
pub(super) fn entry_runs(slots: &[RowSlot], rows: &RowPointers, chunk_len: u64, cut: &Cut) -> Vec<(u64, Range<usize>)> {
    let mut runs: Vec<(u64, Range<usize>)> = Vec::new();
    let mut row = 0..0;
    // entries that the last run spans
    let mut span = 0..0;
    for (i, slot) in slots.iter().enumerate() {
        let (start, end) = rows.range(slot.row);
        if start == end {
            continue;
        }
        let again = row == (start..end);
        row = start..end;
        for chunk in start / chunk_len..=(end - 1) / chunk_len {
            let part = start.max(chunk * chunk_len)..end.min((chunk + 1) * chunk_len);
            // Rows are sorted, so the chunks of this row begin no earlier than those of the row before; a
            // repeated row finds its chunks again at the tail.
            match runs.last().map(|(last, _)| *last) {
                Some(last) if chunk <= last && (again || !cut.between(&span, part.start)) => {
                    let back = runs.len() - 1 - (last - chunk) as usize;
                    runs[back].1.end = i + 1;
                    span.end = span.end.max(part.end);
                }
                _ => {
                    runs.push((chunk, i..i + 1));
                    span = part;
                }
            }
        }
    }
    runs
}

/// Blocks of `block_rows` rows that the slots touch, each with its run of slots.
pub(super) fn row_runs(slots: &[RowSlot], block_rows: u64, cut: &Cut) -> Vec<(u64, Range<usize>)> {
    let mut runs: Vec<(u64, Range<usize>)> = Vec::new();
    for (i, slot) in slots.iter().enumerate() {
        let block = slot.row / block_rows;
        match runs.last_mut() {
            Some((last, run))
                if *last == block
                    && (slots[run.end - 1].row == slot.row
                        || !cut.between(&(slots[run.start].row..slots[run.end - 1].row + 1), slot.row)) =>
            {
                run.end = i + 1;
            }
            _ => runs.push((block, i..i + 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pointers(lengths: &[u64]) -> RowPointers {
        let ends: Vec<i64> = lengths
            .iter()
            .scan(0, |end, l| {
                *end += *l as i64;
                Some(*end)
            })
            .collect();
        let values: Vec<i64> = std::iter::once(0).chain(ends).collect();
        RowPointers::from_values(values.iter().copied(), values[lengths.len()] as u64, "test").unwrap()
    }

    fn slots_of(picks: &[usize], n_obs: usize) -> Vec<RowSlot> {
        let slot = |(i, p): (usize, &usize)| RowSlot { dataset: 0, row: (p % n_obs) as u64, batch: 0, position: i as u32 };
        let mut slots: Vec<RowSlot> = picks.iter().enumerate().map(slot).collect();
        slots.sort_unstable();
        slots
    }

    proptest! {
        /// The slow twin: every (row, chunk) pair that shares an entry must be in one run of that chunk.
        #[test]
        fn runs_cover_exactly_the_touched_chunks(
            lengths in prop::collection::vec(0u64..30, 1..60),
            picks in prop::collection::vec(0usize..60, 1..80),
            chunk_len in 1u64..40,
            (gap, len) in prop_oneof![Just((u64::MAX, u64::MAX)), (1u64..20, 1u64..50)],
        ) {
            let (rows, slots) = (pointers(&lengths), slots_of(&picks, lengths.len()));
            let runs = entry_runs(&slots, &rows, chunk_len, &Cut { gap, len });
            if gap == u64::MAX {
                prop_assert!(runs.windows(2).all(|w| w[0].0 < w[1].0), "each chunk once, in order");
            }
            let mut touched = std::collections::BTreeSet::new();
            for (i, slot) in slots.iter().enumerate() {
                let (start, end) = rows.range(slot.row);
                for entry in start..end {
                    let chunk = entry / chunk_len;
                    touched.insert(chunk);
                    let of = runs.iter().filter(|(c, run)| *c == chunk && run.contains(&i)).count();
                    prop_assert_eq!(of, 1, "row {} in chunk {}", slot.row, chunk);
                }
            }
            let mut chunks: Vec<u64> = runs.iter().map(|(c, _)| *c).collect();
            prop_assert!(chunks.is_sorted());
            chunks.dedup();
            prop_assert_eq!(chunks, touched.into_iter().collect::<Vec<_>>());
            // what a run spans has no gap as long as that, and ends with the row that makes it long enough
            for (chunk, run) in runs {
                let part = |slot: &RowSlot| {
                    let (start, end) = rows.range(slot.row);
                    start.max(chunk * chunk_len)..end.min((chunk + 1) * chunk_len)
                };
                let mut parts: Vec<_> = slots[run].iter().map(part).filter(|p| !p.is_empty()).collect();
                parts.dedup();
                prop_assert!(parts.windows(2).all(|w| w[1].start - w[0].end < gap && w[0].end - parts[0].start < len));
            }
        }

        #[test]
        fn blocks_of_rows_are_cut_at_gaps(
            picks in prop::collection::vec(0usize..200, 1..80), block in 1u64..90,
            (gap, len) in prop_oneof![Just((u64::MAX, u64::MAX)), (1u64..20, 1u64..30)],
        ) {
            let slots = slots_of(&picks, 200);
            let runs = row_runs(&slots, block, &Cut { gap, len });
            let mut next = 0;
            for (number, run) in &runs {
                prop_assert_eq!(run.start, next);
                next = run.end;
                let rows: Vec<u64> = slots[run.clone()].iter().map(|s| s.row).collect();
                prop_assert!(rows.iter().all(|r| r / block == *number));
                prop_assert!(rows.windows(2).all(|w| w[0] == w[1] || (w[1] - w[0] - 1 < gap && w[0] + 1 - rows[0] < len)));
            }
            prop_assert_eq!(next, slots.len());
            if gap == u64::MAX {
                prop_assert!(runs.windows(2).all(|w| w[0].0 < w[1].0), "each block once");
            } else {
                let row = |i: usize| slots[i].row;
                let cut = |w: &[(u64, Range<usize>)]| {
                    let (before, after) = (row(w[0].1.end - 1), row(w[1].1.start));
                    w[0].0 < w[1].0 || after - before > gap || before + 1 - row(w[0].1.start) >= len
                };
                prop_assert!(runs.windows(2).all(cut), "no block is cut where nothing asks for it");
            }
        }
    }
}
