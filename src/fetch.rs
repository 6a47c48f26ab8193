//! Chunks of a plan → their encoded bytes, many reads in flight, few bytes held.
//!
//! ```text
//! requests ─▶ shard indexes not at hand ─▶ addresses ─▶ coalesced reads ─┬─▶ sink (chunk by chunk)
//!                                            byte budget, I/O depth ──────┘
//! ```
//!
//! Bytes are counted against the budget from before the read until the last chunk in it is decoded, so
//! reading runs ahead of decoding by a bounded amount; the depth bounds reads in flight whatever decodes. Units
//! issue their reads one after the other; the shard indexes of one load while those before it still do.

use std::collections::HashMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::arena::{Lease, Pool};
use crate::base::error::{Error, Result, catch};
use crate::base::lock::lock;
use crate::base::stats::StageStats;
use crate::coalesce::{CoalescedRead, Wanted, coalesce};
use crate::decode::{Extract, Outline};
use crate::layout::{Address, ChunkedArray, ShardIndex};
use crate::store::{IoShape, RangeRead, lost};

/// Granularity of the byte budget: a semaphore counts in 32 bits. Every block of a pool is some of these.
const BUDGET_UNIT_BYTES: u64 = 4096;
/// Reads that one call of a store serves at most.
const MAX_READS_PER_CALL: usize = 32;

/// One chunk to fetch, with the caller's number for it.
#[derive(Debug, Clone)]
pub struct ChunkRequest {
    /// What the caller knows the chunk by.
    pub tag: u32,
    /// The array.
    pub array: Arc<ChunkedArray>,
    /// Row-major chunk number.
    pub chunk: u64,
    /// What is wanted of the chunk; `None` for all of it.
    pub part: Option<ChunkPart>,
    /// Chunks of a lower number are wanted before.
    pub deadline: u32,
}

/// Bytes of a chunk that can be read without the others.
#[derive(Debug, Clone)]
pub struct ChunkPart {
    /// The bytes.
    pub bytes: Range<u64>,
    /// Of what they are blocks; `None` where the chunk is stored as it is.
    pub outline: Option<Arc<Outline>>,
}

impl ChunkRequest {
    /// The bytes that are wanted of a chunk at `address`.
    fn of_chunk(&self, address: Address) -> Result<Address> {
        match (address, &self.part) {
            (Address::Stored(key, range), Some(ChunkPart { bytes, outline })) => {
                let stored = range.end - range.start;
                match outline {
                    None => self.array.check_verbatim(self.chunk, stored)?,
                    Some(outline) if outline.encoded_bytes() as u64 == stored => {}
                    Some(outline) => {
                        let before = outline.encoded_bytes();
                        let message = format!(
                            "has {stored} bytes, and had {before} when it was read before; the store has changed: open it again"
                        );
                        return Err(Error::corrupt(self.array.place(self.chunk), message));
                    }
                }
                Ok(Address::Stored(key, range.start + bytes.start..range.start + bytes.end))
            }
            (address, _) => Ok(address),
        }
    }
}

/// The bytes of one coalesced read, held until its last chunk is decoded.
#[derive(Debug)]
pub struct ReadBuffer {
    lease: Lease,
    /// The byte of the object that the lease begins with.
    start: u64,
    _budget: Option<OwnedSemaphorePermit>,
}

/// The encoded bytes of one chunk.
#[derive(Debug)]
pub enum Fetched {
    /// The chunk is not stored: it is all fill value.
    Fill,
    /// Part of a read.
    Bytes(Arc<ReadBuffer>, Range<usize>),
    /// The same, of which the bytes are blocks of the chunk with this outline, from this byte of it on.
    Blocks(Arc<ReadBuffer>, Range<usize>, Arc<Outline>, usize),
}

impl Fetched {
    /// The encoded bytes, or `None` for a chunk of fill value.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Fill => None,
            Self::Bytes(buffer, range) | Self::Blocks(buffer, range, ..) => {
                // SAFETY: the read that filled the buffer has completed, and nothing writes to it afterwards.
                Some(unsafe { &buffer.lease.as_slice()[range.clone()] })
            }
        }
    }

    /// The bytes as blocks of a chunk, where they are not all of it.
    pub fn extract(&self) -> Option<Extract<'_>> {
        let Self::Blocks(_, _, outline, first) = self else { return None };
        Some(Extract { outline, first: *first, encoded: self.bytes()? })
    }
}

/// Takes chunks as they arrive, on a reading thread; it must not block.
pub trait Sink: Send + Sync + 'static {
    /// One chunk's bytes, or why there are none. Called once per request, or never once `cancelled`.
    fn arrived(self: Arc<Self>, tag: u32, fetched: Result<Fetched>);
    /// Whether nobody wants the rest any more.
    fn cancelled(&self) -> bool;
}

/// Bounds shared by all fetches of a pipeline.
#[derive(Debug)]
pub struct Fetcher {
    budget: Arc<Semaphore>,
    budget_units: u32,
    depth: Arc<Semaphore>,
    io_depth: usize,
    /// Fetches whose reads are being issued, one at a time.
    turn: Line,
    /// Fetches whose shard indexes are being read, one at a time.
    indexes: Line,
    pool: Arc<Pool>,
    stats: Arc<StageStats>,
}

impl Fetcher {
    /// A fetcher that holds at most about `budget_bytes` of encoded bytes, in memory from `pool`, and `io_depth` reads.
    pub fn new(budget_bytes: u64, pool: Arc<Pool>, io_depth: usize, stats: Arc<StageStats>) -> Arc<Self> {
        let budget_units = u32::try_from((budget_bytes / BUDGET_UNIT_BYTES).max(1)).unwrap_or(u32::MAX / 8).min(u32::MAX / 8);
        Arc::new(Self {
            budget: Arc::new(Semaphore::new(budget_units as usize)),
            budget_units,
            depth: Arc::new(Semaphore::new(io_depth)),
            io_depth,
            turn: Line::default(),
            indexes: Line::default(),
            pool,
            stats,
        })
    }

    /// Calls of stores under way, each of one read or several small ones.
    pub fn reads_in_flight(&self) -> u64 {
        (self.io_depth - self.depth.available_permits()) as u64
    }

    /// Encoded bytes that are being read or wait to be decoded, the memory that they take, with what the next read has been
    /// granted so far.
    pub fn encoded_bytes_held(&self) -> u64 {
        (self.budget_units as usize - self.budget.available_permits()) as u64 * BUDGET_UNIT_BYTES
    }

    /// Fetches every chunk into `sink`; the future ends once the last read was issued.
    ///
    /// Fetches issue their reads in the order of these calls, whichever future is polled first: one that came later may
    /// hold its bytes until those before it are decoded, so that its reads must not take the byte budget first.
    pub fn fetch(self: Arc<Self>, requests: Vec<ChunkRequest>, sink: Arc<dyn Sink>) -> impl Future<Output = ()> + Send + 'static {
        let (indexes, turn) = (self.indexes.place(), self.turn.place());
        self.fetch_in(indexes, turn, requests, sink)
    }

    async fn fetch_in(self: Arc<Self>, mut indexes: InLine, mut turn: InLine, requests: Vec<ChunkRequest>, sink: Arc<dyn Sink>) {
        // before the turn: indexes do not delay the reads of this one, and one that a fetch ahead reads is not read twice
        indexes.reached().await;
        let addresses = if sink.cancelled() { Vec::new() } else { self.addresses(&requests).await };
        drop(indexes);
        // also where nothing is wanted any more: who leaves the line early lets the one behind overtake
        turn.reached().await;
        let job = Arc::new(ReadJob::new(requests, addresses, sink));
        let mut next = 0;
        while next < job.reads.len() {
            if job.sink.cancelled() {
                return;
            }
            let call = self.call_from(&job, next);
            next = call.end;
            let Some((budget, depth)) = self.admit(job.reads[call.clone()].iter().map(|read| self.units(&job, read)).sum()).await
            else {
                return;
            };
            let (this, job) = (Arc::clone(&self), Arc::clone(&job));
            tokio::spawn(async move {
                this.read_call(&job, call, budget).await;
                drop(depth);
            });
        }
    }

    /// The reads from `first` on that one call of the store serves, one after the other. Each call costs some microseconds,
    /// which count where a window wants many small pieces; but it is one of the reads in flight, so that there must be
    /// enough calls for all of those, and no more bytes than in one large read.
    fn call_from(&self, job: &ReadJob, first: usize) -> Range<usize> {
        let most = (job.reads.len() / self.io_depth).clamp(1, MAX_READS_PER_CALL);
        let shape = job.objects.shape(job.reads[first].object);
        let mut bytes = shape.width(&job.reads[first].range);
        let mut units = self.units(job, &job.reads[first]);
        let mut end = first + 1;
        while let Some(read) = job.reads.get(end)
            && end - first < most
            && read.object == job.reads[first].object
        {
            let more = shape.width(&read.range);
            units += self.units(job, read);
            if bytes + more > shape.joined.target_read_bytes || units > u64::from(self.budget_units) {
                break;
            }
            bytes += more;
            end += 1;
        }
        first..end
    }

    /// What a read takes of the budget.
    fn units(&self, job: &ReadJob, read: &CoalescedRead) -> u64 {
        self.pool.footprint(job.objects.shape(read.object).width(&read.range)) / BUDGET_UNIT_BYTES
    }

    /// Reads in one call what `call` says and hands it out. Where that fails each is read on its own, so that a chunk fails
    /// only by its own read.
    async fn read_call(&self, job: &ReadJob, call: Range<usize>, mut budget: OwnedSemaphorePermit) {
        let (array, key) = job.objects.get(job.reads[call.start].object);
        let reads = &job.reads[call];
        let mut done = self.read_ranges(array, key, reads.iter().map(|r| r.range.clone())).await.map(Vec::into_iter);
        for read in reads {
            let result = match &mut done {
                Ok(buffers) => buffers.next().ok_or_else(lost),
                Err(e) if reads.len() == 1 => Err(e.clone()),
                // each may take until a time-out, and whoever closes waits for it
                Err(_) if job.sink.cancelled() => return,
                Err(_) => self.read_range(array, key, read.range.clone()).await,
            };
            let result = result.map(|done| {
                let share = (self.units(job, read) as usize).min(budget.num_permits());
                let share = budget.split(share);
                ReadBuffer { lease: done.buffer, start: done.span.start, _budget: share }
            });
            job.hand_out(read, result);
        }
    }

    /// Waits until so many units fit the budget and the depth allows one more read.
    async fn admit(&self, units: u64) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        // a read larger than the whole budget takes all of it rather than waiting for ever
        let units = u32::try_from(units).unwrap_or(u32::MAX).min(self.budget_units);
        let start = Instant::now();
        let budget = Arc::clone(&self.budget).acquire_many_owned(units).await.ok()?;
        self.stats.fetch_budget_wait_ns.add_since(start);
        let start = Instant::now();
        let depth = Arc::clone(&self.depth).acquire_owned().await.ok()?;
        self.stats.fetch_depth_wait_ns.add_since(start);
        Some((budget, depth))
    }

    async fn read_range(&self, array: &ChunkedArray, key: &Arc<str>, range: Range<u64>) -> Result<RangeRead> {
        self.read_ranges(array, key, std::iter::once(range)).await?.pop().ok_or_else(lost)
    }

    /// Reads ranges of one object; a panicking store is an error instead of a batch that never comes.
    async fn read_ranges(
        &self,
        array: &ChunkedArray,
        key: &Arc<str>,
        ranges: impl Iterator<Item = Range<u64>>,
    ) -> Result<Vec<RangeRead>> {
        let start = Instant::now();
        let mut n = 0;
        let mut reading = catch(|| {
            let reads: Vec<RangeRead> = ranges.map(|r| RangeRead::new(&**array.store(), r, &self.pool)).collect::<Result<_>>()?;
            n = reads.len();
            Ok(Arc::clone(array.store()).read_ranges(Arc::clone(key), reads))
        })?;
        let reads = poll_fn(|cx| match catch(|| Ok(reading.as_mut().poll(cx))) {
            Ok(poll) => poll,
            Err(panicked) => Poll::Ready(Err(panicked)),
        })
        .await?;
        if reads.len() != n {
            return Err(lost());
        }
        self.stats.reads.add(n as u64);
        for read in &reads {
            self.stats.bytes_read.add(read.buffer.len() as u64);
            self.stats.direct_reads_refused.add(u64::from(read.refused_direct));
        }
        self.stats.fetch_ns.add_since(start);
        Ok(reads)
    }

    /// Where each requested chunk is. Indexes that are not at hand are read, all at once, and may be gone again
    /// afterwards: the addresses in a shard are looked up while its index is held.
    async fn addresses(self: &Arc<Self>, requests: &[ChunkRequest]) -> Vec<Result<Address>> {
        let mut out = vec![Ok(Address::Fill); requests.len()];
        let mut shards: HashMap<(usize, u64), Vec<usize>> = HashMap::new();
        for (i, request) in requests.iter().enumerate() {
            match request.array.shard_of(request.chunk) {
                Some(shard) => shards.entry((Arc::as_ptr(&request.array).addr(), shard)).or_default().push(i),
                None => out[i] = request.array.address(request.chunk),
            }
        }
        let mut running = Vec::new();
        for ((_, shard), members) in shards {
            let array = &requests[members[0]].array;
            let chunks: Vec<u64> = members.iter().map(|&i| requests[i].chunk).collect();
            if let Some(index) = array.index(shard) {
                members.iter().zip(chunks).for_each(|(&i, chunk)| out[i] = array.address_in(chunk, &index));
                continue;
            }
            let (this, array) = (Arc::clone(self), Arc::clone(array));
            let task = tokio::spawn(async move {
                let index = this.read_index(&array, shard).await;
                let address = |chunk| match &index {
                    Ok(index) => array.address_in(chunk, index),
                    Err(e) => Err(e.clone().within(&array.place(chunk))),
                };
                chunks.into_iter().map(address).collect::<Vec<_>>()
            });
            running.push((members, task));
        }
        for (members, task) in running {
            match task.await {
                Ok(addresses) => members.into_iter().zip(addresses).for_each(|(i, address)| out[i] = address),
                Err(e) => members.into_iter().for_each(|i| out[i] = Err(Error::Internal { message: e.to_string() })),
            }
        }
        out
    }

    async fn read_index(&self, array: &ChunkedArray, shard: u64) -> Result<Arc<ShardIndex>> {
        let index = array.index_read(shard)?;
        let _permits = self.admit(self.pool.footprint(array.store().io_shape().width(&index.range)) / BUDGET_UNIT_BYTES).await;
        let mut read = self.read_range(array, &index.key, index.range).await.map_err(|e| e.within(&array.at))?;
        array.load_index(shard, read.wanted_mut())
    }
}

/// Who comes next, decided when a place is taken and not when a future happens to be polled.
#[derive(Debug, Default)]
struct Line {
    last: Mutex<Option<oneshot::Receiver<()>>>,
}

/// A place in a [`Line`]; dropping it lets the one behind go on.
#[derive(Debug)]
struct InLine {
    before: Option<oneshot::Receiver<()>>,
    _done: oneshot::Sender<()>,
}

impl Line {
    /// The place behind all that were taken.
    fn place(&self) -> InLine {
        let (done, ended) = oneshot::channel();
        let before = lock(&self.last).replace(ended);
        InLine { before, _done: done }
    }
}

impl InLine {
    /// Waits until every place before this one was dropped.
    async fn reached(&mut self) {
        if let Some(before) = self.before.take() {
            // nothing is ever sent: the sender is dropped
            let _ = before.await;
        }
    }
}

/// The reads of one fetch, in the order in which they are issued.
struct ReadJob {
    requests: Vec<ChunkRequest>,
    sink: Arc<dyn Sink>,
    /// Tagged with the number of the request.
    wanted: Vec<Wanted>,
    reads: Vec<CoalescedRead>,
    objects: Objects,
}

impl ReadJob {
    /// Plans the reads; what needs none arrives at once.
    fn new(requests: Vec<ChunkRequest>, addresses: Vec<Result<Address>>, sink: Arc<dyn Sink>) -> Self {
        let mut objects = Objects::default();
        let mut wanted = Vec::with_capacity(addresses.len());
        for (number, (request, address)) in requests.iter().zip(addresses).enumerate() {
            match address.and_then(|address| request.of_chunk(address)) {
                Ok(Address::Stored(key, range)) => wanted.push(Wanted {
                    object: objects.number(&request.array, &key),
                    range: (range.start, range.end),
                    tag: number as u32,
                }),
                Ok(Address::Fill) => Arc::clone(&sink).arrived(request.tag, Ok(Fetched::Fill)),
                Ok(Address::InShard(_)) => {
                    let message = "an address was asked for without the shard's index".into();
                    Arc::clone(&sink).arrived(request.tag, Err(Error::Internal { message }));
                }
                Err(e) => Arc::clone(&sink).arrived(request.tag, Err(e)),
            }
        }
        let mut reads = coalesce(&mut wanted, |object| objects.shape(object).joined);
        // What is needed first is read first. Windows are shuffled as a rule, so that their first batch needs a piece of
        // nearly every read, and this is the order of storage.
        let deadline = |w: &Wanted| requests[w.tag as usize].deadline;
        reads.sort_by_cached_key(|read| (wanted[read.members.clone()].iter().map(deadline).min(), read.object, read.range.start));
        Self { requests, sink, wanted, reads, objects }
    }

    /// Gives each chunk of a finished read to the sink.
    fn hand_out(&self, read: &CoalescedRead, result: Result<ReadBuffer>) {
        let result = result.map(Arc::new);
        for member in &self.wanted[read.members.clone()] {
            let request = &self.requests[member.tag as usize];
            let fetched = match &result {
                Ok(buffer) => {
                    let range = (member.range.0 - buffer.start) as usize..(member.range.1 - buffer.start) as usize;
                    let buffer = Arc::clone(buffer);
                    Ok(match &request.part {
                        Some(ChunkPart { bytes, outline: Some(outline) }) => {
                            Fetched::Blocks(buffer, range, Arc::clone(outline), bytes.start as usize)
                        }
                        _ => Fetched::Bytes(buffer, range),
                    })
                }
                Err(e) => Err(e.clone()),
            };
            Arc::clone(&self.sink).arrived(request.tag, fetched);
        }
    }
}

/// Numbers for (store, key) pairs, which sort and compare faster than the pairs.
#[derive(Default)]
struct Objects {
    numbers: HashMap<(usize, Arc<str>), u32>,
    /// With how reads of each should look.
    list: Vec<(Arc<ChunkedArray>, Arc<str>, IoShape)>,
}

impl Objects {
    fn number(&mut self, array: &Arc<ChunkedArray>, key: &Arc<str>) -> u32 {
        let store = Arc::as_ptr(array.store()).cast::<()>().addr();
        *self.numbers.entry((store, Arc::clone(key))).or_insert_with(|| {
            self.list.push((Arc::clone(array), Arc::clone(key), array.store().io_shape()));
            self.list.len() as u32 - 1
        })
    }

    fn get(&self, number: u32) -> (&ChunkedArray, &Arc<str>) {
        let (array, key, _) = &self.list[number as usize];
        (array, key)
    }

    fn shape(&self, number: u32) -> IoShape {
        self.list[number as usize].2
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Futures polled in any order: the work between `reached` and the drop happens in the order of the places.
    #[test]
    fn places_are_reached_in_the_order_in_which_they_were_taken() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let (line, reached) = (Line::default(), Arc::new(AtomicUsize::new(0)));
        let places: Vec<InLine> = (0..100).map(|_| line.place()).collect();
        let visit = |(i, mut place): (usize, InLine)| {
            let reached = Arc::clone(&reached);
            runtime.spawn(async move {
                place.reached().await;
                assert_eq!(reached.fetch_add(1, Ordering::SeqCst), i);
                drop(place);
            })
        };
        let tasks: Vec<_> = places.into_iter().enumerate().rev().map(visit).collect();
        for task in tasks {
            runtime.block_on(task).unwrap();
        }
        assert_eq!(reached.load(Ordering::SeqCst), 100);
    }
}
