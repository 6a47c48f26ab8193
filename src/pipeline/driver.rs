//! The thread that keeps one epoch running ahead of its consumers.
//!
//! It takes windows from the sampler, cuts them into units that fit the memory budget, plans each and sets
//! its reads going; it never waits for a unit to finish, only for room.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::queue::{BatchDelivery, Bounds, EpochQueue};
use super::unit::Unit;
use crate::arena::Pool;
use crate::base::error::{Error, Result, catch};
use crate::base::machine::{physical_memory, processes_of_node};
use crate::base::stats::StageStats;
use crate::batch::BatchLayout;
use crate::collection::{ArraySource, Collection};
use crate::fetch::Fetcher;
use crate::finish::{OnDevice, allocate};
use crate::plan::{ChunkTask, MAX_CHUNKS, Part, batches_of, measure, plan};
use crate::sampler::{LoadRequest, Order};

/// Lets go of what a unit has read, unless it was opened, on every way out.
struct Abandon<'a>(&'a Unit);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// Most of the budget that batches planned together may take. Of a default budget it is half: a shuffled window is complete
/// only when all of it is, so that one is decoded while the one before is consumed. Of a budget that was asked for it is
/// more, for a window that does not fit is cut, and its parts decode many of the same chunks.
const UNIT_SHARE: (u64, u64) = (1, 2);
const STRICT_UNIT_SHARE: (u64, u64) = (5, 8);

/// Everything one epoch needs.
pub(super) struct EpochDriver {
    pub(super) collection: Arc<Collection>,
    pub(super) queue: Arc<EpochQueue>,
    pub(super) pool: Arc<Pool>,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) stats: Arc<StageStats>,
    pub(super) bounds: Bounds,
    /// Whether the budget was asked for; a default one gives way to a batch larger than it.
    pub(super) strict_budget: bool,
    /// What a device finishes.
    pub(super) on_device: Option<Arc<OnDevice>>,
    /// Native windows; submitted ones come through the queue.
    pub(super) order: Option<Box<dyn Order>>,
    /// First batch of the epoch to deliver.
    pub(super) first_batch: u64,
}

impl EpochDriver {
    /// Runs the epoch to its end; errors become the next delivery.
    pub(super) fn run(self) {
        if let Err(error) = catch(|| self.windows()) {
            self.queue.push(&[BatchDelivery::failed(error)]);
        }
        self.queue.complete();
    }

    fn windows(&self) -> Result<()> {
        let (mut number, mut skip) = self.order.as_ref().map_or((0, 0), |order| order.locate(self.first_batch));
        let mut delivered = self.first_batch;
        let mut planned = Planned::default();
        loop {
            let start = Instant::now();
            let request = match &self.order {
                Some(order) if number < order.n_windows() => Some(order.window(number)?),
                Some(_) => None,
                None => self.queue.next_request(),
            };
            let Some(request) = request else { return Ok(()) };
            if self.order.is_some() {
                self.stats.plan_ns.add_since(start);
            }
            self.stats.windows_planned.add(1);
            let Some(n) = self.window(&request, skip as usize, delivered, &mut planned)? else { return Ok(()) };
            delivered += n;
            number += 1;
            skip = 0;
        }
    }

    /// Delivers a window's batches after the first `skip`; `None` when cancelled.
    fn window(&self, request: &LoadRequest, skip: usize, first_number: u64, planned: &mut Planned) -> Result<Option<u64>> {
        // The next unit's bytes are read while this one is decoded, and decoded while it is consumed. A window is shuffled:
        // each part of it needs most of its chunks, so that the default budget rather gives way than cut one.
        let (most, share) =
            if self.strict_budget { (self.bounds.budget_bytes, STRICT_UNIT_SHARE) } else { (self.most_bytes(), UNIT_SHARE) };
        let unit_bytes = most / share.1 * share.0;
        let (mut unit, mut bytes, mut chunks) = (Vec::new(), 0u64, 0u64);
        let mut count = 0;
        for rows in batches_of(request).into_iter().skip(skip) {
            let start = Instant::now();
            let fits = |layout: BatchLayout| {
                let budget = self.bounds.budget_bytes;
                if self.strict_budget && layout.bytes > budget {
                    return Err(Error::Budget { budget, needed: layout.bytes, batch: first_number + count });
                }
                Ok(layout)
            };
            let measured = measure(&self.collection, rows, self.on_device.as_deref()).and_then(fits);
            self.stats.plan_ns.add_since(start);
            let layout = match measured {
                Ok(layout) => layout,
                // what came before is delivered first, the error stands where the batch would
                Err(e) => {
                    self.unit(std::mem::take(&mut unit), bytes, planned)?;
                    return Err(e);
                }
            };
            if !unit.is_empty() && (bytes.saturating_add(layout.bytes) > unit_bytes || chunks + layout.chunks > MAX_CHUNKS) {
                if !self.unit(std::mem::take(&mut unit), bytes, planned)? {
                    return Ok(None);
                }
                (bytes, chunks) = (0, 0);
            }
            bytes = bytes.saturating_add(layout.bytes);
            chunks += layout.chunks;
            unit.push(layout);
            count += 1;
        }
        Ok(self.unit(unit, bytes, planned)?.then_some(count))
    }

    /// Plans and launches some batches together once there is room; false when cancelled.
    fn unit(&self, layouts: Vec<BatchLayout>, bytes: u64, planned: &mut Planned) -> Result<bool> {
        if layouts.is_empty() {
            return Ok(!self.queue.is_cancelled());
        }
        // reads go ahead of the memory for their rows, but not where the consumer said how far to run ahead
        let ahead = self.bounds.batches_ahead.is_none();
        let largest = layouts.iter().map(|layout| layout.bytes).max().unwrap_or(0);
        if !ahead && !self.wait_for_room(bytes, largest) {
            return Ok(false);
        }
        let timed = self.stats.plan_ns.time(c"annbatch: plan");
        let plan = plan(&self.collection, layouts);
        self.stats.chunks_decoded_again.add(planned.again(&self.collection, &plan.tasks));
        let unit = Unit::new(
            Arc::clone(&self.collection),
            plan,
            Arc::clone(&self.queue),
            Arc::clone(&self.pool),
            self.on_device.clone(),
            Arc::clone(&self.stats),
        );
        self.stats.units_planned.add(1);
        drop(timed);
        let _unless_opened = Abandon(&unit);
        unit.read(Arc::clone(&self.fetcher));
        if ahead && !self.wait_for_room(bytes, largest) {
            return Ok(false);
        }
        let batch = |layout| allocate(&self.collection, layout, &self.pool, self.on_device.as_deref());
        unit.open(unit.layouts().iter().map(batch).collect::<Result<_>>()?);
        Ok(true)
    }

    /// What a default budget may grow to.
    fn most_bytes(&self) -> u64 {
        self.bounds.budget_bytes.max(physical_memory() / 8 / processes_of_node())
    }

    /// Waits until batches of `bytes`, the largest of `batch_bytes`, fit; false when cancelled.
    fn wait_for_room(&self, bytes: u64, batch_bytes: u64) -> bool {
        let waiting = Instant::now();
        let mut bounds = self.bounds;
        if !self.strict_budget {
            let two = (bytes / UNIT_SHARE.0).saturating_mul(UNIT_SHARE.1);
            self.stats.memory_budget.raise_to(two);
            // of the largest so far, beside which one that is somewhat smaller has to fit; but what a single batch needed
            // that was larger than any budget is not for others
            bounds.budget_bytes = self.stats.memory_budget.get().min(self.most_bytes()).max(two);
        }
        self.pool.keep_at_least(bounds.budget_bytes, batch_bytes);
        let room = self.queue.wait_for_room(bytes, bounds);
        self.stats.budget_wait_ns.add_since(waiting);
        room
    }
}

/// The chunks of stores that an epoch has planned so far: per (dataset, element, part), a bit for each in words of 64.
#[derive(Default)]
struct Planned(HashMap<(u32, u32, Part, u64), u64>);

impl Planned {
    /// Adds `tasks`; how many of them were there already.
    fn again(&mut self, collection: &Collection, tasks: &[ChunkTask]) -> u64 {
        let mut again = 0;
        for task in tasks {
            match task.array(collection) {
                ArraySource::Chunked(array) if !array.is_verbatim() => {}
                // nothing is decoded
                _ => continue,
            }
            let word = self.0.entry((task.dataset, task.element, task.part, task.chunk / 64)).or_default();
            let bit = 1 << (task.chunk % 64);
            again += u64::from(*word & bit != 0);
            *word |= bit;
        }
        again
    }
}
