//! What is left to do to the rows of an element once they are read, and how much memory that takes.

use crate::arena::Pool;
use crate::batch::ElementLayout;
use crate::collection::Element;
use crate::schema::ElementKind;

/// Which rows are sorted by column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sorts {
    /// Those whose columns a join put elsewhere.
    pub(super) joined: bool,
    /// Those that have a column more than once, for a kernel that adds up entries of one column that stand one behind the other.
    pub(super) repeating: bool,
}

/// What is done on the host to the rows of an element that were read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Values are computed in the place of those that were read.
    InPlace,
    /// Values of another size are computed beside the row pointers and column indices that were read.
    Values,
    /// Sparse rows are made anew.
    Csr,
    /// Dense rows are made.
    Dense,
    /// Rows are sorted where they were read.
    Sorted(Sorts),
}

impl Form {
    /// What is done to an element here; `transformed` says that a device transforms it.
    pub(super) fn of(element: &Element, transformed: bool) -> Option<Self> {
        let transform = element.transform.as_ref()?;
        if transformed {
            // rows that become dense have no order
            let stays_sparse = matches!(transform.kind(), ElementKind::Csr { .. });
            let sorts = Sorts { joined: element.unfinished.sorts && stays_sparse, repeating: element.merges() };
            return (sorts.joined || sorts.repeating).then_some(Self::Sorted(sorts));
        }
        let keeps_size = transform.dtype().size() == element.dtype.size();
        Some(match (&element.kind, transform.kind(), transform.moves_columns() || element.unfinished.drops) {
            (ElementKind::Csr { .. }, ElementKind::Csr { .. }, true) => Self::Csr,
            (ElementKind::Csr { .. }, ElementKind::Dense { .. }, _) | (ElementKind::Dense { .. }, _, true) => Self::Dense,
            _ if transform.is_none() => Self::Sorted(Sorts { joined: true, repeating: false }),
            _ if keeps_size => Self::InPlace,
            _ => Self::Values,
        })
    }
}

/// Bytes that sealing `n` rows of an element takes at most, beside those that are read, unless a device has
/// `transformed` it; `None` if too many to address.
pub(crate) fn bytes_to_finish(element: &Element, layout: &ElementLayout, n: usize, transformed: bool) -> Option<u64> {
    let (Some(transform), Some(form)) = (&element.transform, Form::of(element, transformed)) else { return Some(0) };
    let footprint = |items: usize, size: usize| items.checked_mul(size).filter(|b| *b < 1 << 48).map(Pool::batch_footprint);
    let size = transform.dtype().size();
    let nnz = layout.indptr.last().map_or(0, |&nnz| nnz as usize);
    match form {
        Form::InPlace | Form::Sorted(_) => Some(0),
        Form::Values if matches!(element.kind, ElementKind::Csr { .. }) => footprint(nnz, size),
        Form::Csr => {
            let index = layout.index_dtype().size();
            Some(footprint(n + 1, index)? + footprint(nnz, index)? + footprint(nnz, size)?)
        }
        Form::Dense | Form::Values => footprint(n.checked_mul(transform.n_out())?, size),
    }
}
