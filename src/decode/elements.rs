//! The decoded elements of a chunk, however they lie, and the memory that they are decoded into.

use std::borrow::Cow;
use std::ops::Range;

use super::blosc::{BlockScratch, Blocks};
use super::limits::room;
use super::stored::Stored;
#[cfg(feature = "hdf5")]
use super::stored::{MAX_ITEM, swap_bytes, unshuffle};
#[cfg(feature = "hdf5")]
use crate::base::error::vec_with_room;
use crate::base::error::{Error, Result};

/// Reused memory of one decoding thread.
#[derive(Debug, Default)]
pub struct Scratch {
    /// What is decoded; the second one where there are several steps.
    pub(super) buffers: [Vec<u8>; 2],
    pub(super) blocks: BlockScratch,
}

/// Elements of a chunk, native byte order, row-major: at least those that were asked for.
#[derive(Debug)]
pub struct Decoded<'a> {
    pub(super) elements: Elements<'a>,
    /// Element of the chunk that `elements` begin with.
    pub(super) first: usize,
    pub(super) item_size: usize,
    /// Bytes that decompression produced.
    pub(super) bytes: usize,
}

#[derive(Debug)]
pub(super) enum Elements<'a> {
    /// In the thread's scratch, or the encoded bytes themselves where nothing had to be done.
    Borrowed(&'a [u8]),
    /// From the general path.
    Owned(Vec<u8>),
    /// Not put together yet.
    Blocks(Blocks<'a>),
    /// All elements, their first bytes first; the last ones where `reversed`.
    #[cfg(feature = "hdf5")]
    Planes { bytes: &'a [u8], reversed: bool },
}

impl Decoded<'_> {
    /// Bytes that decompression produced.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Calls `take(elements, elements before them, their number)` for runs that together are the elements of `range`.
    ///
    /// # Errors
    /// [`Internal`](Error::Internal) for elements that were not asked for when decoding.
    pub fn runs(&self, range: Range<usize>, mut take: impl FnMut(Stored, usize, usize)) -> Result<()> {
        let all: &[u8] = match &self.elements {
            Elements::Borrowed(bytes) => bytes,
            Elements::Owned(bytes) => bytes,
            Elements::Blocks(blocks) => return blocks.runs(range, &mut take),
            #[cfg(feature = "hdf5")]
            Elements::Planes { bytes, reversed } => {
                take(Stored::Planes(planes(bytes, self.item_size, *reversed, &range)?), 0, range.len());
                return Ok(());
            }
        };
        let part = range
            .start
            .checked_sub(self.first)
            .and_then(|start| all.get(start * self.item_size..(range.end - self.first) * self.item_size))
            .ok_or_else(|| Error::Internal {
                message: format!("elements {range:?} of {} bytes from element {}", all.len(), self.first),
            })?;
        take(Stored::Items(part), 0, range.len());
        Ok(())
    }

    /// All elements; only where all were asked for.
    pub fn elements(&self) -> Result<Cow<'_, [u8]>> {
        match &self.elements {
            Elements::Borrowed(bytes) => Ok(Cow::Borrowed(bytes)),
            Elements::Owned(bytes) => Ok(Cow::Borrowed(bytes)),
            Elements::Blocks(blocks) => blocks.elements().map(Cow::Owned),
            #[cfg(feature = "hdf5")]
            Elements::Planes { bytes, reversed } => {
                let mut all = vec_with_room(bytes.len() as u64, "chunk")?;
                all.resize(bytes.len(), 0);
                unshuffle(bytes, self.item_size, &mut all);
                if *reversed {
                    swap_bytes(&mut all, self.item_size);
                }
                Ok(Cow::Owned(all))
            }
        }
    }
}

/// The bytes of elements `range` in each of the planes that `bytes` are.
#[cfg(feature = "hdf5")]
fn planes<'a>(bytes: &'a [u8], item_size: usize, reversed: bool, range: &Range<usize>) -> Result<[&'a [u8]; MAX_ITEM]> {
    let n = bytes.len() / item_size;
    if range.end > n {
        return Err(Error::Internal { message: format!("elements {range:?} of {n}") });
    }
    let mut planes: [&[u8]; MAX_ITEM] = [&[]; MAX_ITEM];
    for (j, plane) in planes[..item_size].iter_mut().enumerate() {
        let stored = if reversed { item_size - 1 - j } else { j };
        *plane = &bytes[stored * n..][range.clone()];
    }
    Ok(planes)
}

impl Scratch {
    /// `n` elements like this one.
    pub fn repeated(&mut self, element: &[u8], n: usize) -> Result<&[u8]> {
        let out = room(&mut self.buffers[0], n * element.len())?;
        out.chunks_exact_mut(element.len()).for_each(|o| o.copy_from_slice(element));
        Ok(out)
    }
}
