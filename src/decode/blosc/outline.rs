//! Where the blocks of a Blosc chunk lie, so that some can be read without the others.

use std::ops::Range;

use super::header::{HEADER_BYTES, Header, word};

/// What has to be known of a chunk to read some of its blocks without the others.
#[derive(Debug)]
pub struct Outline {
    pub(super) header: Header,
    /// Bytes of the chunk from which each block begins, and up to which no other does.
    pub(super) blocks: Box<[(u32, u32)]>,
    pub(super) encoded_bytes: usize,
}

/// A part of a chunk whose [`Outline`] is known.
#[derive(Debug, Clone, Copy)]
pub struct Extract<'a> {
    /// The chunk's outline.
    pub outline: &'a Outline,
    /// Byte of the chunk with which `encoded` begins.
    pub first: usize,
    /// The bytes.
    pub encoded: &'a [u8],
}

impl Outline {
    /// Takes down where the blocks of a chunk lie. `None` where it is one block, for C-Blosc to decode, of blocks that overlap,
    /// or stored as it is: nothing in a part of that would tell that the chunk has become another. `n_bytes` and
    /// `item_size` are the array's.
    pub(in crate::decode) fn of(encoded: &[u8], n_bytes: usize, item_size: usize) -> Option<Self> {
        let header = Header::parse(encoded, n_bytes, item_size).ok()??;
        let n_blocks = header.n_blocks();
        let first = HEADER_BYTES.checked_add(n_blocks.checked_mul(4)?)?;
        if header.verbatim || n_blocks == 1 || first > encoded.len() {
            return None;
        }
        let mut blocks = Vec::with_capacity(n_blocks);
        for block in 0..n_blocks {
            let start = word(encoded, HEADER_BYTES + 4 * block).ok().filter(|&start| start >= first)?;
            let mut end = start;
            for _ in 0..header.splits_of(block) {
                end = word(encoded, end).ok()?.checked_add(end + 4)?;
            }
            blocks.push((start as u32, u32::try_from(end).ok().filter(|_| end <= encoded.len())?));
        }
        let mut sorted = blocks.clone();
        sorted.sort_unstable();
        let apart = sorted.windows(2).all(|pair| pair[0].1 <= pair[1].0);
        apart.then(|| Self { header, blocks: blocks.into(), encoded_bytes: encoded.len() })
    }

    /// Bytes of the chunk.
    pub fn encoded_bytes(&self) -> usize {
        self.encoded_bytes
    }

    /// Bytes of memory that this takes.
    pub fn footprint(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.blocks)
    }

    /// The bytes of the chunk from the first to the last that the elements `range` are made of.
    pub fn bytes_of(&self, range: Range<usize>) -> Range<usize> {
        let blocks = self.header.by_block(range).filter_map(|(block, _)| self.blocks.get(block));
        blocks.fold(self.encoded_bytes..0, |hull, &(start, end)| hull.start.min(start as usize)..hull.end.max(end as usize))
    }
}
