//! What the header of a Blosc chunk says: how its blocks are compressed and how large they are.

use std::ops::Range;

use crate::base::error::{Error, Result};
use crate::decode::limits;

pub(super) const HEADER_BYTES: usize = 16;
pub(super) const FORMAT_VERSION: u8 = 2;
/// C-Blosc refuses larger ones.
pub(super) const MAX_BLOCK_BYTES: usize = (i32::MAX as usize - 255 * 4) / 3;
/// Of LZ4, zlib and zstd streams alike.
pub(super) const STREAM_VERSION: u8 = 1;
/// Blocks are split only where each part has at least this many bytes (and elements at most 16, as all here have).
pub(super) const MIN_SPLIT_BYTES: usize = 128;

/// Decoders of streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamFormat {
    Lz4,
    Zstd,
    Zlib,
}

/// What was done to elements before they were compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shuffle {
    None,
    Bytes,
    Bits,
}

/// What a chunk's header says, once it is consistent.
#[derive(Debug, Clone, Copy)]
pub(in crate::decode) struct Header {
    pub(super) format: StreamFormat,
    pub(super) shuffle: Shuffle,
    pub(super) may_split: bool,
    /// The whole chunk is stored as it is.
    pub(super) verbatim: bool,
    pub(super) item_size: usize,
    pub(super) n_bytes: usize,
    pub(super) block_bytes: usize,
}

pub(super) fn damaged(why: impl std::fmt::Display) -> Error {
    limits::damaged("Blosc chunk", &why)
}

pub(super) fn word(bytes: &[u8], at: usize) -> Result<usize> {
    let four = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>).ok_or_else(|| damaged("it is truncated"))?;
    let value = i32::from_le_bytes(*four);
    usize::try_from(value).map_err(|_| damaged(format_args!("a length or offset is {value}")))
}

impl Header {
    /// Reads a header; `None` where C-Blosc must decode the chunk. `n_bytes` and `item_size` are the array's.
    pub(in crate::decode) fn parse(encoded: &[u8], n_bytes: usize, item_size: usize) -> Result<Option<Self>> {
        let Some(head) = encoded.first_chunk::<HEADER_BYTES>() else { return Err(damaged("it is shorter than its header")) };
        let [version, compressor_version, flags, type_size, ..] = *head;
        let format = match flags >> 5 {
            1 => StreamFormat::Lz4,
            3 => StreamFormat::Zlib,
            4 => StreamFormat::Zstd,
            _ => return Ok(None),
        };
        // bit 0: bytes shuffled, 1: stored verbatim, 2: bits shuffled, 3: of a later format, 4: not split
        let (shuffled, verbatim, bits, later, whole) =
            (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0, flags & 8 != 0, flags & 16 != 0);
        if version != FORMAT_VERSION
            || compressor_version != STREAM_VERSION
            || (shuffled && bits)
            || later
            || usize::from(type_size) != item_size
            || !matches!(item_size, 1 | 2 | 4 | 8)
        {
            return Ok(None);
        }
        let (claimed, block_bytes, compressed) = (word(encoded, 4)?, word(encoded, 8)?, word(encoded, 12)?);
        if claimed != n_bytes || compressed != encoded.len() {
            return Err(damaged(format_args!(
                "its header says {compressed} bytes that hold {claimed}, expected {} that hold {n_bytes}",
                encoded.len()
            )));
        }
        if n_bytes == 0 || block_bytes == 0 || block_bytes > n_bytes {
            return Err(damaged(format_args!("blocks of {block_bytes} bytes in a chunk of {n_bytes}")));
        }
        if block_bytes > MAX_BLOCK_BYTES {
            return Ok(None);
        }
        if verbatim && encoded.len() != n_bytes + HEADER_BYTES {
            return Err(damaged(format_args!("{} bytes stored verbatim, expected {n_bytes}", encoded.len() - HEADER_BYTES)));
        }
        // elements that lie across blocks: C-Blosc never writes such, but decodes them
        if !block_bytes.is_multiple_of(item_size) || !n_bytes.is_multiple_of(item_size) {
            return Ok(None);
        }
        let shuffle = match (shuffled && item_size > 1, bits) {
            (true, _) => Shuffle::Bytes,
            (_, true) => Shuffle::Bits,
            _ => Shuffle::None,
        };
        Ok(Some(Self { format, shuffle, may_split: !whole, verbatim, item_size, n_bytes, block_bytes }))
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.n_bytes.div_ceil(self.block_bytes)
    }

    pub(super) fn block_items(&self) -> usize {
        self.block_bytes / self.item_size
    }

    /// Decoded bytes of a block: the last one may be short.
    pub(super) fn bytes_of(&self, block: usize) -> usize {
        self.block_bytes.min(self.n_bytes - block * self.block_bytes)
    }

    pub(super) fn splits_of(&self, block: usize) -> usize {
        let bytes = self.bytes_of(block);
        let split = self.may_split && bytes / self.item_size >= MIN_SPLIT_BYTES && bytes == self.block_bytes;
        if split { self.item_size } else { 1 }
    }

    /// A range of elements of the chunk as blocks and ranges of elements within them.
    pub(super) fn by_block(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let items = self.block_items();
        let blocks = range.start / items..if range.is_empty() { 0 } else { range.end.div_ceil(items) };
        blocks.map(move |block| {
            let begin = block * items;
            (block, range.start.max(begin) - begin..range.end.min(begin + items) - begin)
        })
    }

    /// Whether a block was compressed plane after plane.
    pub(super) fn is_planar(&self, block: usize) -> bool {
        match self.shuffle {
            Shuffle::None => false,
            Shuffle::Bytes => true,
            Shuffle::Bits => (self.bytes_of(block) / self.item_size).is_multiple_of(8),
        }
    }

    pub(super) fn spans_per_block(&self) -> usize {
        if self.shuffle == Shuffle::None { 1 } else { self.item_size }
    }
}
