//! The protocol of transfers, against a GPU that does things in every order there is.

use std::collections::{HashSet, VecDeque};
use std::sync::mpsc;

use super::*;
use crate::arena::Pool;
use crate::batch::{BatchElement, Tensor};
use crate::device::fake::Fake;
use crate::device::pinned::PageLocked;
use crate::schema::DType;

const LOST: u32 = 719;

/// A batch of `n` rows that says by its content which one it is.
fn host_batch(pool: &Arc<Pool>, number: u64, n: u64) -> HostBatch {
    let mut lease = pool.lease(n as usize * 8).unwrap();
    lease.as_mut_slice().chunks_exact_mut(8).for_each(|row| row.copy_from_slice(&(number + 1).to_ne_bytes()));
    HostBatch { rows: Tensor { lease, dtype: DType::Int64, delivered: DType::Int64, shape: vec![n] }, elements: Vec::new() }
}

fn is_batch(bytes: &[u8], number: u64) -> bool {
    bytes.chunks_exact(8).all(|row| row == (number + 1).to_ne_bytes())
}

/// Everything of one stream of batches without its thread, driven step by step.
struct World {
    fake: Arc<Fake>,
    pool: Arc<Pool>,
    target: Arc<TransferTarget>,
    device: Arc<Device>,
    sizes: Vec<u64>,
    ahead: usize,
    blocks: usize,
}

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Stage,
    Retire,
    Place,
    /// The consumer gives a batch up without placing it.
    Drop,
    Gpu(u64),
}

impl World {
    fn new(sizes: &[u64], ahead: usize, blocks: usize, bytes: u64) -> Self {
        let fake = Fake::new();
        let device = Device::with(Arc::clone(&fake) as _, 0);
        // one block at a time is free at most: the memory of a batch that was let go is that of the next
        let pool = Pool::of(Arc::new(PageLocked::new(Arc::clone(&device))), 1 << 30);
        let entered = device.enter().unwrap();
        let copies = entered.driver().stream_create().unwrap();
        drop(entered);
        let staging = Staging::new(Arc::clone(&device), blocks, bytes);
        let target = Arc::new(TransferTarget { device: Arc::clone(&device), staging, copies, ahead, kernels: None });
        Self { fake, pool, target, device, sizes: sizes.to_vec(), ahead, blocks }
    }

    /// Does `acts`, closes everything, and checks what was delivered. Gives what could have come next, and the situation.
    fn run(&self, acts: &[Act], consumers: &[Stream], drops: bool) -> (Vec<Act>, String) {
        let stats = StageStats::default();
        let entered = self.device.enter().unwrap();
        let mut copier = Copier::new(&self.target, &entered, &stats);
        let mut ready: VecDeque<DeviceBatch> = VecDeque::new();
        let (mut number, mut placed, mut dropped) = (0u64, Vec::new(), 0usize);
        for act in acts {
            match act {
                Act::Stage => {
                    let host = host_batch(&self.pool, number, self.sizes[number as usize]);
                    let block = copier.try_take(&host).unwrap().expect("room");
                    ready.push_back(copier.stage(number, host, block).unwrap());
                    number += 1;
                }
                Act::Retire => copier.retire().unwrap(),
                Act::Place => {
                    let mut batch = ready.pop_front().unwrap();
                    let bytes = batch.outputs()[0].bytes();
                    let memory = self.fake.torch_memory(bytes);
                    let stream = consumers[batch.number() as usize % consumers.len()];
                    // SAFETY: memory and stream are the fake's.
                    unsafe { batch.place(&[memory], stream) }.unwrap();
                    placed.push((batch.number(), memory, bytes));
                }
                Act::Drop => {
                    ready.pop_front().unwrap();
                    dropped += 1;
                }
                Act::Gpu(stream) => assert!(self.fake.step(*stream)),
            }
        }
        let mut next: Vec<Act> = self.fake.runnable().into_iter().map(Act::Gpu).collect();
        if (number as usize) < self.sizes.len() && ready.len() < self.ahead {
            // whether there is room is asked without taking anything
            let free = !self.target.staging.describe().is_empty() || self.out(&ready) < self.blocks;
            if free {
                next.push(Act::Stage);
            }
        }
        if !copier.running.is_empty() {
            next.push(Act::Retire);
        }
        if !ready.is_empty() {
            next.push(Act::Place);
            if drops && dropped == 0 {
                next.push(Act::Drop);
            }
        }
        let free: Vec<_> = self.target.staging.describe().iter().map(|(ptr, n)| (self.fake.name(*ptr), *n)).collect();
        let numbers: Vec<u64> = ready.iter().map(DeviceBatch::number).collect();
        let running: Vec<_> = copier.running.iter().map(|running| running.copy_done.handle).collect();
        let situation = format!("{number} {dropped} {numbers:?} {running:?} {free:?} {}", self.fake.situation());
        // close here: it waits for copies, then memory goes back
        drop(copier);
        drop(ready);
        drop(entered);
        self.pool_must_be_quiet();
        self.overwrite();
        self.fake.run_all();
        for (number, memory, bytes) in placed {
            assert!(is_batch(&self.fake.read(memory, bytes), number), "batch {number} is wrong after {acts:?}");
            self.fake.forget_torch_memory(memory);
        }
        (next, situation)
    }

    fn out(&self, ready: &VecDeque<DeviceBatch>) -> usize {
        ready.len() + self.target.staging.describe().len()
    }

    /// Does what who gets the host memory next may do.
    fn overwrite(&self) {
        let next: Vec<_> = self.sizes.iter().map(|n| self.pool.lease(*n as usize * 8).unwrap()).collect();
        for mut lease in next {
            lease.as_mut_slice().fill(0xEE);
        }
    }

    fn pool_must_be_quiet(&self) {
        assert_eq!(self.pool.leases_out(), 0);
    }

    /// Ends everything; what is left of it and what was wrong.
    fn end(self) -> (String, Vec<String>) {
        let Self { fake, pool, target, device, .. } = self;
        drop(pool);
        drop(target);
        drop(device);
        fake.run_all();
        (fake.left(), fake.violations())
    }
}

const NOTHING: &str = "0 device blocks, 0 host blocks, 0 events, 0 streams, 0 modules";

/// Every order of steps of the transfer, the consumer and the GPU; each closed at each point.
fn all_orders(sizes: &[u64], ahead: usize, blocks: usize, n_consumers: usize, drops: bool) -> usize {
    let mut seen = HashSet::new();
    let mut open = vec![Vec::new()];
    while let Some(acts) = open.pop() {
        let world = World::new(sizes, ahead, blocks, u64::MAX);
        let consumers: Vec<Stream> = (0..n_consumers).map(|_| world.fake.torch_stream()).collect();
        let (next, situation) = world.run(&acts, &consumers, drops);
        let (left, wrong) = world.end();
        assert!(wrong.is_empty(), "{wrong:?} after {acts:?}");
        assert_eq!(left, NOTHING, "after {acts:?}");
        if seen.insert(situation) {
            open.extend(next.into_iter().map(|act| {
                let mut acts = acts.clone();
                acts.push(act);
                acts
            }));
        }
    }
    println!("{} situations", seen.len());
    seen.len()
}

#[test]
fn batches_are_right_in_every_order_of_events() {
    let found = all_orders(&[3, 3, 3], 1, 2, 1, false);
    assert!(found > 300, "only {found} situations");
}

#[test]
fn batches_are_right_when_consumers_use_streams_of_their_own_and_give_batches_up() {
    let found = all_orders(&[3, 3, 3], 1, 1, 2, true);
    assert!(found > 900, "only {found} situations");
}

/// The bound holds one block: each batch larger than the one before frees it.
#[test]
fn blocks_that_are_too_small_are_freed_after_their_last_reader() {
    let mib = (1 << 20) / 8;
    for acts in [
        &[Act::Stage, Act::Place, Act::Stage, Act::Place, Act::Stage, Act::Place][..],
        &[Act::Stage, Act::Drop, Act::Stage, Act::Retire, Act::Place, Act::Stage][..],
    ] {
        let world = World::new(&[mib, 2 * mib, 4 * mib], 1, 2, 1 << 20);
        let consumer = world.fake.torch_stream();
        world.run(acts, &[consumer], false);
        assert_eq!(world.fake.device_bytes(), 4 << 20);
        assert_eq!(world.end(), (NOTHING.to_owned(), Vec::new()));
    }
}

#[test]
fn a_device_that_is_full_gets_by_with_fewer_blocks() {
    let world = World::new(&[3, 3, 3], 1, 2, u64::MAX);
    world.fake.limit_device(1 << 20);
    let stats = StageStats::default();
    let entered = world.device.enter().unwrap();
    let mut copier = Copier::new(&world.target, &entered, &stats);
    let host = host_batch(&world.pool, 0, 3);
    let block = copier.try_take(&host).unwrap().unwrap();
    let batch = copier.stage(0, host, block).unwrap();
    let second = host_batch(&world.pool, 1, 3);
    assert!(copier.try_take(&second).unwrap().is_none());
    drop(batch);
    assert!(copier.try_take(&second).unwrap().map(|block| world.target.staging.give_back(block)).is_some());
    drop(second);
    // a batch that does not fit at all
    let host = host_batch(&world.pool, 1, (1 << 20) / 8 + 1);
    let error = copier.try_take(&host).unwrap_err().to_string();
    assert!(error.contains("has no 1310720 bytes for staging") && error.contains("lower batch_size"), "{error}");
    drop((copier, host));
    drop(entered);
    assert_eq!(world.end(), (NOTHING.to_owned(), Vec::new()));
}

/// Batches in a row, then the end; or nothing for ever once they are out.
#[derive(Debug)]
struct Row {
    pool: Arc<Pool>,
    sizes: Vec<u64>,
    given: Mutex<u64>,
    cancelled: AtomicBool,
    endless: bool,
    changed: Condvar,
}

impl Row {
    fn new(pool: &Arc<Pool>, sizes: &[u64], endless: bool) -> Arc<Self> {
        Arc::new(Self {
            pool: Arc::clone(pool),
            sizes: sizes.to_vec(),
            given: Mutex::default(),
            cancelled: AtomicBool::new(false),
            endless,
            changed: Condvar::new(),
        })
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        drop(self.given.lock().unwrap());
        self.changed.notify_all();
    }
}

impl HostBatches for Row {
    fn take(&self, timeout: Option<Duration>) -> Result<Taken<HostBatch>> {
        let mut given = self.given.lock().unwrap();
        loop {
            if self.cancelled.load(Ordering::SeqCst) {
                return Ok(Taken::Cancelled);
            }
            if let Some(&n) = self.sizes.get(*given as usize) {
                *given += 1;
                return Ok(Taken::Batch(host_batch(&self.pool, *given - 1, n)));
            }
            match (self.endless, timeout) {
                (false, _) => return Ok(Taken::End),
                (true, Some(_)) => return Ok(Taken::Pending),
                (true, None) => given = self.changed.wait(given).unwrap(),
            }
        }
    }
}

/// Fails the test where `f` takes longer than anything here should.
fn without_hanging<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || done.send(f()));
    wait.recv_timeout(Duration::from_secs(30)).expect("an end within 30 seconds")
}

/// Runs an epoch through the thread, with retries; the batches that were delivered, and the error that ended it.
fn epoch(world: &World, transfer: &Transfer, consumer: Stream) -> (Vec<(u64, u64, u64)>, Option<Error>) {
    let mut placed = Vec::new();
    let mut failures = 0;
    loop {
        match transfer.ready().take(None) {
            Ok(Taken::Batch(mut batch)) => {
                let bytes = batch.outputs()[0].bytes();
                let memory = world.fake.torch_memory(bytes);
                // SAFETY: memory and stream are the fake's.
                match unsafe { batch.place(&[memory], consumer) } {
                    Ok(()) => placed.push((batch.number(), memory, bytes)),
                    Err(error) => {
                        failures += 1;
                        transfer.ready().put_back(batch);
                        if failures > 3 {
                            return (placed, Some(error));
                        }
                    }
                }
            }
            Ok(Taken::End) => return (placed, None),
            Ok(other) => panic!("{other:?}"),
            Err(error) => return (placed, Some(error)),
        }
    }
}

/// Whatever call fails, once or from then on: no hang, no wrong batch, no batch missing without an error, and nothing
/// left behind that could have been given back.
#[test]
fn every_call_may_fail() {
    let sizes = [3, 200_000, 5, 300_000, 4];
    for (code, forever) in [(LOST, false), (LOST, true), (super::super::driver::OUT_OF_MEMORY, false)] {
        for n in 0.. {
            let (missed, failed, error, delivered, left, wrong) = without_hanging(move || {
                let world = World::new(&sizes, 2, 3, 3 << 20);
                let consumer = world.fake.torch_stream();
                world.fake.fail_in(n, code, forever);
                let source = Row::new(&world.pool, &sizes, false);
                let stats = Arc::new(StageStats::default());
                let transfer = Transfer::start(Arc::clone(&world.target), source as _, stats, 0).unwrap();
                let (placed, error) = epoch(&world, &transfer, consumer);
                drop(transfer);
                let missed = world.fake.mend() || (forever && world.fake.failed().is_none());
                let failed = world.fake.failed();
                if !forever {
                    world.pool_must_be_quiet();
                    world.overwrite();
                }
                world.fake.run_all();
                for (number, memory, bytes) in &placed {
                    assert!(is_batch(&world.fake.read(*memory, *bytes), *number), "batch {number}, call {n} failed");
                }
                let numbers: Vec<u64> = placed.iter().map(|p| p.0).collect();
                assert_eq!(numbers, (0..placed.len() as u64).collect::<Vec<_>>(), "call {n} failed");
                let fake = Arc::clone(&world.fake);
                let (_, wrong) = world.end();
                fake.state_forget_torch();
                (missed, failed, error, placed.len(), fake.left(), wrong)
            });
            assert!(wrong.is_empty(), "{wrong:?} when call {n} ({failed:?}) failed");
            if let Some(error) = &error {
                let text = error.to_string();
                assert!(text.contains("FAKE_FAULT") && (text.contains("batch ") || text.contains("in enter")), "{text}");
            } else {
                assert_eq!(delivered, sizes.len(), "call {n} ({failed:?}) failed");
            }
            // what a call that gives something back failed to give back is left; so is what a broken device may still use
            let gives = ["free", "host_free", "event_destroy", "stream_destroy", "enter", "synchronize", "finish"];
            if !forever && failed.is_none_or(|name| !gives.contains(&name)) {
                assert_eq!(left, NOTHING, "call {n} ({failed:?}) failed");
            }
            if missed {
                assert!(n > 30, "only {n} calls");
                break;
            }
        }
    }
}

#[test]
fn an_error_comes_where_its_batch_would_and_stays() {
    let world = World::new(&[3; 4], 2, 4, u64::MAX);
    let source = Row::new(&world.pool, &world.sizes, false);
    // the first batch is 1 enter, then alloc, h2d, event_create, record
    world.fake.fail_in(10, LOST, true);
    let stats = Arc::new(StageStats::default());
    let transfer = Transfer::start(Arc::clone(&world.target), source as _, stats, 7).unwrap();
    let Ok(Taken::Batch(batch)) = transfer.ready().take(None) else { panic!("a batch") };
    assert_eq!(batch.number(), 7);
    let mut errors = Vec::new();
    while errors.len() < 2 {
        match transfer.ready().take(None) {
            Ok(Taken::Batch(_)) => {}
            Err(error) => errors.push(error.to_string()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(errors[0], errors[1]);
    assert!(errors[0].starts_with("GPU 0 ") && errors[0].contains("(batch ") && errors[0].contains("new process"), "{errors:?}");
}

/// The thread waits for the next batch, for room in front of the consumer, or for staging memory, and is stopped.
#[test]
fn stopping_ends_every_wait() {
    for (sizes, ahead, blocks) in [(vec![3], 2, 4), (vec![3; 9], 2, 9), (vec![3; 9], 4, 1)] {
        without_hanging(move || {
            let world = World::new(&sizes, ahead, blocks, u64::MAX);
            let source = Row::new(&world.pool, &sizes, true);
            let stats = Arc::new(StageStats::default());
            let mut transfer = Transfer::start(Arc::clone(&world.target), Arc::clone(&source) as _, stats, 0).unwrap();
            let Ok(Taken::Batch(held)) = transfer.ready().take(None) else { panic!("a batch") };
            std::thread::sleep(Duration::from_millis(30));
            assert!(transfer.ready().len() <= ahead, "more ahead than was asked for");
            source.cancel();
            transfer.stop();
            assert!(matches!(transfer.ready().take(None), Ok(Taken::Cancelled)));
            world.pool_must_be_quiet();
            // given back too late, it is dropped
            transfer.ready().put_back(held);
            drop((transfer, source));
            assert_eq!(world.end(), (NOTHING.to_owned(), Vec::new()));
        });
    }
}

#[test]
fn a_batch_put_back_is_the_next_one_again() {
    let world = World::new(&[3; 5], 2, 4, u64::MAX);
    let source = Row::new(&world.pool, &world.sizes, false);
    let stats = Arc::new(StageStats::default());
    let transfer = Transfer::start(Arc::clone(&world.target), source as _, Arc::clone(&stats), 0).unwrap();
    let take = || match transfer.ready().take(None) {
        Ok(Taken::Batch(batch)) => batch,
        other => panic!("{other:?}"),
    };
    let (first, second) = (take(), take());
    transfer.ready().put_back(first);
    transfer.ready().put_back(second);
    let numbers: Vec<u64> = (0..5).map(|_| take().number()).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4]);
    assert!(matches!(transfer.ready().take(None), Ok(Taken::End)));
    assert_eq!((stats.h2d_batches.get(), stats.h2d_copies.get(), stats.h2d_bytes.get()), (5, 5, 5 * 24));
}

/// A place that fails leaves reads behind that no event tells of, or that one does: the block is not filled meanwhile, nor
/// freed when everything ends `early`.
#[test]
fn a_batch_that_could_not_be_placed_is_placed_later() {
    let of_two = |pool: &Arc<Pool>, number| {
        let mut host = host_batch(pool, number, 3);
        host.elements.push(BatchElement::Dense(host_batch(pool, number, 3).rows));
        host
    };
    for (failing, early) in (0..7).flat_map(|failing| [(failing, false), (failing, true)]) {
        let world = World::new(&[3; 2], 1, 1, u64::MAX);
        let (mine, yours) = (world.fake.torch_stream(), world.fake.torch_stream());
        let stats = StageStats::default();
        let entered = world.device.enter().unwrap();
        let mut copier = Copier::new(&world.target, &entered, &stats);
        let host = of_two(&world.pool, 0);
        let block = copier.try_take(&host).unwrap().unwrap();
        let mut batch = copier.stage(0, host, block).unwrap();
        let [failed, memory] = [0, 1].map(|_| [0, 1].map(|_| world.fake.torch_memory(24)));
        world.fake.fail_in(failing, LOST, false);
        // SAFETY: memory and streams are the fake's.
        let first = unsafe { batch.place(&failed, mine) };
        assert!(!world.fake.mend() || first.is_ok());
        if !early {
            if first.is_err() {
                // SAFETY: as above.
                unsafe { batch.place(&memory, yours) }.unwrap();
            }
            // SAFETY: as above.
            assert!(unsafe { batch.place(&memory, yours) }.is_err(), "placed twice");
            // the next batch must not overwrite what the failed placing still reads: that stream is the slow one
            let host = of_two(&world.pool, 1);
            if let Some(block) = copier.try_take(&host).unwrap() {
                drop(copier.stage(1, host, block).unwrap());
            }
            for _ in 0..20 {
                for stream in world.fake.runnable() {
                    if stream != mine.0 {
                        world.fake.step(stream);
                    }
                }
            }
            world.fake.run_all();
            for at in if first.is_ok() { failed } else { memory } {
                assert!(is_batch(&world.fake.read(at, 24), 0), "call {failing} failed");
            }
            for at in failed {
                let read = world.fake.read(at, 24);
                assert!(is_batch(&read, 0) || read == [0xAB; 24], "call {failing} failed: a read saw the next batch");
            }
        }
        drop((copier, batch));
        drop(entered);
        let fake = Arc::clone(&world.fake);
        let (_, wrong) = world.end();
        fake.state_forget_torch();
        assert_eq!((fake.left(), wrong), (NOTHING.to_owned(), Vec::new()), "call {failing} failed, {early}");
    }
}
