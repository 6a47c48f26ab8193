//! Chunks of the codecs `zfp` and `zfpy`, made safe to hand to libzfp.
//!
//! libzfp never looks where its bit stream ends (`zfp/bitstream.inl`, rule 7), and zarrs lets the header that begins a
//! `zfpy` chunk say how many values are written into an array of the metadata's size. A damaged chunk would read and
//! write anywhere. So the header is checked against the metadata and cut off, the dimensions that libzfp gets are
//! always those of the metadata, and the stream is followed by zeros up to [`Field::room`], which is more than libzfp
//! reads whatever the bits say.
//!
//! zfp has no checksum: damage that leaves header and length plausible decodes to wrong values.

use std::borrow::Cow;
use std::num::NonZeroU64;
use std::sync::Arc;

use serde_json::Value;
use zarrs::array::codec::api::{ArrayToBytesCodecTraits, CodecMetadataOptions, CodecOptions, CodecTraits};
use zarrs::array::codec::{ZfpCodec, ZfpCodecConfiguration, ZfpDataTypeExt, ZfpMode, ZfpNativeType, ZfpyCodec};
use zarrs::array::{ArrayBytes, BytesRepresentation, CodecChain, DataType, FillValue};
use zarrs::metadata::v3::MetadataV3;
use zarrs::plugin::ZarrVersion;

use super::limits::{MAX_INFLATION, damaged, expect_inflation};
use crate::base::error::{Error, Result, vec_with_room};

/// `ZFP_MAX_BITS`: what the largest block, reversible and of 4⁴ doubles, takes at most.
const MAX_BLOCK_BITS: u32 = 16658;
/// `ZFP_MIN_EXP`; one less means reversible.
const MIN_EXP: i32 = -1074;
/// `ZFP_MAX_PREC`
const MAX_PREC: u32 = 64;
/// `ZFP_CODEC`: version of the bit stream, which a header ends its magic number with.
const CODEC_VERSION: u8 = 5;

/// A codec chain whose array-to-bytes codec is `zfp` or `zfpy`.
#[derive(Debug)]
pub(super) struct ZfpChain {
    chain: Arc<CodecChain>,
    /// Before each array-to-array codec and, last, after all of them.
    arrays: Vec<(Vec<NonZeroU64>, DataType, FillValue)>,
    field: Field,
    /// `None` for `zfpy`: the header of a chunk says.
    mode: Option<Mode>,
}

/// A decoder and the fewest bits that it takes for one block.
#[derive(Debug, Clone, Copy)]
struct Mode {
    codec: ZfpCodec,
    min_bits: u32,
}

/// What libzfp calls a field: the array that one stream encodes.
#[derive(Debug)]
struct Field {
    scalar: ZfpNativeType,
    /// Row-major; libzfp's `nx` is the last.
    shape: Vec<u64>,
}

/// Whether zfp stands inside of another codec's configuration, such as that of a shard within a shard: zarrs would
/// hand the bytes to libzfp unchecked.
pub(super) fn is_nested(metadatas: &[MetadataV3]) -> bool {
    fn mentions(value: &Value) -> bool {
        match value {
            Value::String(s) => s.to_ascii_lowercase().contains("zfp"),
            Value::Array(items) => items.iter().any(mentions),
            Value::Object(fields) => fields.values().any(mentions),
            _ => false,
        }
    }
    metadatas.iter().filter_map(MetadataV3::configuration).any(|c| c.values().any(mentions))
}

impl ZfpChain {
    /// The checked decoder of `chain`, if its array-to-bytes codec is `zfp` or `zfpy`.
    pub(super) fn new(
        chain: &Arc<CodecChain>,
        shape: &[NonZeroU64],
        data_type: &DataType,
        fill: &FillValue,
    ) -> Result<Option<Self>> {
        let codec = chain.array_to_bytes_codec().as_any();
        let zfp = codec.downcast_ref::<ZfpCodec>();
        if zfp.is_none() && !codec.is::<ZfpyCodec>() {
            return Ok(None);
        }
        let unsupported = |why: &dyn std::fmt::Display| Error::unsupported("codec zfp", why.to_string());
        let mut arrays = vec![(shape.to_vec(), data_type.clone(), fill.clone())];
        for codec in chain.array_to_array_codecs() {
            let (shape, data_type, fill) = &arrays[arrays.len() - 1];
            arrays.push(codec.encoded_representation(shape, data_type, fill).map_err(|e| unsupported(&e))?);
        }
        let (shape, data_type, _) = &arrays[arrays.len() - 1];
        let scalar = data_type.codec_zfp().map_err(|e| unsupported(&e))?.zfp_encoding().native_type();
        let field = Field { scalar, shape: shape.iter().map(|d| d.get()).collect() };
        if !(1..=4).contains(&field.shape.len()) {
            return Err(unsupported(&format_args!("chunks of {} dimensions; expected 1 to 4", field.shape.len())));
        }
        let mode = zfp.map(|codec| Mode::of(*codec, scalar)).transpose()?;
        Ok(Some(Self { chain: Arc::clone(chain), arrays, field, mode }))
    }

    /// Decodes one chunk.
    pub(super) fn decode(&self, encoded: &[u8]) -> Result<ArrayBytes<'static>> {
        let options = CodecOptions::default().with_concurrent_target(1);
        let fail = |e: &dyn std::fmt::Display| damaged("chunk", e);
        expect_inflation(encoded.len(), self.field.least_bytes(0, 1)?, MAX_INFLATION)?;
        let mut bytes = Cow::Borrowed(encoded);
        for codec in self.chain.bytes_to_bytes_codecs().iter().rev() {
            bytes = codec.decode(bytes, &BytesRepresentation::UnboundedSize, &options).map_err(|e| fail(&e))?;
        }
        let (mode, header_bits) = match self.mode {
            Some(mode) => (mode, 0),
            None => read_header(&bytes, &self.field)?,
        };
        let stream = self.field.stream(&bytes, header_bits, mode.min_bits)?;
        let (shape, data_type, fill) = &self.arrays[self.arrays.len() - 1];
        let mut array = mode.codec.decode(stream.into(), shape, data_type, fill, &options).map_err(|e| fail(&e))?;
        for (codec, (shape, data_type, fill)) in self.chain.array_to_array_codecs().iter().zip(&self.arrays).rev() {
            array = codec.decode(array, shape, data_type, fill, &options).map_err(|e| fail(&e))?;
        }
        Ok(array)
    }
}

impl Field {
    fn blocks(&self) -> u64 {
        self.shape.iter().map(|d| d.div_ceil(4)).product()
    }

    /// Bytes that libzfp can read at most, where every block takes at least `min_bits`.
    ///
    /// A block holds v = 4^d values of p bits, coded as at most p bit planes (`template/decode.c`). A plane takes one
    /// bit for each value that an earlier plane found significant. Then come group tests, one bit each; a positive
    /// one is followed by at most one bit for each further value up to the next significant one, the last value
    /// needing none. So a value costs at most 2 bits in the plane that finds it (the last one 1), 1 in each later one,
    /// and a plane that leaves values over costs 1 bit more but saves 1 for each of them: (p + 1) v − 1 in all. In
    /// front stand up to 2 flags, an exponent and, when reversible, a precision. That is the table in
    /// `zfp_block_maximum_size`, and the rate constraint only lowers it, as no test of it is skipped: when
    /// `maxbits` is less than what stands in front, the difference wraps around and nothing is constrained. If the
    /// block took less than `minbits`, the stream moves on to that. Words of 64 bits are read when a bit of them is
    /// wanted, or when the stream has moved into their middle; one more is for good measure.
    fn room(&self, min_bits: u32) -> u64 {
        let (precision, front) = match self.scalar {
            ZfpNativeType::Int32 => (32, 5),
            ZfpNativeType::Int64 => (64, 6),
            ZfpNativeType::Float => (32, 1 + 1 + 8 + 5),
            ZfpNativeType::Double => (64, 1 + 1 + 11 + 6),
        };
        let values = 1u64 << (2 * self.shape.len());
        let block_bits = ((precision + 1) * values - 1 + front).max(u64::from(min_bits));
        self.blocks().saturating_mul(block_bits).div_ceil(64).saturating_add(1).saturating_mul(8)
    }

    /// Bytes without which a stream after `header_bits` must be truncated.
    fn least_bytes(&self, header_bits: u64, min_bits: u32) -> Result<usize> {
        let bytes = self.blocks().saturating_mul(u64::from(min_bits)).saturating_add(header_bits).div_ceil(8);
        usize::try_from(bytes).map_err(|_| damaged("chunk", &"it is larger than memory"))
    }

    /// The stream that follows the first `header_bits` of `bytes`, with zeros behind it.
    fn stream(&self, bytes: &[u8], header_bits: u64, min_bits: u32) -> Result<Vec<u8>> {
        let least = self.least_bytes(header_bits, min_bits)?;
        if bytes.len() < least {
            let (got, shape) = (bytes.len(), &self.shape);
            return Err(damaged("zfp chunk", &format_args!("it has {got} bytes, {shape:?} values take at least {least}")));
        }
        let room = self.room(min_bits);
        let mut out = vec_with_room(room, "zfp chunk")?;
        let (rest, shift) = (&bytes[header_bits as usize / 8..], header_bits % 8);
        if rest.len() as u64 > room {
            return Err(damaged("zfp chunk", &format_args!("it has {} bytes, expected at most {room}", rest.len())));
        }
        if shift == 0 {
            out.extend_from_slice(rest);
        } else {
            let following = rest.iter().skip(1).chain(&[0]);
            out.extend(rest.iter().zip(following).map(|(low, high)| low >> shift | high << (8 - shift)));
        }
        out.resize(room as usize, 0);
        Ok(out)
    }
}

impl Mode {
    /// The mode in which `codec` decodes, once it is one that libzfp can have encoded in.
    fn of(codec: ZfpCodec, scalar: ZfpNativeType) -> Result<Self> {
        let configuration = codec.configuration(ZarrVersion::V3, &CodecMetadataOptions::default());
        let Some(ZfpCodecConfiguration::V1(configuration)) = configuration.and_then(|c| c.to_typed().ok()) else {
            return Err(Error::unsupported("codec zfp", "a mode that is unknown"));
        };
        let float = matches!(scalar, ZfpNativeType::Float | ZfpNativeType::Double);
        let min_bits = match configuration.mode {
            ZfpMode::Expert { minbits, maxbits, maxprec, minexp } => {
                return Self::with_params(minbits, maxbits, maxprec, minexp)
                    .ok_or_else(|| Error::corrupt("codec zfp", format!("impossible mode {:?}", configuration.mode)));
            }
            // zarrs counts the bits of a block of 4³ values, whatever the array's dimensions are
            ZfpMode::FixedRate { rate } => match (64.0 * rate + 0.5).floor() {
                bits if (1.0..=f64::from(MAX_BLOCK_BITS)).contains(&bits) => Some((bits as u32).max(match scalar {
                    ZfpNativeType::Float => 1 + 8,
                    ZfpNativeType::Double => 1 + 11,
                    _ => 1,
                })),
                _ => None,
            },
            ZfpMode::FixedAccuracy { tolerance } => (float && tolerance.is_finite()).then_some(1),
            ZfpMode::FixedPrecision { .. } | ZfpMode::Reversible => Some(1),
        };
        let min_bits = min_bits.ok_or_else(|| {
            Error::corrupt("codec zfp", format!("impossible mode {:?} for {scalar:?} values", configuration.mode))
        })?;
        Ok(Self { codec, min_bits })
    }

    /// The mode of these parameters, if there is one (`zfp_stream_set_params`, which zarrs lets fail unnoticed).
    fn with_params(minbits: u32, maxbits: u32, maxprec: u32, minexp: i32) -> Option<Self> {
        let valid = minbits <= maxbits
            && maxbits >= 1
            && minbits <= MAX_BLOCK_BITS
            && (1..=MAX_PREC).contains(&maxprec)
            // what a header can say
            && (-16495..=16272).contains(&minexp);
        valid.then(|| Self { codec: ZfpCodec::new_expert(minbits, maxbits, maxprec, minexp), min_bits: minbits.max(1) })
    }
}

/// The mode in the header of a `zfpy` chunk and the bits of that header, once it describes `field`.
///
/// Source: `zfp_read_header`, `zfp_field_set_metadata` and `zfp_stream_set_mode` of zfp 1.0.1. Bits are counted from
/// the lowest of each byte.
fn read_header(bytes: &[u8], field: &Field) -> Result<(Mode, u64)> {
    let fail = |why: &dyn std::fmt::Display| damaged("zfpy chunk", why);
    let header = bytes.first_chunk::<12>().ok_or_else(|| fail(&"it is shorter than its header"))?;
    let [z, f, p, version, ..] = *header;
    if [z, f, p] != *b"zfp" || version != CODEC_VERSION {
        return Err(fail(&format_args!("it begins with {:?}, expected \"zfp\" and version {CODEC_VERSION}", &header[..4])));
    }
    let bits = header.iter().rev().fold(0u128, |acc, &byte| acc << 8 | u128::from(byte)) >> 32;
    let (found, short_mode) = (Field::from_header(bits as u64 & ((1 << 52) - 1)), (bits >> 52) as u64);
    if found.shape != field.shape || found.scalar != field.scalar {
        return Err(fail(&format_args!(
            "its header says {:?} {:?} values, expected {:?} {:?} values",
            found.shape, found.scalar, field.shape, field.scalar
        )));
    }
    let (mode, header_bits) = match short_mode {
        0..2048 => (Mode::with_params(short_mode as u32 + 1, short_mode as u32 + 1, MAX_PREC, MIN_EXP), 96),
        2048..2176 => (Mode::with_params(1, MAX_BLOCK_BITS, short_mode as u32 + 1 - 2048, MIN_EXP), 96),
        2176 => (Mode::with_params(1, MAX_BLOCK_BITS, MAX_PREC, MIN_EXP - 1), 96),
        2177..4095 => (Mode::with_params(1, MAX_BLOCK_BITS, MAX_PREC, short_mode as i32 + MIN_EXP - 2177), 96),
        _ => {
            // 52 more bits, of which the last byte holds 4
            let rest = bytes.get(12..19).ok_or_else(|| fail(&"it is shorter than its header"))?;
            let rest = rest.iter().rev().fold(0u64, |acc, &byte| acc << 8 | u64::from(byte));
            let take = |from: u32, n: u32| (rest >> from) as u32 & ((1 << n) - 1);
            (Mode::with_params(take(0, 15) + 1, take(15, 15) + 1, take(30, 7) + 1, take(37, 15) as i32 - 16495), 148)
        }
    };
    Ok((mode.ok_or_else(|| fail(&"its header has an impossible mode"))?, header_bits))
}

impl Field {
    /// The field that 52 bits of a header describe.
    fn from_header(meta: u64) -> Self {
        let scalar = match meta & 3 {
            0 => ZfpNativeType::Int32,
            1 => ZfpNativeType::Int64,
            2 => ZfpNativeType::Float,
            _ => ZfpNativeType::Double,
        };
        let dimensions = (meta >> 2 & 3) + 1;
        let width = 48 / dimensions;
        let shape = (0..dimensions).rev().map(|i| (meta >> (4 + i * width) & ((1 << width) - 1)) + 1).collect();
        Self { scalar, shape }
    }
}

#[cfg(test)]
#[path = "zfp_tests.rs"]
mod tests;
