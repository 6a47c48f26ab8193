//! Copies against slow twins.

use super::*;
use crate::decode::stored::MAX_ITEM;

#[test]
fn every_safe_cast_has_a_copy() {
    for src in DType::ALL {
        for dst in DType::ALL {
            let expected = src.casts_safely_to(dst) || (src, dst) == (DType::UInt64, DType::Int64);
            assert_eq!(copy_values(src, dst).is_some(), expected, "{src} -> {dst}");
        }
    }
}

#[test]
fn widens_from_unaligned_sources_and_reports_the_largest_index() {
    let mut bytes = vec![0u8; 1];
    let values: Vec<u16> = (0..1000).map(|i| (i * 61) as u16).collect();
    bytes.extend(values.iter().flat_map(|v| v.to_ne_bytes()));
    let mut out = vec![0i32; values.len()];
    let copy = copy_indices(DType::UInt16, DType::Int32).unwrap();
    // SAFETY: both sides hold 1,000 elements.
    let largest =
        unsafe { copy.run(Stored::Items(&bytes[1..]), out.as_mut_ptr().cast(), values.len(), &mut Columns::new(&[], false)) };
    assert_eq!(out, values.iter().map(|&v| i32::from(v)).collect::<Vec<_>>());
    assert_eq!(largest, u64::from(*values.iter().max().unwrap()));
}

#[test]
fn negative_indices_are_huge_and_overflow_is_seen() {
    fn bytes<const N: usize>(stored: &[[u8; N]]) -> Stored<'_> {
        Stored::Items(stored.as_flattened())
    }
    let mut out = [0i32; 2];
    let stored = [3i32, -1].map(i32::to_ne_bytes);
    // SAFETY: both sides hold two elements.
    let largest = unsafe {
        copy_indices(DType::Int32, DType::Int32).unwrap().run(
            bytes(&stored),
            out.as_mut_ptr().cast(),
            2,
            &mut Columns::new(&[], false),
        )
    };
    assert_eq!(largest, u64::MAX);
    // int8 -1 is 255 as its own unsigned width, which 300 columns would let through
    let (stored, copy) = ([-1i8, 4].map(i8::to_ne_bytes), copy_indices(DType::Int8, DType::Int32).unwrap());
    // SAFETY: both sides hold two elements.
    let largest = unsafe { copy.run(bytes(&stored), out.as_mut_ptr().cast(), 2, &mut Columns::new(&[], false)) };
    assert_eq!(largest, u64::MAX);
    let (stored, mut out) = ([u64::MAX, 1].map(u64::to_ne_bytes), [0i64; 2]);
    // SAFETY: both sides hold two elements.
    let fits = unsafe { copy_values(DType::UInt64, DType::Int64).unwrap().run(bytes(&stored), out.as_mut_ptr().cast(), 2) };
    assert!(!fits);
}

/// The slow twin: element by element through f64, which holds what these values need.
fn value(dtype: DType, bytes: &[u8]) -> f64 {
    match dtype {
        DType::Bool => f64::from(u8::from(bytes[0] != 0)),
        DType::Int8 => f64::from(bytes[0] as i8),
        DType::UInt8 => f64::from(bytes[0]),
        DType::Int16 => f64::from(i16::from_ne_bytes(bytes.try_into().unwrap())),
        DType::UInt16 => f64::from(u16::from_ne_bytes(bytes.try_into().unwrap())),
        DType::Int32 => f64::from(i32::from_ne_bytes(bytes.try_into().unwrap())),
        DType::UInt32 => f64::from(u32::from_ne_bytes(bytes.try_into().unwrap())),
        DType::Int64 => i64::from_ne_bytes(bytes.try_into().unwrap()) as f64,
        DType::UInt64 => u64::from_ne_bytes(bytes.try_into().unwrap()) as f64,
        DType::Float16 => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
        DType::Float32 => f64::from(f32::from_ne_bytes(bytes.try_into().unwrap())),
        DType::Float64 => f64::from_ne_bytes(bytes.try_into().unwrap()),
        DType::BFloat16 => unreachable!("not stored"),
    }
}

/// A line of the caches.
#[repr(align(64))]
#[derive(Clone)]
#[expect(dead_code, reason = "written and read through a pointer")]
struct Aligned([u8; 64]);

/// Every pair of types, from items and from planes, at every length around the stores' and many alignments: the
/// values arrive, and nothing beside them is written.
#[test]
fn every_copy_equals_its_slow_twin() {
    for (src, dst) in DType::ALL.into_iter().flat_map(|s| DType::ALL.map(|d| (s, d))) {
        let Some(copy) = copy_values(src, dst) else { continue };
        let (from, to) = (src.size(), dst.size());
        // all lengths around the first run of whole lines, whatever comes before and behind them
        for n in (0..70).chain(STREAMED_BYTES / to - 1..=STREAMED_BYTES * 2 / to).chain([500, 2_100, 5_000]) {
            // small values of either sign, so that no cast rounds
            let stored: Vec<u8> = (0..n)
                .flat_map(|i| {
                    let v = (i * 7 % 251) as u8;
                    match src {
                        DType::Float16 => f16::from_f64(f64::from(v)).to_ne_bytes().to_vec(),
                        DType::Float32 => f32::from(v).to_ne_bytes().to_vec(),
                        DType::Float64 => f64::from(v).to_ne_bytes().to_vec(),
                        _ => {
                            let mut b = vec![0; from];
                            b[0] = v;
                            b
                        }
                    }
                })
                .collect();
            // boxes have no spare room behind them, where memory checkers would not see what is read too far
            let stored = stored.into_boxed_slice();
            let planes: Vec<Box<[u8]>> = (0..from).map(|j| stored.iter().skip(j).step_by(from).copied().collect()).collect();
            let mut lent: [&[u8]; MAX_ITEM] = [&[]; MAX_ITEM];
            lent.iter_mut().zip(&planes).for_each(|(a, b)| *a = b);
            let shifts = [0, 1, 3, 17, 64 / to - 1].map(|shift| shift % (64 / to));
            for (shift, run) in shifts.into_iter().flat_map(|s| [(s, Stored::Items(&stored)), (s, Stored::Planes(lent))]) {
                let mut out = vec![Aligned([0; 64]); (n * to).div_ceil(64) + 2];
                let first = out.as_mut_ptr().cast::<u8>();
                // SAFETY: the vector holds shift + n elements and more, and its lines are aligned to all.
                assert!(unsafe { copy.run(run, first.add(shift * to), n) });
                publish();
                // SAFETY: as many bytes as the vector has.
                let bytes = unsafe { std::slice::from_raw_parts(first, out.len() * 64) };
                assert!(bytes[..shift * to].iter().chain(&bytes[(shift + n) * to..]).all(|b| *b == 0), "{src} -> {dst}");
                for i in 0..n {
                    let (a, b) = (value(src, &stored[i * from..(i + 1) * from]), value(dst, &bytes[(shift + i) * to..][..to]));
                    assert!((a - b).abs() < f64::EPSILON, "{src} -> {dst}: {a} became {b}");
                }
            }
        }
    }
}

/// Every type of index, from items and from planes, at lengths around the stores': each becomes the entry of the table.
#[test]
fn indices_are_exchanged_for_others() {
    const STORED: [DType; 8] =
        [DType::Int8, DType::Int16, DType::Int32, DType::Int64, DType::UInt8, DType::UInt16, DType::UInt32, DType::UInt64];
    let columns: Vec<u32> = (0..100).map(|c| if c % 7 == 3 { u32::MAX } else { 60_000 - 300 * c }).collect();
    for (src, dst) in STORED.into_iter().flat_map(|s| [DType::UInt16, DType::Int32, DType::Int64].map(|d| (s, d))) {
        let copy = copy_indices(src, dst).unwrap();
        let (from, to) = (src.size(), dst.size());
        for n in (1..70).chain([127, 128, 500, 2_100]) {
            let numbers: Vec<u8> = (0..n).map(|i| (i * 37 % 99) as u8).collect();
            let stored: Vec<u8> = numbers.iter().flat_map(|&c| u64::from(c).to_le_bytes()[..from].to_vec()).collect();
            let planes: Vec<Vec<u8>> = (0..from).map(|j| stored.iter().skip(j).step_by(from).copied().collect()).collect();
            let mut lent: [&[u8]; MAX_ITEM] = [&[]; MAX_ITEM];
            lent.iter_mut().zip(&planes).for_each(|(a, b)| *a = b);
            for run in [Stored::Items(&stored), Stored::Planes(lent)] {
                let mut out = vec![0u64; n * to / 8 + 1];
                // SAFETY: both sides hold n elements.
                let largest = unsafe { copy.run(run, out.as_mut_ptr().cast(), n, &mut Columns::new(&columns, false)) };
                publish();
                assert_eq!(largest, u64::from(*numbers.iter().max().unwrap()));
                // SAFETY: as many bytes as the vector has.
                let bytes = unsafe { std::slice::from_raw_parts(out.as_ptr().cast::<u8>(), n * to) };
                for (i, &number) in numbers.iter().enumerate() {
                    let expected = u64::from(columns[number as usize]).to_le_bytes();
                    assert_eq!(bytes[i * to..(i + 1) * to], expected[..to], "{src} -> {dst}, {i} of {n}");
                }
            }
        }
        // one that the table does not reach is told, and read from nowhere
        let stored: Vec<u8> = [[99u64, 120], [1, 127]].concat().iter().flat_map(|c| c.to_le_bytes()[..from].to_vec()).collect();
        let mut out = [0u64; 4];
        // SAFETY: both sides hold four elements.
        let largest = unsafe { copy.run(Stored::Items(&stored), out.as_mut_ptr().cast(), 4, &mut Columns::new(&columns, false)) };
        assert_eq!(largest, 127, "{src} -> {dst}");
    }
}

/// Whether a number is one that `dst` has, to the last bit.
fn is_whole(value: f64, dst: DType) -> bool {
    let most = if dst == DType::UInt8 { 255.0 } else { 65_535.0 };
    value.fract() == 0.0 && (0.0..=most).contains(&value) && !(value == 0.0 && value.is_sign_negative())
}

/// Every stored type as uint8 and uint16, from items and from planes, with one odd value at any place: it is told, and where
/// there is none all arrive.
#[test]
fn values_that_are_not_whole_are_told() {
    let numbers =
        [0.0, 1.0, 255.0, 256.0, 65_535.0, 65_536.0, -1.0, -0.0, 0.5, 254.999, 1e9, f64::NAN, f64::INFINITY, -f64::INFINITY];
    let stored_as = |src: DType, v: f64| -> Vec<u8> {
        match src {
            DType::Bool => vec![v as u8],
            DType::Int8 => (v as i8).to_ne_bytes().to_vec(),
            DType::UInt8 => (v as u8).to_ne_bytes().to_vec(),
            DType::Int16 => (v as i16).to_ne_bytes().to_vec(),
            DType::UInt16 => (v as u16).to_ne_bytes().to_vec(),
            DType::Int32 => (v as i32).to_ne_bytes().to_vec(),
            DType::UInt32 => (v as u32).to_ne_bytes().to_vec(),
            DType::Int64 => (v as i64).to_ne_bytes().to_vec(),
            DType::UInt64 => (v as u64).to_ne_bytes().to_vec(),
            DType::Float16 => f16::from_f64(v).to_ne_bytes().to_vec(),
            DType::Float32 => (v as f32).to_ne_bytes().to_vec(),
            DType::Float64 => v.to_ne_bytes().to_vec(),
            DType::BFloat16 => unreachable!("not stored"),
        }
    };
    let pairs = DType::ALL.into_iter().flat_map(|s| DType::ALL.map(|d| (s, d)));
    for (src, dst) in pairs {
        let copy = copy_whole_values(src, dst);
        assert_eq!(copy.is_some(), src != DType::BFloat16 && [DType::UInt8, DType::UInt16].contains(&dst), "{src} -> {dst}");
        let (Some(copy), from, to) = (copy, src.size(), dst.size()) else { continue };
        for (n, odd) in [1, 31, 32, 33, 129, 3_000].into_iter().flat_map(|n| numbers.map(|odd| (n, odd))) {
            for place in [0, n / 2, n - 1] {
                let plain = |i: usize| if src == DType::Bool { (i % 2) as f64 } else { (i * 7 % 128) as f64 };
                let stored: Vec<u8> = (0..n).flat_map(|i| stored_as(src, if i == place { odd } else { plain(i) })).collect();
                let planes: Vec<Vec<u8>> = (0..from).map(|j| stored.iter().skip(j).step_by(from).copied().collect()).collect();
                let mut lent: [&[u8]; MAX_ITEM] = [&[]; MAX_ITEM];
                lent.iter_mut().zip(&planes).for_each(|(a, b)| *a = b);
                for run in [Stored::Items(&stored), Stored::Planes(lent)] {
                    let mut out = vec![0u64; n * to / 8 + 2];
                    // SAFETY: both sides hold n elements.
                    let fits = unsafe { copy.run(run, out.as_mut_ptr().cast(), n) };
                    publish();
                    let values = stored.chunks(from).map(|bytes| value(src, bytes));
                    assert_eq!(fits, values.clone().all(|v| is_whole(v, dst)), "{src} -> {dst}: {odd} at {place} of {n}");
                    // SAFETY: as many bytes as the vector has.
                    let bytes = unsafe { std::slice::from_raw_parts(out.as_ptr().cast::<u8>(), n * to) };
                    let arrived = bytes.chunks(to).map(|bytes| value(dst, bytes));
                    assert!(!fits || values.eq(arrived), "{src} -> {dst}: {n}");
                }
            }
        }
    }
}

/// Whether indices rise is seen over all runs of a row, whatever becomes of them on the way.
#[test]
fn indices_that_do_not_rise_are_told() {
    let places: Vec<u32> = (0..6_000).rev().collect();
    for (src, dst) in [DType::UInt16, DType::Int32, DType::UInt64].into_iter().flat_map(|s| [(s, DType::UInt16), (s, DType::Int64)])
    {
        let (copy, from, to) = (copy_indices(src, dst).unwrap(), src.size(), dst.size());
        for n in [0usize, 1, 2, 31, 63, 64, 65, 1_025, 2_500] {
            // in order, with two of them exchanged, or with one of them twice
            let odd_places = [1, 2, 32, 64, 1_024, n / 2 + 1, n.saturating_sub(1)].into_iter().filter(|at| (1..n).contains(at));
            let odds = odd_places.flat_map(|at| [Some((at, false)), Some((at, true))]);
            for (odd, cut) in std::iter::once(None).chain(odds).flat_map(|odd| [(odd, 0), (odd, n / 3), (odd, n)]) {
                let mut numbers: Vec<u64> = (0..n as u64).map(|i| i * 2).collect();
                match odd {
                    Some((at, true)) => numbers[at] = numbers[at - 1],
                    Some((at, false)) => numbers.swap(at - 1, at),
                    None => {}
                }
                for exchanged in [&[][..], &places] {
                    let stored: Vec<u8> = numbers.iter().flat_map(|c| c.to_le_bytes()[..from].to_vec()).collect();
                    let mut out = vec![0u64; n * to / 8 + 1];
                    let mut columns = Columns::new(exchanged, true);
                    for part in [0..cut, cut..n] {
                        let bytes = Stored::Items(&stored[part.start * from..part.end * from]);
                        // SAFETY: both sides hold the part.
                        unsafe { copy.run(bytes, out.as_mut_ptr().cast::<u8>().add(part.start * to), part.len(), &mut columns) };
                    }
                    publish();
                    assert_eq!(columns.rise(), odd.is_none(), "{src} -> {dst}: {n}, {odd:?}, {cut}");
                }
            }
        }
    }
    assert!(!Columns::new(&[], false).rise(), "nobody has looked");
}
