//! A group of batches planned together: its chunks are decoded and scattered here.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use smallvec::SmallVec;

use super::queue::{Delivery, EpochQueue, LiveUnit};
use crate::arena::Pool;
use crate::batch::{BatchElement, HostBatch};
use crate::collection::{ArraySource, Collection, CsrSource, ElementKind, Source};
use crate::decode::scatter::{Stored, copy_indices, copy_values, publish};
use crate::decode::{Decoded, Scratch};
use crate::dtype::DType;
use crate::error::{Error, Result, catch};
use crate::fetch::{ChunkRequest, Fetched, Fetcher, Sink};
use crate::layout::ChunkedArray;
use crate::plan::{BatchLayout, ChunkTask, Part, ReadPlan};
use crate::seal::{ROWS_PER_TASK, Seal};
use crate::stats::StageStats;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Batches being filled, and everything their tasks need.
#[derive(Debug)]
pub(super) struct Unit {
    collection: Arc<Collection>,
    plan: ReadPlan,
    filling: OnceLock<Filling>,
    parked: Mutex<Parked>,
    queue: Arc<EpochQueue>,
    pool: Arc<Pool>,
    /// Whether values may be narrower than they are delivered.
    narrow: bool,
    stats: Arc<StageStats>,
    /// Last, so that everything above is released before the epoch may be declared quiet.
    _live: LiveUnit,
}

/// What tasks write to, once there is memory for it.
#[derive(Debug)]
struct Filling {
    targets: Vec<Vec<Target>>,
    deliveries: Vec<Arc<Delivery>>,
    /// Tasks left per batch.
    remaining: Vec<AtomicU32>,
}

/// Chunks that arrived before there was memory for the batches: reading goes ahead of it, within its own budget.
#[derive(Debug)]
enum Parked {
    Waiting(Vec<(u32, Result<Fetched>)>),
    /// There is memory: chunks go to the decoding threads.
    Open,
    /// There will be none.
    Abandoned,
}

/// Where one element of one batch is written: addresses into leases that the batch's delivery keeps alive.
#[derive(Debug, Clone, Copy)]
struct Target {
    /// CSR: indices, and their type; unused for dense.
    indices: *mut u8,
    index: DType,
    /// Values.
    values: *mut u8,
}
// SAFETY: the addresses point into leases kept alive by the unit's deliveries until the unit drops; each
// task writes only the slots of its own rows and chunk, which are disjoint between tasks.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// Elements to copy from.
enum Run<'a> {
    /// A lent array.
    Elements(&'a [u8]),
    /// What a task needs of a chunk.
    Decoded(&'a Decoded<'a>),
    /// A block of repeated fill values.
    Fill(&'a [u8]),
}

/// Fill values are written in blocks of this many.
const FILL_BLOCK: usize = 1024;

impl Unit {
    /// A unit that does what `plan` says once it is [opened](Unit::open).
    pub(super) fn new(
        collection: Arc<Collection>,
        plan: ReadPlan,
        queue: Arc<EpochQueue>,
        pool: Arc<Pool>,
        narrow: bool,
        stats: Arc<StageStats>,
    ) -> Arc<Self> {
        let live = LiveUnit::new(Arc::clone(&queue));
        let parked = Mutex::new(Parked::Waiting(Vec::new()));
        Arc::new(Self { collection, plan, filling: OnceLock::new(), parked, queue, pool, narrow, stats, _live: live })
    }

    /// Sizes and rows of the batches.
    pub(super) fn layouts(&self) -> &[BatchLayout] {
        &self.plan.batches
    }

    /// Sets the reads going; what arrives before the unit is opened waits for that.
    pub(super) fn read(self: &Arc<Self>, fetcher: Arc<Fetcher>) {
        let request = |(tag, task): (usize, &ChunkTask)| {
            let ArraySource::Chunked(array) = self.array(task) else { return None };
            let part = array.is_verbatim().then(|| {
                let (needed, size) = (self.needed(task, array), array.dtype.size());
                (needed.start * size) as u64..(needed.end * size) as u64
            });
            let deadline = self.plan.task_batches[task.batches.clone()].iter().min().copied().unwrap_or(0);
            Some(ChunkRequest { tag: tag as u32, array: Arc::clone(array), chunk: task.chunk, part, deadline })
        };
        let requests: Vec<_> = self.plan.tasks.iter().enumerate().filter_map(request).collect();
        if !requests.is_empty() {
            let sink: Arc<dyn Sink> = Arc::clone(self) as _;
            self.collection.runtime().io().spawn(fetcher.fetch(requests, sink));
        }
    }

    /// Gives the unit the batches to fill, as its layouts describe them, puts them into the queue, and sets the tasks
    /// going whose bytes are here.
    pub(super) fn open(self: &Arc<Self>, batches: Vec<HostBatch>) {
        let target = |e: &BatchElement| match e {
            BatchElement::Csr { indices, data, .. } => {
                Target { indices: indices.lease.base(), index: indices.dtype, values: data.lease.base() }
            }
            BatchElement::Dense(tensor) => {
                Target { indices: std::ptr::null_mut(), index: DType::Int32, values: tensor.lease.base() }
            }
        };
        // targets are taken from the batches before they move into their deliveries; the leases' blocks stay put
        let targets = batches.iter().map(|batch| batch.elements.iter().map(target).collect()).collect();
        let sizes = self.plan.batches.iter().map(|layout| layout.bytes);
        let deliveries = batches.into_iter().zip(sizes).map(|(batch, bytes)| Delivery::new(batch, bytes)).collect();
        let remaining = self.plan.tasks_per_batch.iter().map(|&n| AtomicU32::new(n)).collect();
        let filling = self.filling.get_or_init(|| Filling { targets, deliveries, remaining });
        self.queue.push(&filling.deliveries);
        for (batch, tasks) in self.plan.tasks_per_batch.iter().enumerate() {
            // all of its rows are without entries
            if *tasks == 0 {
                self.finish(batch);
            }
        }
        if let Parked::Waiting(parked) = std::mem::replace(&mut *self.parked(), Parked::Open) {
            for (tag, fetched) in parked {
                self.spawn(tag, fetched);
            }
        }
        for (tag, task) in self.plan.tasks.iter().enumerate() {
            if let ArraySource::Memory(_) = self.array(task) {
                self.spawn(tag as u32, Ok(Fetched::Fill));
            }
        }
    }

    /// Says that a unit that is not open never will be: its bytes are let go, so that no read waits for them.
    pub(super) fn abandon(&self) {
        let mut parked = self.parked();
        if matches!(*parked, Parked::Waiting(_)) {
            *parked = Parked::Abandoned;
        }
    }

    fn parked(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn filling(&self) -> &Filling {
        self.filling.get().expect("tasks run once the unit is open")
    }

    fn spawn(self: &Arc<Self>, tag: u32, fetched: Result<Fetched>) {
        let (this, runtime) = (Arc::clone(self), Arc::clone(self.collection.runtime()));
        this.stats.decode_queued.raise();
        runtime.decode().spawn_fifo(move || {
            this.stats.decode_queued.lower();
            if this.queue.is_cancelled() {
                // before the unit, whose end says that nothing is held any more
                drop(fetched);
                return;
            }
            let _running = this.stats.decode_running.enter();
            this.execute(tag, fetched);
        });
    }

    fn array(&self, task: &ChunkTask) -> &ArraySource {
        task.array(&self.collection)
    }

    fn source(&self, task: &ChunkTask) -> &Source {
        &self.collection.elements()[task.element as usize].sources[task.dataset as usize]
    }

    /// Decodes and scatters one task, then counts it off for its batches.
    fn execute(self: &Arc<Self>, tag: u32, fetched: Result<Fetched>) {
        let task = &self.plan.tasks[tag as usize];
        let start = Instant::now();
        let result = fetched.and_then(|fetched| catch(|| SCRATCH.with_borrow_mut(|scratch| self.run(task, &fetched, scratch))));
        publish();
        self.stats.decode_ns.add_since(start);
        let result = result.map_err(|e| e.within(&self.place(task)));
        let filling = self.filling();
        for &batch in &self.plan.task_batches[task.batches.clone()] {
            if let Err(e) = &result {
                self.fail(batch as usize, e.clone());
            }
            if filling.remaining[batch as usize].fetch_sub(1, Ordering::AcqRel) == 1 {
                self.finish(batch as usize);
            }
        }
    }

    /// Delivers a batch that is filled, or sets the tasks going that seal it.
    fn finish(self: &Arc<Self>, batch: usize) {
        let Some(filled) = self.filling().deliveries[batch].filled() else { return };
        if !Seal::is_needed(&self.collection) {
            return self.ready(batch, filled);
        }
        match catch(|| Seal::new(&self.collection, filled, &self.pool)) {
            Ok(seal) => self.seal(batch, seal),
            Err(error) => self.fail(batch, error),
        }
    }

    /// Seals a batch in blocks of rows; the last to be done delivers it.
    fn seal(self: &Arc<Self>, batch: usize, seal: Seal) {
        let (n, seal) = (seal.n_rows(), Arc::new(seal));
        for row in (0..n).step_by(ROWS_PER_TASK) {
            let (this, seal) = (Arc::clone(self), Arc::clone(&seal));
            self.collection.runtime().decode().spawn_fifo(move || {
                if this.queue.is_cancelled() {
                    // before the unit, as above
                    drop(seal);
                    return;
                }
                let start = Instant::now();
                // SAFETY: the blocks are disjoint, and each is sealed by this task alone.
                let result = catch(|| unsafe { seal.rows(&this.collection, row..n.min(row + ROWS_PER_TASK)) });
                this.stats.seal_ns.add_since(start);
                if let Err(error) = result {
                    this.fail(batch, error);
                }
                this.sealed(batch, seal);
            });
        }
        self.sealed(batch, seal);
    }

    /// Of all who hold a seal, the last one to let go of it delivers the batch.
    fn sealed(&self, batch: usize, seal: Arc<Seal>) {
        // once cancelled there may be tasks that let go of it without having sealed their rows
        if let Some(seal) = Arc::into_inner(seal)
            && !self.queue.is_cancelled()
        {
            self.ready(batch, seal.finish(&self.collection));
        }
    }

    fn ready(&self, batch: usize, mut delivered: HostBatch) {
        if self.narrow {
            let start = Instant::now();
            // SAFETY: all of the batch's tasks are done.
            let narrowed = catch(|| unsafe { delivered.narrow_values(&self.collection, &self.pool) });
            self.stats.seal_ns.add_since(start);
            if let Err(error) = narrowed {
                return self.fail(batch, error);
            }
        }
        if self.filling().deliveries[batch].ready(delivered) {
            self.stats.batches_ready.add(1);
        }
        self.queue.changed();
    }

    fn fail(&self, batch: usize, error: Error) {
        self.filling().deliveries[batch].fail(error);
        self.queue.changed();
    }

    fn place(&self, task: &ChunkTask) -> String {
        match self.array(task) {
            ArraySource::Chunked(array) => array.place(task.chunk),
            ArraySource::Memory(_) => format!(
                "dataset {:?}, array {} (in memory)",
                self.collection.datasets()[task.dataset as usize].name,
                self.collection.elements()[task.element as usize].name
            ),
        }
    }

    fn run(&self, task: &ChunkTask, fetched: &Fetched, scratch: &mut Scratch) -> Result<()> {
        match self.array(task) {
            ArraySource::Memory(array) => {
                // SAFETY: the lender keeps the buffer alive and unchanged until every stream is closed.
                let elements = unsafe { array.buffer.bytes() };
                self.scatter(task, None, &Run::Elements(elements))
            }
            ArraySource::Chunked(array) => match fetched.bytes() {
                Some(encoded) => {
                    let decoded = self.decode(task, array, encoded, scratch)?;
                    self.stats.chunks_decoded.add(1);
                    self.stats.bytes_decoded.add(decoded.bytes() as u64);
                    if array.codec_of(task.chunk).is_general() {
                        self.stats.chunks_general_path.add(1);
                    }
                    self.scatter(task, Some(array), &Run::Decoded(&decoded))
                }
                None => {
                    self.stats.chunks_filled.add(1);
                    self.scatter(task, Some(array), &Run::Fill(scratch.repeated(&array.fill, FILL_BLOCK)?))
                }
            },
        }
    }

    /// Decodes the elements of a chunk that the task's rows need; of a verbatim one they are all that was read.
    fn decode<'a>(
        &self,
        task: &ChunkTask,
        array: &ChunkedArray,
        encoded: &'a [u8],
        scratch: &'a mut Scratch,
    ) -> Result<Decoded<'a>> {
        if array.is_verbatim() {
            return array.codec.verbatim_part(encoded, self.needed(task, array).start, scratch);
        }
        let codec = array.codec_of(task.chunk);
        match self.source(task) {
            Source::Csr(csr) => {
                let needed = self.pieces(task, csr, Some(array)).map(|(_, from, _, n)| from..from + n);
                codec.decode_ranges(encoded, needed, scratch)
            }
            Source::Dense(source) => {
                let block = DenseBlock::new(source.shape(), Some(array), task.chunk);
                let slots = &self.plan.slots[task.slots.clone()];
                codec.decode_ranges(encoded, slots.iter().map(|slot| block.elements(slot.row)), scratch)
            }
        }
    }

    /// Elements of the chunk from the first to the last that the task's rows need.
    fn needed(&self, task: &ChunkTask, array: &ChunkedArray) -> Range<usize> {
        let hull = |a: Range<usize>, b: Range<usize>| a.start.min(b.start)..a.end.max(b.end);
        match self.source(task) {
            Source::Csr(csr) => {
                self.pieces(task, csr, Some(array)).map(|(_, from, _, n)| from..from + n).reduce(hull).unwrap_or(0..0)
            }
            Source::Dense(source) => {
                let block = DenseBlock::new(source.shape(), Some(array), task.chunk);
                // sorted by row
                let slots = &self.plan.slots[task.slots.clone()];
                hull(block.elements(slots[0].row), block.elements(slots[slots.len() - 1].row))
            }
        }
    }

    /// Copies the rows of a task's slots out of `run`.
    fn scatter(&self, task: &ChunkTask, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        match (self.source(task), task.part) {
            (Source::Csr(csr), Part::Indices) => self.scatter_indices(task, csr, array, run),
            (Source::Csr(csr), _) => self.scatter_values(task, csr, array, run),
            (Source::Dense(source), _) => self.scatter_dense(task, source, array, run),
        }
    }

    /// Entries of the chunk that each slot's row holds: (slot number, first entry in the chunk, offset in
    /// the batch, count).
    fn pieces<'a>(
        &'a self,
        task: &'a ChunkTask,
        csr: &'a CsrSource,
        array: Option<&ChunkedArray>,
    ) -> impl Iterator<Item = (usize, usize, usize, usize)> + 'a {
        let (low, high) = match array {
            Some(a) => (task.chunk * a.chunk_shape[0], (task.chunk + 1) * a.chunk_shape[0]),
            None => (0, u64::MAX),
        };
        task.slots.clone().filter_map(move |number| {
            let slot = &self.plan.slots[number];
            let (start, end) = csr.rows.range(slot.row);
            let (first, last) = (start.max(low), end.min(high));
            if first >= last {
                return None;
            }
            let indptr = &self.plan.batches[slot.batch as usize].elements[task.element as usize].indptr;
            let offset = indptr[slot.position()] + (first - start);
            Some((number, (first - low) as usize, offset as usize, (last - first) as usize))
        })
    }

    fn target(&self, slot: usize, task: &ChunkTask) -> Target {
        self.filling().targets[self.plan.slots[slot].batch as usize][task.element as usize]
    }

    fn scatter_values(&self, task: &ChunkTask, csr: &CsrSource, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        let (stored, delivered) = (csr.data.dtype(), self.collection.elements()[task.element as usize].dtype);
        let copy = copy_values(stored, delivered).ok_or_else(|| no_cast(stored, delivered))?;
        for (slot, from, to, n) in self.pieces(task, csr, array) {
            let dst = self.target(slot, task).values;
            let mut fits = true;
            run.pieces(from, n, stored.size(), |src, done, n| {
                // SAFETY: `run.pieces` gives `n` readable elements; the slot has room for the row's entries,
                // of which these are numbers `to + done..`, and no other task writes them.
                fits &= unsafe { copy.run(src, dst.add((to + done) * delivered.size()), n) };
            })?;
            if !fits {
                return Err(overflow(self.plan.slots[slot].row));
            }
        }
        Ok(())
    }

    fn scatter_indices(&self, task: &ChunkTask, csr: &CsrSource, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        let element = &self.collection.elements()[task.element as usize];
        let ElementKind::Csr { n_var } = element.kind else {
            return Err(Error::Internal { message: "indices of a dense element".into() });
        };
        let stored = csr.indices.dtype();
        for (slot, from, to, n) in self.pieces(task, csr, array) {
            let Target { indices: dst, index, .. } = self.target(slot, task);
            let copy = copy_indices(stored, index).ok_or_else(|| no_cast(stored, index))?;
            let mut largest = 0;
            run.pieces(from, n, stored.size(), |src, done, n| {
                // SAFETY: as in `scatter_values`, with the index size of this batch.
                largest = largest.max(unsafe { copy.run(src, dst.add((to + done) * index.size()), n) });
            })?;
            if largest >= n_var {
                return Err(Error::corrupt(
                    format!("row {}", self.plan.slots[slot].row),
                    format!("a column index is negative or not below n_var = {n_var} (largest, read as unsigned: {largest})"),
                ));
            }
        }
        Ok(())
    }

    fn scatter_dense(&self, task: &ChunkTask, source: &ArraySource, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        let element = &self.collection.elements()[task.element as usize];
        let (stored, delivered) = (source.dtype(), element.dtype);
        let copy = copy_values(stored, delivered).ok_or_else(|| no_cast(stored, delivered))?;
        let block = DenseBlock::new(source.shape(), array, task.chunk);
        for number in task.slots.clone() {
            let slot = &self.plan.slots[number];
            let dst = self.target(number, task).values;
            let (from, to) = (block.elements(slot.row).start, slot.position() * block.delivered_row);
            block.stretches(|stored_at, delivered_at| {
                let mut fits = true;
                run.pieces(from + stored_at, block.stretch, stored.size(), |src, done, n| {
                    // SAFETY: the stretch lies within the slot's row, and no other chunk holds these columns.
                    fits &= unsafe { copy.run(src, dst.add((to + delivered_at + done) * delivered.size()), n) };
                })?;
                if fits { Ok(()) } else { Err(overflow(slot.row)) }
            })?;
        }
        Ok(())
    }
}

impl Run<'_> {
    /// Calls `copy(elements, elements done, n)` for contiguous parts that together are `n` elements from `from`.
    fn pieces(&self, from: usize, n: usize, size: usize, mut copy: impl FnMut(Stored, usize, usize)) -> Result<()> {
        match self {
            Self::Elements(bytes) => {
                let part = bytes.get(from * size..(from + n) * size).ok_or_else(|| Error::Internal {
                    message: format!("elements {from}..{} of a chunk of {} bytes", from + n, bytes.len()),
                })?;
                copy(Stored::Items(part), 0, n);
            }
            Self::Decoded(decoded) => decoded.runs(from..from + n, copy)?,
            Self::Fill(block) => {
                let mut done = 0;
                while done < n {
                    let now = (n - done).min(FILL_BLOCK);
                    copy(Stored::Items(&block[..now * size]), done, now);
                    done += now;
                }
            }
        }
        Ok(())
    }
}

/// How the rows of one dense chunk map to delivered rows: stretches of `stretch` contiguous elements, which lie as
/// the nested loops of `loops` say. They are walked, never listed: metadata may claim any number of them.
struct DenseBlock {
    first_row: u64,
    /// Elements of a row within the chunk and within a batch.
    stored_row: usize,
    delivered_row: usize,
    /// Element of the delivered row where the chunk's part begins.
    origin: usize,
    stretch: usize,
    /// Outermost first: (repeats, elements between two in the chunk, elements between two in the delivered row).
    loops: SmallVec<[Loop; 4]>,
}

type Loop = (usize, usize, usize);

impl DenseBlock {
    fn new(shape: &[u64], array: Option<&ChunkedArray>, chunk: u64) -> Self {
        let delivered_row = shape[1..].iter().product::<u64>() as usize;
        let Some(array) = array else {
            return Self {
                first_row: 0,
                stored_row: delivered_row,
                delivered_row,
                origin: 0,
                stretch: delivered_row,
                loops: SmallVec::new(),
            };
        };
        let grid = &array.grid()[1..];
        // row-major: what is left of it once the inner dimensions are taken off is the block of rows
        let mut number = chunk;
        let (tail, width) = (&shape[1..], &array.chunk_shape[1..]);
        let mut block = Self {
            first_row: 0,
            stored_row: width.iter().product::<u64>() as usize,
            delivered_row,
            origin: 0,
            stretch: 1,
            loops: SmallVec::new(),
        };
        // from the innermost dimension outwards; while the chunk spans whole dimensions its elements are one stretch
        let (mut below_chunk, mut below_row, mut contiguous) = (1usize, 1usize, true);
        for d in (0..tail.len()).rev() {
            let begin = number % grid[d] * width[d];
            number /= grid[d];
            // the part of the chunk that lies inside the array: edge chunks are stored whole
            let inside = width[d].min(tail[d] - begin) as usize;
            block.origin += begin as usize * below_row;
            if contiguous {
                block.stretch *= inside;
            } else {
                block.loops.push((inside, below_chunk, below_row));
            }
            contiguous &= inside as u64 == width[d] && width[d] == tail[d];
            below_chunk *= width[d] as usize;
            below_row *= tail[d] as usize;
        }
        block.first_row = number * array.chunk_shape[0];
        block.loops.reverse();
        block
    }

    /// Elements of the chunk that hold its part of a row.
    fn elements(&self, row: u64) -> Range<usize> {
        let first = (row - self.first_row) as usize * self.stored_row;
        first..first + self.stored_row
    }

    /// Calls `copy(element within the stored row, element within the delivered row)` for each stretch of a row.
    fn stretches(&self, mut copy: impl FnMut(usize, usize) -> Result<()>) -> Result<()> {
        fn walk(loops: &[Loop], from: usize, to: usize, copy: &mut impl FnMut(usize, usize) -> Result<()>) -> Result<()> {
            match loops.split_first() {
                None => copy(from, to),
                Some((&(n, stored, delivered), inner)) => {
                    (0..n).try_for_each(|i| walk(inner, from + i * stored, to + i * delivered, copy))
                }
            }
        }
        walk(&self.loops, 0, self.origin, &mut copy)
    }
}

fn no_cast(from: DType, to: DType) -> Error {
    Error::Internal { message: format!("no copy from {from} to {to}") }
}

fn overflow(row: u64) -> Error {
    Error::corrupt(format!("row {row}"), "holds a uint64 value above 2^63-1, which int64 cannot hold; ask for dtype \"native\"")
}

impl Sink for Unit {
    fn arrived(self: Arc<Self>, tag: u32, fetched: Result<Fetched>) {
        if self.queue.is_cancelled() {
            return;
        }
        match &mut *self.parked() {
            Parked::Waiting(parked) => return parked.push((tag, fetched)),
            Parked::Abandoned => return,
            Parked::Open => {}
        }
        self.spawn(tag, fetched);
    }

    fn cancelled(&self) -> bool {
        self.queue.is_cancelled() || matches!(*self.parked(), Parked::Abandoned)
    }
}
