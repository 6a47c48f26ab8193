//! What the driver, the decoding threads and the consumers of one epoch share.
//!
//! ```text
//! driver ──push──▶ [BatchDelivery 0][BatchDelivery 1]… ──take──▶ consumers (in order)
//!    ▲                 ▲ ready / fail                        │
//!    └── room ─────────┼──────── bytes taken off ◀───────────┘
//!                 decoding threads
//! ```
//!
//! Locks are taken in the order queue, then delivery, never the other way round while holding both.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::error::{Error, Result};
use crate::base::lock::lock;
use crate::base::stats::StageStats;
use crate::batch::{HostBatch, Taken};
use crate::sampler::LoadRequest;

/// One batch on its way.
#[derive(Debug)]
pub(super) struct BatchDelivery {
    state: Mutex<DeliveryState>,
    bytes: u64,
}

#[derive(Debug)]
enum DeliveryState {
    Filling(HostBatch),
    /// Filled, and with the tasks that seal it.
    Sealing,
    Ready(HostBatch),
    /// The batch stays, because other tasks may still write to it.
    Failed(Error, Option<HostBatch>),
    Taken,
}

impl BatchDelivery {
    pub(super) fn new(batch: HostBatch, bytes: u64) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(DeliveryState::Filling(batch)), bytes })
    }

    /// A delivery that is an error from the start.
    pub(super) fn failed(error: Error) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(DeliveryState::Failed(error, None)), bytes: 0 })
    }

    fn lock(&self) -> MutexGuard<'_, DeliveryState> {
        lock(&self.state)
    }

    /// The batch, once all of it is filled, for who seals it; `None` if it had failed.
    pub(super) fn filled(&self) -> Option<HostBatch> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, DeliveryState::Sealing) {
            DeliveryState::Filling(batch) => Some(batch),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Gives back the batch that [`filled`](BatchDelivery::filled) gave, complete; false if it has failed since.
    pub(super) fn ready(&self, batch: HostBatch) -> bool {
        let mut state = self.lock();
        let sealing = matches!(*state, DeliveryState::Sealing);
        if sealing {
            *state = DeliveryState::Ready(batch);
        }
        sealing
    }

    /// Marks the batch as failed; the first error stays.
    pub(super) fn fail(&self, error: Error) {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, DeliveryState::Taken) {
            DeliveryState::Filling(batch) => *state = DeliveryState::Failed(error, Some(batch)),
            DeliveryState::Sealing => *state = DeliveryState::Failed(error, None),
            other => *state = other,
        }
    }

    fn is_settled(&self) -> bool {
        !matches!(*self.lock(), DeliveryState::Filling(_) | DeliveryState::Sealing)
    }

    fn take(&self) -> Option<Result<HostBatch>> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, DeliveryState::Taken) {
            DeliveryState::Ready(batch) => Some(Ok(batch)),
            DeliveryState::Failed(error, batch) => {
                *state = DeliveryState::Failed(error.clone(), batch);
                Some(Err(error))
            }
            other => {
                *state = other;
                None
            }
        }
    }
}

#[derive(Debug, Default)]
struct QueueState {
    deliveries: VecDeque<Arc<BatchDelivery>>,
    /// Bytes of `deliveries`.
    undelivered_bytes: u64,
    /// No further delivery will be pushed.
    complete: bool,
    failed: Option<Error>,
    requests: VecDeque<LoadRequest>,
    requests_closed: bool,
    live_units: usize,
    /// Since when there is a live unit.
    active_since: Option<Instant>,
}

/// The state of one epoch.
#[derive(Debug)]
pub(super) struct EpochQueue {
    inner: Mutex<QueueState>,
    changed: Condvar,
    cancelled: AtomicBool,
    stats: Arc<StageStats>,
}

/// Counts a unit as alive until dropped.
#[derive(Debug)]
pub(super) struct LiveUnit(Arc<EpochQueue>);

impl LiveUnit {
    pub(super) fn new(queue: Arc<EpochQueue>) -> Self {
        let mut inner = queue.lock();
        inner.live_units += 1;
        inner.active_since.get_or_insert_with(Instant::now);
        drop(inner);
        queue.stats.units_alive.raise();
        Self(queue)
    }
}

impl Drop for LiveUnit {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.live_units -= 1;
        self.0.stats.units_alive.lower();
        if inner.live_units == 0
            && let Some(since) = inner.active_since.take()
        {
            self.0.stats.active_ns.add_since(since);
        }
        drop(inner);
        self.0.changed.notify_all();
    }
}

/// Bounds on what waits for the consumer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) budget_bytes: u64,
    pub(super) batches_ahead: Option<u64>,
}

impl EpochQueue {
    pub(super) fn new(stats: Arc<StageStats>) -> Self {
        Self { inner: Mutex::default(), changed: Condvar::new(), cancelled: AtomicBool::new(false), stats }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        lock(&self.inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, QueueState>, until: Option<Instant>) -> (MutexGuard<'a, QueueState>, bool) {
        match until {
            None => (self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner), false),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return (guard, true);
                }
                let (guard, _) = self.changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner);
                (guard, false)
            }
        }
    }

    /// Wakes everybody who waits; the lock makes sure that nobody is between looking and waiting.
    pub(super) fn changed(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.changed();
    }

    /// Waits until no task of this epoch can touch a batch or a lent buffer any more, and lets go of the
    /// batches that nobody took.
    pub(super) fn wait_for_units(&self) {
        let mut inner = self.lock();
        while inner.live_units > 0 {
            (inner, _) = self.wait(inner, None);
        }
        inner.deliveries.clear();
        inner.undelivered_bytes = 0;
    }

    /// Waits until deliveries of `bytes` fit; false when cancelled. Something that fits nowhere is let in alone.
    pub(super) fn wait_for_room(&self, bytes: u64, bounds: Bounds) -> bool {
        let mut inner = self.lock();
        loop {
            if self.is_cancelled() {
                return false;
            }
            let few = bounds.batches_ahead.is_none_or(|ahead| inner.deliveries.len() as u64 <= ahead);
            let fits = inner.undelivered_bytes.saturating_add(bytes) <= bounds.budget_bytes;
            if inner.deliveries.is_empty() || (few && fits) {
                return true;
            }
            (inner, _) = self.wait(inner, None);
        }
    }

    pub(super) fn push(&self, deliveries: &[Arc<BatchDelivery>]) {
        let mut inner = self.lock();
        for delivery in deliveries {
            inner.undelivered_bytes += delivery.bytes;
            inner.deliveries.push_back(Arc::clone(delivery));
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// No delivery follows.
    pub(super) fn complete(&self) {
        self.lock().complete = true;
        self.changed.notify_all();
    }

    pub(super) fn submit(&self, request: LoadRequest) -> Result<()> {
        let mut inner = self.lock();
        if inner.requests_closed {
            return Err(Error::argument("state", "this epoch was finished; call start before submitting more"));
        }
        inner.requests.push_back(request);
        drop(inner);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn close_requests(&self) {
        self.lock().requests_closed = true;
        self.changed.notify_all();
    }

    /// The next submitted request; `None` once they are closed or the epoch is cancelled.
    pub(super) fn next_request(&self) -> Option<LoadRequest> {
        let mut inner = self.lock();
        loop {
            if self.is_cancelled() {
                return None;
            }
            if let Some(request) = inner.requests.pop_front() {
                return Some(request);
            }
            if inner.requests_closed {
                return None;
            }
            (inner, _) = self.wait(inner, None);
        }
    }

    pub(super) fn undelivered_bytes(&self) -> u64 {
        self.lock().undelivered_bytes
    }

    /// Time since there has been a live unit, not yet in the statistics.
    pub(super) fn active_ns(&self) -> u64 {
        self.lock().active_since.map_or(0, |since| since.elapsed().as_nanos() as u64)
    }

    pub(super) fn undelivered_batches(&self) -> usize {
        self.lock().deliveries.len()
    }

    /// The next batch in order; waits up to `timeout`, or for ever.
    pub(super) fn take(&self, timeout: Option<Duration>) -> Result<Taken<HostBatch>> {
        let until = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut inner = self.lock();
        loop {
            if self.is_cancelled() {
                return Ok(Taken::Cancelled);
            }
            if let Some(error) = &inner.failed {
                return Err(error.clone());
            }
            if let Some(front) = inner.deliveries.front() {
                let bytes = front.bytes;
                match front.take() {
                    Some(Ok(batch)) => {
                        inner.deliveries.pop_front();
                        inner.undelivered_bytes -= bytes;
                        drop(inner);
                        self.changed.notify_all();
                        return Ok(Taken::Batch(batch));
                    }
                    Some(Err(error)) => {
                        inner.failed = Some(error.clone());
                        return Err(error);
                    }
                    None => {}
                }
            } else if inner.complete {
                return Ok(Taken::End);
            }
            let timed_out;
            (inner, timed_out) = self.wait(inner, until);
            if timed_out {
                return Ok(Taken::Pending);
            }
        }
    }

    /// Whether `take` would not wait, after waiting up to `timeout` for that.
    pub(super) fn is_ready(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        let mut inner = self.lock();
        loop {
            let settled = inner.deliveries.front().map_or(inner.complete, |front| front.is_settled());
            if self.is_cancelled() || inner.failed.is_some() || settled {
                return true;
            }
            let timed_out;
            (inner, timed_out) = self.wait(inner, until);
            if timed_out {
                return false;
            }
        }
    }
}
