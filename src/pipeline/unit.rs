//! A group of batches planned together: its chunks are decoded and scattered here.

use std::cell::RefCell;
use std::ffi::CStr;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::dense::{DenseBlock, spread};
use super::queue::{Delivery, EpochQueue, LiveUnit};
use super::widened::Widened;
use crate::arena::Pool;
use crate::batch::{BatchElement, HostBatch};
use crate::collection::{ArraySource, Collection, CsrSource, ElementKind, Join, Source};
use crate::decode::scatter::{
    Columns, CopyValues, STREAMED_BYTES, Stored, announce, copy_indices, copy_values, copy_whole_values, publish,
};
use crate::decode::{Decoded, Scratch};
use crate::dtype::DType;
use crate::error::{Error, Result, catch};
use crate::fetch::{ChunkPart, ChunkRequest, Fetched, Fetcher, Sink};
use crate::layout::ChunkedArray;
use crate::plan::{BatchLayout, ChunkTask, Part, ReadPlan};
use crate::seal::{OnDevice, ROWS_PER_TASK, Seal};
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
    /// What a device finishes.
    on_device: Option<Arc<OnDevice>>,
    stats: Arc<StageStats>,
    /// Last, so that everything above is released before the epoch may be declared quiet.
    _live: LiveUnit,
}

/// What tasks write to, once there is memory for it.
#[derive(Debug)]
struct Filling {
    targets: Vec<Vec<Target>>,
    deliveries: Vec<Arc<Delivery>>,
    /// Per batch the elements of which some values did not fit the narrow type that they are scattered as.
    widened: Vec<Mutex<Vec<Widened>>>,
    /// Per batch the rows that were not seen to be sorted, where only those have to be sealed.
    unsorted: Vec<Mutex<Vec<usize>>>,
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
    /// Values, their type, and how many there are.
    values: *mut u8,
    value: DType,
    n_values: usize,
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

/// Fewer bytes of a chunk are read beside those that are needed: reads that lie so close are joined anyway.
const MIN_SAVED_BYTES: usize = 16 << 10;

impl Unit {
    /// A unit that does what `plan` says once it is [opened](Unit::open).
    pub(super) fn new(
        collection: Arc<Collection>,
        plan: ReadPlan,
        queue: Arc<EpochQueue>,
        pool: Arc<Pool>,
        on_device: Option<Arc<OnDevice>>,
        stats: Arc<StageStats>,
    ) -> Arc<Self> {
        let live = LiveUnit::new(Arc::clone(&queue));
        let parked = Mutex::new(Parked::Waiting(Vec::new()));
        Arc::new(Self { collection, plan, filling: OnceLock::new(), parked, queue, pool, on_device, stats, _live: live })
    }

    /// Sizes and rows of the batches.
    pub(super) fn layouts(&self) -> &[BatchLayout] {
        &self.plan.batches
    }

    /// Sets the reads going; what arrives before the unit is opened waits for that.
    pub(super) fn read(self: &Arc<Self>, fetcher: Arc<Fetcher>) {
        let request = |(tag, task): (usize, &ChunkTask)| {
            let ArraySource::Chunked(array) = self.array(task) else { return None };
            let part = self.part(task, array);
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
        let target = |e: &BatchElement| {
            let (indices, index) = match e {
                BatchElement::Csr { indices, .. } => (indices.lease.base(), indices.dtype),
                BatchElement::Dense(_) => (std::ptr::null_mut(), DType::Int32),
            };
            let values = e.values();
            let n_values = values.lease.len() / values.dtype.size();
            Target { indices, index, values: values.lease.base(), value: values.dtype, n_values }
        };
        // targets are taken from the batches before they move into their deliveries; the leases' blocks stay put
        let targets = batches.iter().map(|batch| batch.elements.iter().map(target).collect()).collect();
        let sizes = self.plan.batches.iter().map(|layout| layout.bytes);
        let deliveries = batches.into_iter().zip(sizes).map(|(batch, bytes)| Delivery::new(batch, bytes)).collect();
        let remaining = self.plan.tasks_per_batch.iter().map(|&n| AtomicU32::new(n)).collect();
        let widened = self.plan.batches.iter().map(|_| Mutex::default()).collect();
        let unsorted = self.plan.batches.iter().map(|_| Mutex::default()).collect();
        let filling = self.filling.get_or_init(|| Filling { targets, deliveries, widened, unsorted, remaining });
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
        let timed = self.stats.decode_ns.time(c"annbatch: decode");
        let result = fetched.and_then(|fetched| catch(|| SCRATCH.with_borrow_mut(|scratch| self.run(task, &fetched, scratch))));
        publish();
        drop(timed);
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
        let widened = std::mem::take(&mut *self.widened(batch));
        if widened.is_empty() {
            return self.filled(batch, filled);
        }
        self.stats.batches_widened.add(1);
        let work = |this: &Self, filled: &mut HostBatch| {
            widened.into_iter().try_for_each(|wide| {
                let staged = this.collection.elements()[wide.element()].dtype;
                wide.complete(filled, staged)
            })
        };
        self.apart(batch, filled, c"annbatch: widen", work, Self::filled);
    }

    /// Works on a filled batch on a thread of its own and goes on with `then`: all batches of a window are filled by the same
    /// task, more often than not.
    fn apart(
        self: &Arc<Self>,
        batch: usize,
        mut filled: HostBatch,
        range: &'static CStr,
        work: impl FnOnce(&Self, &mut HostBatch) -> Result<()> + Send + 'static,
        then: fn(&Arc<Self>, usize, HostBatch),
    ) {
        let this = Arc::clone(self);
        self.collection.runtime().decode().spawn(move || {
            if this.queue.is_cancelled() {
                // before the unit, whose end says that nothing is held any more
                drop((filled, work));
                return;
            }
            let timed = this.stats.seal_ns.time(range);
            let result = catch(|| work(&this, &mut filled));
            drop(timed);
            match result {
                Ok(()) => then(&this, batch, filled),
                Err(error) => {
                    drop(filled);
                    this.fail(batch, error);
                }
            }
        });
    }

    /// Goes on with a batch that holds what was read.
    fn filled(self: &Arc<Self>, batch: usize, filled: HostBatch) {
        if !Seal::is_needed(&self.collection, self.on_device.as_deref()) {
            return self.ready(batch, filled);
        }
        let seal = match catch(|| Seal::new(&self.collection, filled, &self.pool, self.on_device.as_deref())) {
            Ok(seal) => seal,
            Err(error) => return self.fail(batch, error),
        };
        if Seal::only_sorts(&self.collection, self.on_device.as_deref()) {
            let mut rows = std::mem::take(&mut *self.unsorted(batch));
            // one that several chunks have parts of was not seen whole by any of them
            rows.sort_unstable();
            rows.dedup();
            if rows.len() <= ROWS_PER_TASK {
                let timed = self.stats.seal_ns.time(c"annbatch: seal");
                // SAFETY: all of the batch's tasks are done, and no row is here twice.
                let sealed = catch(|| unsafe { seal.rows(&self.collection, &rows.iter().copied()) });
                drop(timed);
                return match sealed {
                    Ok(()) => self.ready(batch, seal.finish(&self.collection)),
                    Err(error) => self.fail(batch, error),
                };
            }
        }
        self.seal(batch, seal);
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
                let timed = this.stats.seal_ns.time(c"annbatch: seal");
                // SAFETY: the blocks are disjoint, and each is sealed by this task alone.
                let result = catch(|| unsafe { seal.rows(&this.collection, &(row..n.min(row + ROWS_PER_TASK))) });
                drop(timed);
                if let Err(error) = result {
                    this.fail(batch, error);
                }
                this.sealed(batch, seal);
            });
        }
        self.sealed(batch, seal);
    }

    /// Of all who hold a seal, the last one to let go of it delivers the batch.
    fn sealed(self: &Arc<Self>, batch: usize, seal: Arc<Seal>) {
        // once cancelled there may be tasks that let go of it without having sealed their rows
        if let Some(seal) = Arc::into_inner(seal)
            && !self.queue.is_cancelled()
        {
            self.ready(batch, seal.finish(&self.collection));
        }
    }

    fn ready(self: &Arc<Self>, batch: usize, delivered: HostBatch) {
        if self.on_device.is_none() || !delivered.may_be_narrowed() {
            return self.deliver(batch, delivered);
        }
        let work = |this: &Self, delivered: &mut HostBatch| {
            // SAFETY: all of the batch's tasks are done.
            let narrow = |device| unsafe { delivered.narrow_values(&this.collection, &this.pool, device) };
            this.on_device.as_deref().map_or(Ok(()), narrow)
        };
        self.apart(batch, delivered, c"annbatch: narrow", work, Self::deliver);
    }

    fn deliver(self: &Arc<Self>, batch: usize, delivered: HostBatch) {
        if self.filling().deliveries[batch].ready(delivered) {
            self.stats.batches_ready.add(1);
        }
        self.queue.changed();
    }

    fn widened(&self, batch: usize) -> MutexGuard<'_, Vec<Widened>> {
        self.filling().widened[batch].lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn unsorted(&self, batch: usize) -> MutexGuard<'_, Vec<usize>> {
        self.filling().unsorted[batch].lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Where the values of an element go that do not fit, of which these are some.
    fn widened_values(&self, slot: usize, task: &ChunkTask, some: Range<usize>) -> Result<*mut u8> {
        let (element, n_values) = (task.element as usize, self.target(slot, task).n_values);
        let mut widened = self.widened(self.plan.slots[slot].batch as usize);
        let at = match widened.iter().position(|w| w.element() == element) {
            Some(at) => at,
            None => {
                let values = self.pool.lease(n_values * self.collection.elements()[element].dtype.size())?;
                widened.push(Widened::new(element, values));
                widened.len() - 1
            }
        };
        widened[at].add(some)
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

    /// What of a chunk is read, unless it is all.
    fn part(&self, task: &ChunkTask, array: &ChunkedArray) -> Option<ChunkPart> {
        if array.is_verbatim() {
            let (needed, size) = (self.needed(task, array), array.dtype.size());
            return Some(ChunkPart { bytes: (needed.start * size) as u64..(needed.end * size) as u64, outline: None });
        }
        let outline = array.is_read_by_block().then(|| array.outline(task.chunk))??;
        let needed = Some(self.needed(task, array)).filter(|needed| !needed.is_empty())?;
        let bytes = outline.bytes_of(needed);
        // several small reads for one that is hardly larger save nothing
        let saved = outline.encoded_bytes().checked_sub(bytes.len())?;
        let pays = saved >= MIN_SAVED_BYTES && saved >= bytes.len();
        pays.then_some(ChunkPart { bytes: bytes.start as u64..bytes.end as u64, outline: Some(outline) })
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
                    let decoded = self.decode(task, array, fetched, encoded, scratch)?;
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
        fetched: &'a Fetched,
        encoded: &'a [u8],
        scratch: &'a mut Scratch,
    ) -> Result<Decoded<'a>> {
        if array.is_verbatim() {
            return array.codec.verbatim_part(encoded, self.needed(task, array).start, scratch);
        }
        match self.source(task) {
            Source::Csr(csr) => {
                let needed = self.pieces(task, csr, Some(array)).map(|(_, from, _, n)| from..from + n);
                self.decode_needed(task, array, fetched, encoded, needed, scratch)
            }
            Source::Dense(source) => {
                let block = DenseBlock::new(source.shape(), Some(array), task.chunk);
                let slots = &self.plan.slots[task.slots.clone()];
                self.decode_needed(task, array, fetched, encoded, slots.iter().map(|slot| block.elements(slot.row)), scratch)
            }
        }
    }

    fn decode_needed<'a>(
        &self,
        task: &ChunkTask,
        array: &ChunkedArray,
        fetched: &'a Fetched,
        encoded: &'a [u8],
        needed: impl Iterator<Item = Range<usize>>,
        scratch: &'a mut Scratch,
    ) -> Result<Decoded<'a>> {
        if let Some(extract) = fetched.extract() {
            return array.codec.decode_extract(extract, needed, scratch).inspect_err(|_| array.forget(task.chunk));
        }
        let decoded = array.codec_of(task.chunk).decode_ranges(encoded, needed, scratch)?;
        // of a chunk that gives all it has nothing is saved the next time either
        if array.is_read_by_block() && self.needed(task, array).len() * 2 <= array.chunk_len() as usize {
            array.learn(task.chunk, encoded);
        }
        Ok(decoded)
    }

    /// Elements of the chunk from the first to the last that the task's rows need.
    fn needed(&self, task: &ChunkTask, array: &ChunkedArray) -> Range<usize> {
        // slots are sorted by row
        match self.source(task) {
            Source::Csr(csr) => {
                let mut pieces = self.pieces(task, csr, Some(array)).map(|(_, from, _, n)| from..from + n);
                let Some(first) = pieces.next() else { return 0..0 };
                first.start..pieces.next_back().map_or(first.end, |last| last.end)
            }
            Source::Dense(source) => {
                let block = DenseBlock::new(source.shape(), Some(array), task.chunk);
                let slots = &self.plan.slots[task.slots.clone()];
                block.elements(slots[0].row).start..block.elements(slots[slots.len() - 1].row).end
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
    ) -> impl DoubleEndedIterator<Item = (usize, usize, usize, usize)> + 'a {
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
        let (stored, staged) = (csr.data.dtype(), self.collection.elements()[task.element as usize].dtype);
        let wide = copy_values(stored, staged).ok_or_else(|| no_cast(stored, staged))?;
        let mut pieces = self.pieces(task, csr, array).peekable();
        while let Some((slot, from, to, n)) = pieces.next() {
            if let Some(&(slot, _, to, n)) = pieces.peek() {
                let Target { values, value, .. } = self.target(slot, task);
                announce(values.wrapping_add(to * value.size()), n * value.size());
            }
            let copied = |copy: CopyValues, dst: *mut u8, size: usize| {
                let mut fits = true;
                run.pieces(from, n, stored.size(), |src, done, n| {
                    // SAFETY: `run.pieces` gives `n` readable elements; the slot has room for the row's entries,
                    // of which these are numbers `to + done..`, and no other task writes them.
                    fits &= unsafe { copy.run(src, dst.add((to + done) * size), n) };
                })?;
                Ok(fits)
            };
            let Target { values, value, .. } = self.target(slot, task);
            let mut dst = values;
            if value != staged {
                let narrow = copy_whole_values(stored, value).ok_or_else(|| no_cast(stored, value))?;
                if copied(narrow, values, value.size())? {
                    continue;
                }
                dst = self.widened_values(slot, task, to..to + n)?;
            }
            if !copied(wide, dst, staged.size())? {
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
        let columns = element.join(task.dataset).map(Join::columns);
        let n_var = columns.map_or(n_var, |columns| columns.len() as u64);
        let stored = csr.indices.dtype();
        let look = Seal::only_sorts_element(&self.collection, self.on_device.as_deref(), task.element as usize);
        let mut pieces = self.pieces(task, csr, array).peekable();
        while let Some((slot, from, to, n)) = pieces.next() {
            if let Some(&(slot, _, to, n)) = pieces.peek() {
                let Target { indices, index, .. } = self.target(slot, task);
                announce(indices.wrapping_add(to * index.size()), n * index.size());
            }
            let Target { indices: dst, index, .. } = self.target(slot, task);
            let copy = copy_indices(stored, index).ok_or_else(|| no_cast(stored, index))?;
            let (mut largest, mut columns) = (0, Columns::new(columns.unwrap_or_default(), look));
            run.pieces(from, n, stored.size(), |src, done, n| {
                // SAFETY: as in `scatter_values`, with the index size of this batch.
                largest = largest.max(unsafe { copy.run(src, dst.add((to + done) * index.size()), n, &mut columns) });
            })?;
            if look {
                let slot = &self.plan.slots[slot];
                let (start, end) = csr.rows.range(slot.row);
                if !columns.are_sorted() || (n as u64) < end - start {
                    self.unsorted(slot.batch as usize).push(slot.position());
                }
            }
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
        if let Some(join) = element.join(task.dataset) {
            return self.scatter_joined(task, join, &block, run, copy);
        }
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

    /// The same for rows of a matrix whose columns are joined: each to its place, zeros where the dataset has no column.
    fn scatter_joined(&self, task: &ChunkTask, join: &Join, block: &DenseBlock, run: &Run, copy: CopyValues) -> Result<()> {
        let element = &self.collection.elements()[task.element as usize];
        let (stored, size) = (self.source(task).dtype().size(), element.dtype.size());
        let columns = &join.columns()[block.origin..block.origin + block.stretch];
        // converted and still in the nearest cache
        let mut line = [0u64; STREAMED_BYTES / 8];
        for number in task.slots.clone() {
            let slot = &self.plan.slots[number];
            // SAFETY: within the batch, which has a row of joined columns for each slot.
            let row = unsafe { self.target(number, task).values.add(slot.position() * element.dense_row_bytes()) };
            if block.origin == 0 {
                for &column in join.absent() {
                    // SAFETY: within the row, and no other task of this row has its first columns; none writes to this one.
                    unsafe { row.add(column as usize * size).write_bytes(0, size) };
                }
            }
            let from = block.elements(slot.row).start;
            let (mut fits, at_once) = (true, (STREAMED_BYTES - 1) / size);
            for (number, columns) in columns.chunks(at_once).enumerate() {
                run.pieces(from + number * at_once, columns.len(), stored, |src, done, n| {
                    let line = line.as_mut_ptr().cast::<u8>();
                    // SAFETY: there are `n` elements and the line has room for them; joined columns lie within the row, and
                    // those of different stored ones are different.
                    unsafe {
                        fits &= copy.run(src, line, n);
                        spread(line, row, size, &columns[done..done + n]);
                    }
                })?;
            }
            if !fits {
                return Err(overflow(slot.row));
            }
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
            Self::Decoded(decoded) => decoded.runs(from..from + n, &mut copy)?,
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
