//! zfp chunks against what zarrs decodes by itself, and against damage.

use rand::rngs::ChaCha8Rng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::json;
use zarrs::array::data_type;

use super::*;
use crate::decode::{ChunkCodec, Scratch};
use crate::schema::DType;

/// Expert, so that damaged modes are reached as well: minbits, maxbits, maxprec and minexp of a header.
type LongMode = (u64, u64, u64, u64);

struct Case {
    chain: Arc<CodecChain>,
    codec: ChunkCodec,
    shape: Vec<NonZeroU64>,
    data_type: DataType,
    fill: FillValue,
    /// Random values, native byte order.
    values: Vec<u8>,
}

impl Case {
    fn try_new(codecs: &Value, shape: &[u64], dtype: DType) -> Result<Self> {
        let metadatas: Vec<MetadataV3> = serde_json::from_value(codecs.clone()).unwrap();
        let chain = Arc::new(CodecChain::from_metadata(&metadatas).unwrap());
        let (data_type, fill): (_, FillValue) = match dtype {
            DType::Int8 => (data_type::int8(), 0i8.into()),
            DType::Int16 => (data_type::int16(), 0i16.into()),
            DType::Int32 => (data_type::int32(), 0i32.into()),
            DType::Int64 => (data_type::int64(), 0i64.into()),
            DType::UInt8 => (data_type::uint8(), 0u8.into()),
            DType::UInt16 => (data_type::uint16(), 0u16.into()),
            DType::Float32 => (data_type::float32(), 0f32.into()),
            DType::Float64 => (data_type::float64(), 0f64.into()),
            DType::Float16 => (data_type::float16(), half::f16::ZERO.into()),
            other => panic!("{other}"),
        };
        let codec = ChunkCodec::new(Arc::clone(&chain), &metadatas, shape, &data_type, &fill, dtype)?;
        let mut values = vec![0; shape.iter().product::<u64>() as usize * dtype.size()];
        let mut rng = ChaCha8Rng::seed_from_u64(values.len() as u64);
        match dtype {
            // any bits, NaN among them, come back from reversible mode; the lossy modes want numbers
            DType::Float32 => values.as_chunks_mut().0.iter_mut().for_each(|v| *v = rng.random::<f32>().to_ne_bytes()),
            DType::Float64 => values.as_chunks_mut().0.iter_mut().for_each(|v| *v = rng.random::<f64>().to_ne_bytes()),
            _ => rng.fill_bytes(&mut values),
        }
        let shape = shape.iter().map(|&d| NonZeroU64::new(d).unwrap()).collect();
        Ok(Self { chain, codec, shape, data_type, fill, values })
    }

    fn new(codecs: &Value, shape: &[u64], dtype: DType) -> Self {
        Self::try_new(codecs, shape, dtype).unwrap()
    }

    fn encode(&self) -> Vec<u8> {
        let values = ArrayBytes::from(self.values.clone());
        self.chain.encode(values, &self.shape, &self.data_type, &self.fill, &CodecOptions::default()).unwrap().into_owned()
    }

    fn decode(&self, encoded: &[u8]) -> Result<Vec<u8>> {
        self.codec.decode(encoded, &mut Scratch::default())?.elements().map(std::borrow::Cow::into_owned)
    }

    /// By zarrs alone, which is safe with what zarrs has encoded.
    fn decode_unchecked(&self, encoded: &[u8]) -> Vec<u8> {
        let options = CodecOptions::default();
        let decoded = self.chain.decode(encoded.into(), &self.shape, &self.data_type, &self.fill, &options).unwrap();
        decoded.into_fixed().unwrap().into_owned()
    }

    fn refuses(&self, encoded: &[u8], why: &str) {
        let error = self.decode(encoded).unwrap_err();
        assert_eq!(error.kind(), "Corrupt", "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
}

fn zfp(mode: &Value) -> Value {
    json!([{"name": "zfp", "configuration": mode}])
}

fn zfpy(mode: &Value) -> Value {
    json!([{"name": "numcodecs.zfpy", "configuration": mode}])
}

const SHAPES: [&[u64]; 6] = [&[1], &[64], &[333], &[5, 18], &[3, 1, 9], &[2, 5, 3, 4]];

#[test]
fn every_mode_decodes_as_zarrs_does_and_reversible_ones_to_what_was_encoded() {
    use DType::{Float32, Float64, Int8, Int16, Int32, Int64, UInt8, UInt16};
    for shape in SHAPES {
        for dtype in [Float32, Float64, Int8, Int16, Int32, Int64, UInt8, UInt16] {
            let promoted = dtype.size() < 4;
            let float = matches!(dtype, Float32 | Float64);
            let mut chains = vec![
                (zfp(&json!({"mode": "reversible"})), true),
                (zfp(&json!({"mode": "fixed_rate", "rate": 10.5})), false),
                (zfp(&json!({"mode": "fixed_rate", "rate": 0.02})), false),
                (zfp(&json!({"mode": "fixed_rate", "rate": 260})), false),
                (zfp(&json!({"mode": "fixed_precision", "precision": 19})), false),
                (zfp(&json!({"mode": "expert", "minbits": 40, "maxbits": 50, "maxprec": 19, "minexp": -2})), false),
                (
                    zfp(&json!({"mode": "expert", "minbits": 16658, "maxbits": 4_000_000_000u32, "maxprec": 64, "minexp": -1075})),
                    true,
                ),
            ];
            if float {
                chains.push((zfp(&json!({"mode": "fixed_accuracy", "tolerance": 0.01})), false));
                chains.push((zfpy(&json!({"mode": 4, "tolerance": 0.01})), false));
            }
            if !promoted {
                chains.push((zfpy(&json!({"mode": 5})), true));
                chains.push((zfpy(&json!({"mode": 3, "precision": 7})), false));
                // more than 2048 bits in a block make zfp write its long header
                chains.push((zfpy(&json!({"mode": 2, "rate": 33})), false));
                chains.push((zfpy(&json!({"mode": 2, "rate": 3})), false));
            }
            for (mut codecs, exact) in chains {
                for surrounded in [false, true] {
                    if surrounded {
                        let order: Vec<usize> = (0..shape.len()).rev().collect();
                        let codecs = codecs.as_array_mut().unwrap();
                        codecs.insert(0, json!({"name": "transpose", "configuration": {"order": order}}));
                        codecs.push(json!({"name": "gzip", "configuration": {"level": 1}}));
                        codecs.push(json!({"name": "crc32c"}));
                    }
                    let case = Case::new(&codecs, shape, dtype);
                    let encoded = case.encode();
                    let decoded = case.decode(&encoded).unwrap_or_else(|e| panic!("{codecs} {shape:?} {dtype}: {e}"));
                    assert!(decoded == case.decode_unchecked(&encoded), "{codecs} {shape:?} {dtype}");
                    assert!(!exact || decoded == case.values, "{codecs} {shape:?} {dtype}");
                }
            }
        }
    }
}

/// Chains whose chunks say as little as possible about themselves, and as much.
fn fragile() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in SHAPES {
        for dtype in [DType::Float32, DType::Float64, DType::Int32, DType::Int64] {
            cases.push(Case::new(&zfp(&json!({"mode": "reversible"})), shape, dtype));
            cases.push(Case::new(&zfp(&json!({"mode": "fixed_precision", "precision": 64})), shape, dtype));
            cases.push(Case::new(&zfp(&json!({"mode": "fixed_rate", "rate": 1})), shape, dtype));
            cases.push(Case::new(&zfpy(&json!({"mode": 5})), shape, dtype));
            cases.push(Case::new(&zfpy(&json!({"mode": 3, "precision": 64})), shape, dtype));
        }
        cases.push(Case::new(&zfp(&json!({"mode": "reversible"})), shape, DType::UInt8));
    }
    cases
}

// What matters of the next three is that nothing is read or written out of bounds: valgrind sees that.

#[test]
fn truncated_at_every_length() {
    for case in fragile() {
        let encoded = case.encode();
        let step = encoded.len() / 200 + 1;
        for n in (0..encoded.len()).step_by(step) {
            if let Ok(decoded) = case.decode(&encoded[..n]) {
                assert_eq!(decoded.len(), case.values.len());
            }
        }
        case.refuses(&[], "damaged");
    }
}

#[test]
fn any_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut fill = move |round: usize, body: &mut [u8]| match round {
        // ones make every group test positive and every precision the highest: the most bits
        0 => body.fill(0xff),
        1 => body.fill(0),
        2 => body.fill(0x55),
        3 => body.fill(0xfd),
        4..10 => body.iter_mut().for_each(|b| *b = 1 << rng.random_range(0..8) | 1 << rng.random_range(0..8)),
        _ => rng.fill_bytes(body),
    };
    for case in fragile() {
        let mut encoded = case.encode();
        let header = match encoded.strip_prefix(b"zfp") {
            Some(rest) if rest[8] == 0xff => 20,
            Some(_) => 12,
            None => 0,
        };
        for round in 0..20 {
            fill(round, &mut encoded[header..]);
            assert_eq!(case.decode(&encoded).unwrap().len(), case.values.len());
        }
    }
    // `maxbits` below the bits of an exponent: libzfp's difference wraps around. zarrs' own encoder overruns its
    // buffer in this mode, so there is only the decoder to try.
    for shape in SHAPES {
        for (dtype, minexp) in [(DType::Float64, -1074), (DType::Float64, -1075), (DType::Int32, -1075), (DType::Int64, 0)] {
            for maxbits in 1..14 {
                let mode = json!({"mode": "expert", "minbits": 0, "maxbits": maxbits, "maxprec": 64, "minexp": minexp});
                let case = Case::new(&zfp(&mode), shape, dtype);
                let chain = ZfpChain::new(&case.chain, &case.shape, &case.data_type, &case.fill).unwrap().unwrap();
                // as short as is believed, and as long as libzfp reads
                for n in [chain.field.least_bytes(0, 1).unwrap(), chain.field.room(1) as usize] {
                    let mut encoded = vec![0; n];
                    for round in 0..12 {
                        fill(round, &mut encoded);
                        assert_eq!(case.decode(&encoded).unwrap().len(), case.values.len());
                    }
                }
            }
        }
    }
}

#[test]
fn any_header() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let codecs = zfpy(&json!({"mode": 5}));
    for shape in SHAPES {
        let case = Case::new(&codecs, shape, DType::Float64);
        let encoded = case.encode();
        for bit in 0..160 {
            let mut damaged = encoded.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let decoded = case.decode(&damaged);
            assert!(bit >= 84 || decoded.is_err(), "bit {bit} is magic, type or dimensions");
        }
        for _ in 0..200 {
            let mut damaged = encoded.clone();
            // of 20 bytes of header, the first four right
            rng.fill_bytes(&mut damaged[4..20]);
            let _ = case.decode(&damaged);
            // all up to the mode right, half of the modes long
            damaged[..12].copy_from_slice(&encoded[..12]);
            damaged[10] = rng.random::<u8>() | 0xf0;
            damaged[11] = if rng.random() { 0xff } else { rng.random() };
            let _ = case.decode(&damaged);
        }
    }
}

/// A `zfpy` chunk of `shape` doubles with a long header in front of `stream`.
fn with_long_header(shape: &[u64], mode: LongMode, stream: &[u8]) -> Vec<u8> {
    let mut bits: Vec<bool> = Vec::new();
    let mut put = |value: u64, n: u64| bits.extend((0..n).map(|i| value >> i & 1 == 1));
    b"zfp\x05".iter().for_each(|&b| put(b.into(), 8));
    put(3, 2);
    put(shape.len() as u64 - 1, 2);
    for d in shape.iter().rev() {
        put(d - 1, 48 / shape.len() as u64);
    }
    put(0xfff, 12);
    let (minbits, maxbits, maxprec, minexp) = mode;
    for (value, n) in [(minbits - 1, 15), (maxbits - 1, 15), (maxprec - 1, 7), (minexp, 15)] {
        put(value, n);
    }
    for &byte in stream {
        put(byte.into(), 8);
    }
    bits.chunks(8).map(|byte| byte.iter().rev().fold(0, |acc, &bit| acc << 1 | u8::from(bit))).collect()
}

#[test]
fn long_headers() {
    for shape in [&[9u64] as &[_], &[6, 7], &[5, 5, 5], &[2, 3, 4, 5]] {
        let expert = json!({"mode": "expert", "minbits": 30, "maxbits": 70, "maxprec": 60, "minexp": -20});
        let plain = Case::new(&zfp(&expert), shape, DType::Float64);
        let stream = plain.encode();
        let case = Case::new(&zfpy(&json!({"mode": 5})), shape, DType::Float64);
        let good = (30, 70, 60, 16495 - 20);
        let encoded = with_long_header(shape, good, &stream);
        assert_eq!(case.decode(&encoded).unwrap(), plain.decode(&stream).unwrap());
        for bad in [(71, 70, 60, 0), (16659, 32768, 60, 0), (32768, 32768, 64, 0), (1, 70, 65, 0), (1, 70, 128, 0)] {
            case.refuses(&with_long_header(shape, bad, &stream), "impossible mode");
        }
        // each block takes its minbits, which the stream cannot have
        case.refuses(&with_long_header(shape, (16658, 16658, 64, 16495 - 1074), &stream), "take at least");
        for wrong in [&[10u64] as &[_], &[60000], &[7, 6], &[6, 8], &[5, 5, 6], &[65536, 5, 5], &[4096, 4096, 4096, 4096]] {
            case.refuses(&with_long_header(wrong, good, &stream), "its header says");
        }
        case.refuses(&encoded[..18], "shorter than its header");
        // right after the header nothing is left to shift
        case.refuses(&encoded[..19], "take at least");
    }
}

#[test]
fn chunks_that_cannot_be() {
    let reversible = json!({"mode": "reversible"});
    let case = Case::new(&zfp(&reversible), &[1000], DType::Float32);
    case.refuses(&[0; 31], "take at least 32");
    case.refuses(&vec![0; 1 << 20], "expected at most");
    assert_eq!(case.decode(&[0; 32]).unwrap(), vec![0; 4000]);
    let case = Case::new(&zfpy(&json!({"mode": 5})), &[100], DType::Float32);
    let encoded = case.encode();
    case.refuses(b"zfp", "shorter than its header");
    case.refuses(&[b"zfp\x04", &encoded[4..]].concat(), "begins with");
    Case::new(&zfpy(&json!({"mode": 5})), &[100], DType::Int32).refuses(&encoded, "Float");
    // a chunk that claims a terabyte is refused before memory is taken for it
    let case = &zfp(&reversible);
    let codec = {
        let metadatas: Vec<MetadataV3> = serde_json::from_value(case.clone()).unwrap();
        let chain = Arc::new(CodecChain::from_metadata(&metadatas).unwrap());
        ChunkCodec::new(chain, &metadatas, &[1 << 37], &data_type::float64(), &0f64.into(), DType::Float64).unwrap()
    };
    let error = codec.decode(&[0; 1000], &mut Scratch::default()).unwrap_err();
    assert_eq!(error.kind(), "Corrupt");
}

#[test]
fn modes_types_and_chains_that_are_refused_at_open() {
    let refused = |codecs: &Value, shape: &[u64], dtype| match Case::try_new(codecs, shape, dtype) {
        Ok(_) => panic!("{codecs} is accepted"),
        Err(e) => e.kind(),
    };
    for mode in [
        json!({"mode": "fixed_rate", "rate": 0}),
        json!({"mode": "fixed_rate", "rate": -3}),
        json!({"mode": "fixed_rate", "rate": 1e300}),
        json!({"mode": "fixed_rate", "rate": 261}),
        json!({"mode": "expert", "minbits": 0, "maxbits": 0, "maxprec": 64, "minexp": 0}),
        json!({"mode": "expert", "minbits": 9, "maxbits": 8, "maxprec": 64, "minexp": 0}),
        json!({"mode": "expert", "minbits": 4_000_000_000u32, "maxbits": 4_000_000_000u32, "maxprec": 64, "minexp": 0}),
        json!({"mode": "expert", "minbits": 1, "maxbits": 8, "maxprec": 0, "minexp": 0}),
        json!({"mode": "expert", "minbits": 1, "maxbits": 8, "maxprec": 65, "minexp": 0}),
        json!({"mode": "expert", "minbits": 1, "maxbits": 8, "maxprec": 64, "minexp": i32::MIN}),
    ] {
        assert_eq!(refused(&zfp(&mode), &[8], DType::Float32), "Corrupt", "{mode}");
    }
    assert_eq!(refused(&zfp(&json!({"mode": "fixed_accuracy", "tolerance": 1})), &[8], DType::Int32), "Corrupt");
    let reversible = zfp(&json!({"mode": "reversible"}));
    assert_eq!(refused(&reversible, &[8], DType::Float16), "Unsupported");
    assert_eq!(refused(&reversible, &[1, 1, 2, 2, 2], DType::Float32), "Unsupported");
    let bytes = json!([{"name": "bytes", "configuration": {"endian": "little"}}]);
    let shards = |codecs: &Value, index_codecs: &Value| {
        let configuration = json!({"chunk_shape": [4], "codecs": codecs, "index_codecs": index_codecs});
        json!([{"name": "sharding_indexed", "configuration": configuration}])
    };
    for nested in [
        shards(&reversible, &bytes),
        shards(&bytes, &reversible),
        shards(&shards(&zfpy(&json!({"mode": 5})), &bytes), &bytes),
        json!([{"name": "zarrs.optional", "configuration": {"mask_codecs": bytes, "data_codecs": reversible}}]),
    ] {
        assert_eq!(refused(&nested, &[8], DType::Float32), "Unsupported", "{nested}");
    }
}
