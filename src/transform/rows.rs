//! A row as it was staged and the place that it is delivered to: bytes, and the elements that they are.

use crate::base::error::{Error, Result};

/// A row as it was staged.
#[derive(Debug, Clone, Copy)]
pub enum StagedRow<'a> {
    /// Sparse: the bytes of its column indices (int64 where `wide`, else int32) and of its values.
    Csr {
        /// Column indices.
        indices: &'a [u8],
        /// Whether they are int64.
        wide: bool,
        /// Values of the staged type.
        values: &'a [u8],
    },
    /// Dense: its values.
    Dense(&'a [u8]),
}

/// Where a row is delivered: whole rows of whole elements, of the types that the transform delivers.
#[derive(Debug)]
pub enum RowTarget<'a> {
    /// Sparse: as many entries as `Transform::kept` says.
    Csr {
        /// Column indices.
        indices: &'a mut [u8],
        /// Whether they are int64.
        wide: bool,
        /// Values.
        values: &'a mut [u8],
    },
    /// As many values as the row has: a dense row, or a sparse one whose column indices stay as they are.
    Values(&'a mut [u8]),
    /// A sparse row as a dense one.
    Dense(&'a mut [u8]),
}

pub(super) fn misfit(got: usize, expected: usize) -> Error {
    Error::Internal { message: format!("a row of {got} values for a place of {expected}") }
}

/// Bytes of a buffer as the elements that it is for, of a type without invalid bits.
pub(super) fn elements_mut<D: Copy>(bytes: &mut [u8]) -> Result<&mut [D]> {
    let n = bytes.len() / size_of::<D>();
    // SAFETY: types of delivered values have no invalid bits, a flag being a byte.
    match unsafe { bytes.align_to_mut::<D>() } {
        ([], elements, []) => Ok(elements),
        _ => Err(unaligned(n)),
    }
}

/// The same for reading.
pub(super) fn elements<D: Copy>(bytes: &[u8]) -> Result<&[D]> {
    // SAFETY: as above.
    match unsafe { bytes.align_to::<D>() } {
        ([], elements, []) => Ok(elements),
        _ => Err(unaligned(bytes.len() / size_of::<D>())),
    }
}

fn unaligned(n: usize) -> Error {
    Error::Internal { message: format!("a place for {n} values that is not aligned to them") }
}
