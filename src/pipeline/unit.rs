//! A group of batches planned together: from the reads of its chunks to the delivery of its batches. What is read and decoded of
//! a chunk is said in `chunk`, where its rows go in `scatter`, and what both work on in `filling`.

mod chunk;
mod filling;
mod scatter;

use std::cell::RefCell;
use std::ffi::CStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use self::filling::Filling;
use super::queue::{BatchDelivery, EpochQueue, LiveUnit};
use crate::arena::Pool;
use crate::base::error::{Error, Result, catch};
use crate::base::lock::lock;
use crate::base::stats::StageStats;
use crate::batch::{BatchLayout, HostBatch};
use crate::collection::{ArraySource, Collection};
use crate::decode::Scratch;
use crate::decode::scatter::publish;
use crate::fetch::{ChunkRequest, Fetched, Fetcher, Sink};
use crate::finish::narrow::may_be_narrowed;
use crate::finish::{OnDevice, ROWS_PER_TASK, Seal};
use crate::plan::{ChunkTask, ReadPlan};

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Batches being filled, and everything their tasks need.
#[derive(Debug)]
pub(super) struct Unit {
    filling: Filling,
    /// The batches, once there is memory for them.
    deliveries: OnceLock<Vec<Arc<BatchDelivery>>>,
    /// Tasks left per batch.
    remaining: Vec<AtomicU32>,
    parked: Mutex<Parked>,
    queue: Arc<EpochQueue>,
    /// What a device finishes.
    on_device: Option<Arc<OnDevice>>,
    /// Last, so that everything above is released before the epoch may be declared quiet.
    _live: LiveUnit,
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
        let remaining = plan.tasks_per_batch.iter().map(|&n| AtomicU32::new(n)).collect();
        let filling = Filling::new(collection, plan, pool, stats);
        Arc::new(Self { filling, deliveries: OnceLock::new(), remaining, parked, queue, on_device, _live: live })
    }

    /// Sizes and rows of the batches.
    pub(super) fn layouts(&self) -> &[BatchLayout] {
        &self.filling.plan.batches
    }

    /// Sets the reads going; what arrives before the unit is opened waits for that.
    pub(super) fn read(self: &Arc<Self>, fetcher: Arc<Fetcher>) {
        let request = |(tag, task): (usize, &ChunkTask)| {
            let ArraySource::Chunked(array) = self.filling.array(task) else { return None };
            let part = self.filling.part(task, array);
            let deadline = self.filling.plan.task_batches[task.batches.clone()].iter().min().copied().unwrap_or(0);
            Some(ChunkRequest { tag: tag as u32, array: Arc::clone(array), chunk: task.chunk, part, deadline })
        };
        let requests: Vec<_> = self.filling.plan.tasks.iter().enumerate().filter_map(request).collect();
        if !requests.is_empty() {
            let sink: Arc<dyn Sink> = Arc::clone(self) as _;
            self.filling.collection.runtime().io().spawn(fetcher.fetch(requests, sink));
        }
    }

    /// Gives the unit the batches to fill, as its layouts describe them, puts them into the queue, and sets the tasks
    /// going whose bytes are here.
    pub(super) fn open(self: &Arc<Self>, batches: Vec<HostBatch>) {
        // addresses are taken from the batches before they move into their deliveries; the leases' blocks stay put
        self.filling.fill(&batches);
        let sizes = self.filling.plan.batches.iter().map(|layout| layout.bytes);
        let deliveries = batches.into_iter().zip(sizes).map(|(batch, bytes)| BatchDelivery::new(batch, bytes)).collect();
        self.queue.push(self.deliveries.get_or_init(|| deliveries));
        for (batch, tasks) in self.filling.plan.tasks_per_batch.iter().enumerate() {
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
        for (tag, task) in self.filling.plan.tasks.iter().enumerate() {
            if let ArraySource::Memory(_) = self.filling.array(task) {
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
        lock(&self.parked)
    }

    fn spawn(self: &Arc<Self>, tag: u32, fetched: Result<Fetched>) {
        let (this, runtime) = (Arc::clone(self), Arc::clone(self.filling.collection.runtime()));
        this.filling.stats.decode_queued.raise();
        runtime.decode().spawn_fifo(move || {
            this.filling.stats.decode_queued.lower();
            if this.queue.is_cancelled() {
                // before the unit, whose end says that nothing is held any more
                drop(fetched);
                return;
            }
            let _running = this.filling.stats.decode_running.enter();
            this.execute(tag, fetched);
        });
    }

    /// Decodes and scatters one task, then counts it off for its batches.
    fn execute(self: &Arc<Self>, tag: u32, fetched: Result<Fetched>) {
        let task = &self.filling.plan.tasks[tag as usize];
        let timed = self.filling.stats.decode_ns.time(c"annbatch: decode");
        let result =
            fetched.and_then(|fetched| catch(|| SCRATCH.with_borrow_mut(|scratch| self.filling.run(task, &fetched, scratch))));
        publish();
        drop(timed);
        let result = result.map_err(|e| e.within(&self.filling.place(task)));
        for &batch in &self.filling.plan.task_batches[task.batches.clone()] {
            if let Err(e) = &result {
                self.fail(batch as usize, e.clone());
            }
            if self.remaining[batch as usize].fetch_sub(1, Ordering::AcqRel) == 1 {
                self.finish(batch as usize);
            }
        }
    }

    /// Delivers a batch that is filled, or sets the tasks going that seal it.
    fn finish(self: &Arc<Self>, batch: usize) {
        let Some(filled) = self.delivery(batch).filled() else { return };
        let widened = std::mem::take(&mut *self.filling.widened(batch));
        if widened.is_empty() {
            return self.filled(batch, filled);
        }
        self.filling.stats.batches_widened.add(1);
        let work = |this: &Self, filled: &mut HostBatch| {
            widened.into_iter().try_for_each(|wide| {
                let staged = this.filling.collection.elements()[wide.element()].dtype;
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
        self.filling.collection.runtime().decode().spawn(move || {
            if this.queue.is_cancelled() {
                // before the unit, whose end says that nothing is held any more
                drop((filled, work));
                return;
            }
            let timed = this.filling.stats.seal_ns.time(range);
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
        if !Seal::is_needed(&self.filling.collection, self.on_device.as_deref()) {
            return self.ready(batch, filled);
        }
        let mut repeating = std::mem::take(&mut *self.filling.repeating(batch));
        // one that several chunks have parts of was not seen whole by any of them
        repeating.sort_unstable();
        repeating.dedup();
        let seal =
            match catch(|| Seal::new(&self.filling.collection, filled, repeating, &self.filling.pool, self.on_device.as_deref())) {
                Ok(seal) => seal,
                Err(error) => return self.fail(batch, error),
            };
        if Seal::only_sorts(&self.filling.collection, self.on_device.as_deref()) && seal.repeating().len() <= ROWS_PER_TASK {
            let timed = self.filling.stats.seal_ns.time(c"annbatch: seal");
            // SAFETY: all of the batch's tasks are done, and no row is there twice.
            let sealed = catch(|| unsafe { seal.rows(&self.filling.collection, &seal.repeating().iter().copied()) });
            drop(timed);
            return match sealed {
                Ok(()) => self.ready(batch, seal.finish(&self.filling.collection)),
                Err(error) => self.fail(batch, error),
            };
        }
        self.seal(batch, seal);
    }

    /// Seals a batch in blocks of rows; the last to be done delivers it.
    fn seal(self: &Arc<Self>, batch: usize, seal: Seal) {
        let (n, seal) = (seal.n_rows(), Arc::new(seal));
        for row in (0..n).step_by(ROWS_PER_TASK) {
            let (this, seal) = (Arc::clone(self), Arc::clone(&seal));
            self.filling.collection.runtime().decode().spawn_fifo(move || {
                if this.queue.is_cancelled() {
                    // before the unit, as above
                    drop(seal);
                    return;
                }
                let timed = this.filling.stats.seal_ns.time(c"annbatch: seal");
                // SAFETY: the blocks are disjoint, and each is sealed by this task alone.
                let result = catch(|| unsafe { seal.rows(&this.filling.collection, &(row..n.min(row + ROWS_PER_TASK))) });
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
            self.ready(batch, seal.finish(&self.filling.collection));
        }
    }

    fn ready(self: &Arc<Self>, batch: usize, delivered: HostBatch) {
        if self.on_device.is_none() || !may_be_narrowed(&delivered) {
            return self.deliver(batch, delivered);
        }
        let work = |this: &Self, delivered: &mut HostBatch| {
            // SAFETY: all of the batch's tasks are done.
            let narrow =
                |device: &OnDevice| unsafe { device.narrow_values(delivered, &this.filling.collection, &this.filling.pool) };
            this.on_device.as_deref().map_or(Ok(()), narrow)
        };
        self.apart(batch, delivered, c"annbatch: narrow", work, Self::deliver);
    }

    fn deliver(self: &Arc<Self>, batch: usize, delivered: HostBatch) {
        if self.delivery(batch).ready(delivered) {
            self.filling.stats.batches_ready.add(1);
        }
        self.queue.changed();
    }

    fn delivery(&self, batch: usize) -> &Arc<BatchDelivery> {
        &self.deliveries.get().expect("tasks run once the unit is open")[batch]
    }

    fn fail(&self, batch: usize, error: Error) {
        self.delivery(batch).fail(error);
        self.queue.changed();
    }
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
