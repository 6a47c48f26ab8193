//! One chunk, read and decoded on the spot: for the small arrays that opening needs.

use std::ops::Range;
use std::sync::Arc;

use super::{Address, ChunkedArray};
use crate::arena::Pool;
use crate::decode::Scratch;
use crate::error::{Error, Result};
use crate::store::RangeRead;

/// Calls `take` with the decoded elements of one chunk; waits for its bytes.
pub fn read_chunk_now<T>(
    array: &ChunkedArray,
    chunk: u64,
    io: &tokio::runtime::Runtime,
    scratch: &mut Scratch,
    take: impl FnOnce(&[u8]) -> Result<T>,
) -> Result<T> {
    let pool = Pool::new(0);
    let mut address = array.address(chunk)?;
    if let Address::InShard(shard) = address {
        let index = array.index_read(shard)?;
        let read = read_now(array, index.key, index.range, io, &pool)?;
        array.load_index(shard, &read)?;
        address = array.address(chunk)?;
    }
    match address {
        Address::Stored(key, range) => {
            let encoded = read_now(array, key, range, io, &pool)?;
            let decoded = array.codec.decode(&encoded, scratch).map_err(|e| e.within(&array.place(chunk)))?;
            take(&decoded.elements()?)
        }
        _ => take(&array.fill_chunk()?),
    }
}

fn read_now(
    array: &ChunkedArray,
    key: Arc<str>,
    range: Range<u64>,
    io: &tokio::runtime::Runtime,
    pool: &Arc<Pool>,
) -> Result<Vec<u8>> {
    let reads = vec![RangeRead::new(&**array.store(), range, pool)?];
    let mut reads = io.block_on(Arc::clone(array.store()).read_ranges(key, reads)).map_err(|e| e.within(&array.at))?;
    let mut read = reads.pop().ok_or_else(|| Error::Internal { message: "a store lost a read".into() })?;
    Ok(read.wanted_mut().to_vec())
}
