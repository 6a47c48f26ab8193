//! The bytes of one chunk as elements.
//!
//! The direct path covers what writers use: `bytes` of either endianness, then at most one of Blosc, zstd,
//! gzip or zlib, then at most a crc32c, decoded straight into reused scratch, and the filters of HDF5. Every other chain goes
//! through zarrs' own decoder (the general path), with the same result. A chain of the zfp codecs takes
//! the general path in steps, because libzfp trusts what it is given (`zfp.rs`).

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;
use zarrs::array::codec::api::{ArrayToBytesCodecTraits, CodecOptions};
use zarrs::array::{ArrayBytes, CodecChain, DataType, FillValue};
use zarrs::metadata::v3::MetadataV3;

use super::blosc::{self, Extract, Header, Outline};
use super::elements::{Decoded, Elements, Scratch};
#[cfg(feature = "hdf5")]
use super::filters::{self, Filter};
use super::limits::{MAX_DEFLATE_INFLATION, MAX_INFLATION, damaged, expect_inflation, expect_len, room};
use super::stored::swap_bytes;
#[cfg(feature = "zfp")]
use super::zfp::{ZfpChain, is_nested};
use super::{c_blosc, deflate, zstandard};
use crate::base::error::{Error, Result, catch};
use crate::schema::DType;

/// Most bytes of a chunk that is made up only to be decoded.
const MAX_REHEARSED_BYTES: u64 = 1 << 20;

/// How the chunks of one array are decoded.
#[derive(Debug)]
pub struct ChunkCodec {
    path: Path,
    item_size: usize,
    /// Bytes of one decoded chunk.
    decoded_bytes: usize,
}

#[derive(Debug)]
enum Path {
    Direct {
        /// `None`: elements one after the other.
        compressor: Option<Compressor>,
        checksum: bool,
        swap: bool,
    },
    /// Filters of HDF5, and whether elements are of the other byte order.
    #[cfg(feature = "hdf5")]
    Filters(filters::FilterPipeline, bool),
    General {
        chain: Arc<CodecChain>,
        shape: Vec<NonZeroU64>,
        data_type: DataType,
        fill: FillValue,
    },
    #[cfg(feature = "zfp")]
    Zfp(ZfpChain),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compressor {
    Blosc,
    Zstd,
    Gzip,
    Zlib,
}

impl ChunkCodec {
    /// The codec for chunks of `chunk_shape`; `metadatas` describes `chain`.
    pub fn new(
        chain: Arc<CodecChain>,
        metadatas: &[MetadataV3],
        chunk_shape: &[u64],
        data_type: &DataType,
        fill: &FillValue,
        dtype: DType,
    ) -> Result<Self> {
        let shape: Option<Vec<NonZeroU64>> = chunk_shape.iter().map(|&d| NonZeroU64::new(d)).collect();
        let shape =
            shape.ok_or_else(|| Error::corrupt("metadata", format!("chunk shape {chunk_shape:?}; expected numbers above 0")))?;
        let path = match direct_path(metadatas, dtype) {
            Some(path) => path,
            None => general_path(chain, metadatas, shape, data_type, fill)?,
        };
        let decoded_bytes = chunk_shape.iter().product::<u64>() as usize * dtype.size();
        Ok(Self { path, item_size: dtype.size(), decoded_bytes })
    }

    /// The codec for chunks of `n` elements of an HDF5 dataset with these filters, of which those whose bit is set in
    /// `mask` were skipped; `swap` where elements are of the other byte order.
    #[cfg(feature = "hdf5")]
    pub fn of_filters(filters: &[Filter], mask: u32, n: usize, dtype: DType, swap: bool) -> Self {
        let swap = swap && dtype.size() > 1;
        let path = match filters::FilterPipeline::new(filters, mask) {
            Some(pipeline) => Path::Filters(pipeline, swap),
            None => Path::Direct { compressor: None, checksum: false, swap },
        };
        Self { path, item_size: dtype.size(), decoded_bytes: n * dtype.size() }
    }

    /// Whether chunks take the general path through zarrs.
    pub fn is_general(&self) -> bool {
        match &self.path {
            Path::Direct { .. } => false,
            #[cfg(feature = "hdf5")]
            Path::Filters(..) => false,
            _ => true,
        }
    }

    /// Whether elements are stored one after the other, so that any of them can be read without the others.
    pub fn is_verbatim(&self) -> bool {
        matches!(self.path, Path::Direct { compressor: None, checksum: false, .. })
    }

    /// Checks the stored length of a [verbatim](ChunkCodec::is_verbatim) chunk of which only a part is read.
    pub fn check_verbatim(&self, stored_bytes: u64) -> Result<()> {
        expect_len(stored_bytes as usize, self.decoded_bytes, "the uncompressed chunk")
    }

    /// The elements from `first` on of a [verbatim](ChunkCodec::is_verbatim) chunk, of which `stored` are the bytes.
    ///
    /// # Errors
    /// [`Corrupt`](Error::Corrupt) for bytes that are no whole elements.
    pub fn verbatim_part<'a>(&self, stored: &'a [u8], first: usize, scratch: &'a mut Scratch) -> Result<Decoded<'a>> {
        expect_len(stored.len() % self.item_size, 0, "the part of the uncompressed chunk beyond whole elements")?;
        let elements = if matches!(self.path, Path::Direct { swap: true, .. }) {
            let out = room(&mut scratch.buffers[0], stored.len())?;
            out.copy_from_slice(stored);
            swap_bytes(out, self.item_size);
            Elements::Borrowed(out)
        } else {
            Elements::Borrowed(stored)
        };
        Ok(Decoded { elements, first, item_size: self.item_size, bytes: 0 })
    }

    /// Whether chunks of this array are of blocks that can be read without the others, once their [`Outline`] is known.
    pub fn has_blocks(&self) -> bool {
        matches!(self.path, Path::Direct { compressor: Some(Compressor::Blosc), checksum: false, swap: false })
    }

    /// What must be known of a chunk that [has blocks](ChunkCodec::has_blocks) to read some of them; `None` where it has none.
    pub fn outline(&self, encoded: &[u8]) -> Option<Outline> {
        if self.has_blocks() { Outline::of(encoded, self.decoded_bytes, self.item_size) } else { None }
    }

    /// Decodes at least the elements of the ranges `needed` from a part of a chunk that has all of them.
    ///
    /// # Errors
    /// [`Corrupt`](Error::Corrupt) where the bytes that had to be looked at are damaged; the caller adds where.
    pub fn decode_extract<'a>(
        &self,
        extract: Extract<'a>,
        needed: impl Iterator<Item = Range<usize>>,
        scratch: &'a mut Scratch,
    ) -> Result<Decoded<'a>> {
        let (blocks, bytes) = blosc::decode_extract(extract, needed, &mut scratch.blocks)?;
        Ok(Decoded { elements: Elements::Blocks(blocks), first: 0, item_size: self.item_size, bytes })
    }

    /// Decodes a whole chunk; errors say what is wrong with the bytes, the caller adds where.
    pub fn decode<'a>(&self, encoded: &'a [u8], scratch: &'a mut Scratch) -> Result<Decoded<'a>> {
        let all = 0..self.decoded_bytes / self.item_size;
        self.decode_ranges(encoded, std::iter::once(all), scratch)
    }

    /// Decodes at least the elements of the ranges `needed`, which may come in any order and overlap.
    ///
    /// # Errors
    /// [`Corrupt`](Error::Corrupt) where the bytes that had to be looked at are damaged; the caller adds where.
    pub fn decode_ranges<'a>(
        &self,
        encoded: &'a [u8],
        needed: impl Iterator<Item = Range<usize>>,
        scratch: &'a mut Scratch,
    ) -> Result<Decoded<'a>> {
        let n = self.decoded_bytes;
        let done = |elements, bytes| Ok(Decoded { elements, first: 0, item_size: self.item_size, bytes });
        match &self.path {
            Path::Direct { compressor, checksum, swap } => {
                let body = if *checksum { checked_body(encoded)? } else { encoded };
                let Some(compressor) = compressor else {
                    self.check_verbatim(body.len() as u64)?;
                    return self.verbatim_part(body, 0, scratch);
                };
                compressor.check_claim(body, n)?;
                if *compressor == Compressor::Blosc
                    && !swap
                    && let Some(header) = Header::parse(body, n, self.item_size)?
                {
                    let (blocks, bytes) = blosc::decode(header, body, needed, &mut scratch.blocks)?;
                    return done(Elements::Blocks(blocks), bytes);
                }
                let out = room(&mut scratch.buffers[0], n)?;
                let mut filled = n;
                match compressor {
                    Compressor::Blosc => c_blosc::decode(body, out)?,
                    Compressor::Zstd => {
                        let wanted = needed.map(|range| range.end * self.item_size).max().unwrap_or(0);
                        filled = zstandard::decode_first(body, out, wanted.min(n), "zstd chunk")?;
                    }
                    Compressor::Gzip => deflate::decode_gzip(body, out, "gzip chunk")?,
                    Compressor::Zlib => deflate::decode_zlib(body, out, "zlib chunk")?,
                }
                let out = &mut out[..filled];
                if *swap {
                    swap_bytes(out, self.item_size);
                }
                done(Elements::Borrowed(out), filled)
            }
            #[cfg(feature = "hdf5")]
            Path::Filters(pipeline, swap) => {
                let shape = filters::Shape { n_bytes: n, item_size: self.item_size, swap: *swap };
                let (elements, bytes) = pipeline.decode(encoded, needed, shape, scratch)?;
                done(elements, bytes)
            }
            Path::General { chain, shape, data_type, fill } => {
                expect_inflation(encoded.len(), n, MAX_INFLATION)?;
                let decoded = chain
                    .decode(encoded.into(), shape, data_type, fill, &CodecOptions::default().with_concurrent_target(1))
                    .map_err(|e| damaged("chunk", &e))?;
                done(Elements::Owned(self.fixed(decoded)?), n)
            }
            #[cfg(feature = "zfp")]
            Path::Zfp(chain) => done(Elements::Owned(self.fixed(chain.decode(encoded)?)?), n),
        }
    }

    /// What zarrs decoded, once it has the size that was expected.
    fn fixed(&self, decoded: ArrayBytes<'_>) -> Result<Vec<u8>> {
        let ArrayBytes::Fixed(bytes) = decoded else {
            return Err(Error::corrupt("chunk", "decodes to values of varying size"));
        };
        expect_len(bytes.len(), self.decoded_bytes, "the decoded chunk")?;
        Ok(bytes.into_owned())
    }
}

/// The direct path for this chain, if it has one.
fn direct_path(codecs: &[MetadataV3], dtype: DType) -> Option<Path> {
    let (first, rest) = codecs.split_first()?;
    if first.name() != "bytes" {
        return None;
    }
    let endian = first.configuration().and_then(|c| c.get("endian").and_then(Value::as_str).map(str::to_owned));
    let swap = dtype.size() > 1 && (endian.as_deref() == Some("big")) == cfg!(target_endian = "little");
    if dtype.size() > 1 && endian.is_none() {
        return None;
    }
    let mut rest = rest.iter().map(|c| c.name().trim_start_matches("numcodecs.").to_owned()).collect::<Vec<_>>();
    let checksum = rest.last().is_some_and(|name| name == "crc32c");
    if checksum {
        rest.pop();
    }
    let compressor = match rest.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => None,
        ["blosc"] => Some(Compressor::Blosc),
        ["zstd"] => Some(Compressor::Zstd),
        ["gzip"] => Some(Compressor::Gzip),
        ["zlib"] => Some(Compressor::Zlib),
        _ => return None,
    };
    Some(Path::Direct { compressor, checksum, swap })
}

/// The path through zarrs.
#[cfg_attr(not(feature = "zfp"), expect(clippy::unnecessary_wraps, unused_variables, reason = "only zfp is refused"))]
fn general_path(
    chain: Arc<CodecChain>,
    metadatas: &[MetadataV3],
    shape: Vec<NonZeroU64>,
    data_type: &DataType,
    fill: &FillValue,
) -> Result<Path> {
    #[cfg(feature = "zfp")]
    {
        if is_nested(metadatas) {
            let message =
                "zfp inside of another codec, which nobody would check; rewrite the array with zfp on its own or in plain shards";
            return Err(Error::unsupported("codecs", message));
        }
        if let Some(chain) = ZfpChain::new(&chain, &shape, data_type, fill)? {
            return Ok(Path::Zfp(chain));
        }
    }
    rehearse(&chain, &shape, data_type, fill);
    Ok(Path::General { chain, shape, data_type: data_type.clone(), fill: fill.clone() })
}

/// Encodes and decodes a little, so that zarrs makes what its codecs have once per process now: an array is opened where no
/// fork comes between, chunks are decoded wherever. What fails here says so when a chunk is decoded.
fn rehearse(chain: &CodecChain, shape: &[NonZeroU64], data_type: &DataType, fill: &FillValue) {
    let options = CodecOptions::default().with_concurrent_target(1);
    let through = |shape: &[NonZeroU64]| {
        let n = shape.iter().map(|n| n.get() as usize).product();
        let encoded = chain.encode(fill.as_ne_bytes().repeat(n).into(), shape, data_type, fill, &options)?;
        chain.decode(encoded, shape, data_type, fill, &options).map(|_| ())
    };
    let rehearsed = catch(|| through(&vec![NonZeroU64::MIN; shape.len()]).map_err(|e| damaged("rehearsal", &e)));
    let bytes = shape.iter().try_fold(fill.size() as u64, |n, d| n.checked_mul(d.get()));
    // shards within other codecs divide only their own shape
    if rehearsed.is_err() && bytes.is_some_and(|n| n <= MAX_REHEARSED_BYTES) {
        let _ = catch(|| through(shape).map_err(|e| damaged("rehearsal", &e)));
    }
}

/// The bytes before a trailing little-endian crc32c, once it matches.
fn checked_body(encoded: &[u8]) -> Result<&[u8]> {
    let (body, sum) = encoded.split_last_chunk::<4>().ok_or_else(|| damaged("chunk", &"it is shorter than its checksum"))?;
    let (computed, stored) = (crc32c::crc32c(body), u32::from_le_bytes(*sum));
    if computed == stored {
        return Ok(body);
    }
    Err(damaged("chunk", &format_args!("wrong checksum: crc32c is {computed:#010x}, expected {stored:#010x}")))
}

impl Compressor {
    /// Refuses chunks that cannot possibly decode to `n` bytes, before memory is taken for them.
    fn check_claim(self, body: &[u8], n: usize) -> Result<()> {
        match self {
            Self::Blosc => expect_len(c_blosc::claim(body)?, n, "Blosc chunk"),
            Self::Zstd => expect_inflation(body.len(), n, MAX_INFLATION),
            Self::Gzip | Self::Zlib => expect_inflation(body.len(), n, MAX_DEFLATE_INFLATION),
        }
    }
}
