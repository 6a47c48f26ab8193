//! How large a batch of given rows is: row pointers, bytes, and the chunks that it touches.

use super::runs::{Cut, chunks_beside, row_runs};
use super::slots::RowSlot;
use crate::arena::Pool;
use crate::base::error::{Error, Result};
use crate::base::machine::physical_memory;
use crate::batch::{BatchLayout, ElementLayout};
use crate::collection::{ArraySource, Collection, Element, Source};
use crate::finish::{OnDevice, bytes_to_finish};
use crate::schema::ElementKind;

/// Tasks of one element that one batch may make, and those that the batches of one unit may: honest batches stay ten times
/// below it. Metadata can claim any number of chunks without a byte on disk.
pub const MAX_CHUNKS: u64 = 1 << 21;
/// Bytes that a task takes from planning to delivery (1.2 KB were measured where nothing is stored), counted as the batch's
/// own beyond so many tasks: rows of chunks of single elements take more for their tasks than for themselves.
const TASK_BYTES: u64 = 1200;
const FREE_TASKS: u64 = 1 << 16;

/// Row pointers and bytes of a batch of these global rows, of which a device finishes what `on_device` says.
///
/// # Errors
/// [`Argument`](Error::Argument) for a batch larger than this machine's memory, or of more than [`MAX_CHUNKS`] chunks.
pub fn measure(collection: &Collection, rows: Vec<u64>, on_device: Option<&OnDevice>) -> Result<BatchLayout> {
    let mut bytes = Pool::batch_footprint(rows.len() * 8);
    let located: Vec<(u32, u64)> = rows.iter().map(|&r| collection.split_row(r)).collect();
    let mut elements = Vec::with_capacity(collection.elements().len());
    let mut chunks = 0u64;
    for (number, element) in collection.elements().iter().enumerate() {
        let layout = element_layout(element, &located);
        let read = element_bytes(element, &layout, rows.len())?;
        let transformed = on_device.is_some_and(|device| device.transforms(number));
        let sealed = bytes_to_finish(element, &layout, rows.len(), transformed).ok_or_else(|| too_large(element, rows.len()))?;
        // no more than were just found to be few enough
        let n_dense = || rows.len() * (element.dense_row_bytes() / element.dtype.size());
        let n_values = layout.indptr.last().map_or_else(n_dense, |&nnz| nnz as usize);
        let copied = on_device.map_or(0, |device| device.copied_bytes(number, element, n_values));
        bytes = bytes.saturating_add(read).saturating_add(sealed).saturating_add(copied);
        chunks = chunks.saturating_add(element_chunks(element, &located)?);
        elements.push(layout);
    }
    bytes = bytes.saturating_add(chunks.saturating_sub(FREE_TASKS).saturating_mul(TASK_BYTES));
    // the system would grant the memory and kill the process once it is written
    if bytes > physical_memory() {
        let n = rows.len();
        return Err(Error::argument(
            "batch_size",
            format!("a batch of {n} rows has {bytes} bytes, more than this machine's memory; ask for fewer rows"),
        ));
    }
    Ok(BatchLayout { rows, elements, bytes, chunks })
}

/// Chunks that these rows touch: a cheap upper bound, or the exact number where that bound is too large.
fn element_chunks(element: &Element, located: &[(u32, u64)]) -> Result<u64> {
    let bound = located.iter().fold(0u64, |sum, &(dataset, row)| sum.saturating_add(row_chunks(element, dataset, row).1));
    if bound <= MAX_CHUNKS {
        return Ok(bound);
    }
    let slot = |&(dataset, row): &(u32, u64)| RowSlot { dataset, row, batch: 0, position: 0 };
    let mut slots: Vec<RowSlot> = located.iter().map(slot).collect();
    slots.sort_unstable();
    slots.dedup();
    let of_dataset = |slots: &[RowSlot]| match &element.sources[slots[0].dataset as usize] {
        Source::Dense(ArraySource::Chunked(chunked)) => {
            let runs = row_runs(slots, chunked.chunk_shape[0], &Cut::of(chunked));
            chunks_beside(chunked).saturating_mul(runs.len() as u64)
        }
        // a cut chunk of a CSR array counts once: its parts are no more than its rows
        _ => {
            let (mut next, mut chunks) = (0, 0u64);
            for slot in slots {
                let (first, n) = row_chunks(element, slot.dataset, slot.row);
                let end = first.saturating_add(n);
                chunks = chunks.saturating_add(end.saturating_sub(next.max(first)));
                next = next.max(end);
            }
            chunks
        }
    };
    let chunks = slots.chunk_by(|a, b| a.dataset == b.dataset).map(of_dataset).fold(0, u64::saturating_add);
    if chunks <= MAX_CHUNKS {
        return Ok(chunks);
    }
    let n = located.len();
    Err(Error::argument(
        "batch_size",
        format!(
            "a batch of {n} rows of {:?} touches {chunks} chunks; expected at most {MAX_CHUNKS}: ask for fewer rows, or rewrite the array in larger chunks",
            element.name
        ),
    ))
}

/// First chunk of a row and how many it touches, over both arrays of a CSR element counted as one.
fn row_chunks(element: &Element, dataset: u32, row: u64) -> (u64, u64) {
    match &element.sources[dataset as usize] {
        Source::Csr(csr) => {
            let (start, end) = csr.rows.range(row);
            let lengths = [&csr.indices, &csr.data].into_iter().filter_map(|array| match array {
                ArraySource::Chunked(chunked) => Some(chunked.chunk_shape[0]),
                ArraySource::Memory(_) => None,
            });
            match lengths.min() {
                Some(len) if start < end => (start / len, (end - 1) / len - start / len + 1),
                _ => (0, 0),
            }
        }
        Source::Dense(ArraySource::Chunked(chunked)) => {
            let beside = chunks_beside(chunked);
            (row / chunked.chunk_shape[0] * beside, beside)
        }
        Source::Dense(ArraySource::Memory(_)) => (0, 0),
    }
}

fn element_layout(element: &Element, located: &[(u32, u64)]) -> ElementLayout {
    if !matches!(element.kind, ElementKind::Csr { .. }) {
        return ElementLayout { indptr: Vec::new(), wide: false };
    }
    let mut indptr = Vec::with_capacity(located.len() + 1);
    let mut end = 0u64;
    indptr.push(end);
    for &(dataset, row) in located {
        end = end.saturating_add(element.sources[dataset as usize].entries_of(row));
        indptr.push(end);
    }
    ElementLayout { wide: element.wide_columns() || end > i32::MAX as u64, indptr }
}

fn too_large(element: &Element, n: usize) -> Error {
    Error::argument("batch_size", format!("a batch of {n} rows of {:?} has more bytes than can be addressed", element.name))
}

fn element_bytes(element: &Element, layout: &ElementLayout, n: usize) -> Result<u64> {
    let too_large = || too_large(element, n);
    if let Some(&nnz) = layout.indptr.last() {
        let index = if layout.wide { 8 } else { 4 };
        let per_entry = (index + element.dtype.size()) as u64;
        let total = nnz.checked_mul(per_entry).filter(|b| *b < 1 << 48).ok_or_else(too_large)?;
        return Ok(Pool::batch_footprint((n + 1) * index)
            + Pool::batch_footprint((nnz as usize) * index)
            + Pool::batch_footprint(total as usize - nnz as usize * index));
    }
    let dense = n.checked_mul(element.dense_row_bytes()).filter(|b| *b < 1 << 48).ok_or_else(too_large)?;
    Ok(Pool::batch_footprint(dense))
}
