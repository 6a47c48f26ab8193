//! Chunks read and decoded on the spot: for the small arrays that opening needs.

use std::ops::Range;
use std::sync::Arc;

use super::{Address, ChunkedArray, ShardIndex};
use crate::arena::Pool;
use crate::base::error::{Error, Result};
use crate::coalesce::{CoalescedRead, Wanted, coalesce};
use crate::decode::Scratch;
use crate::store::{RangeRead, lost};

/// Calls `take` with the decoded elements of one chunk; waits for its bytes.
pub fn read_chunk_now<T>(
    array: &ChunkedArray,
    chunk: u64,
    io: &tokio::runtime::Runtime,
    scratch: &mut Scratch,
    take: impl FnOnce(&[u8]) -> Result<T>,
) -> Result<T> {
    let (mut take, mut taken) = (Some(take), None);
    read_chunks_now(array, chunk..chunk + 1, io, scratch, |_, elements| {
        taken = take.take().map(|take| take(elements)).transpose()?;
        Ok(())
    })?;
    taken.ok_or_else(|| Error::Internal { message: "a chunk was not read".into() })
}

/// Calls `take` with the number and the decoded elements of each chunk, in order, up to the first error; those of the
/// last chunk of a contiguous dataset end with it. Waits for their
/// bytes, which are read in few large reads, all at once, and held until the last chunk was taken.
pub fn read_chunks_now(
    array: &ChunkedArray,
    chunks: Range<u64>,
    io: &tokio::runtime::Runtime,
    scratch: &mut Scratch,
    mut take: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let pool = Pool::new(0);
    let addresses = addresses_now(array, chunks.clone(), io, &pool);
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut keys: Vec<&Arc<str>> = Vec::new();
    for (i, address) in addresses.iter().enumerate() {
        if let Ok(Address::Stored(key, range)) = address {
            if keys.last() != Some(&key) {
                keys.push(key);
            }
            wanted.push(Wanted { object: keys.len() as u32 - 1, range: (range.start, range.end), tag: i as u32 });
        }
    }
    let joined = array.store().io_shape().joined;
    let reads = coalesce(&mut wanted, |_| joined);
    let mut buffers = read_now(array, &reads, &keys, io, &pool);
    // where each chunk's bytes came to lie
    let mut places = vec![(0, 0..0); addresses.len()];
    for (number, read) in reads.iter().enumerate() {
        for w in &wanted[read.members.clone()] {
            let (start, end) = (w.range.0 - read.range.start, w.range.1 - read.range.start);
            places[w.tag as usize] = (number, start as usize..end as usize);
        }
    }
    let mut fill = None;
    for ((chunk, address), (read, range)) in chunks.zip(addresses).zip(places) {
        match address? {
            Address::Stored(..) => {
                let encoded = buffers[read].as_mut().map_err(|e| e.clone())?.wanted_mut();
                take(chunk, &array.decode(chunk, &encoded[range], scratch)?.elements()?)?;
            }
            _ => {
                let fill = match &mut fill {
                    Some(fill) => fill,
                    none => none.insert(array.fill_chunk()?),
                };
                take(chunk, fill)?;
            }
        }
    }
    Ok(())
}

/// Where each chunk is, up to the first error.
fn addresses_now(array: &ChunkedArray, chunks: Range<u64>, io: &tokio::runtime::Runtime, pool: &Arc<Pool>) -> Vec<Result<Address>> {
    let mut held: Option<(u64, Arc<ShardIndex>)> = None;
    let mut address = |chunk| {
        let Some(shard) = array.shard_of(chunk) else { return array.address(chunk) };
        let index = match held.take() {
            Some((of, index)) if of == shard => index,
            _ => index_now(array, shard, io, pool)?,
        };
        let (_, index) = held.insert((shard, index));
        array.address_in(chunk, index)
    };
    let mut out = Vec::new();
    for chunk in chunks {
        let found = address(chunk);
        let failed = found.is_err();
        out.push(found);
        if failed {
            break;
        }
    }
    out
}

fn index_now(array: &ChunkedArray, shard: u64, io: &tokio::runtime::Runtime, pool: &Arc<Pool>) -> Result<Arc<ShardIndex>> {
    let _turn = array.index_turn();
    if let Some(index) = array.index(shard) {
        return Ok(index);
    }
    let index = array.index_read(shard)?;
    let read = CoalescedRead { object: 0, range: index.range, members: 0..0 };
    let mut buffers = read_now(array, &[read], &[&index.key], io, pool);
    let mut buffer = buffers.pop().ok_or_else(lost)??;
    array.load_index(shard, buffer.wanted_mut())
}

/// The bytes of every read; waits for all of them.
fn read_now(
    array: &ChunkedArray,
    reads: &[CoalescedRead],
    keys: &[&Arc<str>],
    io: &tokio::runtime::Runtime,
    pool: &Arc<Pool>,
) -> Vec<Result<RangeRead>> {
    let running: Vec<_> = reads
        .iter()
        .map(|read| {
            let ranges = vec![RangeRead::new(&**array.store(), read.range.clone(), pool)?];
            Ok(io.spawn(Arc::clone(array.store()).read_ranges(Arc::clone(keys[read.object as usize]), ranges)))
        })
        .collect();
    let finish = |running: Result<tokio::task::JoinHandle<Result<Vec<RangeRead>>>>| {
        let joined = io.block_on(running?).map_err(|e| Error::Internal { message: e.to_string() })?;
        let mut ranges = joined.map_err(|e| e.within(&array.at))?;
        ranges.pop().ok_or_else(lost)
    };
    running.into_iter().map(finish).collect()
}
