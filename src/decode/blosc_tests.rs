//! Our Blosc reading against its slow twin, C-Blosc decoding whole chunks, and against damage.

use std::ops::Range;

use proptest::prelude::*;

use super::{BlockScratch, Blocks, Extract, Header, Outline, decode, decode_extract};
use crate::base::error::Result;
use crate::base::fuzz::Random;
use crate::decode::scatter::Stored;

const COMPRESSORS: [&std::ffi::CStr; 4] = [c"lz4", c"lz4hc", c"zstd", c"zlib"];

/// `items` elements of `size` bytes: the kinds of content that decide which sequences LZ4 has.
fn content(kind: usize, items: usize, size: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut last = 0u64;
    let values = (0..items).map(|i| match kind {
        0 => 0,
        1 => random.next(),
        // small counts as floats, sorted column indices, a short period, long runs
        2 => u64::from((1.0 + (random.below(40) * random.below(3)) as f32).to_bits()),
        3 => {
            last = if last > 30_000 { 0 } else { last + random.next() % 40 };
            last
        }
        4 => (i % 7) as u64 * 0x0101_0203,
        _ => (i as u64 / (1 + seed % 3000)) * 0x00ff_01ff,
    });
    values.flat_map(|v| v.to_le_bytes()[..size].to_vec()).collect()
}

fn compress(raw: &[u8], size: usize, level: i32, shuffle: i32, name: &std::ffi::CStr, block: usize) -> Vec<u8> {
    let mut out = vec![0u8; raw.len() + 16];
    // SAFETY: both buffers have the lengths given; the name ends with a zero byte.
    let n = unsafe {
        blosc_src::blosc_compress_ctx(
            level,
            shuffle,
            size,
            raw.len(),
            raw.as_ptr().cast(),
            out.as_mut_ptr().cast(),
            out.len(),
            name.as_ptr(),
            block,
            1,
        )
    };
    assert!(n > 0);
    out.truncate(n as usize);
    out
}

/// What C-Blosc makes of a chunk of `n` bytes, if anything.
fn twin(encoded: &[u8], n: usize) -> Option<Vec<u8>> {
    let mut claimed = 0;
    let mut out = vec![0u8; n];
    // SAFETY: C-Blosc reads the bytes of a chunk whose length it was told, and writes at most `n`.
    let got = unsafe {
        if blosc_src::blosc_cbuffer_validate(encoded.as_ptr().cast(), encoded.len(), &raw mut claimed) != 0 {
            return None;
        }
        blosc_src::blosc_decompress_ctx(encoded.as_ptr().cast(), out.as_mut_ptr().cast(), n, 1)
    };
    (got as usize == n).then_some(out)
}

/// The elements of each range, read through [`decode`]; `None` where the chunk is C-Blosc's.
fn read(
    encoded: &[u8],
    n: usize,
    size: usize,
    ranges: &[Range<usize>],
    scratch: &mut BlockScratch,
) -> Result<Option<Vec<Vec<u8>>>> {
    // without spare room behind it, where memory checkers would not see what is read too far
    let encoded = &*Box::<[u8]>::from(encoded);
    let Some(header) = Header::parse(encoded, n, size)? else { return Ok(None) };
    let (blocks, produced) = decode(header, encoded, ranges.iter().cloned(), scratch)?;
    assert!(produced <= n + ranges.len() * 32, "no more than all is decoded, but for what copies write too much");
    taken(&blocks, size, ranges).map(Some)
}

/// The elements of each range, of which all were asked for.
fn taken(blocks: &Blocks, size: usize, ranges: &[Range<usize>]) -> Result<Vec<Vec<u8>>> {
    let all = ranges.iter().map(|range| {
        let mut out = Vec::new();
        blocks.runs(range.clone(), |stored, done, n| {
            assert_eq!(done * size, out.len(), "runs come in order");
            match stored {
                Stored::Items(bytes) => out.extend_from_slice(bytes),
                Stored::Planes(planes) => (0..n).for_each(|i| out.extend(planes[..size].iter().map(|plane| plane[i]))),
            }
        })?;
        Ok(out)
    });
    all.collect()
}

/// The elements of each range, read from no more of the chunk than its outline says; `None` where it has none.
fn read_extract(
    encoded: &[u8],
    n: usize,
    size: usize,
    ranges: &[Range<usize>],
    scratch: &mut BlockScratch,
) -> Option<Result<Vec<Vec<u8>>>> {
    let outline = Outline::of(encoded, n, size)?;
    let needed = ranges.iter().filter(|range| !range.is_empty()).cloned();
    let hull = needed.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))?;
    let bytes = outline.bytes_of(hull);
    let part = Box::<[u8]>::from(&encoded[bytes.clone()]);
    let extract = Extract { outline: &outline, first: bytes.start, encoded: &part };
    let decoded = decode_extract(extract, ranges.iter().cloned(), scratch);
    Some(decoded.and_then(|(blocks, _)| taken(&blocks, size, ranges)))
}

fn ranges_in(items: usize, picks: &[(usize, usize)]) -> Vec<Range<usize>> {
    picks.iter().map(|&(a, n)| a % items..(a % items + n).min(items)).collect()
}

proptest! {
    #![proptest_config(crate::base::fuzz::cases(400))]

    /// Any ranges of any chunk are what C-Blosc says.
    #[test]
    fn ranges_equal_the_whole_chunk(
        kind in 0usize..6, items in 1usize..40_000, size in prop::sample::select(vec![1usize, 2, 4, 8]), seed in any::<u64>(),
        level in 0i32..=9, shuffle in 0i32..=2, name in 0usize..4,
        block in prop::sample::select(vec![0usize, 256, 1000, 4096, 65_536, 1 << 20]),
        picks in prop::collection::vec((any::<u32>().prop_map(|a| a as usize), 0usize..3000), 1..8),
    ) {
        let raw = content(kind, items, size, seed);
        let encoded = compress(&raw, size, level, shuffle, COMPRESSORS[name], block);
        prop_assert!(twin(&encoded, raw.len()).is_some_and(|twin| twin == raw));
        prop_assert!(Header::parse(&encoded, raw.len(), size).unwrap().is_some(), "none of these is left to C-Blosc");
        let mut ranges = ranges_in(items, &picks);
        ranges.push(0..items);
        let mut scratch = BlockScratch::default();
        // each alone, so that decoding stops early, and all together; the scratch is full of what came before
        for some in ranges.iter().map(std::slice::from_ref).chain([&ranges[..]]) {
            if let Some(got) = read(&encoded, raw.len(), size, some, &mut scratch).unwrap() {
                let of_part = read_extract(&encoded, raw.len(), size, some, &mut scratch);
                for (range, got) in some.iter().zip(&got) {
                    prop_assert_eq!(&got[..], &raw[range.start * size..range.end * size]);
                }
                prop_assert!(of_part.is_none_or(|of_part| of_part.unwrap() == got));
            }
        }
    }

    /// Damage is an error where C-Blosc sees one in the whole chunk; what is read of a chunk that it accepts is the same.
    #[test]
    fn damage_never_reads_or_writes_out_of_bounds(
        kind in 0usize..6, items in 1usize..4_000, size in prop::sample::select(vec![1usize, 2, 4, 8]), seed in any::<u64>(),
        shuffle in 0i32..=2, name in 0usize..4, block in prop::sample::select(vec![0usize, 256, 1000, 4096]),
        hits in prop::collection::vec((any::<u32>(), any::<u8>()), 1..6), cut in any::<u32>(), cuts in any::<bool>(),
    ) {
        let raw = content(kind, items, size, seed);
        let mut encoded = compress(&raw, size, 5, shuffle, COMPRESSORS[name], block);
        for (at, value) in hits {
            let at = at as usize % encoded.len();
            encoded[at] = value;
        }
        if cuts {
            encoded.truncate(cut as usize % encoded.len());
        }
        check_damaged(&encoded, raw.len(), size);
    }
}

/// Whole chunks are accepted exactly where C-Blosc accepts them, with the same bytes.
fn check_damaged(encoded: &[u8], n: usize, size: usize) {
    let mut scratch = BlockScratch::default();
    let ours = read(encoded, n, size, std::slice::from_ref(&(0..n / size)), &mut scratch);
    match (ours, twin(encoded, n)) {
        (Ok(Some(got)), Some(expected)) => assert_eq!(got[0], expected),
        (Ok(Some(_)), None) => panic!("C-Blosc refuses a chunk that we accept"),
        // what the format forbids and the reference decoder does not look at: a match of offset 0, and, where its
        // shortcut for short sequences applies, a match too near to the end
        (Err(e), Some(_)) if e.to_string().contains("offset 0") || e.to_string().contains("expected length") => {}
        (Err(e), Some(_)) => panic!("C-Blosc accepts a chunk that we refuse: {e}"),
        (Err(_), None) | (Ok(None), _) => {}
    }
    // a part of it must not go out of bounds either, whatever it reads
    let (some, last) = (0..(n / size).div_ceil(3), (n / size).saturating_sub(3)..n / size);
    let some = std::slice::from_ref(&some);
    let whole = read(encoded, n, size, some, &mut scratch);
    // nor where no more of it is there; what is read is what the whole chunk would give
    if let Some(Ok(of_part)) = read_extract(encoded, n, size, some, &mut scratch) {
        assert_eq!(Some(of_part), whole.unwrap());
    }
    let _ = read_extract(encoded, n, size, std::slice::from_ref(&last), &mut scratch);
}

/// Runs until the time is up: `ANNBATCH_FUZZ_SECONDS=600 cargo test --release blosc_fuzz -- --ignored --nocapture`.
#[test]
#[ignore = "a fuzz run; its length is asked for"]
fn blosc_fuzz() {
    let (mut chunks, mut inputs) = (0u64, 0u64);
    crate::base::fuzz::run(|random| {
        let (kind, items, size) = (random.below(6), 1 + random.below(3000), random.pick(&[1, 2, 4, 8]));
        let raw = content(kind, items, size, random.next());
        let (level, shuffle, name) = (1 + random.below(9) as i32, random.below(3) as i32, random.pick(&COMPRESSORS[..2]));
        let whole = compress(&raw, size, level, shuffle, name, random.pick(&[0, 256, 1000]));
        chunks += 1;
        for _ in 0..50 {
            let mut encoded = whole.clone();
            (0..=random.below(4)).for_each(|_| random.damage(&mut encoded));
            check_damaged(&encoded, raw.len(), size);
            inputs += 1;
        }
    });
    println!("{inputs} inputs from {chunks} chunks, no finding");
}

#[test]
fn decoding_stops_where_enough_is_known() {
    let raw = content(2, 100_000, 4, 7);
    let encoded = compress(&raw, 4, 3, 1, c"lz4", 65_536);
    let header = Header::parse(&encoded, raw.len(), 4).unwrap().unwrap();
    let mut scratch = BlockScratch::default();
    let mut produced = |range: Range<usize>| decode(header, &encoded, std::iter::once(range), &mut scratch).unwrap().1;
    // a block of 65,536 elements, split into planes, of which two hold nothing but zeros, and a shorter one in a piece
    assert_eq!(header.block_items(), 65_536);
    assert!((131_072..140_000).contains(&produced(0..65_536)));
    assert!((200..2000).contains(&produced(0..100)));
    assert!((60_200..62_000).contains(&produced(30_000..30_100)));
    assert!(produced(65_500..65_600) > 131_072 + 3 * 34_464);
    assert_eq!(produced(0..0), 0);
}

#[test]
fn an_outline_tells_the_bytes_of_blocks_in_any_order() {
    let raw = content(3, 320_000, 2, 7);
    let encoded = compress(&raw, 2, 3, 1, c"lz4", 65_536);
    let header = Header::parse(&encoded, raw.len(), 2).unwrap().unwrap();
    assert_eq!((header.block_items(), header.n_blocks()), (65_536, 5));
    let start = |encoded: &[u8], block| super::word(encoded, 16 + 4 * block).unwrap();
    let outline = Outline::of(&encoded, raw.len(), 2).unwrap();
    assert_eq!(outline.bytes_of(65_535..65_537), start(&encoded, 0)..start(&encoded, 2));
    assert_eq!(outline.bytes_of(319_999..320_000), start(&encoded, 4)..encoded.len());
    // as several threads of C-Blosc write them: the second block behind all others
    let (second, third) = (start(&encoded, 1), start(&encoded, 2));
    let mut moved = [&encoded[..second], &encoded[third..], &encoded[second..third]].concat();
    for block in 1..5 {
        let at = if block == 1 { encoded.len() - (third - second) } else { start(&encoded, block) - (third - second) };
        moved[16 + 4 * block..20 + 4 * block].copy_from_slice(&(at as u32).to_le_bytes());
    }
    assert_eq!(twin(&moved, raw.len()).unwrap(), raw);
    let outline = Outline::of(&moved, raw.len(), 2).unwrap();
    assert_eq!(outline.bytes_of(80_000..80_001), start(&moved, 1)..moved.len());
    let ranges = [65_536..131_072, 3..4, 280_000..280_010];
    let expected: Vec<&[u8]> = ranges.iter().map(|r| &raw[r.start * 2..r.end * 2]).collect();
    for some in [&ranges[..1], &ranges[1..2], &ranges[2..], &ranges[..]] {
        let got = read_extract(&moved, raw.len(), 2, some, &mut BlockScratch::default()).unwrap().unwrap();
        let at = ranges.iter().position(|r| *r == some[0]).unwrap();
        assert_eq!(got, expected[at..at + some.len()]);
    }
    // what lies beside was not read
    let extract = Extract { outline: &outline, first: start(&moved, 2), encoded: &moved[start(&moved, 2)..start(&moved, 3)] };
    assert!(decode_extract(extract, std::iter::once(0..1), &mut BlockScratch::default()).is_err());
    // one block, and what is not Blosc
    assert!(Outline::of(&compress(&raw[..2000], 2, 3, 1, c"lz4", 0), 2000, 2).is_none());
    assert!(Outline::of(&raw, raw.len(), 2).is_none());
    // stored as it is
    let noise = content(1, 40_000, 2, 7);
    assert!(Outline::of(&compress(&noise, 2, 0, 1, c"lz4", 0), noise.len(), 2).is_none());
    // a block that begins within another, or within the table; one that ends behind the chunk
    for at in [start(&encoded, 0) + 1, start(&encoded, 0), 20, encoded.len() - 3] {
        let mut overlapping = encoded.clone();
        overlapping[20..24].copy_from_slice(&(at as u32).to_le_bytes());
        assert!(Outline::of(&overlapping, raw.len(), 2).is_none(), "{at}");
    }
}

/// A chunk of one block, whose two planes are these streams.
fn chunk_of(planes: [&[u8]; 2], n: usize) -> Vec<u8> {
    let word = |n: usize| (n as u32).to_le_bytes();
    let total = 16 + 4 + planes.iter().map(|p| 4 + p.len()).sum::<usize>();
    let mut out = vec![2, 1, 1 | 1 << 5, 2];
    out.extend([word(n), word(n), word(total), word(20)].concat());
    out.extend(planes.iter().flat_map(|p| [&word(p.len())[..], p].concat()));
    out
}

/// Streams that differ from a plane of zeros, or from a block that ends as blocks end, by one byte.
#[test]
fn streams_that_end_wrongly_are_refused_as_by_c_blosc() {
    let good = [&[0x1f, 0, 1, 0, 255, 0, 0x50][..], &[0; 5]].concat();
    let n = 1 + 19 + 255 + 5;
    assert_eq!(twin(&chunk_of([&good, &good], 2 * n), 2 * n), Some(vec![0; 2 * n]));
    check_damaged(&chunk_of([&good, &good], 2 * n), 2 * n, 2);
    // fifteen last literals need another length byte
    let zeros = [&[0x1f, 0, 1, 0, 255, 0, 0xf0][..], &[0; 15]].concat();
    let n = 1 + 19 + 255 + 15;
    assert!(
        read(&chunk_of([&zeros, &zeros], 2 * n), 2 * n, 2, std::slice::from_ref(&(0..n)), &mut BlockScratch::default()).is_err()
    );
    // a match up to the end, then with too few literals
    let ending = [&[0x1f, 7, 1, 0][..], &[255; 60], &[7]].concat();
    let n = 1 + 19 + 255 * 60 + 7;
    check_damaged(&chunk_of([&ending, &ending], 2 * n), 2 * n, 2);
    assert!(
        read(&chunk_of([&ending, &ending], 2 * n), 2 * n, 2, std::slice::from_ref(&(0..n)), &mut BlockScratch::default()).is_err()
    );
}

/// One long stream that all blocks name: refused without being read once per block.
#[test]
fn a_stream_of_many_blocks_is_not_read_for_each() {
    let (blocks, stream) = (20_000usize, 2_000_000usize);
    let word = |n: usize| (n as u32).to_le_bytes();
    let n = blocks * 1024;
    let total = 16 + 4 * blocks + 4 + stream;
    let mut out = vec![2, 1, 1 | 1 << 5, 8];
    out.extend([word(n), word(1024), word(total)].concat());
    (0..blocks).for_each(|_| out.extend(word(16 + 4 * blocks)));
    out.extend(word(stream));
    out.extend([0x1f, 0, 1, 0]);
    out.resize(total, 255);
    // 40 billion bytes, if each block looked through it
    assert!(read(&out, n, 8, std::slice::from_ref(&(0..n / 8)), &mut BlockScratch::default()).is_err());
}

#[test]
fn elements_that_were_not_asked_for_are_refused() {
    let raw = content(3, 50_000, 2, 3);
    let encoded = compress(&raw, 2, 3, 1, c"lz4", 4096);
    let header = Header::parse(&encoded, raw.len(), 2).unwrap().unwrap();
    let mut scratch = BlockScratch::default();
    let (blocks, _) = decode(header, &encoded, std::iter::once(0..100), &mut scratch).unwrap();
    assert!(blocks.runs(40_000..40_010, |_, _, _| ()).unwrap_err().to_string().contains("not asked for"));
    assert!(decode(header, &encoded, std::iter::once(0..50_001), &mut scratch).is_err());
}
