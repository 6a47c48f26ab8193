//! The filter pipeline of an HDF5 chunk, undone.
//!
//! A pipeline is applied in order when a chunk is written, so it is undone from its end. Sources: HDF5 File Format
//! Specification, "Data Storage - Filter Pipeline"; `H5Zshuffle.c`, `H5Zfletcher32.c` and `H5checksum.c` of libhdf5; the
//! registry of filters for numbers from 256 on.

use std::ops::Range;

use smallvec::SmallVec;

use super::blosc::{self, Header};
use super::elements::{Elements, Scratch};
use super::limits::{self, damaged, room};
use super::stored::{MAX_ITEM, swap_bytes, unshuffle};
use super::{c_blosc, deflate, lzf, zstandard};
use crate::base::error::{Error, Result};

/// One filter, by what undoing it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// A zlib stream.
    Deflate,
    /// Bytes of equal significance together, of items of this size; what is left over stays at the end. 0 where the file says
    /// none: no chunk can have gone through it.
    Shuffle(usize),
    /// Four bytes of checksum behind the rest.
    Fletcher32,
    /// An LZF stream.
    Lzf,
    /// A Blosc 1 chunk.
    Blosc,
    /// Zstandard frames.
    Zstd,
}

/// Most bytes that a filter adds to what it cannot compress: of all here Blosc's header and zstd's frame add most.
fn most_after_filters(n: usize) -> usize {
    n.saturating_add(n / 16).saturating_add(4096)
}

impl Filter {
    /// The filter with this number, name and parameters in a file.
    ///
    /// # Errors
    /// [`Unsupported`](Error::Unsupported) for a filter that is not read, [`Corrupt`](Error::Corrupt) for impossible parameters.
    pub fn new(id: i32, name: &str, parameters: &[u32]) -> Result<Self> {
        Ok(match id {
            1 => Self::Deflate,
            // of two of them libhdf5 gives the second no parameter, and has all chunks skip it
            2 => Self::Shuffle(parameters.first().map_or(0, |&size| size as usize)),
            3 => Self::Fletcher32,
            32000 => Self::Lzf,
            32001 => Self::Blosc,
            32015 => Self::Zstd,
            _ => {
                let known = match id {
                    4 => "szip",
                    5 => "nbit",
                    6 => "scaleoffset",
                    307 => "bzip2",
                    32004 => "lz4",
                    32008 => "bitshuffle",
                    32013 => "zfp",
                    32026 => "blosc2",
                    _ => name,
                };
                return Err(Error::unsupported(
                    "filters",
                    format!(
                        "chunks went through filter {id} ({known}); read are gzip, shuffle, fletcher32, lzf, blosc and zstd: write the file again \
                         with one of these, e.g. adata.write_h5ad(path, compression=\"gzip\"), or convert it to Zarr"
                    ),
                ));
            }
        })
    }

    /// Most bytes that one encoded byte can stand for.
    fn inflation(self) -> usize {
        match self {
            Self::Deflate => limits::MAX_DEFLATE_INFLATION,
            Self::Lzf => lzf::MAX_INFLATION,
            Self::Blosc | Self::Zstd => limits::MAX_INFLATION,
            Self::Shuffle(_) | Self::Fletcher32 => 1,
        }
    }
}

/// The filters that the chunks of one array went through, all but those that a mask says were skipped.
#[derive(Debug, Clone)]
pub(super) struct FilterPipeline {
    /// In the order of writing.
    filters: SmallVec<[Filter; 4]>,
}

/// Where the bytes are between two filters.
#[derive(Debug, Clone)]
enum Between {
    Encoded(Range<usize>),
    /// The first so many bytes of one of the two buffers.
    Buffer(usize, usize),
}

/// What a chunk's decoded bytes are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) n_bytes: usize,
    pub(super) item_size: usize,
    /// Items are of the other byte order.
    pub(super) swap: bool,
}

impl FilterPipeline {
    /// `None` where nothing is left to undo.
    pub(super) fn new(filters: &[Filter], mask: u32) -> Option<Self> {
        let applied = filters.iter().enumerate().filter(|&(i, filter)| {
            let skipped = i < 32 && mask & 1 << i != 0;
            // single bytes stay where they are
            !skipped && *filter != Filter::Shuffle(1)
        });
        let filters: SmallVec<_> = applied.map(|(_, filter)| *filter).collect();
        (!filters.is_empty()).then_some(Self { filters })
    }

    /// Decodes at least the elements of the ranges `needed`; answers them with the number of bytes that were produced.
    pub(super) fn decode<'a>(
        &self,
        encoded: &'a [u8],
        needed: impl Iterator<Item = Range<usize>>,
        shape: Shape,
        scratch: &'a mut Scratch,
    ) -> Result<(Elements<'a>, usize)> {
        let Shape { n_bytes, item_size, swap } = shape;
        if self.filters.contains(&Filter::Shuffle(0)) {
            return Err(Error::corrupt("filters", "shuffle has no parameter, or 0; expected the size of an item"));
        }
        let mut place = Between::Encoded(0..encoded.len());
        let mut left = &self.filters[..];
        while let Some((&filter, before)) = left.split_last() {
            if *left == [Filter::Shuffle(item_size)] && item_size <= MAX_ITEM {
                break;
            }
            if let ([], Filter::Blosc, Between::Encoded(range), false) = (before, filter, &place, swap) {
                let body = &encoded[range.clone()];
                limits::expect_len(c_blosc::claim(body)?, n_bytes, "Blosc chunk")?;
                if let Some(header) = Header::parse(body, n_bytes, item_size)? {
                    let (blocks, bytes) = blosc::decode(header, body, needed, &mut scratch.blocks)?;
                    return Ok((Elements::Blocks(blocks), bytes));
                }
            }
            place = undo(filter, before, encoded, &place, n_bytes, scratch)?;
            left = before;
        }
        let produced = if matches!(place, Between::Buffer(..)) { n_bytes } else { 0 };
        let len = match &place {
            Between::Encoded(range) => range.len(),
            Between::Buffer(_, len) => *len,
        };
        limits::expect_len(len, n_bytes, "the chunk without its filters")?;
        if !left.is_empty() {
            let planes = match place {
                Between::Encoded(range) => &encoded[range],
                Between::Buffer(number, len) => &scratch.buffers[number][..len],
            };
            return Ok((Elements::Planes { bytes: planes, reversed: swap }, produced));
        }
        let elements: &[u8] = match place {
            Between::Encoded(range) if !swap => &encoded[range],
            Between::Encoded(range) => {
                let out = room(&mut scratch.buffers[0], n_bytes)?;
                out.copy_from_slice(&encoded[range]);
                swap_bytes(out, item_size);
                out
            }
            Between::Buffer(number, len) => {
                let out = &mut scratch.buffers[number][..len];
                if swap {
                    swap_bytes(out, item_size);
                }
                out
            }
        };
        Ok((Elements::Borrowed(elements), produced))
    }
}

/// Undoes one filter, with those `before` it still to come.
fn undo(filter: Filter, before: &[Filter], encoded: &[u8], place: &Between, n: usize, scratch: &mut Scratch) -> Result<Between> {
    let (low, high) = scratch.buffers.split_at_mut(1);
    let (src, number, to) = match place {
        Between::Encoded(range) => (&encoded[range.clone()], 0, &mut low[0]),
        Between::Buffer(0, len) => (&low[0][..*len], 1, &mut high[0]),
        Between::Buffer(_, len) => (&high[0][..*len], 0, &mut low[0]),
    };
    if filter == Filter::Fletcher32 {
        let len = check_fletcher32(src)?;
        return Ok(match place {
            Between::Encoded(range) => Between::Encoded(range.start..range.start + len),
            Between::Buffer(number, _) => Between::Buffer(*number, len),
        });
    }
    if let Filter::Shuffle(size) = filter {
        unshuffle(src, size, room(to, src.len())?);
        return Ok(Between::Buffer(number, src.len()));
    }
    // how many bytes there must be is known unless another filter changed their number
    let exact = before.iter().all(|f| matches!(f, Filter::Shuffle(_)));
    let most = if exact { n } else { most_after_filters(n) };
    let possible = limits::most_inflated(src.len(), filter.inflation());
    if exact {
        limits::expect_inflation(src.len(), n, filter.inflation())?;
    }
    let out = room(to, most.min(possible))?;
    let len = match filter {
        Filter::Deflate => {
            let (read, written) = deflate::zlib(src, out).map_err(|e| damaged("gzip chunk", &e))?;
            if read < src.len() {
                return Err(damaged("gzip chunk", &"bytes follow the end of the stream"));
            }
            written
        }
        Filter::Lzf => lzf::decode(src, out).map_err(|e| damaged("lzf chunk", &e))?,
        Filter::Zstd => zstandard::decode_up_to(src, out, "zstd chunk")?,
        Filter::Blosc => {
            let claimed = c_blosc::claim(src)?;
            let available = out.len();
            let out = out.get_mut(..claimed).ok_or_else(|| {
                damaged("Blosc chunk", &format_args!("its header claims {claimed} bytes, expected at most {available}"))
            })?;
            c_blosc::decode(src, out)?;
            claimed
        }
        Filter::Shuffle(_) | Filter::Fletcher32 => unreachable!("undone above"),
    };
    Ok(Between::Buffer(number, len))
}

/// Length without the checksum, once that is right.
fn check_fletcher32(src: &[u8]) -> Result<usize> {
    let (body, sum) = src.split_last_chunk::<4>().ok_or_else(|| damaged("chunk", &"it is shorter than its checksum"))?;
    let (computed, stored) = (fletcher32(body), u32::from_le_bytes(*sum));
    // HDF5 before 1.6.3 had the bytes of both halves the other way round
    let turned = (computed & 0x00ff_00ff) << 8 | (computed & 0xff00_ff00) >> 8;
    if stored == computed || stored == turned {
        return Ok(body.len());
    }
    Err(damaged("chunk", &format_args!("wrong checksum: fletcher32 is {computed:#010x}, expected {stored:#010x}")))
}

/// Fletcher's checksum as libhdf5 has it: of big-endian words, an odd last byte being the high one of its word, with sums
/// that begin with 0 and are never reduced from 65,535 to 0.
fn fletcher32(bytes: &[u8]) -> u32 {
    fn fold(sum: u32) -> u32 {
        (sum & 0xffff) + (sum >> 16)
    }
    let (mut low, mut high) = (0u32, 0u32);
    let (words, odd) = bytes.as_chunks::<2>();
    // as many as cannot overflow
    for words in words.chunks(360) {
        for word in words {
            low += u32::from(u16::from_be_bytes(*word));
            high += low;
        }
        (low, high) = (fold(low), fold(high));
    }
    if let [last] = odd {
        low += u32::from(*last) << 8;
        high += low;
        (low, high) = (fold(low), fold(high));
    }
    fold(high) << 16 | fold(low)
}

#[cfg(test)]
#[path = "filters_tests.rs"]
mod tests;
