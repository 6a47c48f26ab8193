//! The thread that copies batches to the device, ahead of the consumer.
//!
//! It is the consumer of the batches in host memory: takes the next one once there is room for it in front of the
//! device's consumer, gets a staging block, issues the copies and hands the batch on while they run. Page-locked memory
//! goes back to its pool when its copies have passed. This thread may wait for the device; it does so only when there is
//! nothing else to do, and before it ends.
//!
//! [`Copier`] is what the thread does, one step at a time and without the thread, so that tests can try every order of
//! steps.

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::batch::{DeviceBatch, Layout, Staged, staged_bytes};
use super::driver::Stream;
use super::loaded::LoadedKernels;
use super::staging::{Staging, StagingBlock};
use super::{Device, Entered, Event};
use crate::base::error::{Error, Result, catch};
use crate::base::fork;
use crate::base::lock::lock;
use crate::base::machine::{niceness, set_niceness};
use crate::base::nvtx;
use crate::base::stats::StageStats;
use crate::batch::{HostBatch, Taken};

/// Batches in device memory in front of the consumer unless it says otherwise: one being consumed next while the other
/// is copied.
pub const DEFAULT_AHEAD: usize = 2;

/// Where batches in host memory come from.
pub trait HostBatches: Send + Sync {
    /// The next batch in order; waits up to `timeout`, or for ever.
    fn take(&self, timeout: Option<Duration>) -> Result<Taken<HostBatch>>;
}

/// What a stream of batches has on its device, from epoch to epoch.
#[derive(Debug)]
pub struct TransferTarget {
    device: Arc<Device>,
    staging: Arc<Staging>,
    copies: Stream,
    ahead: usize,
    /// What finishes batches on the device, where it could be had. Behind `staging`: see their drop.
    kernels: Option<Arc<LoadedKernels>>,
}

impl TransferTarget {
    /// A copy stream, and room for staging: two blocks more than batches wait, within `max_bytes`. With `kernels`, column
    /// indices and values may come narrower than they are delivered, and rows as they were read.
    pub fn new(device: Arc<Device>, ahead: usize, max_bytes: u64, kernels: Option<Arc<LoadedKernels>>) -> Result<Arc<Self>> {
        let entered = device.enter()?;
        let copies = entered.check("cannot make a stream", entered.driver().stream_create())?;
        drop(entered);
        let ahead = ahead.max(1);
        Ok(Arc::new(Self { staging: Staging::new(Arc::clone(&device), ahead + 2, max_bytes), device, copies, ahead, kernels }))
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The staging memory.
    pub fn staging(&self) -> &Arc<Staging> {
        &self.staging
    }

    /// The end of an epoch, shaped as `host` is.
    pub fn end(&self, host: &HostBatch) -> DeviceBatch {
        DeviceBatch::end(host, Arc::clone(&self.staging), self.kernels.clone())
    }
}

impl Drop for TransferTarget {
    fn drop(&mut self) {
        if self.device.is_inherited() {
            return;
        }
        if let Ok(entered) = self.device.enter() {
            // SAFETY: whoever copies on the stream holds the target, so nobody does.
            let _ = unsafe { entered.driver().stream_destroy(self.copies) };
        }
    }
}

/// Issues copies, and holds host memory until they have passed.
pub(super) struct Copier<'a> {
    target: &'a TransferTarget,
    entered: &'a Entered<'a>,
    stats: &'a StageStats,
    /// Batches whose copies may be running, oldest first.
    running: VecDeque<RunningTransfer>,
}

/// Copies that may be running, and what they read.
struct RunningTransfer {
    started: Arc<Event>,
    copy_done: Arc<Event>,
    host: HostBatch,
}

impl<'a> Copier<'a> {
    pub(super) fn new(target: &'a TransferTarget, entered: &'a Entered<'a>, stats: &'a StageStats) -> Self {
        Self { target, entered, stats, running: VecDeque::new() }
    }

    /// A block for `host`, or `None` while there is no room.
    pub(super) fn try_take(&self, host: &HostBatch) -> Result<Option<StagingBlock>> {
        let bytes = Layout::of(host, self.target.kernels.as_deref()).bytes;
        self.target.staging.try_take(self.entered, bytes)
    }

    /// Issues the copies of a batch into `block`.
    pub(super) fn stage(&mut self, number: u64, host: HostBatch, mut block: StagingBlock) -> Result<DeviceBatch> {
        let _range = nvtx::range(c"annbatch: copy to the GPU");
        let layout = Layout::of(&host, self.target.kernels.as_deref());
        // SAFETY: a batch is given out once it is written whole.
        let rows = unsafe { host.rows.lease.as_slice() }.as_chunks::<8>().0.iter().map(|row| i64::from_ne_bytes(*row)).collect();
        let issued = self.issue(&layout, &block);
        let outputs = layout.outputs;
        match issued {
            Ok((started, copy_done)) => {
                block.set_written(Arc::clone(&copy_done));
                self.running.push_back(RunningTransfer { started, copy_done: Arc::clone(&copy_done), host });
                self.stats.h2d_batches.add(1);
                let staged = Staged { block, copy_done };
                let (staging, kernels) = (Arc::clone(&self.target.staging), self.target.kernels.clone());
                Ok(DeviceBatch::new(number, rows, outputs, staged, staging, kernels))
            }
            Err(error) => {
                // copies may be running, and no event says until when
                if self.entered.driver().finish().is_err() {
                    block.set_untold();
                    std::mem::forget(host);
                }
                self.target.staging.give_back(block);
                Err(error)
            }
        }
    }

    /// Gives the points in the copy stream before and behind the copies.
    fn issue(&self, layout: &Layout, block: &StagingBlock) -> Result<(Arc<Event>, Arc<Event>)> {
        let (entered, stream) = (self.entered, self.target.copies);
        block.hold_for_readers(entered, stream)?;
        let started = Event::record_timed(&self.target.device, entered, stream)?;
        for &(tensor, offset) in &layout.pieces {
            let bytes = staged_bytes(tensor);
            let Some(src) = std::ptr::NonNull::new(tensor.lease.base()).filter(|_| bytes > 0) else { continue };
            // SAFETY: the lease is held until the copy has passed, and nobody writes to a batch that was delivered; the
            // block has room at this offset, and the stream waits for its last readers.
            let called = unsafe { entered.driver().h2d(block.ptr().offset(offset), src, bytes, stream) };
            entered.check("cannot copy a batch", called)?;
            self.stats.h2d_copies.add(1);
            self.stats.h2d_bytes.add(bytes);
        }
        Ok((started, Event::record_timed(&self.target.device, entered, stream)?))
    }

    /// Lets go of host memory whose copies have passed, without waiting.
    pub(super) fn retire(&mut self) -> Result<()> {
        while let Some(RunningTransfer { copy_done, .. }) = self.running.front() {
            if !copy_done.is_passed(self.entered)? {
                break;
            }
            self.let_go();
        }
        Ok(())
    }

    /// Waits for the oldest copies and lets go of their host memory; false when there were none.
    pub(super) fn retire_oldest(&mut self) -> Result<bool> {
        let Some(RunningTransfer { copy_done, .. }) = self.running.front() else { return Ok(false) };
        copy_done.wait(self.entered)?;
        self.let_go();
        Ok(true)
    }

    /// Lets go of the oldest batch, whose copies have passed.
    fn let_go(&mut self) {
        let Some(RunningTransfer { started, copy_done, .. }) = self.running.pop_front() else { return };
        self.stats.h2d_ns.add(copy_done.ns_since(&started, self.entered).unwrap_or(0));
    }
}

impl Drop for Copier<'_> {
    fn drop(&mut self) {
        while let Some(RunningTransfer { copy_done, .. }) = self.running.front() {
            if copy_done.wait(self.entered).is_ok() {
                self.let_go();
            } else if let Some(running) = self.running.pop_front()
                && self.entered.driver().finish().is_err()
            {
                // the device failed: whether it still reads the memory is not to be known
                std::mem::forget(running.host);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Waiting {
    batches: VecDeque<DeviceBatch>,
    complete: bool,
    failed: Option<Error>,
}

/// Batches on the device in front of the consumer of one epoch.
#[derive(Debug)]
pub struct Ready {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    cancelled: AtomicBool,
    ahead: usize,
}

impl Ready {
    fn new(ahead: usize) -> Arc<Self> {
        Arc::new(Self { waiting: Mutex::default(), changed: Condvar::new(), cancelled: AtomicBool::new(false), ahead })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Batches that wait.
    pub fn len(&self) -> usize {
        self.lock().batches.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn has_room(&self) -> bool {
        self.len() < self.ahead
    }

    fn wait_for_room(&self) {
        let mut waiting = self.lock();
        while waiting.batches.len() >= self.ahead && !self.is_cancelled() {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn change(&self, f: impl FnOnce(&mut Waiting)) {
        f(&mut self.lock());
        self.changed.notify_all();
    }

    /// Gives back a batch that was taken and could not be placed: it is the next one again.
    pub fn put_back(&self, batch: DeviceBatch) {
        if batch.staging_is_inherited() || self.is_cancelled() || batch.is_end() {
            // an end is said again when it is asked for; the batch gives its memory back
            return;
        }
        self.change(|waiting| {
            let place = waiting.batches.partition_point(|other| other.number() < batch.number());
            waiting.batches.insert(place, batch);
        });
    }

    /// The next batch in order; waits up to `timeout`, or for ever. An error comes where its batch would, and stays.
    pub fn take(&self, timeout: Option<Duration>) -> Result<Taken<DeviceBatch>> {
        let until = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut waiting = self.lock();
        loop {
            if self.is_cancelled() {
                return Ok(Taken::Cancelled);
            }
            if let Some(batch) = waiting.batches.pop_front() {
                drop(waiting);
                self.changed.notify_all();
                return Ok(Taken::Batch(batch));
            }
            if let Some(error) = &waiting.failed {
                return Err(error.clone());
            }
            if waiting.complete {
                return Ok(Taken::End);
            }
            let Some(rest) = self.wait(waiting, until) else { return Ok(Taken::Pending) };
            waiting = rest;
        }
    }

    /// Whether `take` would not wait, after waiting up to `timeout` for that.
    pub fn is_ready(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        let mut waiting = self.lock();
        loop {
            if self.is_cancelled() || !waiting.batches.is_empty() || waiting.failed.is_some() || waiting.complete {
                return true;
            }
            let Some(rest) = self.wait(waiting, until) else { return false };
            waiting = rest;
        }
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Waiting>, until: Option<Instant>) -> Option<MutexGuard<'a, Waiting>> {
        let Some(until) = until else {
            return Some(self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner));
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        Some(self.changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0)
    }
}

/// The transfer of one epoch: its thread, and what waits for the consumer.
#[derive(Debug)]
pub struct Transfer {
    ready: Arc<Ready>,
    target: Arc<TransferTarget>,
    thread: Option<JoinHandle<()>>,
    generation: u64,
}

impl Transfer {
    /// Starts copying what `source` gives; its first batch has the number `first`.
    pub fn start(target: Arc<TransferTarget>, source: Arc<dyn HostBatches>, stats: Arc<StageStats>, first: u64) -> Result<Self> {
        let ready = Ready::new(target.ahead);
        let job = TransferJob { target: Arc::clone(&target), ready: Arc::clone(&ready), source, stats, number: first };
        let niceness = niceness();
        let thread = std::thread::Builder::new()
            .name("annbatch-transfer".into())
            .spawn(move || {
                set_niceness(niceness);
                job.run();
            })
            .map_err(|e| Error::Internal { message: format!("cannot start a thread: {e}") })?;
        Ok(Self { ready, target, thread: Some(thread), generation: fork::generation() })
    }

    /// What waits for the consumer.
    pub fn ready(&self) -> &Arc<Ready> {
        &self.ready
    }

    /// Ends the transfer and waits until no copy of it runs. The source must have been cancelled, or be about to end.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.generation != fork::generation() {
            return;
        }
        self.ready.cancelled.store(true, Ordering::Release);
        self.ready.change(|_| ());
        self.target.staging.wake();
        // the thread catches its own panics
        drop(thread.join());
        // after the lock is released, though nobody else should want it
        let left = std::mem::take(&mut self.ready.lock().batches);
        drop(left);
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the thread holds.
struct TransferJob {
    target: Arc<TransferTarget>,
    ready: Arc<Ready>,
    source: Arc<dyn HostBatches>,
    stats: Arc<StageStats>,
    number: u64,
}

impl TransferJob {
    fn run(mut self) {
        if let Err(error) = catch(|| self.copy_all()) {
            self.ready.change(|waiting| waiting.failed = Some(error));
        }
    }

    /// Copies until the source ends or the transfer is cancelled, and says which.
    fn copy_all(&mut self) -> Result<()> {
        let target = Arc::clone(&self.target);
        let entered = target.device.enter()?;
        let stats = Arc::clone(&self.stats);
        let mut copier = Copier::new(&target, &entered, &stats);
        let ended = catch(|| self.copy_each(&mut copier));
        // before the copier waits for copies that run: who asks for the end does not wait for the GPU
        self.ready.change(|waiting| match ended {
            Ok(()) => waiting.complete = true,
            Err(error) => waiting.failed = Some(error),
        });
        Ok(())
    }

    fn copy_each(&mut self, copier: &mut Copier) -> Result<()> {
        loop {
            let place = format!("batch {}", self.number);
            let Some(host) = self.next_host_batch(copier).map_err(|e| e.within(&place))? else { return Ok(()) };
            let staged = self.block_for(&host, copier).and_then(|block| match block {
                Some(block) => copier.stage(self.number, host, block).map(Some),
                None => Ok(None),
            });
            let Some(batch) = staged.map_err(|e| e.within(&place))? else { return Ok(()) };
            self.ready.change(|waiting| waiting.batches.push_back(batch));
            self.number += 1;
        }
    }

    /// The next batch, once there is room for it; `None` at the end and when cancelled.
    fn next_host_batch(&self, copier: &mut Copier) -> Result<Option<HostBatch>> {
        loop {
            copier.retire()?;
            if self.ready.is_cancelled() {
                return Ok(None);
            }
            // A consumer that never waits for its GPU gets its batches far ahead of the copies; the host memory of those that
            // were not made yet counts for no budget any more.
            if copier.running.len() > self.target.ahead + 2 {
                copier.retire_oldest()?;
                continue;
            }
            if !self.ready.has_room() {
                if !copier.retire_oldest()? {
                    let start = Instant::now();
                    self.ready.wait_for_room();
                    self.stats.transfer_room_wait_ns.add_since(start);
                }
                continue;
            }
            let mut taken = self.source.take(Some(Duration::ZERO))?;
            if matches!(taken, Taken::Pending) {
                if copier.retire_oldest()? {
                    continue;
                }
                let start = Instant::now();
                taken = self.source.take(None)?;
                self.stats.transfer_host_wait_ns.add_since(start);
            }
            match taken {
                Taken::Batch(host) => return Ok(Some(host)),
                Taken::End | Taken::Cancelled => return Ok(None),
                Taken::Pending => {}
            }
        }
    }

    /// Staging memory for a batch, once there is some; `None` when cancelled.
    fn block_for(&self, host: &HostBatch, copier: &mut Copier) -> Result<Option<StagingBlock>> {
        loop {
            let seen = self.target.staging.returns();
            if let Some(block) = copier.try_take(host)? {
                return Ok(Some(block));
            }
            if self.ready.is_cancelled() {
                return Ok(None);
            }
            if !copier.retire_oldest()? {
                let start = Instant::now();
                self.target.staging.wait(seen, &self.ready.cancelled);
                self.stats.transfer_room_wait_ns.add_since(start);
            }
        }
    }
}
