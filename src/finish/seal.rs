//! Rows of a batch whose chunks have all arrived → what is delivered of them.
//!
//! ```text
//! HostBatch (as read) ─▶ Seal::new: memory for what is delivered ─▶ rows(block) on any threads ─▶ finish ─▶ HostBatch
//! ```
//!
//! Elements with a [`Transform`](crate::transform::Transform) are rewritten row by row, the others pass. So are rows whose
//! columns were replaced by [joined](crate::collection::Join) ones where some are dropped or change places. Where entries are
//! dropped their number is known only now that the column indices are here: they are counted first, so that the batch is
//! made in its final size. What keeps its columns and the size of its values is rewritten in place.

use std::ops::Range;
use std::sync::Arc;

use super::form::{Form, Sorts};
use super::on_device::OnDevice;
use crate::arena::Pool;
use crate::base::error::{Error, Result};
use crate::batch::{BatchElement, HostBatch, Tensor};
use crate::collection::{Collection, Element};
use crate::schema::{DType, ElementKind};
use crate::transform::{EntrySorter, Joined, RowSealer, RowTarget, StagedRow, copy_kept};

/// Rows that one task seals.
pub(crate) const ROWS_PER_TASK: usize = 256;

/// A batch between reading and delivery.
#[derive(Debug)]
pub(crate) struct Seal {
    staged: HostBatch,
    /// Rows of which some element may have a column more than once, in order.
    repeating: Vec<usize>,
    /// Per element what is delivered instead of it or of parts of it; `None` where nothing is done to it.
    sealed: Vec<Option<Sealed>>,
}

#[derive(Debug)]
enum Sealed {
    /// Values in the place of those that were read.
    InPlace,
    /// Values beside the row pointers and column indices that were read.
    Values(Tensor),
    /// Sparse rows.
    Csr { indptr: Tensor, indices: Tensor, values: Tensor },
    /// Dense rows.
    Dense(Tensor),
    /// Sparse rows in the place of those that were read, some of them sorted by column.
    Sorted(Sorts),
}

impl Seal {
    /// Whether batches of `collection` have to be sealed.
    pub(crate) fn is_needed(collection: &Collection, on_device: Option<&OnDevice>) -> bool {
        forms(collection, on_device).any(|form| form.is_some())
    }

    /// Whether all that is done to batches is to sort rows for a kernel of the device: those that were seen to have each column
    /// once need nothing.
    pub(crate) fn only_sorts(collection: &Collection, on_device: Option<&OnDevice>) -> bool {
        let repeating = Sorts { joined: false, repeating: true };
        forms(collection, on_device).flatten().all(|form| form == Form::Sorted(repeating))
    }

    /// Memory for what becomes of `staged`, every byte of which has been written. `repeating` are its rows, in order, that were
    /// not seen to have each column once in the elements that are [merged](Element::merges).
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) fn new(
        collection: &Collection,
        staged: HostBatch,
        repeating: Vec<usize>,
        pool: &Arc<Pool>,
        on_device: Option<&OnDevice>,
    ) -> Result<Self> {
        let elements = collection.elements().iter().zip(forms(collection, on_device)).zip(&staged.elements);
        let sealed =
            elements.map(|((element, form), read)| Sealed::new(element, form, read, &staged, pool)).collect::<Result<_>>()?;
        Ok(Self { staged, repeating, sealed })
    }

    /// Rows that may have a column more than once.
    pub(crate) fn repeating(&self) -> &[usize] {
        &self.repeating
    }

    /// Number of rows.
    pub(crate) fn n_rows(&self) -> usize {
        self.staged.n_rows() as usize
    }

    /// Seals some rows.
    ///
    /// # Safety
    /// No row is sealed twice, and none by two threads.
    ///
    /// # Errors
    /// [`Internal`](Error::Internal) for a batch that is not of this collection.
    pub(crate) unsafe fn rows(&self, collection: &Collection, rows: &(impl Iterator<Item = usize> + Clone)) -> Result<()> {
        for ((element, staged), sealed) in collection.elements().iter().zip(&self.staged.elements).zip(&self.sealed) {
            let (Some(transform), Some(sealed)) = (&element.transform, sealed) else { continue };
            if transform.is_none() || matches!(sealed, Sealed::Sorted(_)) {
                // SAFETY: the caller's promise.
                unsafe { self.move_entries(collection, element, (staged, sealed), rows.clone())? };
                continue;
            }
            let mut sealer = RowSealer::new(transform)?;
            for row in rows.clone() {
                // SAFETY: the rows' numbers are written, and nobody writes to them.
                let joined = unsafe { joined(collection, element, &self.staged, row)? };
                // entries of other rows move up
                let joined = Joined { drops: element.unfinished.drops, ..joined };
                // SAFETY: the batch was read whole before it was given to `new`, nobody else touches this row (the caller's
                // promise), and what was loaded is not looked at any more when its place is written.
                unsafe {
                    let moved = sealer.load(staged_row(staged, row)?, joined, self.may_repeat(row));
                    sealer.write(target_row(staged, sealed, row, moved)?)?;
                }
            }
        }
        Ok(())
    }

    fn may_repeat(&self, row: usize) -> bool {
        self.repeating.binary_search(&row).is_ok()
    }

    /// Seals sparse rows whose entries are dropped or change places, and nothing else.
    ///
    /// # Safety
    /// As for [`rows`](Self::rows).
    unsafe fn move_entries(
        &self,
        collection: &Collection,
        element: &Element,
        (staged, sealed): (&BatchElement, &Sealed),
        rows: impl Iterator<Item = usize>,
    ) -> Result<()> {
        let BatchElement::Csr { indptr, indices, data } = staged else {
            return Err(Error::Internal { message: "entries of a dense element".into() });
        };
        let (indptr, indices, data, sorts) = match sealed {
            Sealed::Sorted(sorts) => (indptr, indices, data, *sorts),
            Sealed::Csr { indptr, indices, values } => (indptr, indices, values, Sorts { joined: true, repeating: false }),
            _ => return Err(Error::Internal { message: "entries that stay where they are".into() }),
        };
        let mut sorter = EntrySorter::new(indices.dtype, data.dtype.size())?;
        for row in rows {
            // SAFETY: the batch was read whole before it was given to `new`, and nobody else touches this row (the caller's
            // promise).
            unsafe {
                let joined = joined(collection, element, &self.staged, row)?;
                if matches!(sealed, Sealed::Csr { .. }) {
                    copy_kept(staged_row(staged, row)?, target_row(staged, sealed, row, false)?, data.dtype.size())?;
                }
                let entries = entries(indptr, row)?;
                if sorts.joined && joined.sorts {
                    sorter.sort(items_mut(indices, entries.clone())?, items_mut(data, entries)?)?;
                } else if sorts.repeating && self.may_repeat(row) {
                    sorter.sort_repeating(items_mut(indices, entries.clone())?, items_mut(data, entries)?)?;
                }
            }
        }
        Ok(())
    }

    /// What is delivered, once every row is sealed.
    pub(crate) fn finish(self, collection: &Collection) -> HostBatch {
        let mut elements = Vec::with_capacity(self.sealed.len());
        for ((element, mut read), sealed) in collection.elements().iter().zip(self.staged.elements).zip(self.sealed) {
            elements.push(match sealed {
                Some(Sealed::Csr { indptr, indices, values: data }) => BatchElement::Csr { indptr, indices, data },
                Some(Sealed::Dense(values)) => BatchElement::Dense(values),
                Some(Sealed::Values(values)) => {
                    *read.values_mut() = values;
                    read
                }
                Some(Sealed::InPlace) => {
                    let values = read.values_mut();
                    (values.dtype, values.delivered) = (element.delivered_dtype(), element.delivered_dtype());
                    read
                }
                Some(Sealed::Sorted(_)) | None => read,
            });
        }
        HostBatch { rows: self.staged.rows, elements }
    }
}

/// What is done here to each element.
fn forms(collection: &Collection, on_device: Option<&OnDevice>) -> impl Iterator<Item = Option<Form>> {
    let transformed = move |element| on_device.is_some_and(|device| device.transforms(element));
    collection.elements().iter().enumerate().map(move |(number, element)| Form::of(element, transformed(number)))
}

impl Sealed {
    fn new(
        element: &Element,
        form: Option<Form>,
        read: &BatchElement,
        staged: &HostBatch,
        pool: &Arc<Pool>,
    ) -> Result<Option<Self>> {
        let n = staged.n_rows();
        let (Some(transform), Some(form)) = (&element.transform, form) else { return Ok(None) };
        let dtype = transform.dtype();
        Ok(Some(match (form, read) {
            (Form::InPlace, _) => Self::InPlace,
            (Form::Sorted(sorts), _) => Self::Sorted(sorts),
            (Form::Values, read) => Self::Values(Tensor::new(pool, dtype, read.values().shape.clone())?),
            (Form::Csr, read) => {
                let mut ends = Vec::with_capacity(n as usize + 1);
                let mut end = 0;
                ends.push(end);
                for row in 0..n as usize {
                    // SAFETY: the batch was read whole, and nobody writes to it.
                    if let StagedRow::Csr { indices, wide, .. } = unsafe { staged_row(read, row)? } {
                        end += transform.kept(indices, wide) as u64;
                    }
                    ends.push(end);
                }
                let index = if end > i32::MAX as u64 { DType::Int64 } else { DType::Int32 };
                Self::Csr {
                    indptr: Tensor::filled(pool, index, ends.into_iter())?,
                    indices: Tensor::new(pool, index, vec![end])?,
                    values: Tensor::new(pool, dtype, vec![end])?,
                }
            }
            (Form::Dense, _) => Self::Dense(Tensor::new(pool, dtype, vec![n, transform.n_out() as u64])?),
        }))
    }
}

/// A row as it was read.
///
/// # Safety
/// The row has been written, and nobody writes to it while this lives.
unsafe fn staged_row(read: &BatchElement, row: usize) -> Result<StagedRow<'_>> {
    // SAFETY: the caller's promise.
    unsafe {
        Ok(match read {
            BatchElement::Csr { indptr, indices, data } => {
                let entries = entries(indptr, row)?;
                let wide = indices.dtype == DType::Int64;
                StagedRow::Csr { indices: items(indices, entries.clone())?, wide, values: items(data, entries)? }
            }
            BatchElement::Dense(values) => StagedRow::Dense(items(values, dense_row(values, row))?),
        })
    }
}

/// What joining the datasets has left to do to a row.
///
/// # Safety
/// Nobody writes to the numbers of the rows.
unsafe fn joined(collection: &Collection, element: &Element, staged: &HostBatch, row: usize) -> Result<Joined> {
    if element.joins.is_empty() || !matches!(element.kind, ElementKind::Csr { .. }) {
        return Ok(Joined::default());
    }
    // SAFETY: the caller's promise; they are written before anything else of a batch.
    let number = unsafe { items(&staged.rows, row..row + 1)? };
    let number = i64::from_ne_bytes(number.try_into().expect("8 bytes"));
    Ok(element.joined(collection.split_row(number as u64).0))
}

/// Where a row is delivered whose entries may have `moved`.
///
/// # Safety
/// Nobody else has to do with the row while this lives.
unsafe fn target_row<'a>(read: &'a BatchElement, sealed: &'a Sealed, row: usize, moved: bool) -> Result<RowTarget<'a>> {
    // SAFETY: the caller's promise; row pointers are written already.
    unsafe {
        Ok(match (sealed, read) {
            // sorted where they were read
            (Sealed::InPlace | Sealed::Values(_), BatchElement::Csr { indptr, indices, data }) if moved => {
                let values = if let Sealed::Values(values) = sealed { values } else { data };
                let entries = entries(indptr, row)?;
                let wide = indices.dtype == DType::Int64;
                RowTarget::Csr { indices: items_mut(indices, entries.clone())?, wide, values: items_mut(values, entries)? }
            }
            (Sealed::InPlace, BatchElement::Csr { indptr, data, .. }) => RowTarget::Values(items_mut(data, entries(indptr, row)?)?),
            (Sealed::InPlace, BatchElement::Dense(values)) => RowTarget::Values(items_mut(values, dense_row(values, row))?),
            (Sealed::Values(values), BatchElement::Csr { indptr, .. }) => {
                RowTarget::Values(items_mut(values, entries(indptr, row)?)?)
            }
            (Sealed::Csr { indptr, indices, values }, _) => {
                let entries = entries(indptr, row)?;
                let wide = indices.dtype == DType::Int64;
                RowTarget::Csr { indices: items_mut(indices, entries.clone())?, wide, values: items_mut(values, entries)? }
            }
            (Sealed::Dense(values), BatchElement::Csr { .. }) => RowTarget::Dense(items_mut(values, dense_row(values, row))?),
            (Sealed::Dense(values) | Sealed::Values(values), BatchElement::Dense(_)) => {
                RowTarget::Values(items_mut(values, dense_row(values, row))?)
            }
            (Sealed::Sorted(_), _) => return Err(Error::Internal { message: "a row that is only sorted".into() }),
        })
    }
}

/// Entries of a row, by row pointers.
///
/// # Safety
/// They are written, and nobody writes to them.
unsafe fn entries(indptr: &Tensor, row: usize) -> Result<Range<usize>> {
    // SAFETY: the caller's promise.
    let ends = unsafe { items(indptr, row..row + 2)? };
    let at = |i: usize| match indptr.dtype {
        DType::Int32 => i32::from_ne_bytes(ends[4 * i..4 * i + 4].try_into().expect("4 bytes")) as usize,
        _ => i64::from_ne_bytes(ends[8 * i..8 * i + 8].try_into().expect("8 bytes")) as usize,
    };
    Ok(at(0)..at(1))
}

fn dense_row(values: &Tensor, row: usize) -> Range<usize> {
    let n = values.shape[1..].iter().product::<u64>() as usize;
    row * n..(row + 1) * n
}

/// Bytes of some elements.
///
/// # Safety
/// They are written, and nobody writes to them while this lives.
unsafe fn items(tensor: &Tensor, range: Range<usize>) -> Result<&[u8]> {
    let bytes = bytes_of(tensor, range)?;
    // SAFETY: within the lease; the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(tensor.lease.base().add(bytes.start), bytes.len()) })
}

/// The same for writing.
///
/// # Safety
/// Nobody else has to do with them while this lives.
#[expect(clippy::mut_from_ref, reason = "a lease is filled in parts by several threads")]
unsafe fn items_mut(tensor: &Tensor, range: Range<usize>) -> Result<&mut [u8]> {
    let bytes = bytes_of(tensor, range)?;
    // SAFETY: within the lease, whose memory was initialised when it was made; the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.lease.base().add(bytes.start), bytes.len()) })
}

fn bytes_of(tensor: &Tensor, range: Range<usize>) -> Result<Range<usize>> {
    let bytes = range.start * tensor.dtype.size()..range.end * tensor.dtype.size();
    if bytes.start <= bytes.end && bytes.end <= tensor.lease.len() {
        return Ok(bytes);
    }
    Err(Error::Internal { message: format!("elements {range:?} of a tensor of shape {:?}", tensor.shape) })
}
