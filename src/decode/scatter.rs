//! Runs of elements copied to their slots, widened on the way.
//!
//! Each function is one pass over `n` elements: read (unaligned), convert, write; column indices may be exchanged for
//! others on the way. They are monomorphic per pair of types, from elements or from their byte planes, and compiled twice, for the baseline and for AVX2, chosen at run time. The AVX2 ones store past the
//! caches: whoever hands the result to another thread calls [`publish`] first.

use std::mem::MaybeUninit;

use half::f16;

use super::stored::Planes;
pub use super::stored::Stored;
use crate::schema::DType;

/// A copy of values from the type in which they are stored to the one in which they are delivered.
#[derive(Clone, Copy)]
pub struct CopyValues {
    items: unsafe fn(*const u8, *mut u8, usize) -> bool,
    planes: unsafe fn(&Planes, *mut u8, usize) -> bool,
}

impl CopyValues {
    /// Copies `n` elements; answers whether all of them could be represented.
    ///
    /// # Safety
    /// `src` holds `n` stored elements, `dst` is writable for `n` delivered ones and aligned to them; the two do not
    /// overlap, and no other thread touches either part of `dst`.
    pub unsafe fn run(&self, src: Stored, dst: *mut u8, n: usize) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match src {
                Stored::Items(bytes) => (self.items)(bytes.as_ptr(), dst, n),
                Stored::Planes(planes) => (self.planes)(&planes, dst, n),
            }
        }
    }
}

/// A copy of column indices, as [`CopyValues`].
#[derive(Clone, Copy)]
pub struct CopyIndices {
    items: unsafe fn(*const u8, *mut u8, usize, &mut Columns) -> u64,
    planes: unsafe fn(&Planes, *mut u8, usize, &mut Columns) -> u64,
}

/// What is done to column indices on their way, and seen of them.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// Each becomes the entry of these that it is the number of, or stays as it is where there are none.
    exchanged: &'a [u32],
    order: Option<Order>,
}

/// What is known of the order of the copied indices.
#[derive(Debug, Clone, Copy)]
struct Order {
    rises: bool,
    /// The smallest that may come next.
    next: usize,
}

impl<'a> Columns<'a> {
    /// Columns to be exchanged for those, if there are any; with `look`, it is seen whether they rise as they are stored.
    pub fn new(exchanged: &'a [u32], look: bool) -> Self {
        Self { exchanged, order: look.then_some(Order { rises: true, next: 0 }) }
    }

    /// Whether the indices of all runs copied so far, one behind the other, were looked at and are each larger than the one
    /// before: then no column is there more than once.
    pub fn rise(&self) -> bool {
        self.order.is_some_and(|order| order.rises)
    }
}

impl CopyIndices {
    /// Copies `n` indices as `columns` says; answers the largest one that is stored, as unsigned (a negative one is huge).
    /// What becomes of indices without an entry is not said.
    ///
    /// # Safety
    /// As for [`CopyValues::run`].
    pub unsafe fn run(&self, src: Stored, dst: *mut u8, n: usize, columns: &mut Columns) -> u64 {
        // SAFETY: the caller's promise.
        unsafe {
            match src {
                Stored::Items(bytes) => (self.items)(bytes.as_ptr(), dst, n, columns),
                Stored::Planes(planes) => (self.planes)(&planes, dst, n, columns),
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
    unsafe fn gather(planes: &Planes, i: usize) -> Self;
}

macro_rules! items {
    ($($t:ty as $bits:ty: $from:expr),+ $(,)?) => { $(impl Item for $t {
        #[inline(always)]
        unsafe fn gather(planes: &Planes, i: usize) -> Self {
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
    /// Whether the value survives: casts that lose nothing always say yes.
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
macro_rules! by_as_if_it_fits {
    ($($s:ty => $($d:ty),+;)+) => { $($(impl Convert<$d> for $s {
        #[inline(always)]
        fn convert(self) -> $d { self as $d }
        #[inline(always)]
        fn fits(self) -> bool { <$d>::try_from(self).is_ok() }
    })+)+ };
}
by_as_if_it_fits! {
    i8 => u8, u16;
    i16 => u8, u16;
    i32 => u8, u16;
    i64 => u8, u16;
    u16 => u8;
    u32 => u8, u16;
    u64 => u8, u16, i64;
}
macro_rules! floats_if_whole {
    ($($s:ty as $wide:ty, $whole_from:literal => $($d:ty),+;)+) => { $($(impl Convert<$d> for $s {
        // Added to the number from which on floats are whole, a small whole one stands in the lowest bits; what becomes of
        // others does not matter. A cast would do, at three times the time: it has to saturate.
        #[inline(always)]
        fn convert(self) -> $d { (<$wide>::from(self) + $whole_from).to_bits() as $d }
        // bits: of the zeros the negative one would lose its sign
        #[inline(always)]
        fn fits(self) -> bool {
            let small: $d = self.convert();
            <$wide>::from(small).to_bits() == <$wide>::from(self).to_bits()
        }
    })+)+ };
}
floats_if_whole! {
    f16 as f32, 8_388_608.0 => u8, u16;
    f32 as f32, 8_388_608.0 => u8, u16;
    f64 as f64, 4_503_599_627_370_496.0 => u8, u16;
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
/// Bytes that go past the caches at a time: a line of theirs. One that is stored past them in part costs memory a read, and
/// the ends of rows are stored through them: 32 bytes at a time took twice as long on rows of 7 KiB.
const STREAM_BYTES: usize = 64;
/// Runs of fewer delivered bytes are left in the caches.
pub const STREAMED_BYTES: usize = 2 * STREAM_BYTES;

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
    if !STREAM || n * size < STREAMED_BYTES {
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
/// `src` is readable and `dst` writable for `bytes`, of which [`STREAM_BYTES`] is a part as it is of `dst`'s address; the CPU
/// has AVX.
#[inline(always)]
unsafe fn stream(src: *const u8, dst: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..bytes).step_by(STREAM_BYTES) {
        use std::arch::x86_64::{_mm256_loadu_si256, _mm256_stream_si256};
        // SAFETY: the caller's promise.
        unsafe {
            let halves = [_mm256_loadu_si256(src.add(at).cast()), _mm256_loadu_si256(src.add(at + 32).cast())];
            _mm256_stream_si256(dst.add(at).cast(), halves[0]);
            _mm256_stream_si256(dst.add(at + 32).cast(), halves[1]);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, bytes);
    }
}

/// Says that `bytes` at `dst` are copied to soon: lines that they fill only in part are fetched meanwhile.
#[inline(always)]
pub fn announce(dst: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for end in [dst, dst.wrapping_add(bytes)] {
        if bytes < STREAMED_BYTES || !end.addr().is_multiple_of(STREAM_BYTES) {
            // To be read, not written: every CPU has that, and hardly ever has another thread the line.
            // SAFETY: a hint, which touches no memory.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(end.cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (dst, bytes);
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
/// `dst` as for [`CopyValues::run`]; `get` gives any element below `n`; with `STREAM` the CPU has AVX2.
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
unsafe fn index_body<S: Index<D>, D: Column, const STREAM: bool>(
    get: impl Fn(usize) -> S,
    dst: *mut u8,
    n: usize,
    columns: &mut Columns,
) -> u64 {
    let mut largest = S::Unsigned::default();
    let mut order = columns.order;
    let write = |to: *mut D, from: usize, len: usize| {
        for i in 0..len {
            let value = get(from + i);
            largest = largest.max(value.unsigned());
            // SAFETY: as in `copy_body`.
            unsafe { to.add(i).write(value.cast()) };
        }
        // in the nearest cache, and by itself: looking up does not vectorize, widening does
        if let Some(order) = order.as_mut().filter(|_| len > 0) {
            // SAFETY: written just now.
            let number = |i: usize| unsafe { to.add(i).read() };
            let mut rises = order.next <= number(0).number();
            for i in 1..len {
                rises &= number(i - 1) < number(i);
            }
            *order = Order { rises: order.rises && rises, next: number(len - 1).number().saturating_add(1) };
        }
        if let Some(last) = columns.exchanged.len().checked_sub(1) {
            for i in 0..len {
                // SAFETY: written just now.
                unsafe { to.add(i).write(D::of(columns.exchanged[to.add(i).read().number().min(last)])) };
            }
        }
    };
    // SAFETY: the caller's promise.
    unsafe { in_lines::<D, STREAM>(dst.cast(), n, write) };
    columns.order = order;
    S::widen(largest)
}

/// A column index as it is staged.
trait Column: Copy + Ord {
    fn number(self) -> usize;
    fn of(column: u32) -> Self;
}
macro_rules! columns {
    ($($t:ty as $u:ty),+) => { $(impl Column for $t {
        #[inline(always)]
        fn number(self) -> usize { self as $u as usize }
        #[inline(always)]
        fn of(column: u32) -> Self { column as $t }
    })+ };
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
    use super::{Column, Index};
    columns! { u16 as u16, i32 as u32, i64 as u64 }
    indices! { i8 as u8, i16 as u16, i32 as u32, i64 as u64, u8 as u8, u16 as u16, u32 as u32, u64 as u64 }
}

/// Declares the compilations of one generic body: from items and from planes, for any CPU and for AVX2.
macro_rules! builds {
    ($items:ident, $planes:ident, $wide_items:ident, $wide_planes:ident, $body:ident, $s:ident, $d:path, $ret:ty $(, $arg:ident: $arg_type:ty)?) => {
        builds!(one $items, $body, $s, $d, $ret, false, src: *const u8, |i| src.cast::<S>().add(i).read_unaligned() $(, $arg: $arg_type)?);
        builds!(one $planes, $body, $s, $d, $ret, false, src: &Planes, |i| S::gather(src, i) $(, $arg: $arg_type)?);
        #[cfg(target_arch = "x86_64")]
        builds!(one #[target_feature(enable = "avx2")] $wide_items, $body, $s, $d, $ret, true, src: *const u8,
            |i| src.cast::<S>().add(i).read_unaligned() $(, $arg: $arg_type)?);
        #[cfg(target_arch = "x86_64")]
        builds!(one #[target_feature(enable = "avx2")] $wide_planes, $body, $s, $d, $ret, true, src: &Planes,
            |i| S::gather(src, i) $(, $arg: $arg_type)?);
    };
    (one $(#[$feature:meta])? $name:ident, $body:ident, $s:ident, $d:path, $ret:ty, $stream:literal, $src:ident: $type:ty, |$i:ident| $get:expr $(, $arg:ident: $arg_type:ty)?) => {
        /// # Safety
        /// As for `run`; the CPU has the instructions that the function is compiled for.
        $(#[$feature])?
        unsafe fn $name<S: Item + $s<D>, D: $d>($src: $type, dst: *mut u8, n: usize $(, $arg: $arg_type)?) -> $ret {
            // SAFETY: the caller's promise: `n` elements are readable, in any alignment, and writable.
            unsafe { $body::<S, D, $stream>(|$i| $get, dst, n $(, $arg)?) }
        }
    };
}
builds!(copy_items, copy_planes, copy_items_avx2, copy_planes_avx2, copy_body, Convert, Copy, bool);
builds!(index_items, index_planes, index_items_avx2, index_planes_avx2, index_body, Index, Column, u64, columns: &mut Columns);

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2")
}

macro_rules! choose {
    ($copy:ident, $items:ident, $planes:ident, $wide_items:ident, $wide_planes:ident, $s:ty, $d:ty) => {{
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            return Some($copy { items: $wide_items::<$s, $d>, planes: $wide_planes::<$s, $d> });
        }
        Some($copy { items: $items::<$s, $d>, planes: $planes::<$s, $d> })
    }};
}

/// Copies elements that are delivered as they are stored, past the caches without a [`Line`] between.
///
/// # Safety
/// As for [`CopyValues::run`]; the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_same_avx2<const SIZE: usize>(src: *const u8, dst: *mut u8, n: usize) -> bool {
    let bytes = n * SIZE;
    let head = if bytes < STREAMED_BYTES { bytes } else { dst.addr().next_multiple_of(STREAM_BYTES) - dst.addr() };
    let end = head + (bytes - head) / STREAM_BYTES * STREAM_BYTES;
    // SAFETY: the caller's promise: `bytes` are readable and writable; `dst` is aligned behind the head.
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, head);
        stream(src.add(head), dst.add(head), end - head);
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
        return Some(CopyValues { items, ..copy });
    }
    Some(copy)
}

fn converting_copy(src: DType, dst: DType) -> Option<CopyValues> {
    macro_rules! table {
        ($($sv:ident: $s:ty => $($dv:ident: $d:ty),+;)+) => {
            match (src, dst) {
                $($((DType::$sv, DType::$dv) => choose!(CopyValues, copy_items, copy_planes, copy_items_avx2, copy_planes_avx2, $s, $d),)+)+
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

/// The copy of values that says whether each is a whole number that `dst`, uint8 or uint16, has, to the last bit; what becomes
/// of the others is not said. `None` for other types.
pub fn copy_whole_values(src: DType, dst: DType) -> Option<CopyValues> {
    macro_rules! table {
        ($($sv:ident: $s:ty),+) => {
            match (src, dst) {
                $((DType::$sv, DType::UInt8) => choose!(CopyValues, copy_items, copy_planes, copy_items_avx2, copy_planes_avx2, $s, u8),
                  (DType::$sv, DType::UInt16) => choose!(CopyValues, copy_items, copy_planes, copy_items_avx2, copy_planes_avx2, $s, u16),)+
                _ => None,
            }
        };
    }
    table! {
        Bool: Flag, Int8: i8, Int16: i16, Int32: i32, Int64: i64, UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64,
        Float16: f16, Float32: f32, Float64: f64
    }
}

/// The copy from column indices stored as `src` to `uint16`, `int32` or `int64`; indices that do not fit are cut, which
/// their largest tells.
pub fn copy_indices(src: DType, dst: DType) -> Option<CopyIndices> {
    macro_rules! table {
        ($($sv:ident: $s:ty),+) => {
            match (src, dst) {
                $((DType::$sv, DType::UInt16) => choose!(CopyIndices, index_items, index_planes, index_items_avx2, index_planes_avx2, $s, u16),
                  (DType::$sv, DType::Int32) => choose!(CopyIndices, index_items, index_planes, index_items_avx2, index_planes_avx2, $s, i32),
                  (DType::$sv, DType::Int64) => choose!(CopyIndices, index_items, index_planes, index_items_avx2, index_planes_avx2, $s, i64),)+
                _ => None,
            }
        };
    }
    table! { Int8: i8, Int16: i16, Int32: i32, Int64: i64, UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64 }
}

#[cfg(test)]
#[path = "scatter_tests.rs"]
mod tests;
