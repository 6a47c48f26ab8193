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

use std::ops::Range;

use super::lz4::{self, SLACK};
use super::stored::{MAX_ITEM, Stored};
use super::{bits, deflate, limits, zstandard};
use crate::base::error::{Error, Result};

const HEADER_BYTES: usize = 16;
const FORMAT_VERSION: u8 = 2;
/// C-Blosc refuses larger ones.
const MAX_BLOCK_BYTES: usize = (i32::MAX as usize - 255 * 4) / 3;
/// Of LZ4, zlib and zstd streams alike.
const STREAM_VERSION: u8 = 1;
/// Blocks are split only where each part has at least this many bytes (and elements at most 16, as all here have).
const MIN_SPLIT_BYTES: usize = 128;

/// Decoders of streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Lz4,
    Zstd,
    Zlib,
}

/// What was done to elements before they were compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shuffle {
    None,
    Bytes,
    Bits,
}

/// What a chunk's header says, once it is consistent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    format: Format,
    shuffle: Shuffle,
    may_split: bool,
    /// The whole chunk is stored as it is.
    verbatim: bool,
    item_size: usize,
    n_bytes: usize,
    block_bytes: usize,
}

/// Where the bytes of one plane (or of a whole unshuffled block) lie.
#[derive(Debug, Clone, Copy, Default)]
enum Span {
    #[default]
    Nowhere,
    Encoded(usize),
    Decoded(usize),
    /// All zero, as the high bytes of counts are: nothing is written or read.
    Zero,
}

/// Memory of one thread, kept from chunk to chunk.
#[derive(Debug, Default)]
pub(super) struct BlockScratch {
    decoded: Vec<u8>,
    /// Elements wanted of each block, from its first.
    wanted: Vec<usize>,
    /// `item_size` spans per block, or one where nothing is shuffled.
    spans: Vec<Span>,
    jobs: Vec<lz4::Job>,
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
    jobs: &'s mut Vec<lz4::Job>,
    produced: usize,
}

/// What has to be known of a chunk to read some of its blocks without the others.
#[derive(Debug)]
pub struct Outline {
    header: Header,
    /// Bytes of the chunk from which each block begins, and up to which no other does.
    blocks: Box<[(u32, u32)]>,
    encoded_bytes: usize,
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

impl Span {
    /// What lies `bytes` behind.
    fn behind(self, bytes: usize) -> Self {
        match self {
            Self::Encoded(at) => Self::Encoded(at + bytes),
            Self::Decoded(at) => Self::Decoded(at + bytes),
            Self::Zero | Self::Nowhere => self,
        }
    }
}

impl Outline {
    /// Takes down where the blocks of a chunk lie. `None` where it is one block, for C-Blosc to decode, of blocks that overlap,
    /// or stored as it is: nothing in a part of that would tell that the chunk has become another. `n_bytes` and
    /// `item_size` are the array's.
    pub(super) fn of(encoded: &[u8], n_bytes: usize, item_size: usize) -> Option<Self> {
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

/// The decoded part of a chunk.
#[derive(Debug)]
pub(super) struct Blocks<'a> {
    header: Header,
    encoded: &'a [u8],
    decoded: &'a [u8],
    spans: &'a [Span],
}

fn damaged(why: impl std::fmt::Display) -> Error {
    limits::damaged("Blosc chunk", &why)
}

fn word(bytes: &[u8], at: usize) -> Result<usize> {
    let four = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>).ok_or_else(|| damaged("it is truncated"))?;
    let value = i32::from_le_bytes(*four);
    usize::try_from(value).map_err(|_| damaged(format_args!("a length or offset is {value}")))
}

impl Header {
    /// Reads a header; `None` where C-Blosc must decode the chunk. `n_bytes` and `item_size` are the array's.
    pub(super) fn parse(encoded: &[u8], n_bytes: usize, item_size: usize) -> Result<Option<Self>> {
        let Some(head) = encoded.first_chunk::<HEADER_BYTES>() else { return Err(damaged("it is shorter than its header")) };
        let [version, compressor_version, flags, type_size, ..] = *head;
        let format = match flags >> 5 {
            1 => Format::Lz4,
            3 => Format::Zlib,
            4 => Format::Zstd,
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

    fn n_blocks(&self) -> usize {
        self.n_bytes.div_ceil(self.block_bytes)
    }

    fn block_items(&self) -> usize {
        self.block_bytes / self.item_size
    }

    /// Decoded bytes of a block: the last one may be short.
    fn bytes_of(&self, block: usize) -> usize {
        self.block_bytes.min(self.n_bytes - block * self.block_bytes)
    }

    fn splits_of(&self, block: usize) -> usize {
        let bytes = self.bytes_of(block);
        let split = self.may_split && bytes / self.item_size >= MIN_SPLIT_BYTES && bytes == self.block_bytes;
        if split { self.item_size } else { 1 }
    }

    /// A range of elements of the chunk as blocks and ranges of elements within them.
    fn by_block(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let items = self.block_items();
        let blocks = range.start / items..if range.is_empty() { 0 } else { range.end.div_ceil(items) };
        blocks.map(move |block| {
            let begin = block * items;
            (block, range.start.max(begin) - begin..range.end.min(begin + items) - begin)
        })
    }

    /// Whether a block was compressed plane after plane.
    fn is_planar(&self, block: usize) -> bool {
        match self.shuffle {
            Shuffle::None => false,
            Shuffle::Bytes => true,
            Shuffle::Bits => (self.bytes_of(block) / self.item_size).is_multiple_of(8),
        }
    }

    fn spans_per_block(&self) -> usize {
        if self.shuffle == Shuffle::None { 1 } else { self.item_size }
    }
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
                } else if header.format == Format::Lz4 && lz4::is_all_zero(&self.encoded[stream.clone()], part) {
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
            Format::Lz4 => self.jobs.push(lz4::Job { src: stream, at: first, n, wanted }),
            Format::Zstd => {
                zstandard::decode(src, out, "Blosc chunk (zstd)")?;
                self.produced += n;
            }
            Format::Zlib => {
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

impl Blocks<'_> {
    /// Calls `take(elements, elements before them, their number)` for runs that together are the elements of `range`.
    ///
    /// The range must lie within one that was asked for when decoding.
    pub(super) fn runs(&self, range: Range<usize>, mut take: impl FnMut(Stored, usize, usize)) -> Result<()> {
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

    fn planes(&self, spans: &[Span], range: Range<usize>, done: usize, take: &mut impl FnMut(Stored, usize, usize)) -> Result<()> {
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
    pub(super) fn elements(&self) -> Result<Vec<u8>> {
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

    fn part(&self, span: Span, range: Range<usize>) -> Result<&[u8]> {
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

static ZEROS: [u8; 4096] = [0; 4096];

#[cfg(test)]
#[path = "blosc_tests.rs"]
mod tests;
