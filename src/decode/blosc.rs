//! Blosc containers, block by block: only the blocks that are wanted, each only as far as it is wanted.
//!
//! ```text
//! chunk  = header (16 bytes), offsets of the blocks, blocks
//! block  = one stream, or one per byte of an element ("split"): length (int32), then that many bytes
//! stream = compressed, or stored as it is where its length equals its decoded length
//! ```
//!
//! A shuffled block holds the first bytes of all its elements, then all second bytes, and so on. These planes are left
//! as they are: the scatter puts elements together as it copies rows, so that nothing is written twice, and planes that
//! were stored uncompressed are read where they lie. Of a bit-shuffled block each plane is put together from its bits; one whose
//! number of elements is no multiple of 8 was not shuffled. What has no decoder here is left to C-Blosc.
//!
//! Source: C-Blosc's `README_CHUNK_FORMAT.rst` (format version 2) and the behaviour of `blosc_d` in its `blosc.c`.

mod blocks;
mod header;
mod outline;

use std::ops::Range;

pub(super) use self::blocks::Blocks;
pub(super) use self::header::Header;
pub use self::outline::{Extract, Outline};

use self::blocks::Span;
use self::header::{HEADER_BYTES, Shuffle, StreamFormat, damaged, word};
use super::lz4::{self, SLACK};
use super::{bits, deflate, zstandard};
use crate::base::error::{Error, Result};

/// Memory of one thread, kept from chunk to chunk.
#[derive(Debug, Default)]
pub(super) struct BlockScratch {
    decoded: Vec<u8>,
    /// Elements wanted of each block, from its first.
    wanted: Vec<usize>,
    /// `item_size` spans per block, or one where nothing is shuffled.
    spans: Vec<Span>,
    jobs: Vec<lz4::StreamJob>,
}

/// What decoding a chunk's blocks adds to, block after block.
struct Progress<'a, 's> {
    header: Header,
    /// Where blocks begin and byte of the chunk with which `encoded` begins, where it is a part of one.
    outline: Option<(&'a Outline, usize)>,
    encoded: &'a [u8],
    decoded: &'s mut Vec<u8>,
    /// Bytes of `decoded` that are taken.
    used: usize,
    /// LZ4 streams, decoded together in the end.
    jobs: &'s mut Vec<lz4::StreamJob>,
    produced: usize,
}

/// Decodes what `needed` asks for: ranges of elements of the chunk, in any order.
pub(super) fn decode<'a>(
    header: Header,
    encoded: &'a [u8],
    needed: impl Iterator<Item = Range<usize>>,
    scratch: &'a mut BlockScratch,
) -> Result<(Blocks<'a>, usize)> {
    decode_part(header, None, encoded, needed, scratch)
}

/// The same from a part of the chunk, in which all of `needed` must lie.
pub(super) fn decode_extract<'a>(
    extract: Extract<'a>,
    needed: impl Iterator<Item = Range<usize>>,
    scratch: &'a mut BlockScratch,
) -> Result<(Blocks<'a>, usize)> {
    let Extract { outline, first, encoded } = extract;
    decode_part(outline.header, Some((outline, first)), encoded, needed, scratch)
}

fn decode_part<'a>(
    header: Header,
    outline: Option<(&'a Outline, usize)>,
    encoded: &'a [u8],
    needed: impl Iterator<Item = Range<usize>>,
    scratch: &'a mut BlockScratch,
) -> Result<(Blocks<'a>, usize)> {
    if header.verbatim {
        let blocks = Blocks { header, encoded, decoded: &[], spans: &[] };
        return Ok((blocks, 0));
    }
    let BlockScratch { decoded, wanted, spans, jobs } = scratch;
    jobs.clear();
    let n_blocks = header.n_blocks();
    if outline.is_none() && n_blocks > (encoded.len() - HEADER_BYTES) / 4 {
        return Err(damaged(format_args!("{} bytes cannot hold {n_blocks} blocks", encoded.len())));
    }
    wanted.clear();
    wanted.resize(n_blocks, 0);
    note_wanted(&header, needed, wanted)?;
    let per_block = header.spans_per_block();
    spans.clear();
    spans.resize(n_blocks * per_block, Span::Nowhere);
    let mut progress = Progress { header, outline, encoded, decoded, used: 0, jobs, produced: 0 };
    for (block, spans) in spans.chunks_exact_mut(per_block).enumerate().filter(|(block, _)| wanted[*block] > 0) {
        progress.block(block, wanted[block], spans)?;
    }
    let produced = progress.finish()?;
    Ok((Blocks { header, encoded, decoded, spans }, produced))
}

fn note_wanted(header: &Header, needed: impl Iterator<Item = Range<usize>>, wanted: &mut [usize]) -> Result<()> {
    let total = header.n_bytes / header.item_size;
    for range in needed {
        if range.end > total {
            return Err(Error::Internal { message: format!("elements {range:?} of a chunk of {total}") });
        }
        for (block, inside) in header.by_block(range) {
            wanted[block] = wanted[block].max(inside.end);
        }
    }
    Ok(())
}

impl Progress<'_, '_> {
    /// Finds or decodes the first `wanted` elements of a block: its planes, or all in the first span where it has none.
    fn block(&mut self, block: usize, wanted: usize, spans: &mut [Span]) -> Result<()> {
        if self.header.shuffle == Shuffle::Bits && self.header.is_planar(block) {
            return self.bit_shuffled_block(block, wanted, spans);
        }
        self.streams(block, wanted, wanted, spans)
    }

    /// The same for planes that have to be put together from their bits.
    fn bit_shuffled_block(&mut self, block: usize, wanted: usize, spans: &mut [Span]) -> Result<()> {
        let bytes = self.header.bytes_of(block);
        let plane = bytes / self.header.item_size;
        let to = self.room(bytes)?;
        // what is decoded lies behind, for as long as it takes to put it together
        let used = self.used;
        self.streams(block, wanted, plane - plane / 8 + wanted.div_ceil(8), spans)?;
        self.run_jobs()?;
        let (out, decoded) = self.decoded.split_at_mut(used);
        for (j, span) in spans.iter_mut().enumerate() {
            let bits = match *span {
                Span::Encoded(at) => &self.encoded[at..at + plane],
                Span::Decoded(at) => &decoded[at - used..at - used + plane],
                // bits of zeros are zeros
                Span::Zero => continue,
                Span::Nowhere => return Err(Error::Internal { message: "a plane that was not decoded".into() }),
            };
            let at = to + j * plane;
            bits::unshuffle(bits, &mut out[at..at + wanted.next_multiple_of(8)]);
            *span = Span::Decoded(at);
        }
        self.used = used;
        Ok(())
    }

    /// Finds or decodes the first `wanted` elements of a block as they were compressed, of planes their first `of_plane` bytes.
    fn streams(&mut self, block: usize, wanted: usize, of_plane: usize, spans: &mut [Span]) -> Result<()> {
        let header = self.header;
        let (bytes, splits, planar) = (header.bytes_of(block), header.splits_of(block), header.is_planar(block));
        let (part, plane) = (bytes / splits, bytes / header.item_size);
        let mut at = self.start_of(block)?;
        if planar && splits > 1 {
            for span in spans {
                let stream = self.stream(&mut at)?;
                *span = if stream.len() == part {
                    Span::Encoded(stream.start)
                } else if header.format == StreamFormat::Lz4 && lz4::is_all_zero(&self.encoded[stream.clone()], part) {
                    Span::Zero
                } else {
                    Span::Decoded(self.decompress(stream, part, of_plane)?)
                };
            }
            return Ok(());
        }
        let end = if planar { (header.item_size - 1) * plane + of_plane } else { wanted * header.item_size };
        let whole = if splits > 1 {
            Span::Decoded(self.parts(&mut at, splits, part, end)?)
        } else {
            let stream = self.stream(&mut at)?;
            if stream.len() == part { Span::Encoded(stream.start) } else { Span::Decoded(self.decompress(stream, part, end)?) }
        };
        spans.iter_mut().enumerate().for_each(|(j, span)| *span = whole.behind(j * plane));
        Ok(())
    }

    /// Where a block begins in `encoded`.
    fn start_of(&self, block: usize) -> Result<usize> {
        let Some((outline, first)) = self.outline else { return word(self.encoded, HEADER_BYTES + 4 * block) };
        let start = outline.blocks.get(block).and_then(|&(start, _)| (start as usize).checked_sub(first));
        start.ok_or_else(|| Error::Internal { message: format!("block {block} of a part of a chunk without it") })
    }

    /// The parts of a split block that is not shuffled, one behind the other; returns where they begin.
    fn parts(&mut self, at: &mut usize, splits: usize, part: usize, end: usize) -> Result<usize> {
        let whole = self.room(splits * part)?;
        for to in (whole..).step_by(part).take(end.div_ceil(part)) {
            let stream = self.stream(at)?;
            if stream.len() == part {
                self.decoded[to..to + part].copy_from_slice(&self.encoded[stream]);
            } else {
                // beside, from where it is copied: a decoder writes beyond the end of its part
                let used = self.used;
                let first = self.decompress(stream, part, part.min(end - (to - whole)))?;
                self.run_jobs()?;
                self.decoded.copy_within(first..first + part, to);
                self.used = used;
            }
        }
        Ok(whole)
    }

    /// Bytes of the next stream.
    fn stream(&self, at: &mut usize) -> Result<Range<usize>> {
        let length = word(self.encoded, *at)?;
        let start = *at + 4;
        if length > self.encoded.len() - start {
            return Err(damaged(format_args!("a stream of {length} bytes at {start} of {}", self.encoded.len())));
        }
        *at = start + length;
        Ok(start..start + length)
    }

    /// Room for `n` bytes and what copies write too much.
    fn room(&mut self, n: usize) -> Result<usize> {
        let first = self.used;
        let end = first.checked_add(n + SLACK).ok_or_else(|| damaged("it is too large"))?;
        if self.decoded.len() < end {
            let more = end - self.decoded.len();
            self.decoded.try_reserve(more).map_err(|_| damaged(format_args!("it claims {n} bytes, more than memory holds")))?;
            self.decoded.resize(end, 0);
        }
        self.used = end;
        Ok(first)
    }

    /// Decodes a stream of `n` decoded bytes at least as far as `wanted`; returns where it will be.
    fn decompress(&mut self, stream: Range<usize>, n: usize, wanted: usize) -> Result<usize> {
        let first = self.room(n)?;
        let src = &self.encoded[stream.clone()];
        let out = &mut self.decoded[first..first + n];
        match self.header.format {
            StreamFormat::Lz4 => self.jobs.push(lz4::StreamJob { src: stream, at: first, n, wanted }),
            StreamFormat::Zstd => {
                zstandard::decode(src, out, "Blosc chunk (zstd)")?;
                self.produced += n;
            }
            StreamFormat::Zlib => {
                deflate::decode_zlib(src, out, "Blosc chunk (zlib)")?;
                self.produced += n;
            }
        }
        Ok(first)
    }

    fn run_jobs(&mut self) -> Result<()> {
        self.produced += lz4::decode(self.encoded, self.jobs, self.decoded).map_err(damaged)?;
        self.jobs.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<usize> {
        self.run_jobs()?;
        Ok(self.produced)
    }
}

#[cfg(test)]
#[path = "blosc_tests.rs"]
mod tests;
