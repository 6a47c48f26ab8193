//! Chunks of one object, by address: those of an HDF5 dataset.

use std::ops::Range;
use std::sync::Arc;

use super::address::Address;
use crate::decode::ChunkCodec;

/// Where the chunks of one array lie in an object: 12 bytes for each that is stored, one more where some were written
/// otherwise than the rest, and eight more where some are not stored.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Of the object in its store.
    key: Arc<str>,
    /// Numbers of the stored chunks in rising order; `None` where they are all from 0 on.
    numbers: Option<Vec<u64>>,
    offsets: Vec<u64>,
    sizes: Vec<u32>,
    /// Number of each chunk's codec among `exceptions`, from 1 on, and 0 for those that are none; empty if all are none.
    codecs: Vec<u8>,
    exceptions: Vec<ChunkCodec>,
}

/// A chunk to be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listed {
    /// Row-major number in the chunk grid.
    pub(crate) chunk: u64,
    pub(crate) offset: u64,
    pub(crate) size: u32,
    /// Number of its codec, as in [`Listing`].
    pub(crate) codec: u8,
}

impl Listing {
    /// The chunks of the object `key`; one that is listed twice is the error.
    pub(crate) fn new(key: Arc<str>, mut chunks: Vec<Listed>, exceptions: Vec<ChunkCodec>) -> Result<Self, u64> {
        if !chunks.is_sorted() {
            chunks.sort_unstable();
        }
        if let Some(twice) = chunks.array_windows().find(|[a, b]| a.chunk == b.chunk) {
            return Err(twice[0].chunk);
        }
        let whole = chunks.iter().zip(0..).all(|(listed, number)| listed.chunk == number);
        Ok(Self {
            key,
            numbers: (!whole).then(|| chunks.iter().map(|c| c.chunk).collect()),
            offsets: chunks.iter().map(|c| c.offset).collect(),
            sizes: chunks.iter().map(|c| c.size).collect(),
            codecs: if exceptions.is_empty() { Vec::new() } else { chunks.iter().map(|c| c.codec).collect() },
            exceptions,
        })
    }

    fn place(&self, chunk: u64) -> Option<usize> {
        match &self.numbers {
            Some(numbers) => numbers.binary_search(&chunk).ok(),
            None => usize::try_from(chunk).ok().filter(|&place| place < self.offsets.len()),
        }
    }

    pub(super) fn address(&self, chunk: u64) -> Address {
        match self.place(chunk) {
            Some(place) => {
                let start = self.offsets[place];
                Address::Stored(Arc::clone(&self.key), start..start + u64::from(self.sizes[place]))
            }
            None => Address::Fill,
        }
    }

    /// The chunk's own codec, if it has one.
    pub(super) fn exception(&self, chunk: u64) -> Option<&ChunkCodec> {
        if self.exceptions.is_empty() {
            return None;
        }
        usize::from(self.codecs[self.place(chunk)?]).checked_sub(1).map(|number| &self.exceptions[number])
    }

    pub(super) fn has_exceptions(&self) -> bool {
        !self.exceptions.is_empty()
    }

    pub(super) fn stored_bytes(&self) -> u64 {
        self.sizes.iter().map(|&size| u64::from(size)).sum()
    }
}

/// Elements one after the other, cut into chunks that are not stored as such.
#[derive(Debug)]
pub(crate) struct Contiguous {
    /// Of the object in its store.
    pub(crate) key: Arc<str>,
    /// Where all elements lie.
    pub(crate) bytes: Range<u64>,
    /// Bytes of every chunk but the last.
    pub(crate) chunk_bytes: u64,
}

impl Contiguous {
    /// Bytes of a chunk of the object, if there is that chunk.
    pub(super) fn range(&self, chunk: u64) -> Option<Range<u64>> {
        let start = chunk.checked_mul(self.chunk_bytes)?.checked_add(self.bytes.start)?;
        (start < self.bytes.end).then(|| start..start.saturating_add(self.chunk_bytes).min(self.bytes.end))
    }

    pub(super) fn address(&self, chunk: u64) -> Address {
        self.range(chunk).map_or(Address::Fill, |range| Address::Stored(Arc::clone(&self.key), range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(chunk: u64, offset: u64) -> Listed {
        Listed { chunk, offset, size: 10, codec: 0 }
    }

    #[test]
    fn listed_chunks_are_found_in_any_order_and_others_are_fill() {
        let at = |listing: &Listing, chunk| match listing.address(chunk) {
            Address::Stored(_, range) => Some(range.start),
            _ => None,
        };
        let all = Listing::new("".into(), vec![listed(1, 70), listed(0, 50), listed(2, 90)], Vec::new()).unwrap();
        assert!(all.numbers.is_none());
        assert_eq!([0, 1, 2, 3, u64::MAX].map(|c| at(&all, c)), [Some(50), Some(70), Some(90), None, None]);
        let some = Listing::new("".into(), vec![listed(5, 70), listed(1 << 60, 50)], Vec::new()).unwrap();
        assert_eq!(Listing::new("".into(), vec![listed(5, 70), listed(4, 90), listed(5, 80)], Vec::new()).unwrap_err(), 5);
        assert_eq!([0, 5, 1 << 60].map(|c| at(&some, c)), [None, Some(70), Some(50)]);
        assert_eq!((all.stored_bytes(), some.stored_bytes()), (30, 20));
    }

    #[test]
    fn the_last_piece_ends_with_the_array() {
        let contiguous = Contiguous { key: "".into(), bytes: 100..125, chunk_bytes: 10 };
        let ranges: Vec<_> = [0, 1, 2, 3, u64::MAX].map(|c| contiguous.range(c)).into();
        assert_eq!(ranges, [Some(100..110), Some(110..120), Some(120..125), None, None]);
    }
}
