//! Entries of sparse rows moved as they are: in the order of their columns, and without those that a join drops.

use std::marker::PhantomData;

use super::rows::{RowTarget, StagedRow, elements, elements_mut, misfit};
use crate::base::error::{Error, Result};
use crate::schema::DType;

/// Sorts rows as they lie in a batch.
pub(crate) struct EntrySorter(Box<dyn SortRow>);

trait SortRow {
    fn sort(&mut self, indices: &mut [u8], values: &mut [u8], only_repeating: bool) -> Result<()>;
}

impl EntrySorter {
    /// A sorter of rows with column indices of the type `indices`, and values of `value_size` bytes.
    ///
    /// # Errors
    /// [`Internal`](Error::Internal) for others than a batch has.
    pub(crate) fn new(indices: DType, value_size: usize) -> Result<Self> {
        fn of<I: Column + 'static>(value_size: usize) -> Option<Box<dyn SortRow>> {
            Some(match value_size {
                1 => Box::new((Sorter::<u8>::default(), PhantomData::<I>)),
                2 => Box::new((Sorter::<u16>::default(), PhantomData::<I>)),
                4 => Box::new((Sorter::<u32>::default(), PhantomData::<I>)),
                8 => Box::new((Sorter::<u64>::default(), PhantomData::<I>)),
                _ => return None,
            })
        }
        let sorter = match indices {
            DType::UInt16 => of::<u16>(value_size),
            DType::Int32 => of::<u32>(value_size),
            DType::Int64 => of::<u64>(value_size),
            _ => None,
        };
        let message = || format!("no rows have columns of {indices} and values of {value_size} bytes");
        sorter.map(Self).ok_or_else(|| Error::Internal { message: message() })
    }

    /// Sorts one row in place; entries of one column stay in the order in which they came.
    ///
    /// # Errors
    /// [`Internal`](Error::Internal) for bytes that are no entries.
    pub(crate) fn sort(&mut self, indices: &mut [u8], values: &mut [u8]) -> Result<()> {
        self.0.sort(indices, values, false)
    }

    /// The same for a row that has a column more than once; others stay as they are.
    ///
    /// # Errors
    /// As [`sort`](Self::sort).
    pub(crate) fn sort_repeating(&mut self, indices: &mut [u8], values: &mut [u8]) -> Result<()> {
        self.0.sort(indices, values, true)
    }
}

impl<I: Column, V: Copy + Default> SortRow for (Sorter<V>, PhantomData<I>) {
    fn sort(&mut self, indices: &mut [u8], values: &mut [u8], only_repeating: bool) -> Result<()> {
        let columns: &mut [I] = elements_mut(indices)?;
        if !only_repeating || self.0.has_column_twice(columns) {
            self.0.sort(columns, elements_mut(values)?);
        }
        Ok(())
    }
}

/// A column index; in wider types, too, it is one of 32 bits.
pub(super) trait Column: Copy + Ord {
    fn number(self) -> u32;
    fn of(number: u32) -> Self;
}
macro_rules! columns {
    ($($t:ty),+) => { $(impl Column for $t {
        #[inline(always)]
        fn number(self) -> u32 {
            self as u32
        }
        #[inline(always)]
        fn of(number: u32) -> Self {
            number as Self
        }
    })+ };
}
#[expect(clippy::cast_lossless, reason = "one macro serves all widths")]
mod columns {
    use super::Column;
    columns! { u16, u32, u64 }
}

/// Copies the entries of a sparse row, of values of `value_size` bytes, but for those of column `u32::MAX`: without them it is
/// as long as its target.
///
/// # Errors
/// [`Internal`](Error::Internal) for rows that do not fit.
pub(crate) fn copy_kept(row: StagedRow, target: RowTarget, value_size: usize) -> Result<()> {
    fn of_width<I: Column, O: Column>(
        (columns, values): (&[u8], &[u8]),
        to_columns: &mut [u8],
        to_values: &mut [u8],
        value_size: usize,
    ) -> Result<()> {
        let (columns, to_columns) = (elements::<I>(columns)?, elements_mut::<O>(to_columns)?);
        match value_size {
            1 => kept(columns, elements::<u8>(values)?, to_columns, elements_mut(to_values)?),
            2 => kept(columns, elements::<u16>(values)?, to_columns, elements_mut(to_values)?),
            4 => kept(columns, elements::<u32>(values)?, to_columns, elements_mut(to_values)?),
            8 => kept(columns, elements::<u64>(values)?, to_columns, elements_mut(to_values)?),
            _ => Err(misfit(columns.len(), to_columns.len())),
        }
    }
    let (StagedRow::Csr { indices, wide, values }, RowTarget::Csr { indices: to_indices, wide: to_wide, values: to_values }) =
        (row, target)
    else {
        return Err(Error::Internal { message: "entries of a dense row".into() });
    };
    let entries = (indices, values);
    match (wide, to_wide) {
        (false, false) => of_width::<u32, u32>(entries, to_indices, to_values, value_size),
        (true, false) => of_width::<u64, u32>(entries, to_indices, to_values, value_size),
        (false, true) => of_width::<u32, u64>(entries, to_indices, to_values, value_size),
        (true, true) => of_width::<u64, u64>(entries, to_indices, to_values, value_size),
    }
}

fn kept<I: Column, O: Column, V: Copy>(columns: &[I], values: &[V], to_columns: &mut [O], to_values: &mut [V]) -> Result<()> {
    let n = to_columns.len();
    if to_values.len() != n || values.len() != columns.len() {
        return Err(misfit(values.len(), to_values.len()));
    }
    let mut kept = 0;
    for (&column, &value) in columns.iter().zip(values) {
        if kept == n {
            break;
        }
        // without a branch, which would be guessed wrong for every second gene
        (to_columns[kept], to_values[kept]) = (O::of(column.number()), value);
        kept += usize::from(column.number() != u32::MAX);
    }
    if kept == n { Ok(()) } else { Err(misfit(kept, n)) }
}

/// Sorts the entries of rows by their columns, where they are not; holds what is reused between them.
#[derive(Debug, Default)]
pub(super) struct Sorter<V> {
    /// A bit for each column that there is, and how many lie before each word of them.
    seen: Vec<u64>,
    before: Vec<u32>,
    /// Column and place of each entry, in one number.
    order: Vec<u64>,
    spare: Vec<u64>,
    /// Entries in order, on their way back.
    sorted: Vec<(u32, V)>,
}

/// Rows of fewer entries are sorted by comparing them.
const FEW: usize = 48;
/// Rows are sorted by rank where there are at most so many words of columns' bits for each entry.
const WORDS_PER_ENTRY: usize = 4;

impl<V: Copy + Default> Sorter<V> {
    /// Whether a column comes more than once.
    pub(super) fn has_column_twice<I: Column>(&mut self, columns: &[I]) -> bool {
        if columns.is_sorted_by(|a, b| a < b) {
            return false;
        }
        // joined columns are unsorted, and each there once
        let n_words = end_of(columns).div_ceil(64);
        self.seen.clear();
        self.seen.resize(n_words, 0);
        columns.iter().fold(false, |twice, column| {
            let (word, bit) = (&mut self.seen[column.number() as usize / 64], 1 << (column.number() % 64));
            let here = *word & bit != 0;
            *word |= bit;
            twice | here
        })
    }

    /// Sorts one row; entries of one column stay in the order in which they came.
    pub(super) fn sort<I: Column>(&mut self, columns: &mut [I], values: &mut [V]) {
        if columns.is_sorted() {
            return;
        }
        let (n, n_columns) = (columns.len(), end_of(columns));
        let few_words = n_columns.div_ceil(64) <= n * WORDS_PER_ENTRY;
        if !(n >= FEW && few_words && self.by_rank(columns, values, n_columns)) {
            self.by_bytes(columns, values, n_columns);
        }
        for ((column, value), &(number, moved)) in columns.iter_mut().zip(values).zip(&self.sorted) {
            (*column, *value) = (I::of(number), moved);
        }
    }

    fn by_bytes<I: Column>(&mut self, columns: &[I], values: &[V], n_columns: usize) {
        self.order.clear();
        self.order.extend((0..).zip(columns).map(|(at, column)| (u64::from(column.number()) << 32) | at));
        if columns.len() < FEW {
            self.order.sort_unstable();
        } else {
            sort_by_column(&mut self.order, &mut self.spare, n_columns);
        }
        self.sorted.clear();
        self.sorted.extend(self.order.iter().map(|&key| ((key >> 32) as u32, values[key as u32 as usize])));
    }

    fn by_rank<I: Column>(&mut self, columns: &[I], values: &[V], n_columns: usize) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,bmi2,popcnt")]
            fn counting<I: Column, V: Copy + Default>(
                sorter: &mut Sorter<V>,
                columns: &[I],
                values: &[V],
                n_columns: usize,
            ) -> bool {
                sorter.by_rank_body(columns, values, n_columns)
            }
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("bmi2") && has!("popcnt") {
                // SAFETY: the CPU has the instructions that the function is compiled for.
                return unsafe { counting(self, columns, values, n_columns) };
            }
        }
        self.by_rank_body(columns, values, n_columns)
    }

    /// Sends each entry to as many places from the first as there are columns below its own: some 2 ns an entry, where sorting
    /// by bytes takes 5. `n_columns` is what [`end_of`] says. The answer is false, and nothing is sent, where a column comes twice.
    #[inline(always)]
    fn by_rank_body<I: Column>(&mut self, columns: &[I], values: &[V], n_columns: usize) -> bool {
        let (n, n_words) = (columns.len(), n_columns.div_ceil(64));
        if values.len() != n {
            return false;
        }
        self.seen.clear();
        self.seen.resize(n_words, 0);
        self.before.resize(n_words, 0);
        let place = |column: I| ((column.number() >> 6) as usize, column.number() & 63);
        for &column in columns {
            let (word, bit) = place(column);
            // SAFETY: there is a word for each column below `n_columns`, and these are.
            unsafe { *self.seen.get_unchecked_mut(word) |= 1 << bit };
        }
        let mut counted = 0;
        for (word, before) in self.seen.iter().zip(&mut self.before) {
            *before = counted;
            counted += word.count_ones();
        }
        if counted as usize != n {
            return false;
        }
        self.sorted.resize(n, (0, V::default()));
        for (&column, &value) in columns.iter().zip(values) {
            let (word, bit) = place(column);
            // SAFETY: as above. The bit of this column is among the `n` that were counted and not among those below it, so
            // its rank is less than `n`.
            unsafe {
                let below = (self.seen.get_unchecked(word) & ((1 << bit) - 1)).count_ones();
                let rank = (self.before.get_unchecked(word) + below) as usize;
                *self.sorted.get_unchecked_mut(rank) = (column.number(), value);
            }
        }
        true
    }
}

/// One more than the last of the columns, or 0.
#[inline(always)]
fn end_of<I: Column>(columns: &[I]) -> usize {
    columns.iter().fold(0, |end, column| (column.number() as usize + 1).max(end))
}

/// Sorts numbers by their upper halves, columns below `n_columns`, byte by byte from the last. Each pass keeps the order in
/// which equal ones came.
fn sort_by_column(numbers: &mut Vec<u64>, spare: &mut Vec<u64>, n_columns: usize) {
    spare.resize(numbers.len(), 0);
    let mut left = n_columns.saturating_sub(1);
    for shift in (32..64).step_by(8) {
        let byte = |number: u64| (number >> shift) as usize & 255;
        let mut places = [0u32; 256];
        for &number in &*numbers {
            places[byte(number)] += 1;
        }
        let mut start = 0;
        for place in &mut places {
            start += std::mem::replace(place, start);
        }
        for &number in &*numbers {
            let place = &mut places[byte(number)];
            spare[*place as usize] = number;
            *place += 1;
        }
        std::mem::swap(numbers, spare);
        left >>= 8;
        if left == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sorting_by_column_is_a_stable_sort(
            columns in prop::collection::vec(any::<prop::sample::Index>(), 0..300),
            n_columns in prop::sample::select(vec![1usize, 2, 256, 257, 65_536, 65_537, 1 << 24, (1 << 24) + 1, 1 << 27]),
        ) {
            let numbers = (0..).zip(&columns).map(|(at, column)| ((column.index(n_columns) as u64) << 32) | at);
            let mut numbers: Vec<u64> = numbers.collect();
            let mut expected = numbers.clone();
            expected.sort_by_key(|number| number >> 32);
            sort_by_column(&mut numbers, &mut vec![7; 3], n_columns);
            prop_assert_eq!(numbers, expected);
        }

        #[test]
        fn rows_are_kept_but_for_what_is_dropped(columns in prop::collection::vec(prop::option::of(0u32..9), 0..80)) {
            let columns: Vec<u32> = columns.into_iter().map(|column| column.unwrap_or(u32::MAX)).collect();
            let expected = || (0u8..).zip(&columns).filter(|(_, column)| **column != u32::MAX);
            macro_rules! check {
                ($index:ty => $out:ty: $($value:ty),+) => { $({
                    let indices: Vec<$index> = columns.iter().map(|&column| column as $index).collect();
                    let values: Vec<$value> = (0..columns.len()).map(|place| place as $value).collect();
                    let n = expected().count();
                    let (mut out, mut out_values) = (vec![<$out>::MAX; n], vec![<$value>::MAX; n]);
                    // SAFETY: bytes of numbers, which may be any.
                    unsafe {
                        let row = StagedRow::Csr { indices: indices.align_to().1, wide: size_of::<$index>() == 8, values: values.align_to().1 };
                        let (indices, values) = (out.align_to_mut().1, out_values.align_to_mut().1);
                        copy_kept(row, RowTarget::Csr { indices, wide: size_of::<$out>() == 8, values }, size_of::<$value>()).unwrap();
                    }
                    let expected: Vec<_> = expected().map(|(place, &column)| (column as $out, place as $value)).collect();
                    prop_assert_eq!(out.into_iter().zip(out_values).collect::<Vec<_>>(), expected);
                })+ };
            }
            check!(u32 => u32: u8, u16, u32, u64);
            check!(u64 => u32: u8, u16, u32, u64);
            check!(u32 => u64: u8, u16, u32, u64);
            check!(u64 => u64: u8, u16, u32, u64);
        }

        #[test]
        fn rows_are_sorted_in_each_way(
            columns in prop::collection::vec(any::<prop::sample::Index>(), 0..300),
            n_columns in prop::sample::select(vec![1usize, 40, 300, 4_000, 1 << 16, 1 << 24]),
            distinct: bool,
        ) {
            let mut columns: Vec<u32> = columns.iter().map(|column| column.index(n_columns) as u32).collect();
            if distinct {
                let mut known = std::collections::HashSet::new();
                columns.retain(|&column| known.insert(column));
            }
            let mut expected: Vec<(u32, u16)> = columns.iter().copied().zip(0..).collect();
            expected.sort_by_key(|&(column, _)| column);
            let repeats = expected.windows(2).any(|pair| pair[0].0 == pair[1].0);
            macro_rules! check {
                ($dtype:ident as $index:ty: $($value:ty),+) => { $({
                    let mut indices: Vec<$index> = columns.iter().map(|&column| column as $index).collect();
                    let mut values: Vec<$value> = (0..columns.len()).map(|place| place as $value).collect();
                    let before = indices.clone();
                    // SAFETY: bytes of numbers, which may be any.
                    let (indices_bytes, values_bytes) = unsafe { (indices.align_to_mut().1, values.align_to_mut().1) };
                    let mut sorter = EntrySorter::new(DType::$dtype, size_of::<$value>()).unwrap();
                    sorter.sort_repeating(indices_bytes, values_bytes).unwrap();
                    if !repeats {
                        // SAFETY: as above.
                        prop_assert_eq!(&*indices_bytes, unsafe { before.align_to::<u8>().1 });
                        sorter.sort(indices_bytes, values_bytes).unwrap();
                    }
                    let expected: Vec<_> = expected.iter().map(|&(column, place)| (column as $index, place as $value)).collect();
                    prop_assert_eq!(indices.into_iter().zip(values).collect::<Vec<_>>(), expected);
                })+ };
            }
            if n_columns <= 1 << 16 {
                check!(UInt16 as u16: u8, u16, u32, u64);
            }
            check!(Int32 as u32: u8, u16, u32, u64);
            check!(Int64 as u64: u8, u16, u32, u64);
        }
    }
}
