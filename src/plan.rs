//! `LoadRequest` → [`ReadPlan`]: which chunks to decode and where each row goes. Pure, no I/O.
//!
//! ```text
//! rows of each batch ──measure──▶ BatchLayout (row pointers of every element, bytes)
//! layouts ──plan──▶ ReadPlan { slots: one row slot per delivered row, sorted by (dataset, row)
//!                              tasks: one per needed chunk and array, with its run of slots; several for
//!                                     an uncompressed chunk of which rows far apart are needed }
//! ```
//!
//! Row lengths are in memory, so the place of every row in its batch is known before a byte is read, and
//! each chunk can be scattered as soon as it is decoded, whichever comes first. All elements share the slots.

use std::ops::Range;

use crate::arena::Pool;
use crate::base::error::{Error, Result};
use crate::base::machine::physical_memory;
use crate::batch::{BatchLayout, ElementLayout};
use crate::coalesce::CoalesceOptions;
use crate::collection::{ArraySource, Collection, Element, Source};
use crate::finish::{OnDevice, bytes_to_finish};
use crate::layout::{ChunkedArray, RowPointers};
use crate::sampler::LoadRequest;
use crate::schema::ElementKind;

/// Slots of one task over memory sources: small enough to share out, large enough to be worth a task.
const MEMORY_SLOTS_PER_TASK: usize = 256;

/// Tasks of one element that one batch may make, and those that the batches of one unit may: honest batches stay ten times
/// below it. Metadata can claim any number of chunks without a byte on disk.
pub const MAX_CHUNKS: u64 = 1 << 21;
/// Bytes that a task takes from planning to delivery (1.2 KB were measured where nothing is stored), counted as the batch's
/// own beyond so many tasks: rows of chunks of single elements take more for their tasks than for themselves.
const TASK_BYTES: u64 = 1200;
const FREE_TASKS: u64 = 1 << 16;

/// One delivered row: where it comes from and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowSlot {
    /// Dataset.
    pub dataset: u32,
    /// Row within the dataset.
    pub row: u64,
    /// Batch within the plan.
    pub batch: u32,
    /// Row within the batch.
    pub position: u32,
}

/// Which array of an element a task decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Values of a CSR element.
    Data,
    /// Column indices of a CSR element.
    Indices,
    /// A dense element.
    Dense,
}

/// One chunk of one array, or a part of one that is stored verbatim, and the rows that it feeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkTask {
    /// Dataset.
    pub dataset: u32,
    /// Element.
    pub element: u32,
    /// Array of the element.
    pub part: Part,
    /// Row-major chunk number; 0 for memory sources, which have no chunks.
    pub chunk: u64,
    /// Slots that lie at least partly in the chunk (rows without entries among them are skipped later).
    pub slots: Range<usize>,
    /// Distinct batches among the slots, as a range of [`ReadPlan::task_batches`].
    pub batches: Range<usize>,
}

/// Everything that must happen to fill some batches.
#[derive(Debug, Default)]
pub struct ReadPlan {
    /// All rows, sorted by dataset and row.
    pub slots: Vec<RowSlot>,
    /// The batches.
    pub batches: Vec<BatchLayout>,
    /// Chunks in storage order, each once per array, or several times where its parts are read one by one.
    pub tasks: Vec<ChunkTask>,
    /// Batches of the tasks, see [`ChunkTask::batches`].
    pub task_batches: Vec<u32>,
    /// Tasks that feed each batch.
    pub tasks_per_batch: Vec<u32>,
}

impl ChunkTask {
    /// The array that the task decodes.
    pub fn array<'a>(&self, collection: &'a Collection) -> &'a ArraySource {
        match (&collection.elements()[self.element as usize].sources[self.dataset as usize], self.part) {
            (Source::Csr(csr), Part::Indices) => &csr.indices,
            (Source::Csr(csr), _) => &csr.data,
            (Source::Dense(array), _) => array,
        }
    }
}

impl RowSlot {
    /// The slot's number of rows before it in its batch.
    pub fn position(&self) -> usize {
        self.position as usize
    }
}

/// The row lists of a request's batches.
pub fn batches_of(request: &LoadRequest) -> Vec<Vec<u64>> {
    let mut positions = request.positions.as_slice();
    request
        .sizes
        .iter()
        .map(|&size| {
            let (mine, rest) = positions.split_at(size as usize);
            positions = rest;
            mine.iter().map(|&p| request.rows[p as usize]).collect()
        })
        .collect()
}

/// Row pointers and bytes of a batch of these global rows, of which a device finishes what `on_device` says.
///
/// # Errors
/// [`Argument`](Error::Argument) for a batch larger than this machine's memory, or of more than [`MAX_CHUNKS`] chunks.
pub fn measure(collection: &Collection, rows: Vec<u64>, on_device: Option<&OnDevice>) -> Result<BatchLayout> {
    let mut bytes = Pool::batch_footprint(rows.len() * 8);
    let located: Vec<(u32, u64)> = rows.iter().map(|&r| collection.split_row(r)).collect();
    let mut elements = Vec::with_capacity(collection.elements().len());
    let mut chunks = 0u64;
    for (number, element) in collection.elements().iter().enumerate() {
        let layout = element_layout(element, &located);
        let read = element_bytes(element, &layout, rows.len())?;
        let transformed = on_device.is_some_and(|device| device.transforms(number));
        let sealed = bytes_to_finish(element, &layout, rows.len(), transformed).ok_or_else(|| too_large(element, rows.len()))?;
        // no more than were just found to be few enough
        let n_dense = || rows.len() * (element.dense_row_bytes() / element.dtype.size());
        let n_values = layout.indptr.last().map_or_else(n_dense, |&nnz| nnz as usize);
        let copied = on_device.map_or(0, |device| device.copied_bytes(number, element, n_values));
        bytes = bytes.saturating_add(read).saturating_add(sealed).saturating_add(copied);
        chunks = chunks.saturating_add(element_chunks(element, &located)?);
        elements.push(layout);
    }
    bytes = bytes.saturating_add(chunks.saturating_sub(FREE_TASKS).saturating_mul(TASK_BYTES));
    // the system would grant the memory and kill the process once it is written
    if bytes > physical_memory() {
        let n = rows.len();
        return Err(Error::argument(
            "batch_size",
            format!("a batch of {n} rows has {bytes} bytes, more than this machine's memory; ask for fewer rows"),
        ));
    }
    Ok(BatchLayout { rows, elements, bytes, chunks })
}

/// Chunks that these rows touch: a cheap upper bound, or the exact number where that bound is too large.
fn element_chunks(element: &Element, located: &[(u32, u64)]) -> Result<u64> {
    let bound = located.iter().fold(0u64, |sum, &(dataset, row)| sum.saturating_add(row_chunks(element, dataset, row).1));
    if bound <= MAX_CHUNKS {
        return Ok(bound);
    }
    let slot = |&(dataset, row): &(u32, u64)| RowSlot { dataset, row, batch: 0, position: 0 };
    let mut slots: Vec<RowSlot> = located.iter().map(slot).collect();
    slots.sort_unstable();
    slots.dedup();
    let of_dataset = |slots: &[RowSlot]| match &element.sources[slots[0].dataset as usize] {
        Source::Dense(ArraySource::Chunked(chunked)) => {
            let runs = row_runs(slots, chunked.chunk_shape[0], &Cut::of(chunked));
            chunks_beside(chunked).saturating_mul(runs.len() as u64)
        }
        // a cut chunk of a CSR array counts once: its parts are no more than its rows
        _ => {
            let (mut next, mut chunks) = (0, 0u64);
            for slot in slots {
                let (first, n) = row_chunks(element, slot.dataset, slot.row);
                let end = first.saturating_add(n);
                chunks = chunks.saturating_add(end.saturating_sub(next.max(first)));
                next = next.max(end);
            }
            chunks
        }
    };
    let chunks = slots.chunk_by(|a, b| a.dataset == b.dataset).map(of_dataset).fold(0, u64::saturating_add);
    if chunks <= MAX_CHUNKS {
        return Ok(chunks);
    }
    let n = located.len();
    Err(Error::argument(
        "batch_size",
        format!(
            "a batch of {n} rows of {:?} touches {chunks} chunks; expected at most {MAX_CHUNKS}: ask for fewer rows, or rewrite the array in larger chunks",
            element.name
        ),
    ))
}

/// First chunk of a row and how many it touches, over both arrays of a CSR element counted as one.
fn row_chunks(element: &Element, dataset: u32, row: u64) -> (u64, u64) {
    match &element.sources[dataset as usize] {
        Source::Csr(csr) => {
            let (start, end) = csr.rows.range(row);
            let lengths = [&csr.indices, &csr.data].into_iter().filter_map(|array| match array {
                ArraySource::Chunked(chunked) => Some(chunked.chunk_shape[0]),
                ArraySource::Memory(_) => None,
            });
            match lengths.min() {
                Some(len) if start < end => (start / len, (end - 1) / len - start / len + 1),
                _ => (0, 0),
            }
        }
        Source::Dense(ArraySource::Chunked(chunked)) => {
            let beside = chunks_beside(chunked);
            (row / chunked.chunk_shape[0] * beside, beside)
        }
        Source::Dense(ArraySource::Memory(_)) => (0, 0),
    }
}

/// Chunks that hold the same rows: each other columns of them.
fn chunks_beside(array: &ChunkedArray) -> u64 {
    array.grid()[1..].iter().product()
}

fn element_layout(element: &Element, located: &[(u32, u64)]) -> ElementLayout {
    if !matches!(element.kind, ElementKind::Csr { .. }) {
        return ElementLayout { indptr: Vec::new(), wide: false };
    }
    let mut indptr = Vec::with_capacity(located.len() + 1);
    let mut end = 0u64;
    indptr.push(end);
    for &(dataset, row) in located {
        end = end.saturating_add(element.sources[dataset as usize].entries_of(row));
        indptr.push(end);
    }
    ElementLayout { wide: element.wide_columns() || end > i32::MAX as u64, indptr }
}

fn too_large(element: &Element, n: usize) -> Error {
    Error::argument("batch_size", format!("a batch of {n} rows of {:?} has more bytes than can be addressed", element.name))
}

fn element_bytes(element: &Element, layout: &ElementLayout, n: usize) -> Result<u64> {
    let too_large = || too_large(element, n);
    if let Some(&nnz) = layout.indptr.last() {
        let index = if layout.wide { 8 } else { 4 };
        let per_entry = (index + element.dtype.size()) as u64;
        let total = nnz.checked_mul(per_entry).filter(|b| *b < 1 << 48).ok_or_else(too_large)?;
        return Ok(Pool::batch_footprint((n + 1) * index)
            + Pool::batch_footprint((nnz as usize) * index)
            + Pool::batch_footprint(total as usize - nnz as usize * index));
    }
    let dense = n.checked_mul(element.dense_row_bytes()).filter(|b| *b < 1 << 48).ok_or_else(too_large)?;
    Ok(Pool::batch_footprint(dense))
}

/// Plans the decoding of `batches` together: each needed chunk once, however many of them it feeds.
pub fn plan(collection: &Collection, batches: Vec<BatchLayout>) -> ReadPlan {
    let mut slots = Vec::with_capacity(batches.iter().map(|b| b.rows.len()).sum());
    for (batch, layout) in batches.iter().enumerate() {
        slots.extend(layout.rows.iter().enumerate().map(|(position, &global)| {
            let (dataset, row) = collection.split_row(global);
            RowSlot { dataset, row, batch: batch as u32, position: position as u32 }
        }));
    }
    slots.sort_unstable();
    let tasks_per_batch = vec![0; batches.len()];
    let mut plan = ReadPlan { slots, batches, tasks: Vec::new(), task_batches: Vec::new(), tasks_per_batch };
    let mut start = 0;
    while start < plan.slots.len() {
        let dataset = plan.slots[start].dataset;
        let end = start + plan.slots[start..].partition_point(|s| s.dataset == dataset);
        for (number, element) in collection.elements().iter().enumerate() {
            let tasks = tasks_of(&plan.slots[start..end], number as u32, &element.sources[dataset as usize]);
            plan.tasks.extend(tasks.into_iter().map(|t| ChunkTask {
                slots: t.slots.start + start..t.slots.end + start,
                dataset,
                ..t
            }));
        }
        start = end;
    }
    plan.note_batches();
    plan
}

impl ReadPlan {
    /// Fills `batches` of every task, `task_batches` and `tasks_per_batch`.
    fn note_batches(&mut self) {
        let mut seen_by = vec![usize::MAX; self.batches.len()];
        for (number, task) in self.tasks.iter_mut().enumerate() {
            let first = self.task_batches.len();
            for slot in &self.slots[task.slots.clone()] {
                let seen = &mut seen_by[slot.batch as usize];
                if *seen != number {
                    *seen = number;
                    self.task_batches.push(slot.batch);
                    self.tasks_per_batch[slot.batch as usize] += 1;
                }
            }
            task.batches = first..self.task_batches.len();
        }
    }
}

/// Tasks of one element over one dataset's slots (which are sorted by row).
fn tasks_of(slots: &[RowSlot], element: u32, source: &Source) -> Vec<ChunkTask> {
    let task = |part, chunk, slots| ChunkTask { dataset: 0, element, part, chunk, slots, batches: 0..0 };
    let in_memory = |part| {
        let runs = (0..slots.len()).step_by(MEMORY_SLOTS_PER_TASK);
        runs.map(move |i| task(part, 0, i..(i + MEMORY_SLOTS_PER_TASK).min(slots.len())))
    };
    match source {
        Source::Csr(csr) => [(Part::Indices, &csr.indices), (Part::Data, &csr.data)]
            .into_iter()
            .flat_map(|(part, array)| match array {
                ArraySource::Chunked(chunked) => {
                    let runs = entry_runs(slots, &csr.rows, chunked.chunk_shape[0], &Cut::of(chunked));
                    runs.into_iter().map(|(chunk, run)| task(part, chunk, run)).collect::<Vec<_>>()
                }
                ArraySource::Memory(_) => in_memory(part).collect(),
            })
            .collect(),
        Source::Dense(ArraySource::Memory(_)) => in_memory(Part::Dense).collect(),
        Source::Dense(ArraySource::Chunked(chunked)) => {
            let beside = chunks_beside(chunked);
            row_runs(slots, chunked.chunk_shape[0], &Cut::of(chunked))
                .into_iter()
                .flat_map(|(block, run)| (0..beside).map(move |i| task(Part::Dense, block * beside + i, run.clone())))
                .collect()
        }
    }
}

/// Where the task of one chunk becomes several: only a verbatim chunk can be read in parts. They are cut as
/// [`coalesce`](crate::coalesce) would join them.
struct Cut {
    /// Between the rows of one task lie fewer items (entries of a CSR array, rows of a dense one) than this.
    gap: u64,
    /// A task that spans this many takes no further row.
    len: u64,
}

impl Cut {
    const WHOLE: Self = Self { gap: u64::MAX, len: u64::MAX };

    fn of(array: &ChunkedArray) -> Self {
        if !array.is_verbatim() {
            return Self::WHOLE;
        }
        let CoalesceOptions { max_gap_bytes, target_read_bytes } = CoalesceOptions::default();
        let size = array.chunk_shape[1..].iter().product::<u64>().saturating_mul(array.dtype.size() as u64).max(1);
        Self { gap: max_gap_bytes / size + 1, len: (target_read_bytes / size).max(1) }
    }

    /// Whether a task of `run` ends before an item at `start`.
    fn between(&self, run: &Range<u64>, start: u64) -> bool {
        start.saturating_sub(run.end) >= self.gap || run.end - run.start >= self.len
    }
}

/// Chunks of `chunk_len` entries that the slots' rows touch, each with its run of slots.
fn entry_runs(slots: &[RowSlot], rows: &RowPointers, chunk_len: u64, cut: &Cut) -> Vec<(u64, Range<usize>)> {
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
fn row_runs(slots: &[RowSlot], block_rows: u64, cut: &Cut) -> Vec<(u64, Range<usize>)> {
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
