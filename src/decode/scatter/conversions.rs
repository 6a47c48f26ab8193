//! What a stored element becomes: values and column indices, one by one.

use half::f16;

use crate::decode::stored::Planes;

/// An element as it is stored.
pub(super) trait Item: Copy {
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
    StoredFlag as u8: StoredFlag, u8 as u8: |b| b, i8 as i8: |b| b,
    u16 as u16: |b| b, i16 as i16: |b| b, f16 as u16: f16::from_bits,
    u32 as u32: |b| b, i32 as i32: |b| b, f32 as u32: f32::from_bits,
    u64 as u64: |b| b, i64 as i64: |b| b, f64 as u64: f64::from_bits,
}

/// A stored value that becomes a delivered one.
pub(super) trait Convert<D>: Copy {
    fn convert(self) -> D;
    /// Whether the value survives: casts that lose nothing always say yes.
    fn fits(self) -> bool {
        true
    }
}

/// A stored bool; any byte but zero is true, as torch and `NumPy` read it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct StoredFlag(u8);

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
    ($($d:ty),+) => { $(impl Convert<$d> for StoredFlag {
        #[inline(always)]
        fn convert(self) -> $d { <$d>::from(u8::from(self.0 != 0)) }
    })+ };
}
flags! { u8, u16, u32, u64, i16, i32, i64, f16, f32, f64 }
impl Convert<i8> for StoredFlag {
    #[inline(always)]
    fn convert(self) -> i8 {
        i8::from(self.0 != 0)
    }
}

/// A column index as it is staged.
pub(super) trait StagedColumn: Copy + Ord {
    fn number(self) -> usize;
    fn of(column: u32) -> Self;
}
macro_rules! columns {
    ($($t:ty as $u:ty),+) => { $(impl StagedColumn for $t {
        #[inline(always)]
        fn number(self) -> usize { self as $u as usize }
        #[inline(always)]
        fn of(column: u32) -> Self { column as $t }
    })+ };
}

/// A stored column index.
pub(super) trait Index<D>: Copy {
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
    use super::{Index, StagedColumn};
    columns! { u16 as u16, i32 as u32, i64 as u64 }
    indices! { i8 as u8, i16 as u16, i32 as u32, i64 as u64, u8 as u8, u16 as u16, u32 as u32, u64 as u64 }
}
