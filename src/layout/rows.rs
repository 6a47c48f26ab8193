//! Where each row of a CSR matrix begins, at a little over four bytes per row.
//!
//! Built from pieces that several threads fill at once. A piece checks what it can see; what spans pieces (does the
//! next one go on from where this one ended, how far are the rows before its first block boundary from the base that
//! an earlier piece knows) is done when they are joined, in order, so that the error reported is always that of the
//! first wrong row.

use std::fmt::Display;
use std::mem::MaybeUninit;

use crate::base::error::{Error, Result, vec_with_room};

/// Rows that share one 64-bit base.
const BLOCK: usize = 256;

/// The row pointers (`indptr`) of a CSR matrix, compactly: `start(r) = base[r / 256] + offset[r]`.
#[derive(Debug, Clone)]
pub struct RowPointers {
    bases: Vec<u64>,
    offsets: Vec<u32>,
}

/// Room for [`RowPointers`] that are not all there yet.
#[derive(Debug)]
pub struct RowPointersBuilder {
    bases: Vec<u64>,
    offsets: Vec<u32>,
    /// Pointers expected: one more than rows.
    len: usize,
    at: String,
}

/// Room for some consecutive row pointers, to be filled in order.
#[derive(Debug)]
pub struct PointerPiece<'a> {
    at: &'a str,
    offsets: &'a mut [MaybeUninit<u32>],
    /// Of the blocks that begin in the piece.
    bases: &'a mut [MaybeUninit<u64>],
    filled: Filled,
}

/// What a piece knows of itself once it is filled.
#[derive(Debug, Default)]
pub struct Filled {
    first_row: usize,
    len: usize,
    first: u64,
    last: u64,
    /// Pointers before the first block boundary, whose base an earlier piece knows: at most 255.
    head: Vec<u64>,
    blocks: usize,
    /// Base of the last block that begins in the piece.
    base: Option<u64>,
    error: Option<Error>,
}

impl RowPointersBuilder {
    /// For `n_obs` rows; `at` names the array in errors.
    pub fn new(n_obs: u64, at: &str) -> Result<Self> {
        let len = n_obs.checked_add(1).ok_or_else(|| Error::corrupt(at, "more rows than 2^64-2"))?;
        let (bases, offsets) = (vec_with_room(len.div_ceil(BLOCK as u64), at)?, vec_with_room(len, at)?);
        Ok(Self { bases, offsets, len: len as usize, at: at.to_owned() })
    }

    /// Cuts the room into pieces of `rows` pointers each; the last may be shorter.
    pub fn pieces(&mut self, rows: u64) -> Vec<PointerPiece<'_>> {
        let rows = usize::try_from(rows).unwrap_or(usize::MAX).clamp(1, self.len);
        let mut bases = &mut self.bases.spare_capacity_mut()[..self.len.div_ceil(BLOCK)];
        let offsets = &mut self.offsets.spare_capacity_mut()[..self.len];
        let mut out = Vec::with_capacity(self.len.div_ceil(rows));
        for (number, offsets) in offsets.chunks_mut(rows).enumerate() {
            let first_row = number * rows;
            let blocks = (first_row + offsets.len()).div_ceil(BLOCK) - first_row.div_ceil(BLOCK);
            let (own, rest) = bases.split_at_mut(blocks);
            bases = rest;
            let filled = Filled { first_row, ..Filled::default() };
            out.push(PointerPiece { at: &self.at, offsets, bases: own, filled });
        }
        out
    }

    /// The finished pointers, once every piece (in order) was filled without an error and the last pointer is `nnz`.
    pub fn join(mut self, pieces: Vec<Filled>, nnz: u64) -> Result<RowPointers> {
        let (mut len, mut blocks) = (0, 0);
        let (mut base, mut last) = (0, 0);
        for piece in pieces {
            if piece.first_row != len {
                return Err(Error::Internal { message: format!("row pointers of row {len} are missing") });
            }
            if piece.len > 0 && piece.first < last {
                return Err(decrease(&self.at, last, piece.first, len));
            }
            for (row, value) in (len..).zip(piece.head) {
                self.offsets.spare_capacity_mut()[row].write(offset(&self.at, base, value, row)?);
            }
            if let Some(error) = piece.error {
                return Err(error);
            }
            if piece.len > 0 {
                last = piece.last;
            }
            base = piece.base.unwrap_or(base);
            len += piece.len;
            blocks += piece.blocks;
        }
        if (len, blocks) != (self.len, self.len.div_ceil(BLOCK)) {
            return Err(Error::Internal { message: format!("{len} row pointers of {} were filled", self.len) });
        }
        if last != nnz {
            return Err(Error::corrupt(
                &self.at,
                format!("the last row pointer is {last} but data and indices hold {nnz} entries; expected them equal"),
            ));
        }
        // SAFETY: the pieces are consecutive and together as long as the vectors, which were allocated so; each
        // counted as many offsets and bases as it has written (those of its head were written above).
        unsafe {
            self.offsets.set_len(self.len);
            self.bases.set_len(self.len.div_ceil(BLOCK));
        }
        Ok(RowPointers { bases: self.bases, offsets: self.offsets })
    }
}

impl PointerPiece<'_> {
    /// Number of pointers that the piece has room for.
    pub fn room(&self) -> usize {
        self.offsets.len()
    }

    /// Appends the next row pointer, of any type of integers.
    pub fn push(&mut self, value: impl TryInto<u64> + Copy + Display) -> Result<()> {
        let f = &mut self.filled;
        let row = f.first_row + f.len;
        let number = value.try_into().ok().filter(|value| i64::try_from(*value).is_ok());
        let value = number.ok_or_else(|| {
            Error::corrupt(self.at, format!("row pointer {row} is {value}; expected a number of at least 0 and below 2^63"))
        })?;
        if row == 0 && value != 0 {
            return Err(Error::corrupt(self.at, format!("the first row pointer is {value}; expected 0")));
        }
        if f.len == 0 {
            f.first = value;
        } else if value < f.last {
            return Err(decrease(self.at, f.last, value, row));
        }
        if row.is_multiple_of(BLOCK) {
            self.bases[f.blocks].write(value);
            f.blocks += 1;
            f.base = Some(value);
        }
        match f.base {
            Some(base) => {
                self.offsets[f.len].write(offset(self.at, base, value, row)?);
            }
            None => f.head.push(value),
        }
        f.last = value;
        f.len += 1;
        Ok(())
    }

    /// Ends the piece: full, or with the error of its next row.
    pub fn end(self, filled: Result<()>) -> Filled {
        Filled { error: filled.err(), ..self.filled }
    }
}

impl Filled {
    /// First row of the piece.
    pub fn first_row(&self) -> usize {
        self.first_row
    }

    /// Whether the piece ended with an error.
    pub fn failed(&self) -> bool {
        self.error.is_some()
    }
}

fn decrease(at: &str, last: u64, value: u64, row: usize) -> Error {
    Error::corrupt(at, format!("row pointers decrease: {last} at {} and then {value} at {row}", row - 1))
}

fn offset(at: &str, base: u64, value: u64, row: usize) -> Result<u32> {
    u32::try_from(value - base)
        .map_err(|_| Error::unsupported(at, format!("rows {}..={row} hold more than 2^32 entries", row / BLOCK * BLOCK)))
}

impl RowPointers {
    /// From all values, one more than rows; `at` names the array in errors.
    pub fn from_values<V: TryInto<u64> + Copy + Display>(
        mut values: impl ExactSizeIterator<Item = V>,
        nnz: u64,
        at: &str,
    ) -> Result<Self> {
        let n_obs = (values.len() as u64).checked_sub(1).ok_or_else(|| Error::corrupt(at, "no row pointer; expected one"))?;
        let mut builder = RowPointersBuilder::new(n_obs, at)?;
        let mut pieces = builder.pieces(u64::MAX);
        let filled = pieces.pop().map(|mut piece| {
            let result = values.try_for_each(|v| piece.push(v));
            piece.end(result)
        });
        builder.join(filled.into_iter().collect(), nnz)
    }

    /// Number of rows.
    pub fn n_obs(&self) -> u64 {
        self.offsets.len() as u64 - 1
    }

    /// First entry of `row`; `row == n_obs` gives the number of entries.
    pub fn start(&self, row: u64) -> u64 {
        let row = row as usize;
        self.bases[row / BLOCK] + u64::from(self.offsets[row])
    }

    /// Entries of `row` as a half-open range.
    pub fn range(&self, row: u64) -> (u64, u64) {
        (self.start(row), self.start(row + 1))
    }

    /// Number of entries of `row`.
    pub fn len_of(&self, row: u64) -> u64 {
        self.start(row + 1) - self.start(row)
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.bases.capacity() * 8 + self.offsets.capacity() * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn build(values: &[i64], nnz: u64) -> Result<RowPointers> {
        RowPointers::from_values(values.iter().copied(), nnz, "indptr")
    }

    /// Fills pieces of `rows` pointers, the last first: no piece may count on another.
    fn build_in_pieces(values: &[i64], nnz: u64, rows: usize) -> Result<RowPointers> {
        let mut builder = RowPointersBuilder::new(values.len() as u64 - 1, "indptr")?;
        let mut filled: Vec<Filled> = builder
            .pieces(rows as u64)
            .into_iter()
            .zip(values.chunks(rows))
            .rev()
            .map(|(mut piece, values)| {
                assert_eq!(piece.room(), values.len());
                let result = values.iter().try_for_each(|&v| piece.push(v));
                piece.end(result)
            })
            .collect();
        filled.reverse();
        builder.join(filled, nnz)
    }

    #[test]
    fn equals_the_plain_array() {
        let values: Vec<i64> = (0..2000).map(|i: i64| i * i * 700).collect();
        let p = build(&values, *values.last().unwrap() as u64).unwrap();
        for (row, pair) in values.windows(2).enumerate() {
            assert_eq!(p.range(row as u64), (pair[0] as u64, pair[1] as u64));
        }
        assert!(p.bytes() < values.len() * 5);
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_same(
            lengths in prop::collection::vec(0i64..1 << 26, 0..1500), rows in 1usize..1600,
            damage in prop::option::of((0usize..1500, -1i64 << 33..1 << 33)),
        ) {
            let mut values: Vec<i64> = std::iter::once(0)
                .chain(lengths.iter().scan(0, |end, l| { *end += l; Some(*end) }))
                .collect();
            let nnz = *values.last().unwrap() as u64;
            if let Some((row, by)) = damage {
                let row = row % values.len();
                values[row] += by;
            }
            match (build_in_pieces(&values, nnz, rows), build(&values, nnz)) {
                (Ok(joined), Ok(whole)) => prop_assert_eq!((joined.bases, joined.offsets), (whole.bases, whole.offsets)),
                (Err(joined), Err(whole)) => prop_assert_eq!(joined.to_string(), whole.to_string()),
                (joined, whole) => prop_assert!(false, "in pieces {joined:?}, as a whole {whole:?}"),
            }
        }
    }

    #[test]
    fn refuses_what_contradicts_itself() {
        let refused = |values: &[i64], nnz, words: &str| {
            for rows in 1..=values.len() {
                let error = build_in_pieces(values, nnz, rows).unwrap_err().to_string();
                assert!(error.contains(words), "{words:?} in {error:?}, pieces of {rows}");
            }
        };
        refused(&[0, 5, 4], 4, "row pointers decrease: 5 at 1 and then 4 at 2");
        refused(&[1, 5], 5, "the first row pointer is 1; expected 0");
        refused(&[0, 5], 6, "the last row pointer is 5 but data and indices hold 6 entries");
        refused(&[0, -1], 6, "row pointer 1 is -1; expected a number of at least 0");
        refused(&[0, 3, 1 << 33], 1 << 33, "rows 0..=2 hold more than 2^32 entries");
        refused(&[0, 3, 1 << 33, 2], 2, "rows 0..=2 hold more than 2^32 entries");
        let above = RowPointers::from_values([0, u64::MAX, 3].into_iter(), 3, "indptr").unwrap_err().to_string();
        assert!(above.contains("row pointer 1 is 18446744073709551615; expected a number of at least 0 and below 2^63"), "{above}");
        assert!(RowPointersBuilder::new(1 << 60, "indptr").is_err());
        assert!(build(&[], 0).is_err());
    }

    #[test]
    fn a_missing_piece_is_an_error() {
        let mut builder = RowPointersBuilder::new(9, "indptr").unwrap();
        let filled = builder.pieces(5).into_iter().map(|mut piece| {
            let result = (0..5).try_for_each(|_| piece.push(0u8));
            piece.end(result)
        });
        let filled = filled.skip(1).collect();
        assert!(matches!(builder.join(filled, 0), Err(Error::Internal { .. })));
    }
}
