//! Runs of elements copied to their slots, widened on the way.
//!
//! Each function is one pass over `n` elements: read (unaligned), convert, write. They are monomorphic per
//! pair of types, from elements or from their byte planes, and compiled twice, for the baseline and for AVX2, chosen at run time. The AVX2 ones store past the
//! caches: whoever hands the result to another thread calls [`publish`] first.

use std::mem::MaybeUninit;

use half::f16;

use crate::dtype::DType;

/// Largest element, in bytes.
pub const MAX_ITEM: usize = 8;

/// Where a run of stored elements lies.
#[derive(Debug, Clone, Copy)]
pub enum Stored<'a> {
    /// One behind the other, in any alignment.
    Items(&'a [u8]),
    /// Byte `j` of every element in plane `j`; planes beyond the element's size are empty.
    Planes([&'a [u8]; MAX_ITEM]),
}

/// A copy of elements from the type in which they are stored to the one in which they are delivered, which answers `R`.
#[derive(Clone, Copy)]
pub struct CopyRun<R> {
    items: unsafe fn(*const u8, *mut u8, usize) -> R,
    planes: unsafe fn(&[&[u8]; MAX_ITEM], *mut u8, usize) -> R,
}

/// Copies values; answers whether all of them could be represented.
pub type CopyValues = CopyRun<bool>;

/// Copies column indices; answers the largest one seen, as unsigned (a negative one is huge).
pub type CopyIndices = CopyRun<u64>;

impl<R> CopyRun<R> {
    /// Copies `n` elements.
    ///
    /// # Safety
    /// `src` holds `n` stored elements, `dst` is writable for `n` delivered ones and aligned to them; the two do not
    /// overlap, and no other thread touches either part of `dst`.
    pub unsafe fn run(&self, src: Stored, dst: *mut u8, n: usize) -> R {
        // SAFETY: the caller's promise.
        unsafe {
            match src {
                Stored::Items(bytes) => (self.items)(bytes.as_ptr(), dst, n),
                Stored::Planes(planes) => (self.planes)(&planes, dst, n),
            }
        }
    }
}

/// An element as it is stored.
trait Item: Copy {
    /// Element `i` of planes.
    ///
    /// # Safety
    /// The first `size_of::<Self>()` planes hold more than `i` bytes.
    unsafe fn gather(planes: &[&[u8]; MAX_ITEM], i: usize) -> Self;
}

macro_rules! items {
    ($($t:ty as $bits:ty: $from:expr),+ $(,)?) => { $(impl Item for $t {
        #[inline(always)]
        unsafe fn gather(planes: &[&[u8]; MAX_ITEM], i: usize) -> Self {
            // SAFETY: the caller's promise.
            let bytes = std::array::from_fn(|j| unsafe { *planes[j].get_unchecked(i) });
            $from(<$bits>::from_ne_bytes(bytes))
        }
    })+ };
}
items! {
    Flag as u8: Flag, u8 as u8: |b| b, i8 as i8: |b| b,
    u16 as u16: |b| b, i16 as i16: |b| b, f16 as u16: f16::from_bits,
    u32 as u32: |b| b, i32 as i32: |b| b, f32 as u32: f32::from_bits,
    u64 as u64: |b| b, i64 as i64: |b| b, f64 as u64: f64::from_bits,
}

/// A stored value that becomes a delivered one.
trait Convert<D>: Copy {
    fn convert(self) -> D;
    /// Whether the value survives; only the one unsafe cast (u64 → i64) can say no.
    fn fits(self) -> bool {
        true
    }
}

/// A stored bool; any byte but zero is true, as torch and `NumPy` read it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Flag(u8);

macro_rules! by_from {
    ($($s:ty => $($d:ty),+;)+) => { $($(impl Convert<$d> for $s {
        #[inline(always)]
        fn convert(self) -> $d { <$d>::from(self) }
    })+)+ };
}
macro_rules! by_as {
    ($($s:ty => $($d:ty),+;)+) => { $($(impl Convert<$d> for $s {
        #[inline(always)]
        fn convert(self) -> $d { self as $d }
    })+)+ };
}
by_from! {
    i8 => i8, i16, i32, i64, f32, f64;
    i16 => i16, i32, i64, f32, f64;
    i32 => i32, i64, f64;
    i64 => i64;
    u8 => u8, u16, u32, u64, i16, i32, i64, f32, f64;
    u16 => u16, u32, u64, i32, i64, f32, f64;
    u32 => u32, u64, i64, f64;
    u64 => u64;
    f32 => f32, f64;
    f64 => f64;
    f16 => f16, f32, f64;
}
// NumPy counts 64-bit integers as safely cast to float64
by_as! {
    i64 => f64;
    u64 => f64;
}
impl Convert<i64> for u64 {
    #[inline(always)]
    fn convert(self) -> i64 {
        self as i64
    }
    #[inline(always)]
    fn fits(self) -> bool {
        i64::try_from(self).is_ok()
    }
}
impl Convert<f16> for u8 {
    #[inline(always)]
    fn convert(self) -> f16 {
        f16::from(self)
    }
}
impl Convert<f16> for i8 {
    #[inline(always)]
    fn convert(self) -> f16 {
        f16::from(self)
    }
}
macro_rules! flags {
    ($($d:ty),+) => { $(impl Convert<$d> for Flag {
        #[inline(always)]
        fn convert(self) -> $d { <$d>::from(u8::from(self.0 != 0)) }
    })+ };
}
flags! { u8, u16, u32, u64, i16, i32, i64, f16, f32, f64 }
impl Convert<i8> for Flag {
    #[inline(always)]
    fn convert(self) -> i8 {
        i8::from(self.0 != 0)
    }
}

/// Bytes of a [`Line`]: it stays in the nearest cache.
const LINE_BYTES: usize = 2048;
/// Bytes of one non-temporal store.
const STREAM_BYTES: usize = 32;

#[repr(align(64))]
#[expect(dead_code, reason = "written and read through a pointer")]
struct Line(MaybeUninit<[u8; LINE_BYTES]>);

/// Lets `write(to, from, len)` write elements `from..from + len` of a run of `n` to `to`, part by part until all are at
/// `dst`. Where `STREAM`, long runs are written to a line in the nearest cache and stored past the caches from there:
/// nobody reads a batch before it is complete, and fetching its memory first would only cost bandwidth.
///
/// # Safety
/// `dst` is writable for `n` elements and aligned to them, `write` writes all elements it is asked for and no others,
/// and with `STREAM` the CPU has AVX2.
#[inline(always)]
unsafe fn in_lines<D, const STREAM: bool>(dst: *mut D, n: usize, mut write: impl FnMut(*mut D, usize, usize)) {
    let size = size_of::<D>();
    if !STREAM || n * size < 4 * STREAM_BYTES {
        return write(dst, 0, n);
    }
    // up to the first whole store; elements are aligned, so that is a whole number of them
    let mut done = (dst.addr().next_multiple_of(STREAM_BYTES) - dst.addr()) / size;
    write(dst, 0, done);
    let mut line = Line(MaybeUninit::uninit());
    let out = (&raw mut line).cast::<D>();
    let whole = STREAM_BYTES / size;
    while n - done >= whole {
        let len = (n - done).min(LINE_BYTES / size) / whole * whole;
        write(out, done, len);
        // SAFETY: `len` elements were just written to the line, and `dst` has room for them and is aligned here.
        unsafe { stream(out.cast(), dst.add(done).cast(), len * size) };
        done += len;
    }
    // SAFETY: `done <= n`.
    write(unsafe { dst.add(done) }, done, n - done);
}

/// # Safety
/// `src` is readable and `dst` writable for `bytes`, both aligned to [`STREAM_BYTES`], of which `bytes` is a multiple;
/// the CPU has AVX.
#[inline(always)]
unsafe fn stream(src: *const u8, dst: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..bytes).step_by(STREAM_BYTES) {
        use std::arch::x86_64::{_mm256_load_si256, _mm256_stream_si256};
        // SAFETY: the caller's promise.
        unsafe { _mm256_stream_si256(dst.add(at).cast(), _mm256_load_si256(src.add(at).cast())) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, bytes);
    }
}

/// Makes what this thread has stored past the caches visible to threads that see what it writes next.
pub fn publish() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence of SSE, which every x86-64 has.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// # Safety
/// `dst` as for [`CopyRun::run`]; `get` gives any element below `n`; with `STREAM` the CPU has AVX2.
#[inline(always)]
unsafe fn copy_body<S: Convert<D>, D, const STREAM: bool>(get: impl Fn(usize) -> S, dst: *mut u8, n: usize) -> bool {
    let mut fits = true;
    let write = |to: *mut D, from: usize, len: usize| {
        for i in 0..len {
            let value = get(from + i);
            fits &= value.fits();
            // SAFETY: `in_lines` gives room for `len` elements.
            unsafe { to.add(i).write(value.convert()) };
        }
    };
    // SAFETY: the caller's promise.
    unsafe { in_lines::<D, STREAM>(dst.cast(), n, write) };
    fits
}

/// # Safety
/// As for [`copy_body`].
#[inline(always)]
unsafe fn index_body<S: Index<D>, D, const STREAM: bool>(get: impl Fn(usize) -> S, dst: *mut u8, n: usize) -> u64 {
    let mut largest = S::Unsigned::default();
    let write = |to: *mut D, from: usize, len: usize| {
        for i in 0..len {
            let value = get(from + i);
            largest = largest.max(value.unsigned());
            // SAFETY: as in `copy_body`.
            unsafe { to.add(i).write(value.cast()) };
        }
    };
    // SAFETY: the caller's promise.
    unsafe { in_lines::<D, STREAM>(dst.cast(), n, write) };
    S::widen(largest)
}

/// A stored column index.
trait Index<D>: Copy {
    type Unsigned: Copy + Ord + Default;
    fn unsigned(self) -> Self::Unsigned;
    /// The largest index seen; a negative one keeps its sign bits, so it is huge in 64 bits too.
    fn widen(largest: Self::Unsigned) -> u64;
    fn cast(self) -> D;
}
macro_rules! indices {
    ($($s:ty as $u:ty),+) => { $(indices!(one $s, $u => u16, i32, i64);)+ };
    (one $s:ty, $u:ty => $($d:ty),+) => { $(
        impl Index<$d> for $s {
            type Unsigned = $u;
            #[inline(always)]
            fn unsigned(self) -> $u { self as $u }
            #[inline(always)]
            fn widen(largest: $u) -> u64 { largest as $s as i64 as u64 }
            #[inline(always)]
            fn cast(self) -> $d { self as $d }
        }
    )+ };
}
#[expect(clippy::cast_lossless, reason = "one macro serves widening and reinterpreting casts")]
mod index_impls {
    use super::Index;
    indices! { i8 as u8, i16 as u16, i32 as u32, i64 as u64, u8 as u8, u16 as u16, u32 as u32, u64 as u64 }
}

/// Declares the compilations of one generic body: from items and from planes, for any CPU and for AVX2.
macro_rules! builds {
    ($items:ident, $planes:ident, $wide_items:ident, $wide_planes:ident, $body:ident, $bound:ident, $ret:ty) => {
        builds!(one $items, $body, $bound, $ret, false, src: *const u8, |i| src.cast::<S>().add(i).read_unaligned());
        builds!(one $planes, $body, $bound, $ret, false, src: &[&[u8]; MAX_ITEM], |i| S::gather(src, i));
        #[cfg(target_arch = "x86_64")]
        builds!(one #[target_feature(enable = "avx2")] $wide_items, $body, $bound, $ret, true, src: *const u8,
            |i| src.cast::<S>().add(i).read_unaligned());
        #[cfg(target_arch = "x86_64")]
        builds!(one #[target_feature(enable = "avx2")] $wide_planes, $body, $bound, $ret, true, src: &[&[u8]; MAX_ITEM],
            |i| S::gather(src, i));
    };
    (one $(#[$feature:meta])? $name:ident, $body:ident, $bound:ident, $ret:ty, $stream:literal, $src:ident: $type:ty, |$i:ident| $get:expr) => {
        /// # Safety
        /// As for `run`; the CPU has the instructions that the function is compiled for.
        $(#[$feature])?
        unsafe fn $name<S: Item + $bound<D>, D>($src: $type, dst: *mut u8, n: usize) -> $ret {
            // SAFETY: the caller's promise: `n` elements are readable, in any alignment, and writable.
            unsafe { $body::<S, D, $stream>(|$i| $get, dst, n) }
        }
    };
}
builds!(copy_items, copy_planes, copy_items_avx2, copy_planes_avx2, copy_body, Convert, bool);
builds!(index_items, index_planes, index_items_avx2, index_planes_avx2, index_body, Index, u64);

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2")
}

macro_rules! choose {
    ($items:ident, $planes:ident, $wide_items:ident, $wide_planes:ident, $s:ty, $d:ty) => {{
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            return Some(CopyRun { items: $wide_items::<$s, $d>, planes: $wide_planes::<$s, $d> });
        }
        Some(CopyRun { items: $items::<$s, $d>, planes: $planes::<$s, $d> })
    }};
}

/// Copies elements that are delivered as they are stored, past the caches without a [`Line`] between.
///
/// # Safety
/// As for [`CopyRun::run`]; the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_same_avx2<const SIZE: usize>(src: *const u8, dst: *mut u8, n: usize) -> bool {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm256_stream_si256};
    let bytes = n * SIZE;
    let head = if bytes < 4 * STREAM_BYTES { bytes } else { dst.addr().next_multiple_of(STREAM_BYTES) - dst.addr() };
    let end = head + (bytes - head) / STREAM_BYTES * STREAM_BYTES;
    // SAFETY: the caller's promise: `bytes` are readable and writable, and `dst` is aligned behind the head.
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, head);
        for at in (head..end).step_by(STREAM_BYTES) {
            _mm256_stream_si256(dst.add(at).cast(), _mm256_loadu_si256(src.add(at).cast()));
        }
        std::ptr::copy_nonoverlapping(src.add(end), dst.add(end), bytes - end);
    }
    true
}

/// The copy from values stored as `src` to values delivered as `dst`, where that loses nothing.
pub fn copy_values(src: DType, dst: DType) -> Option<CopyValues> {
    let copy = converting_copy(src, dst)?;
    #[cfg(target_arch = "x86_64")]
    // bools are normalised
    if src == dst && src != DType::Bool && has_avx2() {
        let items = match src.size() {
            1 => copy_same_avx2::<1>,
            2 => copy_same_avx2::<2>,
            4 => copy_same_avx2::<4>,
            _ => copy_same_avx2::<8>,
        };
        return Some(CopyRun { items, ..copy });
    }
    Some(copy)
}

fn converting_copy(src: DType, dst: DType) -> Option<CopyValues> {
    macro_rules! table {
        ($($sv:ident: $s:ty => $($dv:ident: $d:ty),+;)+) => {
            match (src, dst) {
                $($((DType::$sv, DType::$dv) => choose!(copy_items, copy_planes, copy_items_avx2, copy_planes_avx2, $s, $d),)+)+
                _ => None,
            }
        };
    }
    table! {
        Bool: Flag => Bool: u8, UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64, Int8: i8, Int16: i16, Int32: i32, Int64: i64, Float16: f16, Float32: f32, Float64: f64;
        Int8: i8 => Int8: i8, Int16: i16, Int32: i32, Int64: i64, Float16: f16, Float32: f32, Float64: f64;
        Int16: i16 => Int16: i16, Int32: i32, Int64: i64, Float32: f32, Float64: f64;
        Int32: i32 => Int32: i32, Int64: i64, Float64: f64;
        Int64: i64 => Int64: i64, Float64: f64;
        UInt8: u8 => UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64, Int16: i16, Int32: i32, Int64: i64, Float16: f16, Float32: f32, Float64: f64;
        UInt16: u16 => UInt16: u16, UInt32: u32, UInt64: u64, Int32: i32, Int64: i64, Float32: f32, Float64: f64;
        UInt32: u32 => UInt32: u32, UInt64: u64, Int64: i64, Float64: f64;
        UInt64: u64 => UInt64: u64, Int64: i64, Float64: f64;
        Float16: f16 => Float16: f16, Float32: f32, Float64: f64;
        Float32: f32 => Float32: f32, Float64: f64;
        Float64: f64 => Float64: f64;
    }
}

/// The copy from column indices stored as `src` to `uint16`, `int32` or `int64`; indices that do not fit are cut, which
/// their largest tells.
pub fn copy_indices(src: DType, dst: DType) -> Option<CopyIndices> {
    macro_rules! table {
        ($($sv:ident: $s:ty),+) => {
            match (src, dst) {
                $((DType::$sv, DType::UInt16) => choose!(index_items, index_planes, index_items_avx2, index_planes_avx2, $s, u16),
                  (DType::$sv, DType::Int32) => choose!(index_items, index_planes, index_items_avx2, index_planes_avx2, $s, i32),
                  (DType::$sv, DType::Int64) => choose!(index_items, index_planes, index_items_avx2, index_planes_avx2, $s, i64),)+
                _ => None,
            }
        };
    }
    table! { Int8: i8, Int16: i16, Int32: i32, Int64: i64, UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let largest = unsafe { copy.run(Stored::Items(&bytes[1..]), out.as_mut_ptr().cast(), values.len()) };
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
        let largest = unsafe { copy_indices(DType::Int32, DType::Int32).unwrap().run(bytes(&stored), out.as_mut_ptr().cast(), 2) };
        assert_eq!(largest, u64::MAX);
        // int8 -1 is 255 as its own unsigned width, which 300 columns would let through
        let (stored, copy) = ([-1i8, 4].map(i8::to_ne_bytes), copy_indices(DType::Int8, DType::Int32).unwrap());
        // SAFETY: both sides hold two elements.
        let largest = unsafe { copy.run(bytes(&stored), out.as_mut_ptr().cast(), 2) };
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

    /// Every pair of types, from items and from planes, at every length around the stores' and every alignment: the
    /// values arrive, and nothing beside them is written.
    #[test]
    fn every_copy_equals_its_slow_twin() {
        for (src, dst) in DType::ALL.into_iter().flat_map(|s| DType::ALL.map(|d| (s, d))) {
            let Some(copy) = copy_values(src, dst) else { continue };
            let (from, to) = (src.size(), dst.size());
            for n in (0..70).chain([127, 128, 129, 500, 2_100, 5_000]) {
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
                for (shift, run) in [0, 1, 3].into_iter().flat_map(|s| [(s, Stored::Items(&stored)), (s, Stored::Planes(lent))]) {
                    let mut out = vec![0u64; (n + 10) * to / 8 + 8];
                    let first = out.as_mut_ptr().cast::<u8>();
                    // SAFETY: the vector holds shift + n elements and more, and elements of 8 bytes are aligned to all.
                    assert!(unsafe { copy.run(run, first.add(shift * to), n) });
                    publish();
                    // SAFETY: as many bytes as the vector has.
                    let bytes = unsafe { std::slice::from_raw_parts(first, out.len() * 8) };
                    assert!(bytes[..shift * to].iter().chain(&bytes[(shift + n) * to..]).all(|b| *b == 0), "{src} -> {dst}");
                    for i in 0..n {
                        let (a, b) = (value(src, &stored[i * from..(i + 1) * from]), value(dst, &bytes[(shift + i) * to..][..to]));
                        assert!((a - b).abs() < f64::EPSILON, "{src} -> {dst}: {a} became {b}");
                    }
                }
            }
        }
    }
}
