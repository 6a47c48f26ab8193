//! Where each row of a CSR matrix begins, at a little over four bytes per row.

use crate::error::{Error, Result, vec_with_room};

/// Rows that share one 64-bit base.
const BLOCK: usize = 256;

/// The row pointers (`indptr`) of a CSR matrix, compactly: `start(r) = base[r / 256] + offset[r]`.
#[derive(Debug, Clone)]
pub struct RowPointers {
    bases: Vec<u64>,
    offsets: Vec<u32>,
}

/// Builds [`RowPointers`] from values that arrive in order, checking each.
#[derive(Debug)]
pub struct RowPointersBuilder {
    pointers: RowPointers,
    last: u64,
    at: String,
}

impl RowPointersBuilder {
    /// For `n_obs` rows; `at` names the array in errors.
    pub fn new(n_obs: u64, at: &str) -> Result<Self> {
        let len = n_obs.checked_add(1).ok_or_else(|| Error::corrupt(at, "more rows than 2^64-2"))?;
        let pointers = RowPointers { bases: vec_with_room(len.div_ceil(BLOCK as u64), at)?, offsets: vec_with_room(len, at)? };
        Ok(Self { pointers, last: 0, at: at.to_owned() })
    }

    /// Appends the next row pointer.
    pub fn push(&mut self, value: i64) -> Result<()> {
        let p = &mut self.pointers;
        let row = p.offsets.len();
        let value = u64::try_from(value)
            .map_err(|_| Error::corrupt(&self.at, format!("row pointer {row} is {value}; expected a number of at least 0")))?;
        if row == 0 && value != 0 {
            return Err(Error::corrupt(&self.at, format!("the first row pointer is {value}; expected 0")));
        }
        if value < self.last {
            return Err(Error::corrupt(
                &self.at,
                format!("row pointers decrease: {} at {} and then {value} at {row}", self.last, row - 1),
            ));
        }
        self.last = value;
        if row.is_multiple_of(BLOCK) {
            p.bases.push(value);
        }
        let offset = u32::try_from(value - p.bases[row / BLOCK]).map_err(|_| {
            Error::unsupported(&self.at, format!("rows {}..={row} hold more than 2^32 entries", row / BLOCK * BLOCK))
        })?;
        p.offsets.push(offset);
        Ok(())
    }

    /// The finished pointers, once `n_obs + 1` values were pushed and the last equals `nnz`.
    pub fn finish(self, nnz: u64) -> Result<RowPointers> {
        if self.last != nnz {
            return Err(Error::corrupt(
                &self.at,
                format!("the last row pointer is {} but data and indices hold {nnz} entries; expected them equal", self.last),
            ));
        }
        Ok(self.pointers)
    }
}

impl RowPointers {
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

    fn build(values: &[i64], nnz: u64) -> Result<RowPointers> {
        let mut b = RowPointersBuilder::new(values.len() as u64 - 1, "indptr")?;
        values.iter().try_for_each(|&v| b.push(v))?;
        b.finish(nnz)
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

    #[test]
    fn refuses_what_contradicts_itself() {
        assert!(build(&[0, 5, 4], 4).unwrap_err().to_string().contains("decrease"));
        assert!(build(&[1, 5], 5).unwrap_err().to_string().contains("expected 0"));
        assert!(build(&[0, 5], 6).unwrap_err().to_string().contains("hold 6"));
        assert!(build(&[0, -1], 6).unwrap_err().to_string().contains("at least 0"));
        assert!(build(&[0, 1 << 33], 1 << 33).unwrap_err().to_string().contains("2^32"));
        assert!(RowPointersBuilder::new(1 << 60, "indptr").is_err());
    }
}
