//! `LoadRequest` → [`ReadPlan`]: which chunks to decode and where each row goes. Pure, no I/O.
//!
//! ```text
//! rows of each batch ──measure──▶ BatchLayout (row pointers of every element, bytes)
//! layouts ──plan──▶ ReadPlan { slots: of each axis one row slot per delivered row, sorted by (dataset, row)
//!                              tasks: one per needed chunk and array, with its run of slots; several for
//!                                     an uncompressed chunk of which rows far apart are needed }
//! ```
//!
//! Row lengths are in memory, so the place of every row in its batch is known before a byte is read, and
//! each chunk can be scattered as soon as it is decoded, whichever comes first. Elements of one axis of observations share its
//! slots.

mod measure;
mod runs;
mod slots;

use std::ops::Range;

pub use measure::{MAX_CHUNKS, measure};
use runs::{Cut, chunks_beside, entry_runs, row_runs};
pub use slots::RowSlot;

use crate::batch::BatchLayout;
use crate::collection::{ArraySource, Collection, Source};
use crate::sampler::LoadRequest;

/// Slots of one task over memory sources: small enough to share out, large enough to be worth a task.
const MEMORY_SLOTS_PER_TASK: usize = 256;

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
    /// Axis of observations that the element's rows lie on.
    pub axis: u32,
    /// Array of the element.
    pub part: Part,
    /// Row-major chunk number; 0 for memory sources, which have no chunks.
    pub chunk: u64,
    /// Slots of the axis that lie at least partly in the chunk (rows without entries among them are skipped later).
    pub slots: Range<usize>,
    /// Distinct batches among the slots, as a range of [`ReadPlan::task_batches`].
    pub batches: Range<usize>,
}

/// Everything that must happen to fill some batches.
#[derive(Debug, Default)]
pub struct ReadPlan {
    /// Of each axis of observations all rows, sorted by dataset and row.
    pub slots: Vec<Vec<RowSlot>>,
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

/// Plans the decoding of `batches` together: each needed chunk once, however many of them it feeds.
pub fn plan(collection: &Collection, batches: Vec<BatchLayout>) -> ReadPlan {
    let tasks_per_batch = vec![0; batches.len()];
    let mut plan = ReadPlan { slots: Vec::new(), batches, tasks: Vec::new(), task_batches: Vec::new(), tasks_per_batch };
    for axis in 0..collection.n_axes() {
        let slots = slots_of(collection, &plan.batches);
        let elements = || (0..).zip(collection.elements()).filter(move |(_, element)| element.axis == axis);
        let mut start = 0;
        for of_dataset in slots.chunk_by(|a, b| a.dataset == b.dataset) {
            for (number, element) in elements() {
                let tasks = tasks_of(of_dataset, (axis, number), &element.sources[of_dataset[0].dataset as usize]);
                let moved = |t: ChunkTask| ChunkTask { slots: t.slots.start + start..t.slots.end + start, ..t };
                plan.tasks.extend(tasks.into_iter().map(moved));
            }
            start += of_dataset.len();
        }
        plan.slots.push(slots);
    }
    plan.note_batches();
    plan
}

/// A slot for each row of the batches, sorted by dataset and row. The one axis there is has the rows of the batches.
fn slots_of(collection: &Collection, batches: &[BatchLayout]) -> Vec<RowSlot> {
    let mut slots = Vec::with_capacity(batches.iter().map(|b| b.rows.len()).sum());
    for (batch, layout) in (0..).zip(batches) {
        slots.extend(layout.rows.iter().zip(0..).map(|(&global, position)| {
            let (dataset, row) = collection.split_row(global);
            RowSlot { dataset, row, batch, position }
        }));
    }
    slots.sort_unstable();
    slots
}

impl ReadPlan {
    /// The slots of a task.
    pub fn slots_of(&self, task: &ChunkTask) -> &[RowSlot] {
        &self.slots[task.axis as usize][task.slots.clone()]
    }

    /// Slot number `number` of the task's axis.
    pub fn slot(&self, task: &ChunkTask, number: usize) -> &RowSlot {
        &self.slots[task.axis as usize][number]
    }

    /// Fills `batches` of every task, `task_batches` and `tasks_per_batch`.
    fn note_batches(&mut self) {
        let mut seen_by = vec![usize::MAX; self.batches.len()];
        for (number, task) in self.tasks.iter_mut().enumerate() {
            let first = self.task_batches.len();
            for slot in &self.slots[task.axis as usize][task.slots.clone()] {
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

/// Tasks of one element (axis and number) over one dataset's slots, which are sorted by row; numbers of slots begin with these.
fn tasks_of(slots: &[RowSlot], (axis, element): (u32, u32), source: &Source) -> Vec<ChunkTask> {
    let dataset = slots[0].dataset;
    let task = |part, chunk, slots| ChunkTask { dataset, element, axis, part, chunk, slots, batches: 0..0 };
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
