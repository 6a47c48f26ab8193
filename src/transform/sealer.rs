//! One row from where it was staged to where it is delivered.
//!
//! A row is loaded into the type that is computed in, the steps run over it one after the other while it is in the first
//! cache, and it is written once. Which types these are is decided once per sealer.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use num_traits::AsPrimitive;

use super::entries::Sorter;
use super::math::{bf16_of_f32, log1p_f32, log1p_f64, sum_f32, sum_f64};
use super::rows::{RowTarget, StagedRow, elements_mut, misfit};
use super::{Arithmetic, Joined, Step, Transform};
use crate::base::error::{Error, Result};
use crate::schema::DType;

/// Seals rows of one element, one after the other; holds what is reused between them.
pub struct RowSealer<'a>(Box<dyn SealRow + 'a>);

trait SealRow {
    fn load(&mut self, row: StagedRow, joined: Joined, may_repeat: bool) -> bool;
    fn write(&mut self, target: RowTarget) -> Result<()>;
}

/// A type of values that rows are computed in.
trait Cell: Copy + Default {
    fn apply(step: &Step, values: &mut [Self]);
    /// What two entries of one column make.
    fn plus(self, other: Self) -> Self;
}

/// A type that values of type `C` are delivered in.
trait DeliveredValue<C>: Copy + Default {
    fn convert(from: &[C], to: &mut [Self]);
}

macro_rules! cells_with_arithmetic {
    ($($t:ty: $sum:path, $log1p:expr);+ $(;)?) => { $(impl Cell for $t {
        fn apply(step: &Step, values: &mut [Self]) {
            match step {
                Step::NormalizeTotal { target_sum } => {
                    let sum = $sum(values);
                    if sum != 0.0 {
                        divide(values, (sum / target_sum) as $t);
                    }
                }
                Step::Log1p { base } => {
                    $log1p(values);
                    if let Some(base) = base {
                        divide(values, base.ln() as $t);
                    }
                }
                Step::Columns(_) => {}
            }
        }
        fn plus(self, other: Self) -> Self {
            self + other
        }
    })+ };
}
cells_with_arithmetic! {
    f32: sum_f32, log1p_f32;
    f64: sum_f64, log1p_f64;
}

fn divide<T: Copy + std::ops::DivAssign>(values: &mut [T], by: T) {
    for value in values {
        *value /= by;
    }
}

/// Types that nothing is computed in.
macro_rules! cells_without_arithmetic {
    ($($t:ty: |$a:ident, $b:ident| $plus:expr);+ $(;)?) => { $(
        impl Cell for $t {
            fn apply(_: &Step, _: &mut [Self]) {}
            fn plus(self, other: Self) -> Self {
                let ($a, $b) = (self, other);
                $plus
            }
        }
    )+ };
}
cells_without_arithmetic! {
    Flag: |a, b| Flag(a.0 | b.0);
    u8: |a, b| a.wrapping_add(b);
    i8: |a, b| a.wrapping_add(b);
    u16: |a, b| a.wrapping_add(b);
    i16: |a, b| a.wrapping_add(b);
    u32: |a, b| a.wrapping_add(b);
    i32: |a, b| a.wrapping_add(b);
    u64: |a, b| a.wrapping_add(b);
    i64: |a, b| a.wrapping_add(b);
    f16: |a, b| a + b;
}

impl<C: Cell> DeliveredValue<C> for C {
    fn convert(from: &[C], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

macro_rules! delivered_narrowed {
    ($($c:ty => $d:ty: |$from:ident, $to:ident| $convert:expr);+ $(;)?) => { $(impl DeliveredValue<$c> for $d {
        fn convert($from: &[$c], $to: &mut [Self]) {
            $convert
        }
    })+ };
}
delivered_narrowed! {
    f32 => f16: |from, to| to.convert_from_f32_slice(from);
    f32 => bf16: |from, to| bf16_of_f32(from, to.reinterpret_cast_mut());
    f64 => f16: |from, to| to.convert_from_f64_slice(from);
    f64 => bf16: |from, to| to.convert_from_f64_slice(from);
    f64 => f32: |from, to| to.iter_mut().zip(from).for_each(|(to, from)| *to = *from as f32);
}

/// A bool, as the byte 0 or 1 that it is staged as.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Flag(u8);

/// Appends stored values in another type.
type Load<C> = fn(&[u8], &mut Vec<C>);

struct Typed<'a, C, D> {
    transform: &'a Transform,
    load: Load<C>,
    values: Vec<C>,
    columns: Vec<u32>,
    /// Whether they may have to be sorted once more.
    sorts: bool,
    /// Values on their way to other places, and in the type that they are delivered in.
    moved: Vec<C>,
    narrowed: Vec<D>,
    sorter: Sorter<C>,
}

impl<'a> RowSealer<'a> {
    /// A sealer of rows for `transform`.
    ///
    /// # Errors
    /// [`Internal`](Error::Internal) for types between which there is no way.
    pub fn new(transform: &'a Transform) -> Result<Self> {
        let (staged, dtype) = (transform.staged, transform.dtype);
        if transform.arithmetic() == Arithmetic::None {
            macro_rules! same {
                ($($dtype:ident: $t:ty),+) => {
                    match staged {
                        $(DType::$dtype => return Ok(Self::typed::<$t, $t>(transform, load::<$t, $t>)),)+
                        DType::Bool => {
                            return Ok(Self::typed::<Flag, Flag>(transform, |bytes, flags| flags.extend(bytes.iter().map(|&b| Flag(b)))));
                        }
                        DType::BFloat16 => {}
                    }
                };
            }
            same! {
                Int8: i8, Int16: i16, Int32: i32, Int64: i64, UInt8: u8, UInt16: u16, UInt32: u32, UInt64: u64,
                Float16: f16, Float32: f32, Float64: f64
            }
        }
        let none = || Error::Internal { message: format!("no transform from {staged} to {dtype}") };
        if transform.arithmetic() == Arithmetic::Float64 {
            let load = load_of::<f64>(staged).ok_or_else(none)?;
            Ok(match dtype {
                DType::Float64 => Self::typed::<f64, f64>(transform, load),
                DType::Float32 => Self::typed::<f64, f32>(transform, load),
                DType::Float16 => Self::typed::<f64, f16>(transform, load),
                DType::BFloat16 => Self::typed::<f64, bf16>(transform, load),
                _ => return Err(none()),
            })
        } else {
            let load = load_of::<f32>(staged).ok_or_else(none)?;
            Ok(match dtype {
                DType::Float32 => Self::typed::<f32, f32>(transform, load),
                DType::Float16 => Self::typed::<f32, f16>(transform, load),
                DType::BFloat16 => Self::typed::<f32, bf16>(transform, load),
                _ => return Err(none()),
            })
        }
    }

    fn typed<C: Cell + 'a, D: DeliveredValue<C> + 'a>(transform: &'a Transform, load: Load<C>) -> Self {
        let (values, columns) = (Vec::new(), Vec::new());
        Self(Box::new(Typed::<C, D> {
            transform,
            load,
            values,
            columns,
            sorts: false,
            moved: Vec::new(),
            narrowed: Vec::new(),
            sorter: Sorter::default(),
        }))
    }

    /// Takes in a row, does to it what joining has left to do, and then the steps. `may_repeat` is false of a row that is known
    /// to have no column more than once. Answers whether entries may have changed places, so that column indices are to be
    /// written, too.
    pub fn load(&mut self, row: StagedRow, joined: Joined, may_repeat: bool) -> bool {
        self.0.load(row, joined, may_repeat)
    }

    /// Writes what became of the row loaded last; its place may be the one that it was loaded from.
    ///
    /// # Errors
    /// [`Internal`](Error::Internal) for a target that is not as long as the row became.
    pub fn write(&mut self, target: RowTarget) -> Result<()> {
        self.0.write(target)
    }
}

impl Transform {
    /// How many entries of these columns (int64 where `wide`, else int32) are delivered; none of those that a join drops.
    pub fn kept(&self, indices: &[u8], wide: bool) -> usize {
        let mut kept = 0;
        let mut maps = self.maps();
        match (maps.next(), maps.next()) {
            (None, _) => each_column(indices, wide, |column| kept += usize::from(column != u32::MAX)),
            (Some(map), None) => each_column(indices, wide, |column| kept += usize::from(map.delivered(column).is_some())),
            _ => each_column(indices, wide, |column| kept += usize::from(self.delivered(column).is_some())),
        }
        kept
    }
}

/// Calls `take` with each column; they were checked to be below n_var, and n_var to be at most 2^27, or are `u32::MAX`.
#[inline(always)]
fn each_column(indices: &[u8], wide: bool, mut take: impl FnMut(u32)) {
    if wide {
        indices.as_chunks::<8>().0.iter().for_each(|bytes| take(i64::from_ne_bytes(*bytes) as u32));
    } else {
        indices.as_chunks::<4>().0.iter().for_each(|bytes| take(i32::from_ne_bytes(*bytes) as u32));
    }
}

impl<C: Cell, D: DeliveredValue<C>> SealRow for Typed<'_, C, D> {
    fn load(&mut self, row: StagedRow, joined: Joined, may_repeat: bool) -> bool {
        self.values.clear();
        self.columns.clear();
        let transform = self.transform;
        self.sorts = joined.sorts || transform.unsorts();
        let mut moved = self.sorts;
        match row {
            StagedRow::Csr { indices, wide, values } => {
                (self.load)(values, &mut self.values);
                let merges = may_repeat && transform.merges();
                // needed by whoever moves entries or spreads them out
                if merges || transform.moves_columns() || transform.is_spread() || joined != Joined::default() {
                    if wide {
                        self.columns.extend(indices.as_chunks().0.iter().map(|bytes| i64::from_ne_bytes(*bytes) as u32));
                    } else {
                        self.columns.extend(indices.as_chunks().0.iter().map(|bytes| i32::from_ne_bytes(*bytes) as u32));
                    }
                    if joined.drops {
                        self.keep(|column| column);
                    }
                    if merges && self.sorter.has_column_twice(&self.columns) {
                        self.merge();
                        moved = true;
                    }
                }
                transform.steps.iter().for_each(|step| self.sparse_step(step));
            }
            StagedRow::Dense(values) => {
                (self.load)(values, &mut self.values);
                transform.steps.iter().for_each(|step| self.dense_step(step));
            }
        }
        moved
    }

    fn write(&mut self, target: RowTarget) -> Result<()> {
        match target {
            RowTarget::Csr { indices, wide, values } => {
                if self.sorts {
                    self.sorter.sort(&mut self.columns, &mut self.values);
                }
                let item = if wide { 8 } else { 4 };
                if indices.len() != self.columns.len() * item {
                    return Err(misfit(self.columns.len(), indices.len() / item));
                }
                if wide {
                    indices
                        .as_chunks_mut::<8>()
                        .0
                        .iter_mut()
                        .zip(&self.columns)
                        .for_each(|(to, &c)| *to = i64::from(c).to_ne_bytes());
                } else {
                    indices.as_chunks_mut::<4>().0.iter_mut().zip(&self.columns).for_each(|(to, &c)| *to = c.to_ne_bytes());
                }
                self.write_values(values)
            }
            RowTarget::Values(values) => self.write_values(values),
            RowTarget::Dense(row) => {
                self.narrowed.clear();
                self.narrowed.resize(self.values.len(), D::default());
                D::convert(&self.values, &mut self.narrowed);
                row.fill(0);
                let out = elements_mut::<D>(row)?;
                for (&column, &value) in self.columns.iter().zip(&self.narrowed) {
                    let slot = out.get_mut(column as usize).ok_or_else(|| misfit(column as usize + 1, 0))?;
                    *slot = value;
                }
                Ok(())
            }
        }
    }
}

impl<C: Cell, D: DeliveredValue<C>> Typed<'_, C, D> {
    fn sparse_step(&mut self, step: &Step) {
        match step {
            Step::Columns(map) => self.keep(|column| map.delivered(column).unwrap_or(u32::MAX)),
            _ => C::apply(step, &mut self.values),
        }
    }

    /// Gives entries other columns, and drops those that get `u32::MAX`.
    #[inline(always)]
    fn keep(&mut self, delivered: impl Fn(u32) -> u32) {
        let n = self.columns.len().min(self.values.len());
        let (columns, values) = (&mut self.columns[..n], &mut self.values[..n]);
        // without a branch, which would be guessed wrong for every second gene
        let mut kept = 0;
        for at in 0..n {
            let column = delivered(columns[at]);
            columns[kept] = column;
            values[kept] = values[at];
            kept += usize::from(column != u32::MAX);
        }
        self.columns.truncate(kept);
        self.values.truncate(kept);
    }

    fn dense_step(&mut self, step: &Step) {
        let Step::Columns(map) = step else { return C::apply(step, &mut self.values) };
        self.moved.clear();
        self.moved.extend(map.stored().iter().map(|&column| self.values[column as usize]));
        std::mem::swap(&mut self.values, &mut self.moved);
    }

    /// Sorts the row and has the first entry of each column hold the sum of all, added up in the order in which they came. The
    /// others become zeros where the row stays sparse, for its number of entries is settled by then; a dense one needs none.
    fn merge(&mut self) {
        let is_spread = self.transform.is_spread();
        self.sorter.sort(&mut self.columns, &mut self.values);
        let mut first = 0;
        for at in 1..self.columns.len() {
            if self.columns[at] != self.columns[first] {
                first = at;
                continue;
            }
            self.values[first] = self.values[first].plus(self.values[at]);
            self.values[at] = C::default();
            if is_spread {
                self.columns[at] = u32::MAX;
            }
        }
        if is_spread {
            self.keep(|column| column);
        }
    }

    fn write_values(&self, target: &mut [u8]) -> Result<()> {
        let out = elements_mut::<D>(target)?;
        if out.len() != self.values.len() {
            return Err(misfit(self.values.len(), out.len()));
        }
        D::convert(&self.values, out);
        Ok(())
    }
}

/// Appends values of one type as those of another, as `as` casts them.
fn load<S: AsPrimitive<C>, C: Copy + 'static>(bytes: &[u8], values: &mut Vec<C>) {
    // SAFETY: types of staged values have no invalid bits.
    let (before, items, after) = unsafe { bytes.align_to::<S>() };
    debug_assert!(before.is_empty() && after.is_empty(), "rows lie aligned in their blocks");
    values.extend(items.iter().map(|&item| item.as_()));
}

/// The way from a staged type; flags are bytes of 0 or 1 once they are staged.
fn load_of<C: Copy + 'static>(staged: DType) -> Option<Load<C>>
where
    u8: AsPrimitive<C>,
    i8: AsPrimitive<C>,
    u16: AsPrimitive<C>,
    i16: AsPrimitive<C>,
    u32: AsPrimitive<C>,
    i32: AsPrimitive<C>,
    u64: AsPrimitive<C>,
    i64: AsPrimitive<C>,
    f16: AsPrimitive<C>,
    f32: AsPrimitive<C>,
    f64: AsPrimitive<C>,
{
    Some(match staged {
        DType::Bool | DType::UInt8 => load::<u8, C>,
        DType::Int8 => load::<i8, C>,
        DType::UInt16 => load::<u16, C>,
        DType::Int16 => load::<i16, C>,
        DType::UInt32 => load::<u32, C>,
        DType::Int32 => load::<i32, C>,
        DType::UInt64 => load::<u64, C>,
        DType::Int64 => load::<i64, C>,
        DType::Float16 => load::<f16, C>,
        DType::Float32 => load::<f32, C>,
        DType::Float64 => load::<f64, C>,
        DType::BFloat16 => return None,
    })
}
