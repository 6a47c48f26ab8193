//! What the tasks of a unit work on: the plan, the sources of its chunks, and where their rows are written.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::arena::Pool;
use crate::base::lock::lock;
use crate::base::stats::StageStats;
use crate::batch::{BatchElement, HostBatch};
use crate::collection::{ArraySource, Collection, CsrSource, Source};
use crate::finish::widened::Widened;
use crate::layout::ChunkedArray;
use crate::pipeline::dense::DenseBlock;
use crate::plan::{ChunkTask, ReadPlan};
use crate::schema::DType;

/// What is read, and the memory that it is written to.
#[derive(Debug)]
pub(super) struct Filling {
    pub(super) collection: Arc<Collection>,
    pub(super) plan: ReadPlan,
    opened: OnceLock<OpenedBatches>,
    /// Memory of values that turn out not to fit.
    pub(super) pool: Arc<Pool>,
    pub(super) stats: Arc<StageStats>,
}

/// What tasks write to, once there is memory for it.
#[derive(Debug)]
struct OpenedBatches {
    /// Per batch and element.
    destinations: Vec<Vec<Destination>>,
    /// Per batch the elements of which some values did not fit the narrow type that they are scattered as.
    widened: Vec<Mutex<Vec<Widened>>>,
    /// Per batch the rows that were not seen to have each column once, in elements where that matters.
    repeating: Vec<Mutex<Vec<usize>>>,
}

/// Where one element of one batch is written: addresses into leases that the batch's delivery keeps alive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Destination {
    /// CSR: indices, and their type; unused for dense.
    pub(super) indices: *mut u8,
    pub(super) index: DType,
    /// Values, their type, and how many there are.
    pub(super) values: *mut u8,
    pub(super) value: DType,
    pub(super) n_values: usize,
}
// SAFETY: the addresses point into leases kept alive by the unit's deliveries until the unit drops; each
// task writes only the slots of its own rows and chunk, which are disjoint between tasks.
unsafe impl Send for Destination {}
// SAFETY: as above.
unsafe impl Sync for Destination {}

/// Entries of one sparse row that one chunk holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// Number of the row's slot.
    pub(super) slot: usize,
    /// The first of them in the chunk.
    pub(super) from: usize,
    /// And in the batch.
    pub(super) to: usize,
    pub(super) n: usize,
}

impl Piece {
    /// The elements of the chunk.
    pub(super) fn stored(self) -> Range<usize> {
        self.from..self.from + self.n
    }
}

impl Filling {
    pub(super) fn new(collection: Arc<Collection>, plan: ReadPlan, pool: Arc<Pool>, stats: Arc<StageStats>) -> Self {
        Self { collection, plan, opened: OnceLock::new(), pool, stats }
    }

    /// Takes down where the elements of these batches lie, which tasks write to from now on.
    pub(super) fn fill(&self, batches: &[HostBatch]) {
        let destination = |e: &BatchElement| {
            let (indices, index) = match e {
                BatchElement::Csr { indices, .. } => (indices.lease.base(), indices.dtype),
                BatchElement::Dense(_) => (std::ptr::null_mut(), DType::Int32),
            };
            let values = e.values();
            let n_values = values.lease.len() / values.dtype.size();
            Destination { indices, index, values: values.lease.base(), value: values.dtype, n_values }
        };
        let destinations = batches.iter().map(|batch| batch.elements.iter().map(destination).collect()).collect();
        let widened = batches.iter().map(|_| Mutex::default()).collect();
        let repeating = batches.iter().map(|_| Mutex::default()).collect();
        self.opened.get_or_init(|| OpenedBatches { destinations, widened, repeating });
    }

    fn opened(&self) -> &OpenedBatches {
        self.opened.get().expect("tasks run once the unit is open")
    }

    pub(super) fn array(&self, task: &ChunkTask) -> &ArraySource {
        task.array(&self.collection)
    }

    pub(super) fn source(&self, task: &ChunkTask) -> &Source {
        &self.collection.elements()[task.element as usize].sources[task.dataset as usize]
    }

    pub(super) fn destination(&self, slot: usize, task: &ChunkTask) -> Destination {
        self.opened().destinations[self.plan.slot(task, slot).batch as usize][task.element as usize]
    }

    /// Entries of the chunk that each slot's row holds.
    pub(super) fn pieces<'a>(
        &'a self,
        task: &'a ChunkTask,
        csr: &'a CsrSource,
        array: Option<&ChunkedArray>,
    ) -> impl DoubleEndedIterator<Item = Piece> + 'a {
        let (low, high) = match array {
            Some(a) => (task.chunk * a.chunk_shape[0], (task.chunk + 1) * a.chunk_shape[0]),
            None => (0, u64::MAX),
        };
        task.slots.clone().zip(self.plan.slots_of(task)).filter_map(move |(number, slot)| {
            let (start, end) = csr.rows.range(slot.row);
            let (first, last) = (start.max(low), end.min(high));
            if first >= last {
                return None;
            }
            let indptr = &self.plan.batches[slot.batch as usize].elements[task.element as usize].indptr;
            let to = indptr[slot.position()] + (first - start);
            Some(Piece { slot: number, from: (first - low) as usize, to: to as usize, n: (last - first) as usize })
        })
    }

    /// Entries of the chunk of a dense array that each slot's row has where it is read as a sparse one.
    pub(super) fn dense_pieces<'a>(&'a self, task: &'a ChunkTask, block: &'a DenseBlock) -> impl Iterator<Item = Piece> + 'a {
        task.slots.clone().zip(self.plan.slots_of(task)).map(move |(number, slot)| {
            let first = self.plan.batches[slot.batch as usize].elements[task.element as usize].indptr[slot.position()];
            Piece { slot: number, from: block.elements(slot.row).start, to: first as usize + block.origin, n: block.stretch }
        })
    }

    pub(super) fn widened(&self, batch: usize) -> MutexGuard<'_, Vec<Widened>> {
        lock(&self.opened().widened[batch])
    }

    pub(super) fn repeating(&self, batch: usize) -> MutexGuard<'_, Vec<usize>> {
        lock(&self.opened().repeating[batch])
    }

    pub(super) fn place(&self, task: &ChunkTask) -> String {
        match self.array(task) {
            ArraySource::Chunked(array) => array.place(task.chunk),
            ArraySource::Memory(_) => format!(
                "dataset {:?}, array {} (in memory)",
                self.collection.datasets()[task.dataset as usize].name,
                self.collection.elements()[task.element as usize].name
            ),
        }
    }
}
