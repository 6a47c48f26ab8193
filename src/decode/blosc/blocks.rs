//! The decoded blocks of a Blosc chunk: planes and elements wherever they lie.

use std::ops::Range;

use super::header::{HEADER_BYTES, Header, damaged};
use crate::base::error::{Error, Result};
use crate::decode::stored::{MAX_ITEM, Stored};

/// Where the bytes of one plane (or of a whole unshuffled block) lie.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Span {
    #[default]
    Nowhere,
    Encoded(usize),
    Decoded(usize),
    /// All zero, as the high bytes of counts are: nothing is written or read.
    Zero,
}

impl Span {
    /// What lies `bytes` behind.
    pub(super) fn behind(self, bytes: usize) -> Self {
        match self {
            Self::Encoded(at) => Self::Encoded(at + bytes),
            Self::Decoded(at) => Self::Decoded(at + bytes),
            Self::Zero | Self::Nowhere => self,
        }
    }
}

/// The decoded part of a chunk.
#[derive(Debug)]
pub(in crate::decode) struct Blocks<'a> {
    pub(super) header: Header,
    pub(super) encoded: &'a [u8],
    pub(super) decoded: &'a [u8],
    pub(super) spans: &'a [Span],
}

impl Blocks<'_> {
    /// Calls `take(elements, elements before them, their number)` for runs that together are the elements of `range`.
    ///
    /// The range must lie within one that was asked for when decoding.
    pub(in crate::decode) fn runs(&self, range: Range<usize>, mut take: impl FnMut(Stored, usize, usize)) -> Result<()> {
        let (size, per_block) = (self.header.item_size, self.header.spans_per_block());
        if self.header.verbatim {
            let bytes = self.part(Span::Encoded(HEADER_BYTES), range.start * size..range.end * size)?;
            take(Stored::Items(bytes), 0, range.len());
            return Ok(());
        }
        let mut done = 0;
        for (block, inside) in self.header.by_block(range) {
            let (spans, n) = (&self.spans[block * per_block..][..per_block], inside.len());
            if size > 1 && self.header.is_planar(block) {
                self.planes(spans, inside, done, &mut take)?;
            } else {
                let bytes = self.part(spans[0], inside.start * size..inside.end * size)?;
                take(Stored::Items(bytes), done, n);
            }
            done += n;
        }
        Ok(())
    }

    pub(super) fn planes(
        &self,
        spans: &[Span],
        range: Range<usize>,
        done: usize,
        take: &mut impl FnMut(Stored, usize, usize),
    ) -> Result<()> {
        // one page of zeros stands for all of a plane
        let step = if spans.iter().any(|span| matches!(span, Span::Zero)) { ZEROS.len() } else { range.len() };
        for first in range.clone().step_by(step.max(1)) {
            let n = step.min(range.end - first);
            let mut planes: [&[u8]; MAX_ITEM] = [&[]; MAX_ITEM];
            for (plane, &span) in planes.iter_mut().zip(spans) {
                let from = if matches!(span, Span::Zero) { 0 } else { first };
                *plane = self.part(span, from..from + n)?;
            }
            take(Stored::Planes(planes), done + first - range.start, n);
        }
        Ok(())
    }

    /// All elements in one piece; only where all were asked for.
    pub(in crate::decode) fn elements(&self) -> Result<Vec<u8>> {
        let size = self.header.item_size;
        let mut all = Vec::new();
        let n = self.header.n_bytes;
        all.try_reserve_exact(n).map_err(|_| damaged(format_args!("it claims {n} bytes, more than memory holds")))?;
        self.runs(0..self.header.n_bytes / size, |stored, _, n| match stored {
            Stored::Items(bytes) => all.extend_from_slice(bytes),
            Stored::Planes(planes) => (0..n).for_each(|i| all.extend(planes[..size].iter().map(|plane| plane[i]))),
        })?;
        Ok(all)
    }

    pub(super) fn part(&self, span: Span, range: Range<usize>) -> Result<&[u8]> {
        let (bytes, at) = match span {
            Span::Encoded(at) => (self.encoded, at),
            Span::Decoded(at) => (self.decoded, at),
            Span::Zero => (&ZEROS[..], 0),
            Span::Nowhere => return Err(Error::Internal { message: "elements of a block that was not asked for".into() }),
        };
        bytes
            .get(at + range.start..at + range.end)
            .ok_or_else(|| Error::Internal { message: format!("bytes {range:?} of a block") })
    }
}

pub(super) static ZEROS: [u8; 4096] = [0; 4096];
