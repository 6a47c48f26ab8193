//! Datasets of different columns side by side: where each column of one of them stands among the joined ones.

use std::sync::Arc;

use super::Buffer;
use crate::base::error::{Error, Result, vec_with_room};
use crate::schema::DType;
use crate::transform::{Joined, MAX_COLUMNS};

/// Joined column of each column that one dataset stores of an element.
#[derive(Debug, PartialEq, Eq)]
pub struct Join {
    /// By stored column; [`Join::DROPPED`] for those that are left out.
    to: Vec<u32>,
    /// Joined columns that the dataset lacks, ascending.
    absent: Vec<u32>,
    joined: Joined,
}

/// Of each dataset, `None` where columns keep their places.
pub type Joins = Vec<Option<Arc<Join>>>;

impl Join {
    /// Stands for a column that is left out: no joined one, and as int32 negative.
    pub const DROPPED: u32 = u32::MAX;

    /// The join that `columns` (int32 or int64 `[n_stored]`, -1 for columns that are left out) describes; `None` where every
    /// column keeps its place.
    ///
    /// # Errors
    /// [`Argument`](Error::Argument) for columns of another type or number, that do not exist, or that come twice.
    ///
    /// # Safety
    /// As for [`Buffer::bytes`].
    pub(super) unsafe fn new(columns: &Buffer, n_stored: u64, n_joined: u64, at: &str) -> Result<Option<Arc<Self>>> {
        let wrong = |message: String| Error::argument("buffers", format!("{at}: columns {message}"));
        if columns.shape != [n_stored] {
            let expected = format!("[{n_stored}], a joined column for each stored one");
            return Err(wrong(format!("have shape {:?}; expected {expected}", columns.shape)));
        }
        // SAFETY: the caller's promise.
        let bytes = unsafe { columns.bytes() };
        let place = |bytes: &[u8]| match columns.dtype {
            DType::Int32 => i64::from(i32::from_ne_bytes(bytes.try_into().expect("four bytes"))),
            _ => i64::from_ne_bytes(bytes.try_into().expect("eight bytes")),
        };
        if !matches!(columns.dtype, DType::Int32 | DType::Int64) {
            return Err(wrong(format!("have type {}; expected int32 or int64", columns.dtype)));
        }
        if n_stored.max(n_joined) > MAX_COLUMNS || n_joined == 0 {
            let message = format!("{n_stored} columns cannot be joined to {n_joined}; expected 1 to {MAX_COLUMNS} of them");
            return Err(Error::unsupported(at, message));
        }
        let (mut to, mut taken) = (vec_with_room(n_stored, at)?, vec_with_room(n_joined, at)?);
        taken.resize(n_joined as usize, false);
        for (stored, column) in bytes.chunks_exact(columns.dtype.size()).map(place).enumerate() {
            if column == -1 {
                to.push(Self::DROPPED);
                continue;
            }
            let slot = usize::try_from(column).ok().and_then(|c| taken.get_mut(c)).ok_or_else(|| {
                wrong(format!("send stored column {stored} to {column}; expected -1, to leave it out, or 0 to {}", n_joined - 1))
            })?;
            if std::mem::replace(slot, true) {
                return Err(wrong(format!("send two stored columns to {column}, the second of them {stored}; expected one")));
            }
            to.push(column as u32);
        }
        let absent: Vec<u32> = (0..).zip(&taken).filter(|(_, taken)| !**taken).map(|(column, _)| column).collect();
        let kept = || to.iter().filter(|&&column| column != Self::DROPPED);
        let joined = Joined { drops: to.contains(&Self::DROPPED), sorts: !kept().is_sorted() };
        let same = absent.is_empty() && joined == Joined::default();
        Ok((!same).then(|| Arc::new(Self { to, absent, joined })))
    }

    /// Joined column of each stored one, or [`Join::DROPPED`].
    pub fn columns(&self) -> &[u32] {
        &self.to
    }

    /// Joined columns that the dataset lacks, ascending.
    pub fn absent(&self) -> &[u32] {
        &self.absent
    }

    /// What is left to do to sparse rows whose columns were replaced by joined ones.
    pub fn joined(&self) -> Joined {
        self.joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(columns: &[i32], n_stored: u64, n_joined: u64) -> Result<Option<Arc<Join>>> {
        let shape = vec![columns.len() as u64];
        let buffer = Buffer { address: columns.as_ptr().addr(), dtype: DType::Int32, shape };
        // SAFETY: `columns` outlives the call.
        unsafe { Join::new(&buffer, n_stored, n_joined, "dataset \"a\", element \"X\"") }
    }

    #[test]
    fn says_what_is_left_to_do_to_a_row() {
        assert_eq!(join(&[0, 1, 2], 3, 3).unwrap(), None);
        let of = |columns: &[i32], n_joined| join(columns, columns.len() as u64, n_joined).unwrap().unwrap();
        let wider = of(&[0, 1, 2], 4);
        assert_eq!((wider.joined(), wider.absent()), (Joined::default(), &[3][..]));
        let mixed = of(&[2, -1, 0], 3);
        assert_eq!((mixed.joined(), mixed.absent()), (Joined { drops: true, sorts: true }, &[1][..]));
        assert_eq!(mixed.columns(), [2, Join::DROPPED, 0]);
        assert_eq!(of(&[-1, 0, 1], 2).joined(), Joined { drops: true, sorts: false });
        assert_eq!(of(&[1, 0], 2).joined(), Joined { drops: false, sorts: true });
    }

    #[test]
    fn refuses_what_is_no_map_of_columns() {
        let refused = |columns: &[i32], n_stored, n_joined, words: &str| {
            let error = join(columns, n_stored, n_joined).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("dataset \"a\", element \"X\""), "{words:?} in {error:?}");
        };
        refused(&[0, 1], 3, 3, "columns have shape [2]; expected [3]");
        refused(&[0, 3], 2, 3, "send stored column 1 to 3; expected -1, to leave it out, or 0 to 2");
        refused(&[0, -2], 2, 3, "send stored column 1 to -2");
        refused(&[1, 1], 2, 3, "send two stored columns to 1, the second of them 1");
        refused(&[], 0, 0, "cannot be joined to 0");
        refused(&[0], 1, MAX_COLUMNS + 1, "expected 1 to");
        let columns = [0.0f32; 2];
        let buffer = Buffer { address: columns.as_ptr().addr(), dtype: DType::Float32, shape: vec![2] };
        // SAFETY: `columns` outlives the call.
        let error = unsafe { Join::new(&buffer, 2, 2, "X") }.unwrap_err().to_string();
        assert!(error.contains("have type float32; expected int32 or int64"), "{error}");
    }
}
