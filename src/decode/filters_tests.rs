//! Pipelines undone against how they are applied, and against damage.

use std::io::Write;
use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::base::fuzz::Random;
use crate::decode::scatter::Stored;
use crate::decode::{ChunkCodec, Decoded};
use crate::schema::DType;

const FILTERS: [Filter; 7] =
    [Filter::Deflate, Filter::Shuffle(4), Filter::Shuffle(3), Filter::Fletcher32, Filter::Lzf, Filter::Zstd, Filter::Blosc];

/// Literals, and runs of one byte.
fn lzf_of(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let literals = |out: &mut Vec<u8>, bytes: &[u8]| {
        for piece in bytes.chunks(32) {
            out.push(piece.len() as u8 - 1);
            out.extend(piece);
        }
    };
    let (mut at, mut begin) = (0, 0);
    while at < bytes.len() {
        let run = bytes[at..].iter().take(265).take_while(|&&b| b == bytes[at]).count();
        if run < 11 {
            at += run;
            continue;
        }
        literals(&mut out, &bytes[begin..=at]);
        out.extend([7 << 5, (run - 1 - 9) as u8, 0]);
        at += run;
        begin = at;
    }
    literals(&mut out, &bytes[begin..]);
    out
}

fn blosc_of(bytes: &[u8], item_size: usize) -> Vec<u8> {
    let mut out = vec![0u8; bytes.len() + 16];
    // SAFETY: both buffers have the lengths given; the name ends with a zero byte.
    let n = unsafe {
        blosc_src::blosc_compress_ctx(
            5,
            1,
            item_size,
            bytes.len(),
            bytes.as_ptr().cast(),
            out.as_mut_ptr().cast(),
            out.len(),
            c"lz4".as_ptr(),
            0,
            1,
        )
    };
    out.truncate(usize::try_from(n).unwrap());
    out
}

/// What a writer does: filters in order, but for those of the mask.
fn applied(filters: &[Filter], mask: u32, bytes: &[u8], item_size: usize) -> Vec<u8> {
    let mut now = bytes.to_vec();
    for (_, filter) in filters.iter().enumerate().filter(|(i, _)| mask & 1 << i == 0) {
        now = match *filter {
            Filter::Deflate => {
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&now).unwrap();
                encoder.finish().unwrap()
            }
            Filter::Shuffle(size) => {
                let n = now.len() / size;
                let mut out: Vec<u8> =
                    (0..size).flat_map(|j| (0..n).map(move |i| (i, j))).map(|(i, j)| now[i * size + j]).collect();
                out.extend(&now[n * size..]);
                out
            }
            Filter::Fletcher32 => [&now[..], &fletcher32(&now).to_le_bytes()].concat(),
            Filter::Lzf => lzf_of(&now),
            Filter::Zstd => zstd::bulk::compress(&now, 1).unwrap(),
            Filter::Blosc => blosc_of(&now, item_size),
        };
    }
    now
}

/// Elements of a range, put together.
fn elements_of(decoded: &Decoded, range: Range<usize>, size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let done = decoded.runs(range, |stored, _, n| match stored {
        Stored::Items(bytes) => out.extend_from_slice(&bytes[..n * size]),
        Stored::Planes(planes) => (0..n).for_each(|i| out.extend(planes[..size].iter().map(|plane| plane[i]))),
    });
    done.unwrap();
    out
}

fn content(items: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let limit = random.pick(&[1, 2, 40, u32::MAX as usize]);
    (0..items).flat_map(|_| (random.below(limit) as u32).to_le_bytes()).collect()
}

proptest! {
    #![proptest_config(crate::base::fuzz::cases(600))]

    /// Whatever filters there were, in whatever order, and whichever a chunk skipped: its bytes come back.
    #[test]
    fn pipelines_are_undone(
        filters in prop::collection::vec(prop::sample::select(&FILTERS[..]), 0..5), mask in prop_oneof![Just(0), 0u32..32],
        items in 1usize..5000, seed in any::<u64>(), swap in any::<bool>(), picks in (any::<u32>(), any::<u32>()),
    ) {
        let raw = content(items, seed);
        let encoded = applied(&filters, mask, &raw, 4);
        let codec = ChunkCodec::of_filters(&filters, mask, items, DType::UInt32, swap);
        let mut expected = raw.clone();
        if swap {
            swap_bytes(&mut expected, 4);
        }
        let mut scratch = Scratch::default();
        // twice: the scratch is full of what came before
        for _ in 0..2 {
            let whole = codec.decode(&encoded, &mut scratch).unwrap();
            prop_assert_eq!(&whole.elements().unwrap()[..], &expected[..]);
            prop_assert_eq!(elements_of(&whole, 0..items, 4), &expected[..]);
        }
        let (a, b) = (picks.0 as usize % items, picks.1 as usize % items);
        let range = a.min(b)..a.max(b);
        let part = codec.decode_ranges(&encoded, std::iter::once(range.clone()), &mut scratch).unwrap();
        prop_assert_eq!(elements_of(&part, range.clone(), 4), &expected[range.start * 4..range.end * 4]);
    }

    #[test]
    fn damaged_chunks_are_errors_or_of_the_right_size(
        filters in prop::collection::vec(prop::sample::select(&FILTERS[..]), 1..5), items in 1usize..2000, seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let mut encoded = applied(&filters, 0, &content(items, seed), 4);
        (0..=random.below(4)).for_each(|_| random.damage(&mut encoded));
        encoded.truncate(encoded.len() - random.below(3));
        undo_damaged(&filters, &encoded, items);
    }
}

/// libhdf5 gives the second of two such filters no parameter, and has all chunks skip it.
#[test]
fn a_shuffle_without_a_parameter_is_an_error_unless_chunks_skip_it() {
    let filters = [Filter::new(2, "shuffle", &[4]).unwrap(), Filter::new(2, "shuffle", &[]).unwrap()];
    let raw = content(100, 5);
    let encoded = applied(&filters[..1], 0, &raw, 4);
    let mut scratch = Scratch::default();
    let decoded = |mask, scratch: &mut Scratch| {
        let codec = ChunkCodec::of_filters(&filters, mask, 100, DType::UInt32, false);
        codec.decode(&encoded, scratch).map(|decoded| elements_of(&decoded, 0..100, 4))
    };
    assert_eq!(decoded(0b10, &mut scratch).unwrap(), raw);
    let error = decoded(0, &mut scratch).unwrap_err().to_string();
    assert!(error.contains("expected the size of an item"), "{error}");
}

fn undo_damaged(filters: &[Filter], encoded: &[u8], items: usize) {
    // without spare room behind it, where memory checkers would not see what is read too far
    let encoded = &*Box::<[u8]>::from(encoded);
    let codec = ChunkCodec::of_filters(filters, 0, items, DType::UInt32, false);
    let mut scratch = Scratch::default();
    if let Ok(decoded) = codec.decode(encoded, &mut scratch) {
        assert_eq!(elements_of(&decoded, 0..items, 4).len(), items * 4);
    }
}

/// Runs until the time is up: `ANNBATCH_FUZZ_SECONDS=600 cargo test --release filters_fuzz -- --ignored --nocapture`.
#[test]
#[ignore = "a fuzz run; its length is asked for"]
fn filters_fuzz() {
    let (mut chunks, mut inputs) = (0u64, 0u64);
    crate::base::fuzz::run(|random| {
        let filters: Vec<Filter> = (0..=random.below(4)).map(|_| random.pick(&FILTERS)).collect();
        let items = 1 + random.below(2000);
        let whole = applied(&filters, 0, &content(items, random.next()), 4);
        chunks += 1;
        for _ in 0..50 {
            let mut encoded = whole.clone();
            (0..=random.below(4)).for_each(|_| random.damage(&mut encoded));
            encoded.truncate(encoded.len() - random.below(2) * random.below(encoded.len()));
            undo_damaged(&filters, &encoded, items);
            inputs += 1;
        }
    });
    println!("{inputs} inputs from {chunks} chunks, no finding");
}

fn error_of(filters: &[Filter], encoded: &[u8], items: usize) -> String {
    let codec = ChunkCodec::of_filters(filters, 0, items, DType::UInt32, false);
    codec.decode(encoded, &mut Scratch::default()).unwrap_err().to_string()
}

#[test]
fn what_is_wrong_is_said() {
    let raw = content(100, 3);
    let gzip = applied(&[Filter::Deflate], 0, &raw, 4);
    let sum = applied(&[Filter::Fletcher32], 0, &raw, 4);
    let mut flipped = sum.clone();
    flipped[50] ^= 1;
    let lzf = lzf_of(&raw);
    for (filters, encoded, items, expected) in [
        (&[Filter::Deflate][..], &gzip[..gzip.len() / 2], 100, "cut off"),
        (&[Filter::Deflate], &[&gzip[..], b"x"].concat(), 100, "bytes follow"),
        (&[Filter::Deflate], &gzip, 99, "more than was expected"),
        (&[Filter::Deflate], &gzip, 101, "400 bytes, expected 404"),
        (&[Filter::Deflate], &gzip, 1 << 40, "cannot hold"),
        (&[Filter::Shuffle(4), Filter::Deflate], &gzip, 101, "400 bytes, expected 404"),
        (&[Filter::Fletcher32], &flipped, 100, "wrong checksum: fletcher32"),
        (&[Filter::Fletcher32], &sum[..3], 100, "shorter than its checksum"),
        (&[Filter::Fletcher32], &sum, 99, "400 bytes, expected 396"),
        (&[Filter::Lzf], &lzf[..lzf.len() - 1], 100, "truncated"),
        (&[Filter::Lzf], &lzf, 99, "more than was expected"),
        (&[Filter::Lzf], &lzf, 101, "400 bytes, expected 404"),
        (&[Filter::Lzf], &[32, 0], 100, "before its beginning"),
        (&[Filter::Shuffle(4)], &raw, 99, "400 bytes, expected 396"),
        (&[Filter::Blosc], &raw, 100, "damaged"),
        (&[Filter::Zstd], &raw, 100, "damaged"),
    ] {
        let error = error_of(filters, encoded, items);
        assert!(error.contains(expected) && error.contains("damaged"), "{filters:?}: {error}");
    }
    let error = Filter::new(32013, "H5Z-ZFP", &[]).unwrap_err().to_string();
    assert!(error.contains("zfp") && error.contains("compression=\"gzip\""), "{error}");
}

/// The slow twin: sums that are reduced once, at the end. That they are those of libhdf5 is for files of h5py to show.
#[test]
fn checksums_equal_the_slow_twin() {
    let bytes: Vec<u8> = (0..2001u32).map(|i| (i * 7 + i / 251) as u8).collect();
    assert_eq!(fletcher32(&bytes[..4]), reference_fletcher32(&bytes[..4]));
    for n in [2, 718, 720, 722, 1441, 2000, 2001, 3, 1] {
        assert_eq!(fletcher32(&bytes[..n]), reference_fletcher32(&bytes[..n]), "{n} bytes");
    }
}

/// The sums modulo 65,535, where 0 is written as 65,535 once anything but 0 was added.
fn reference_fletcher32(bytes: &[u8]) -> u32 {
    let (mut low, mut high) = (0u64, 0u64);
    for word in bytes.chunks(2) {
        low += u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0));
        high += low;
    }
    let modulo = |sum: u64| if sum == 0 { 0 } else { (sum - 1) % 65_535 + 1 };
    (modulo(high) << 16 | modulo(low)) as u32
}

#[test]
fn planes_are_not_copied_where_shuffling_is_all_that_is_left() {
    let raw = content(1000, 5);
    let encoded = applied(&[Filter::Shuffle(4)], 0, &raw, 4);
    let codec = ChunkCodec::of_filters(&[Filter::Shuffle(4)], 0, 1000, DType::UInt32, false);
    let mut scratch = Scratch::default();
    let decoded = codec.decode(&encoded, &mut scratch).unwrap();
    assert_eq!((elements_of(&decoded, 0..1000, 4), decoded.bytes()), (raw, 0));
    drop(decoded);
    assert!(scratch.buffers.iter().all(Vec::is_empty));
}
