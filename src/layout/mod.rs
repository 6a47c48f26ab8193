//! Where the bytes of every chunk of an array lie, and how to decode them.
//!
//! The one format all readers share is a chunk index: chunk → (object, byte range, codec chain). A Zarr
//! shard's inner chunk, an unsharded chunk file, an HDF5 chunk and a piece of a contiguous HDF5 dataset are rows of the
//! same table, so everything above this module plans, reads and decodes them alike. Objects are listed once, at open: a
//! chunk absent then is made of the fill value, one that disappears later is an error.

mod address;
#[cfg(feature = "hdf5")]
pub mod hdf5;
mod indexes;
#[cfg_attr(not(any(feature = "hdf5", test)), expect(dead_code, reason = "only HDF5 files are listed so"))]
mod listing;
mod outlines;
mod read;
mod rows;
mod shard;
pub mod zarr;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, MutexGuard};

pub use address::Address;
pub use indexes::{DEFAULT_INDEX_BYTES, IndexCache};
pub use read::{read_chunk_now, read_chunks_now};
pub use rows::{Filled, PointerPiece, RowPointers, RowPointersBuilder};
pub use shard::{IndexLocation, Shard, ShardIndex, ShardIndexFormat};

pub(crate) use listing::{Contiguous, Listing};

use crate::base::error::{Error, Result};
use crate::base::lock::lock;
use crate::decode::{ChunkCodec, Decoded, Outline, Scratch};
use crate::schema::DType;
use crate::store::Store;
use outlines::Outlines;

/// Bytes of one shard's index, to be read before its chunks can be addressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexRead {
    /// Linear number of the shard.
    pub shard: u64,
    /// The shard's object.
    pub key: Arc<str>,
    /// Where its index lies.
    pub range: Range<u64>,
}

/// How chunks map to objects.
#[derive(Debug)]
#[cfg_attr(not(feature = "hdf5"), expect(dead_code, reason = "the last two are of HDF5 files"))]
pub(crate) enum Addressing {
    /// One object per chunk: linear chunk number → (key, size in bytes).
    Objects(HashMap<u64, (Arc<str>, u64)>),
    /// Shards of inner chunks.
    Shards(Shards),
    /// Chunks anywhere in the one object of the store.
    Listed(Listing),
    /// All elements one after the other in the one object of the store.
    Contiguous(Contiguous),
}

/// Shards that hold `per_shard` inner chunks in every dimension.
#[derive(Debug)]
pub(crate) struct Shards {
    pub(crate) per_shard: Vec<u64>,
    pub(crate) grid: Vec<u64>,
    pub(crate) stored: HashMap<u64, Shard>,
    pub(crate) format: ShardIndexFormat,
    pub(crate) indexes: Arc<IndexCache>,
    /// Number of the array in `indexes`.
    pub(crate) array: u64,
}

/// One n-dimensional chunked array of a store, opened: metadata checked, objects listed.
#[derive(Debug)]
pub struct ChunkedArray {
    /// Dataset and array, as errors name them.
    pub at: String,
    /// Stored element type.
    pub dtype: DType,
    /// Elements per dimension.
    pub shape: Vec<u64>,
    /// Elements per dimension of the smallest unit that can be decoded (inner chunk or chunk).
    pub chunk_shape: Vec<u64>,
    /// One element of the fill value, native byte order.
    pub fill: Vec<u8>,
    /// How the bytes of a chunk become elements, but for those of which [`ChunkedArray::codec_of`] knows better.
    pub codec: ChunkCodec,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) grid: Vec<u64>,
    pub(crate) addressing: Addressing,
    outlines: Outlines,
}

impl ChunkedArray {
    /// Chunks per dimension.
    pub fn grid(&self) -> &[u64] {
        &self.grid
    }

    /// Elements of one decoded chunk (edge chunks are stored whole).
    pub fn chunk_len(&self) -> u64 {
        self.chunk_shape.iter().product()
    }

    /// Bytes of one decoded chunk.
    pub fn chunk_bytes(&self) -> usize {
        self.chunk_len() as usize * self.dtype.size()
    }

    /// A whole chunk of the fill value.
    pub fn fill_chunk(&self) -> Result<Vec<u8>> {
        let mut out = crate::base::error::vec_with_room(self.chunk_bytes() as u64, &self.at)?;
        for _ in 0..self.chunk_len() {
            out.extend_from_slice(&self.fill);
        }
        Ok(out)
    }

    /// The store that the array's objects live in.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Bytes of all listed objects: what a hostile shape is weighed against.
    pub fn stored_bytes(&self) -> u64 {
        match &self.addressing {
            Addressing::Objects(objects) => objects.values().map(|(_, size)| size).sum(),
            Addressing::Shards(shards) => shards.stored.values().map(|s| s.size).sum(),
            Addressing::Listed(listing) => listing.stored_bytes(),
            Addressing::Contiguous(contiguous) => contiguous.bytes.end - contiguous.bytes.start,
        }
    }

    /// Checks that what is stored can account for the elements of an array of one dimension, which is to be read whole.
    ///
    /// # Errors
    /// [`Corrupt`](Error::Corrupt) where it cannot.
    pub(crate) fn check_claim(&self) -> Result<()> {
        // chunks are made whole, also those of which nothing is stored
        let claimed = self.shape[0].max(self.chunk_shape[0]).saturating_mul(self.dtype.size() as u64);
        let stored = self.stored_bytes();
        if claimed > FREE_BYTES.saturating_add(stored.saturating_mul(MAX_INFLATION)) {
            return Err(Error::corrupt(&self.at, format!("claims {claimed} bytes, but only {stored} are stored")));
        }
        Ok(())
    }

    /// How the bytes of this chunk become elements.
    pub fn codec_of(&self, chunk: u64) -> &ChunkCodec {
        match &self.addressing {
            Addressing::Listed(listing) => listing.exception(chunk).unwrap_or(&self.codec),
            _ => &self.codec,
        }
    }

    /// Whether the elements of every chunk are stored one after the other, so that any of them can be read without the
    /// others.
    pub fn is_verbatim(&self) -> bool {
        self.codec.is_verbatim() && !matches!(&self.addressing, Addressing::Listed(listing) if listing.has_exceptions())
    }

    /// Checks the stored length of a chunk of a [verbatim](ChunkedArray::is_verbatim) array. The last chunk of a
    /// contiguous one ends with the array; all others are stored whole.
    pub fn check_verbatim(&self, chunk: u64, stored_bytes: u64) -> Result<()> {
        let checked = match &self.addressing {
            Addressing::Contiguous(contiguous) if contiguous.range(chunk).is_some_and(|r| r.end - r.start == stored_bytes) => {
                Ok(())
            }
            _ => self.codec.check_verbatim(stored_bytes),
        };
        checked.map_err(|e| e.within(&self.place(chunk)))
    }

    /// Whether chunks are large enough, and of blocks, so that some of them are read without the others once it is known
    /// where they lie.
    pub fn is_read_by_block(&self) -> bool {
        self.codec.has_blocks() && self.chunk_bytes() >= MIN_BLOCKS_BYTES
    }

    /// What is known of a chunk from [`ChunkedArray::learn`].
    pub fn outline(&self, chunk: u64) -> Option<Arc<Outline>> {
        self.outlines.get(chunk)
    }

    /// Takes down where the blocks of a chunk lie, which was read whole.
    pub fn learn(&self, chunk: u64, encoded: &[u8]) {
        if self.outlines.get(chunk).is_none()
            && let Some(outline) = self.codec.outline(encoded)
        {
            self.outlines.keep(chunk, outline);
        }
    }

    /// Forgets where the blocks of a chunk lie: what lies there is something else.
    pub fn forget(&self, chunk: u64) {
        self.outlines.remove(chunk);
    }

    /// Decodes a chunk as it is stored: whole, or to the end of the array.
    pub(crate) fn decode<'a>(&self, chunk: u64, encoded: &'a [u8], scratch: &'a mut Scratch) -> Result<Decoded<'a>> {
        if self.is_verbatim() {
            self.check_verbatim(chunk, encoded.len() as u64)?;
            return self.codec.verbatim_part(encoded, 0, scratch).map_err(|e| e.within(&self.place(chunk)));
        }
        self.codec_of(chunk).decode(encoded, scratch).map_err(|e| e.within(&self.place(chunk)))
    }

    /// Coordinates in the chunk grid of the chunk with this row-major number.
    pub fn coordinates(&self, chunk: u64) -> Vec<u64> {
        unravel(chunk, &self.grid)
    }

    /// Dataset, array and chunk, as errors name them.
    pub fn place(&self, chunk: u64) -> String {
        let coordinates: Vec<String> = self.coordinates(chunk).iter().map(u64::to_string).collect();
        format!("{}, chunk [{}]", self.at, coordinates.join(", "))
    }

    /// Where chunk `chunk` is, as far as that can be told from what is at hand now.
    pub fn address(&self, chunk: u64) -> Result<Address> {
        match (self.shard_of(chunk), &self.addressing) {
            (Some(shard), _) => match self.index(shard) {
                Some(index) => self.address_in(chunk, &index),
                None => Ok(Address::InShard(shard)),
            },
            (None, Addressing::Objects(objects)) => Ok(match objects.get(&chunk) {
                Some((key, size)) => Address::Stored(Arc::clone(key), 0..*size),
                None => Address::Fill,
            }),
            (None, Addressing::Shards(_)) => Ok(Address::Fill),
            (None, Addressing::Listed(listing)) => Ok(listing.address(chunk)),
            (None, Addressing::Contiguous(contiguous)) => Ok(contiguous.address(chunk)),
        }
    }

    /// The stored shard that holds `chunk`, if one does.
    pub fn shard_of(&self, chunk: u64) -> Option<u64> {
        let Addressing::Shards(shards) = &self.addressing else { return None };
        let (number, _) = shards.split(&self.coordinates(chunk));
        shards.stored.contains_key(&number).then_some(number)
    }

    /// Where `chunk` is, by the index of its shard; pure.
    pub fn address_in(&self, chunk: u64, index: &ShardIndex) -> Result<Address> {
        let Addressing::Shards(shards) = &self.addressing else { return Err(no_shard()) };
        let (number, inner) = shards.split(&self.coordinates(chunk));
        let shard = shards.stored.get(&number).ok_or_else(no_shard)?;
        index.address(inner, shard).map_err(|e| e.within(&self.place(chunk)))
    }

    /// The index of a shard, if it is at hand.
    pub fn index(&self, shard: u64) -> Option<Arc<ShardIndex>> {
        let Addressing::Shards(shards) = &self.addressing else { return None };
        shards.indexes.get((shards.array, shard))
    }

    /// Held while an index is read for opening, so that several threads in need of it read it once.
    fn index_turn(&self) -> Option<MutexGuard<'_, ()>> {
        let Addressing::Shards(shards) = &self.addressing else { return None };
        Some(lock(&shards.indexes.turn))
    }

    /// The read that loads a shard's index.
    pub fn index_read(&self, shard: u64) -> Result<IndexRead> {
        let Addressing::Shards(shards) = &self.addressing else { return Err(no_shard()) };
        let entry = shards.stored.get(&shard).ok_or_else(no_shard)?;
        let range = shards.format.range(entry.size).map_err(|e| e.within(&self.shard_place(shard, entry)))?;
        Ok(IndexRead { shard, key: Arc::clone(&entry.key), range })
    }

    /// Checks the index bytes of a shard. The index is kept for later calls of [`ChunkedArray::index`] while there is
    /// room; who needs it now uses what is returned.
    pub fn load_index(&self, shard: u64, bytes: &[u8]) -> Result<Arc<ShardIndex>> {
        let Addressing::Shards(shards) = &self.addressing else { return Err(no_shard()) };
        let entry = shards.stored.get(&shard).ok_or_else(no_shard)?;
        let index = shards.format.parse(bytes).map_err(|e| e.within(&self.shard_place(shard, entry)))?;
        let index = Arc::new(index);
        shards.indexes.keep((shards.array, shard), &index);
        Ok(index)
    }

    fn shard_place(&self, shard: u64, entry: &Shard) -> String {
        format!("{}, shard {shard} ({})", self.at, self.store.display(&entry.key))
    }
}

/// Decoded bytes of chunks that are read by block: smaller ones are of one, and read at once.
const MIN_BLOCKS_BYTES: usize = 128 << 10;

/// Decoded bytes that a stored byte may stand for before a shape is held to be a lie: zstd of one repeated value reaches
/// 32,000.
const MAX_INFLATION: u64 = 1 << 18;
/// Decoded bytes that need no evidence.
const FREE_BYTES: u64 = 1 << 26;

/// Decoded bytes of one chunk beyond which metadata is not believed (1 TiB).
const MAX_CHUNK_BYTES: u64 = 1 << 40;

/// Refuses shapes whose byte counts overflow or whose chunks nobody could decode.
fn check_sizes(at: &str, shape: &[u64], chunk_shape: &[u64], dtype: DType) -> Result<()> {
    let product = |s: &[u64]| s.iter().try_fold(dtype.size() as u64, |acc, &d| acc.checked_mul(d));
    if shape.is_empty() {
        return Err(Error::unsupported(at, "a scalar; expected an array of at least one dimension"));
    }
    match (product(shape), product(chunk_shape)) {
        (Some(all), Some(chunk)) if all < 1 << 62 && chunk <= MAX_CHUNK_BYTES => Ok(()),
        _ => Err(Error::corrupt(at, format!("impossible size: shape {shape:?} in chunks of {chunk_shape:?} elements of {dtype}"))),
    }
}

fn grid_of(shape: &[u64], chunk_shape: &[u64]) -> Vec<u64> {
    shape.iter().zip(chunk_shape).map(|(s, c)| s.div_ceil(*c)).collect()
}

/// Coordinates of the row-major number `linear` in a grid.
pub(crate) fn unravel(mut linear: u64, grid: &[u64]) -> Vec<u64> {
    let mut out = vec![0; grid.len()];
    for (o, &g) in out.iter_mut().zip(grid).rev() {
        *o = linear % g.max(1);
        linear /= g.max(1);
    }
    out
}

/// Row-major number of `coordinates` in a grid.
pub(crate) fn ravel(coordinates: impl IntoIterator<Item = u64>, grid: &[u64]) -> u64 {
    coordinates.into_iter().zip(grid).fold(0, |acc, (c, &g)| acc * g + c)
}

impl Shards {
    /// Shard number and number within the shard of the inner chunk at `coordinates`.
    fn split(&self, coordinates: &[u64]) -> (u64, u64) {
        let (mut shard, mut inner) = (0, 0);
        for ((&c, &p), &g) in coordinates.iter().zip(&self.per_shard).zip(&self.grid) {
            shard = shard * g + c / p;
            inner = inner * p + c % p;
        }
        (shard, inner)
    }
}

fn no_shard() -> Error {
    Error::Internal { message: "asked for the index of a shard that is not there".into() }
}
