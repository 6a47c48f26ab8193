//! The bounded stages as one object that runs ahead of its consumer.
//!
//! ```text
//!  driver thread          I/O threads              decoding threads            consumers
//!  sampler ─▶ plan ─▶ ┌─▶ fetch (byte budget, ──▶ decode ─▶ scatter ─▶ ready ─▶ next()
//!     ▲               │    I/O depth)                                     in order │
//!     └── room ◀──────┴───────────── bytes not yet delivered ◀──────────────────────┘
//! ```
//!
//! [`Pipeline::start`] begins an epoch at any batch, [`Pipeline::next`] gives batches in order to however
//! many threads ask, [`Pipeline::close`] returns once no thread of ours touches memory of the caller's.
//! Memory counts until delivery: a delivered batch belongs to the consumer, who may keep all of them.

mod dense;
#[cfg(test)]
mod device_tests;
mod driver;
mod queue;
mod unit;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::arena::{BlockSource, Pool, Pools, SystemBlocks};
use crate::base::error::{Error, Result};
use crate::base::fork;
use crate::base::lock::lock;
use crate::base::machine::{niceness, set_niceness, set_patient};
use crate::base::nvtx;
use crate::base::random::mix;
use crate::base::stats::StageStats;
use crate::batch::{HostBatch, Taken};
use crate::collection::{ArraySource, Collection, Element, Source};
use crate::config::{Sampling, StreamConfig};
use crate::device::kernels::RowKernel;
use crate::device::loaded::LoadedKernels;
use crate::device::pinned::PageLocked;
use crate::device::transfer::{DEFAULT_AHEAD, HostBatches, Ready, Transfer, TransferTarget};
use crate::device::{Device, DeviceBatch};
use crate::fetch::Fetcher;
use crate::finish::{OnDevice, Seal, allocate};
use crate::plan::measure;
use crate::sampler::LoadRequest;
use driver::EpochDriver;
use queue::{Bounds, EpochQueue};

/// Bytes in a MiB.
const MIB: u64 = 1 << 20;
/// Bytes not yet delivered unless the configuration says otherwise. Where two windows are more it gives way to them (see
/// [`EpochDriver`]): cutting one costs decoding its chunks again.
const DEFAULT_BUDGET_BYTES: u64 = 48 * MIB;
/// Encoded bytes of reads under way at most, and of those that each decoding thread works on beside.
const READ_BYTES: u64 = 64 * MIB;
const READ_BYTES_PER_THREAD: u64 = 2 * MIB;

/// What [`Pipeline::next`] gives.
#[derive(Debug)]
pub enum Next<B = HostBatch> {
    /// The next batch.
    Batch(B),
    /// The epoch is over; stays the answer until the next [`Pipeline::start`].
    End,
    /// Nothing arrived within the timeout.
    Pending,
}

/// Streams batches of one collection.
#[derive(Debug)]
pub struct Pipeline {
    collection: Arc<Collection>,
    config: StreamConfig,
    pool: Arc<Pool>,
    fetcher: Arc<Fetcher>,
    stats: Arc<StageStats>,
    bounds: Bounds,
    /// The GPU to deliver to.
    target: Option<Arc<TransferTarget>>,
    /// What is finished there, or why nothing is.
    on_device: std::result::Result<Arc<OnDevice>, String>,
    epoch: Mutex<Option<Epoch>>,
    epochs_started: AtomicU64,
    closed: AtomicBool,
    generation: u64,
}

/// A GPU, and the kernels that finish batches there, or why there are none.
type OpenDevice = (Arc<Device>, std::result::Result<Arc<LoadedKernels>, String>);

/// What a GPU can do to the rows of each element; nothing to rows of which a join leaves out entries.
fn row_kernels(collection: &Collection) -> Vec<Option<RowKernel>> {
    let of = |element: &Element| {
        let transform = element.transform.as_ref().filter(|transform| !element.unfinished.drops && !transform.is_none())?;
        RowKernel::new(&element.kind, transform)
    };
    collection.elements().iter().map(of).collect()
}

/// Encoded bytes in flight: as many reads as may be under way, or, of chunks that are larger than reads get, one for each
/// decoding thread and one more.
fn fetch_bytes(collection: &Collection) -> u64 {
    let arrays = collection.elements().iter().flat_map(|element| &element.sources).flat_map(|source| match source {
        Source::Csr(csr) => [Some(&csr.indices), Some(&csr.data)],
        Source::Dense(values) => [Some(values), None],
    });
    // of a chunk, and of a read
    let bytes = |array: &ArraySource| match array {
        ArraySource::Chunked(array) => {
            (Pool::read_footprint(array.chunk_bytes()), array.store().io_shape().joined.target_read_bytes)
        }
        ArraySource::Memory(_) => (0, 0),
    };
    let largest = arrays.flatten().map(bytes).fold((0, 0), |all, one| (all.0.max(one.0), all.1.max(one.1)));
    let (threads, depth) = (collection.runtime().n_threads() as u64, collection.runtime().io_depth() as u64);
    let chunks = (threads + 1).saturating_mul(largest.0);
    let reads = depth.saturating_mul(largest.1);
    chunks.max(reads).min(READ_BYTES) + threads * READ_BYTES_PER_THREAD
}

#[derive(Debug)]
struct Epoch {
    queue: Arc<EpochQueue>,
    driver: Option<JoinHandle<()>>,
    transfer: Option<Transfer>,
}

/// The running epoch, as consumers see it.
struct RunningEpoch {
    queue: Arc<EpochQueue>,
    /// Of a stream to a GPU.
    ready: Option<Arc<Ready>>,
}

impl HostBatches for EpochQueue {
    fn take(&self, timeout: Option<Duration>) -> Result<Taken<HostBatch>> {
        self.take(timeout)
    }
}

impl Epoch {
    /// Cancels and waits until every thread has let go.
    fn stop(mut self) {
        self.queue.cancel();
        if let Some(transfer) = &mut self.transfer {
            transfer.stop();
        }
        if let Some(driver) = self.driver.take() {
            // the driver catches its own panics and reports them as a delivery
            drop(driver.join());
        }
        self.queue.wait_for_units();
    }
}

impl Pipeline {
    /// A pipeline that has not started.
    pub fn new(collection: Arc<Collection>, config: StreamConfig) -> Result<Self> {
        let Some(ordinal) = config.device else { return Self::to(None, collection, config) };
        let device = Device::open(ordinal)?;
        // without a compiler everything goes over the bus as it is delivered
        let kernels = LoadedKernels::new(&device, config.nvrtc.as_deref(), row_kernels(&collection));
        Self::to(Some((device, kernels.map_err(|e| e.to_string()))), collection, config)
    }

    /// A pipeline to a device that is open.
    pub(crate) fn to(device: Option<OpenDevice>, collection: Arc<Collection>, config: StreamConfig) -> Result<Self> {
        nvtx::look_for(config.nvrtc.as_deref());
        let (device, kernels) = device.unzip();
        if let Some(sampling) = &config.sampling {
            // parameters are checked now, not in the first epoch
            sampling.n_batches(collection.n_obs())?;
        }
        let budget_bytes = config.memory_budget.map_or(DEFAULT_BUDGET_BYTES, |b| b.0);
        let stats = Arc::new(StageStats::default());
        let fetch_budget = fetch_bytes(&collection);
        let fetch_budget = config.memory_budget.map_or(fetch_budget, |asked| fetch_budget.min(asked.0 / 2));
        let ordinal = device.as_ref().map(|device| device.ordinal());
        let blocks = || -> Arc<dyn BlockSource> {
            match &device {
                Some(device) => Arc::new(PageLocked::new(Arc::clone(device))),
                None => Arc::new(SystemBlocks),
            }
        };
        let Pools { batches, encoded, .. } = collection.pools(budget_bytes, fetch_budget, ordinal, blocks);
        let depth = collection.runtime().io_depth();
        let fetcher = Fetcher::new(fetch_budget, encoded, depth, Arc::clone(&stats));
        stats.memory_budget.raise_to(budget_bytes);
        let ahead = config.batches_ahead.map_or(DEFAULT_AHEAD, |n| DEFAULT_AHEAD.min(n as usize));
        let kernels = kernels.unwrap_or_else(|| Err("there is no device".into()));
        let on_device = kernels.as_ref().map(|kernels| Arc::new(OnDevice::new(kernels.transformed()))).map_err(String::clone);
        // a default budget gives way to large batches, in staging memory too: the number of blocks bounds it
        let staging_bytes = if config.memory_budget.is_some() { budget_bytes } else { u64::MAX };
        let target = device.map(|device| TransferTarget::new(device, ahead, staging_bytes, kernels.ok())).transpose()?;
        let bounds = Bounds { budget_bytes, batches_ahead: config.batches_ahead };
        Ok(Self {
            pool: batches,
            collection,
            config,
            fetcher,
            stats,
            bounds,
            target,
            on_device,
            epoch: Mutex::default(),
            epochs_started: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            generation: fork::generation(),
        })
    }

    /// The collection that is streamed.
    pub fn collection(&self) -> &Arc<Collection> {
        &self.collection
    }

    fn epoch(&self) -> MutexGuard<'_, Option<Epoch>> {
        lock(&self.epoch)
    }

    /// Whether a fork lies between the making of this pipeline and now: its threads are the parent's, and its locks may
    /// be held by one of them for ever.
    fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    fn check_open(&self) -> Result<()> {
        if self.is_inherited() {
            return Err(Error::closed("the pipeline was opened in the parent process; open it again after the fork"));
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::closed("the state is closed; open a new one"));
        }
        Ok(())
    }

    fn sampling(&self) -> Result<&Sampling> {
        self.config.sampling.as_ref().ok_or_else(|| {
            Error::config("sampling", "is null: this state only holds the collection open; make a stream of it with a sampling")
        })
    }

    /// Begins the epoch of `epoch_seed` at batch `first_batch`, ending the one that ran.
    pub fn start(&self, epoch_seed: u64, first_batch: u64) -> Result<()> {
        self.check_open()?;
        self.start_under(self.epoch(), epoch_seed, first_batch)
    }

    fn start_under(&self, epoch: MutexGuard<'_, Option<Epoch>>, epoch_seed: u64, first_batch: u64) -> Result<()> {
        let order = self.sampling()?.order(self.collection.n_obs(), epoch_seed)?;
        match &order {
            Some(order) if first_batch > order.n_batches() => {
                return Err(Error::argument(
                    "first_batch",
                    format!("is {first_batch}, but the epoch has {} batches", order.n_batches()),
                ));
            }
            None if first_batch > 0 => {
                return Err(Error::argument("first_batch", "submitted epochs begin with their first request; leave it 0"));
            }
            _ => {}
        }
        let queue = Arc::new(EpochQueue::new(Arc::clone(&self.stats)));
        let driver = EpochDriver {
            collection: Arc::clone(&self.collection),
            queue: Arc::clone(&queue),
            pool: Arc::clone(&self.pool),
            fetcher: Arc::clone(&self.fetcher),
            stats: Arc::clone(&self.stats),
            bounds: self.bounds,
            strict_budget: self.config.memory_budget.is_some(),
            on_device: self.on_device.as_ref().ok().cloned(),
            order,
            first_batch,
        };
        self.replace(epoch, queue, driver, first_batch)
    }

    /// Ends the running epoch and puts a new one in its place, under the lock of `epoch`.
    fn replace(
        &self,
        mut epoch: MutexGuard<'_, Option<Epoch>>,
        queue: Arc<EpochQueue>,
        driver: EpochDriver,
        first_batch: u64,
    ) -> Result<()> {
        if let Some(previous) = epoch.take() {
            previous.stop();
        }
        self.check_open()?;
        let transfer = match &self.target {
            Some(target) => {
                let source = Arc::clone(&queue) as Arc<dyn HostBatches>;
                Some(Transfer::start(Arc::clone(target), source, Arc::clone(&self.stats), first_batch)?)
            }
            None => None,
        };
        let niceness = niceness();
        let driver = std::thread::Builder::new()
            .name("annbatch-driver".into())
            .spawn(move || {
                set_niceness(niceness);
                set_patient();
                driver.run();
            })
            .map_err(|e| {
                // the transfer would wait for it
                queue.cancel();
                Error::Internal { message: format!("cannot start a thread: {e}") }
            })?;
        self.epochs_started.fetch_add(1, Ordering::Relaxed);
        *epoch = Some(Epoch { queue, driver: Some(driver), transfer });
        Ok(())
    }

    /// The running epoch; with `auto_restart` the first one starts itself.
    fn running(&self) -> Result<RunningEpoch> {
        self.check_open()?;
        if let Some(epoch) = &*self.epoch() {
            let ready = epoch.transfer.as_ref().map(|transfer| Arc::clone(transfer.ready()));
            return Ok(RunningEpoch { queue: Arc::clone(&epoch.queue), ready });
        }
        self.sampling()?;
        if !self.config.auto_restart {
            return Err(Error::argument(
                "state",
                "no epoch was started; call start(state, epoch_seed) first, or open with auto_restart",
            ));
        }
        self.start_next(None)?;
        self.running()
    }

    /// Starts the epoch that `auto_restart` has next, unless another consumer of the epoch that `ended` did.
    fn start_next(&self, ended: Option<&Arc<EpochQueue>>) -> Result<()> {
        let epoch = self.epoch();
        let same = match (&*epoch, ended) {
            (None, None) => true,
            (Some(running), Some(ended)) => Arc::ptr_eq(&running.queue, ended),
            _ => false,
        };
        if !same {
            return Ok(());
        }
        let n = self.epochs_started.load(Ordering::Relaxed);
        self.start_under(epoch, mix(self.config.seed as u64, n), 0)
    }

    /// Adds a request to a submitted epoch.
    pub fn submit(&self, request: LoadRequest) -> Result<()> {
        self.check_submitted()?;
        self.running()?.queue.submit(request)
    }

    /// Says that the submitted epoch has no further requests.
    pub fn finish(&self) -> Result<()> {
        self.check_submitted()?;
        self.running()?.queue.close_requests();
        Ok(())
    }

    fn check_submitted(&self) -> Result<()> {
        match self.sampling()? {
            Sampling::Submitted {} => Ok(()),
            _ => Err(Error::argument(
                "state",
                "this state samples natively; open a stream with {\"kind\": \"submitted\"} to submit requests",
            )),
        }
    }

    /// The next batch in order; waits up to `timeout`, or for ever. Each batch goes to one caller.
    pub fn next(&self, timeout: Option<Duration>) -> Result<Next> {
        if let Some(ordinal) = self.device() {
            return Err(Error::argument("state", format!("this stream delivers to GPU {ordinal}: ask for its batches there")));
        }
        self.next_by(|running| running.queue.take(timeout), |batch| Some((batch.n_rows(), batch.bytes())))
    }

    /// The next batch of a stream to a GPU, and where to put it back if it cannot be placed; as [`Pipeline::next`].
    pub fn next_on_device(&self, timeout: Option<Duration>) -> Result<Next<(DeviceBatch, Arc<Ready>)>> {
        let take = |running: &RunningEpoch| {
            let ready = running.ready.as_ref().ok_or_else(|| {
                Error::argument("state", "this stream delivers to host memory: open it with a \"device\" for batches on a GPU")
            })?;
            Ok(match ready.take(timeout)? {
                Taken::Batch(batch) => Taken::Batch((batch, Arc::clone(ready))),
                Taken::End => Taken::End,
                Taken::Pending => Taken::Pending,
                Taken::Cancelled => Taken::Cancelled,
            })
        };
        self.next_by(take, |(batch, _)| batch.is_taken_first().then(|| (batch.n_rows(), batch.bytes())))
    }

    /// What `take` gives, counted by its rows and bytes unless it was before.
    fn next_by<B>(
        &self,
        take: impl Fn(&RunningEpoch) -> Result<Taken<B>>,
        sizes: impl Fn(&mut B) -> Option<(u64, u64)>,
    ) -> Result<Next<B>> {
        let start = Instant::now();
        loop {
            let running = self.running()?;
            let mut batch = match take(&running)? {
                Taken::Batch(batch) => batch,
                Taken::End => {
                    if self.config.auto_restart {
                        self.start_next(Some(&running.queue))?;
                    }
                    return Ok(Next::End);
                }
                Taken::Pending => {
                    self.stats.consumer_wait_ns.add_since(start);
                    return Ok(Next::Pending);
                }
                // another thread started a new epoch, or closed
                Taken::Cancelled => continue,
            };
            self.stats.consumer_wait_ns.add_since(start);
            if let Some((rows, bytes)) = sizes(&mut batch) {
                self.stats.batches_delivered.add(1);
                self.stats.rows_delivered.add(rows);
                self.stats.bytes_delivered.add(bytes);
            }
            return Ok(Next::Batch(batch));
        }
    }

    /// Whether [`Pipeline::next`] would not wait, after waiting up to `timeout` for that.
    pub fn is_ready(&self, timeout: Duration) -> Result<bool> {
        let start = Instant::now();
        let running = self.running()?;
        let ready = running.ready.map_or_else(|| running.queue.is_ready(timeout), |ready| ready.is_ready(timeout));
        self.stats.consumer_wait_ns.add_since(start);
        Ok(ready)
    }

    /// Number of the GPU that this stream delivers to.
    pub fn device(&self) -> Option<u32> {
        self.target.as_ref().map(|target| target.device().ordinal())
    }

    /// Whether the batches' host memory is page-locked, or why it is not.
    pub fn is_page_locked(&self) -> std::result::Result<(), &str> {
        self.pool.is_locked()
    }

    /// A batch of no rows, which stands for the end of an epoch where a batch must be given.
    pub fn end_batch(&self) -> Result<HostBatch> {
        let layout = measure(&self.collection, Vec::new(), None)?;
        let read = allocate(&self.collection, &layout, &self.pool, None)?;
        Ok(Seal::new(&self.collection, read, Vec::new(), &self.pool, None)?.finish(&self.collection))
    }

    /// The same for a stream to a GPU.
    pub fn end_batch_on_device(&self) -> Result<DeviceBatch> {
        let target = self.target.as_ref().ok_or_else(|| Error::argument("state", "this stream delivers to host memory"))?;
        Ok(target.end(&self.end_batch()?))
    }

    /// Ends the running epoch and refuses every later call; batches already delivered stay valid.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if self.is_inherited() {
            // nobody to wait for: dropping the epoch's handle only lets go of its thread
            return;
        }
        // under the lock, so that a second caller also returns only when every thread has let go
        let mut epoch = self.epoch();
        if let Some(epoch) = epoch.take() {
            epoch.stop();
        }
    }

    /// Counters and gauges, as JSON: those of [`StageStats`], and
    /// - `reads_in_flight`, `encoded_bytes_held`: see [`Fetcher`];
    /// - `decode_idle_ns`: what the decoding threads could have worked and did not while a unit was alive, that is
    ///   `threads × active_ns − decode_ns`; time spent for other pipelines on the same threads counts as idle;
    /// - `bytes_undelivered`, `batches_undelivered`: planned, being filled or ready, and not yet taken;
    /// - `batches_on_device`, `staging_bytes`: batches on the GPU in front of the consumer, and memory there that they and
    ///   those before and after them take; 0 for streams to host memory;
    /// - `pinned`: whether batches are assembled in page-locked memory, or why not (null for streams to host memory);
    /// - `leases_out`, `leased_bytes`: buffers of batches, delivered ones included, that somebody holds.
    pub fn stats(&self) -> Value {
        let mut out = self.stats.to_json();
        let queue = if self.is_inherited() { None } else { self.epoch().as_ref().map(|e| Arc::clone(&e.queue)) };
        let active_ns = self.stats.active_ns.get() + queue.as_ref().map_or(0, |q| q.active_ns());
        out["active_ns"] = active_ns.into();
        let threads = self.collection.runtime().n_threads() as u64;
        out["decode_idle_ns"] = (active_ns * threads).saturating_sub(self.stats.decode_ns.get()).into();
        out["reads_in_flight"] = self.fetcher.reads_in_flight().into();
        out["encoded_bytes_held"] = self.fetcher.encoded_bytes_held().into();
        out["bytes_undelivered"] = queue.as_ref().map_or(0, |q| q.undelivered_bytes()).into();
        out["batches_undelivered"] = queue.as_ref().map_or(0, |q| q.undelivered_batches()).into();
        let transfer = if self.is_inherited() { None } else { self.target.as_ref() };
        let ready = if self.is_inherited() { None } else { self.running_ready() };
        out["batches_on_device"] = ready.map_or(0, |ready| ready.len()).into();
        out["staging_bytes"] = transfer.map_or(0, |target| target.staging().bytes()).into();
        out["pinned"] = self.describe_page_locking();
        out["leases_out"] = self.pool.leases_out().into();
        out["leased_bytes"] = self.pool.leased_bytes().into();
        out["epochs_started"] = self.epochs_started.load(Ordering::Relaxed).into();
        out
    }

    fn running_ready(&self) -> Option<Arc<Ready>> {
        self.epoch().as_ref()?.transfer.as_ref().map(|transfer| Arc::clone(transfer.ready()))
    }

    fn describe_page_locking(&self) -> Value {
        match (&self.target, self.is_page_locked()) {
            (None, _) => Value::Null,
            (Some(_), Ok(())) => true.into(),
            (Some(_), Err(reason)) => reason.into(),
        }
    }

    /// The collection's description and how it is streamed, as JSON. Of a stream to a GPU, `pinned` and `narrow` are true or
    /// say why not, and `transformed_on_device` names the elements whose rows are transformed there.
    pub fn describe(&self) -> Result<Value> {
        let mut out = self.collection.describe();
        let n_batches = match &self.config.sampling {
            Some(sampling) => sampling.n_batches(self.collection.n_obs())?,
            None => None,
        };
        out["n_batches"] = n_batches.into();
        out["memory_budget"] = self.stats.memory_budget.get().into();
        out["auto_restart"] = self.config.auto_restart.into();
        out["device"] = self.device().into();
        out["pinned"] = self.describe_page_locking();
        (out["narrow"], out["transformed_on_device"]) = match (&self.target, &self.on_device) {
            (None, _) => (Value::Null, Value::Null),
            (Some(_), Ok(there)) => {
                let elements = self.collection.elements().iter().enumerate();
                let names: Vec<&str> = elements.filter(|(i, _)| there.transforms(*i)).map(|(_, e)| e.name.as_str()).collect();
                (true.into(), names.into())
            }
            (Some(_), Err(reason)) => (reason.as_str().into(), Vec::<&str>::new().into()),
        };
        Ok(out)
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.close();
    }
}
