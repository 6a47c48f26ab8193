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

mod driver;
mod queue;
mod unit;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::arena::{Pool, Pools};
use crate::batch::HostBatch;
use crate::coalesce::CoalesceOptions;
use crate::collection::Collection;
use crate::config::StreamConfig;
use crate::error::{Error, Result};
use crate::fetch::Fetcher;
use crate::fork;
use crate::runtime::{niceness, set_niceness};
use crate::sampler::{LoadRequest, Sampling, mix};
use crate::stats::StageStats;
use driver::Driver;
use queue::{Bounds, EpochQueue, Taken};

/// Bytes in a MiB.
const MIB: u64 = 1 << 20;
/// Bytes not yet delivered unless the configuration says otherwise. Where two windows are more it gives way to them (see
/// [`Driver`]): cutting one costs decoding its chunks again.
const DEFAULT_BUDGET_BYTES: u64 = 256 * MIB;
/// Encoded bytes in flight at most.
const FETCH_BUDGET_BYTES: u64 = 64 * MIB;

/// What [`Pipeline::next`] gives.
#[derive(Debug)]
pub enum Next {
    /// The next batch.
    Batch(HostBatch),
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
    epoch: Mutex<Option<Epoch>>,
    epochs_started: AtomicU64,
    closed: AtomicBool,
    generation: u64,
}

#[derive(Debug)]
struct Epoch {
    queue: Arc<EpochQueue>,
    driver: Option<JoinHandle<()>>,
}

impl Epoch {
    /// Cancels and waits until every thread has let go.
    fn stop(mut self) {
        self.queue.cancel();
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
        if let Some(sampling) = &config.sampling {
            // parameters are checked now, not in the first epoch
            sampling.n_batches(collection.n_obs())?;
        }
        let budget_bytes = config.memory_budget.map_or(DEFAULT_BUDGET_BYTES, |b| b.0);
        let stats = Arc::new(StageStats::default());
        let fetch_budget = FETCH_BUDGET_BYTES.min(budget_bytes / 2);
        let Pools { batches, encoded, .. } = collection.pools(budget_bytes, fetch_budget);
        let depth = collection.runtime().io_depth();
        let fetcher = Fetcher::new(fetch_budget, encoded, depth, CoalesceOptions::default(), Arc::clone(&stats));
        stats.memory_budget.raise_to(budget_bytes);
        let bounds = Bounds { budget_bytes, batches_ahead: config.batches_ahead };
        Ok(Self {
            pool: batches,
            collection,
            config,
            fetcher,
            stats,
            bounds,
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
        self.epoch.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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
        let pass = self.sampling()?.pass(self.collection.n_obs(), epoch_seed)?;
        match &pass {
            Some(pass) if first_batch > pass.n_batches() => {
                return Err(Error::argument(
                    "first_batch",
                    format!("is {first_batch}, but the epoch has {} batches", pass.n_batches()),
                ));
            }
            None if first_batch > 0 => {
                return Err(Error::argument("first_batch", "submitted epochs begin with their first request; leave it 0"));
            }
            _ => {}
        }
        let queue = Arc::new(EpochQueue::new(Arc::clone(&self.stats)));
        let driver = Driver {
            collection: Arc::clone(&self.collection),
            queue: Arc::clone(&queue),
            pool: Arc::clone(&self.pool),
            fetcher: Arc::clone(&self.fetcher),
            stats: Arc::clone(&self.stats),
            bounds: self.bounds,
            strict_budget: self.config.memory_budget.is_some(),
            pass,
            first_batch,
        };
        self.replace(epoch, queue, driver)
    }

    /// Ends the running epoch and puts a new one in its place, under the lock of `epoch`.
    fn replace(&self, mut epoch: MutexGuard<'_, Option<Epoch>>, queue: Arc<EpochQueue>, driver: Driver) -> Result<()> {
        if let Some(previous) = epoch.take() {
            previous.stop();
        }
        self.check_open()?;
        let niceness = niceness();
        let driver = std::thread::Builder::new()
            .name("annbatch-driver".into())
            .spawn(move || {
                set_niceness(niceness);
                driver.run();
            })
            .map_err(|e| Error::Internal { message: format!("cannot start a thread: {e}") })?;
        self.epochs_started.fetch_add(1, Ordering::Relaxed);
        *epoch = Some(Epoch { queue, driver: Some(driver) });
        Ok(())
    }

    /// The running epoch; with `auto_restart` the first one starts itself.
    fn queue(&self) -> Result<Arc<EpochQueue>> {
        self.check_open()?;
        if let Some(epoch) = &*self.epoch() {
            return Ok(Arc::clone(&epoch.queue));
        }
        self.sampling()?;
        if !self.config.auto_restart {
            return Err(Error::argument(
                "state",
                "no epoch was started; call start(state, epoch_seed) first, or open with auto_restart",
            ));
        }
        self.start_next(None)?;
        self.queue()
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
        self.queue()?.submit(request)
    }

    /// Says that the submitted epoch has no further requests.
    pub fn finish(&self) -> Result<()> {
        self.check_submitted()?;
        self.queue()?.close_requests();
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
        let start = Instant::now();
        loop {
            let queue = self.queue()?;
            let batch = match queue.take(timeout)? {
                Taken::Batch(batch) => batch,
                Taken::End => {
                    if self.config.auto_restart {
                        self.start_next(Some(&queue))?;
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
            self.stats.batches_delivered.add(1);
            self.stats.rows_delivered.add(batch.n_rows());
            self.stats.bytes_delivered.add(batch.bytes());
            return Ok(Next::Batch(batch));
        }
    }

    /// Whether [`Pipeline::next`] would not wait, after waiting up to `timeout` for that.
    pub fn is_ready(&self, timeout: Duration) -> Result<bool> {
        let start = Instant::now();
        let ready = self.queue()?.is_ready(timeout);
        self.stats.consumer_wait_ns.add_since(start);
        Ok(ready)
    }

    /// A batch of no rows, which stands for the end of an epoch where a batch must be given.
    pub fn end_batch(&self) -> Result<HostBatch> {
        HostBatch::empty(&self.collection, &self.pool)
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
        out["leases_out"] = self.pool.leases_out().into();
        out["leased_bytes"] = self.pool.leased_bytes().into();
        out["epochs_started"] = self.epochs_started.load(Ordering::Relaxed).into();
        out
    }

    /// The collection's description and how it is streamed, as JSON.
    pub fn describe(&self) -> Result<Value> {
        let mut out = self.collection.describe();
        let n_batches = match &self.config.sampling {
            Some(sampling) => sampling.n_batches(self.collection.n_obs())?,
            None => None,
        };
        out["n_batches"] = n_batches.into();
        out["memory_budget"] = self.stats.memory_budget.get().into();
        out["auto_restart"] = self.config.auto_restart.into();
        Ok(out)
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.close();
    }
}
