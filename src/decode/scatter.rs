//! Runs of elements copied to their slots, widened on the way.
//!
//! Each function is one pass over `n` elements: read (unaligned), convert, write. Column indices may be exchanged for others on
//! the way. Functions are monomorphic per pair of types, from elements or from their byte planes (`conversions`). Each is compiled
//! twice, for the baseline and for AVX2, and chosen at run time. The AVX2 ones store past the caches (`past_caches`): whoever
//! hands the result to another thread calls [`publish`] first.

mod conversions;
mod past_caches;

use half::f16;

use self::conversions::{Convert, Index, Item, StagedColumn, StoredFlag};
use self::past_caches::{STREAM_BYTES, in_lines, stream};
pub use self::past_caches::{STREAMED_BYTES, announce, publish};
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
    order: Option<Rising>,
}

/// What is known of the order of the copied indices.
#[derive(Debug, Clone, Copy)]
struct Rising {
    rises: bool,
    /// The smallest that may come next.
    next: usize,
}

impl<'a> Columns<'a> {
    /// Columns to be exchanged for those, if there are any; with `look`, it is seen whether they rise as they are stored.
    pub fn new(exchanged: &'a [u32], look: bool) -> Self {
        Self { exchanged, order: look.then_some(Rising { rises: true, next: 0 }) }
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
unsafe fn index_body<S: Index<D>, D: StagedColumn, const STREAM: bool>(
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
            *order = Rising { rises: order.rises && rises, next: number(len - 1).number().saturating_add(1) };
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
builds!(index_items, index_planes, index_items_avx2, index_planes_avx2, index_body, Index, StagedColumn, u64, columns: &mut Columns);

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

/// Copies elements that are delivered as they are stored, past the caches without a line of the nearest cache between.
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
        Bool: StoredFlag => Bool: u8, UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64, Int8: i8, Int16: i16, Int32: i32, Int64: i64, Float16: f16, Float32: f32, Float64: f64;
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
        Bool: StoredFlag, Int8: i8, Int16: i16, Int32: i32, Int64: i64, UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64,
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
