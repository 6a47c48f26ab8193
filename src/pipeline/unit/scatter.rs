//! Rows of a decoded chunk to their slots.

use std::ops::Range;

use smallvec::SmallVec;

use super::filling::{Destination, Filling, Piece};
use crate::base::error::{Error, Result};
use crate::collection::{ArraySource, CsrSource, ElementKind, Join, Source};
use crate::decode::Decoded;
use crate::decode::scatter::{Columns, CopyValues, STREAMED_BYTES, Stored, announce, copy_indices, copy_values, copy_whole_values};
use crate::finish::widened::Widened;
use crate::layout::ChunkedArray;
use crate::pipeline::dense::{DenseBlock, spread};
use crate::plan::{ChunkTask, Part};
use crate::schema::DType;

/// Elements to copy from.
pub(super) enum Run<'a> {
    /// A lent array.
    Elements(&'a [u8]),
    /// What a task needs of a chunk.
    Decoded(&'a Decoded<'a>),
    /// A block of repeated fill values.
    Fill(&'a [u8]),
}

/// Fill values are written in blocks of this many.
pub(super) const FILL_BLOCK: usize = 1024;

/// Column numbers of dense rows are made so many at a time: they stay in the nearest cache.
const COLUMNS_AT_ONCE: usize = 512;

/// So many pieces are looked up, and what they are copied to is announced, before the first of them is copied: to copy a short row
/// takes less time than memory needs for either.
const PIECES_AHEAD: usize = 16;

/// Lets `copy` copy all of `pieces` to their destinations, of which `place` says where elements begin, and the size of one.
fn copy_announced(
    mut pieces: impl Iterator<Item = (Piece, Destination)>,
    place: impl Fn(&Destination) -> (*mut u8, usize),
    mut copy: impl FnMut(Piece, Destination) -> Result<()>,
) -> Result<()> {
    loop {
        let ahead: SmallVec<[(Piece, Destination); PIECES_AHEAD]> = pieces.by_ref().take(PIECES_AHEAD).collect();
        if ahead.is_empty() {
            return Ok(());
        }
        for (piece, to) in &ahead {
            let (base, size) = place(to);
            announce(base.wrapping_add(piece.to * size), piece.n * size);
        }
        ahead.into_iter().try_for_each(|(piece, to)| copy(piece, to))?;
    }
}

impl Filling {
    /// Copies the rows of a task's slots out of `run`.
    pub(super) fn scatter(&self, task: &ChunkTask, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        match (self.source(task), task.part) {
            (Source::Csr(csr), Part::Indices) => self.scatter_indices(task, csr, array, run),
            (Source::Csr(csr), _) => self.scatter_values(task, csr.data.dtype(), self.destined(task, csr, array), run),
            (Source::Dense(source), _) => match self.collection.elements()[task.element as usize].kind {
                ElementKind::Dense { .. } => self.scatter_dense(task, source, array, run),
                ElementKind::Csr { .. } => self.scatter_as_sparse(task, source, array, run),
            },
        }
    }

    fn destined<'a>(
        &'a self,
        task: &'a ChunkTask,
        csr: &'a CsrSource,
        array: Option<&ChunkedArray>,
    ) -> impl Iterator<Item = (Piece, Destination)> + 'a {
        self.pieces(task, csr, array).map(|piece| (piece, self.destination(piece.slot, task)))
    }

    fn scatter_values(
        &self,
        task: &ChunkTask,
        stored: DType,
        pieces: impl Iterator<Item = (Piece, Destination)>,
        run: &Run,
    ) -> Result<()> {
        let staged = self.collection.elements()[task.element as usize].dtype;
        let wide = copy_values(stored, staged).ok_or_else(|| no_cast(stored, staged))?;
        let place = |to: &Destination| (to.values, to.value.size());
        copy_announced(pieces, place, |Piece { slot, from, to, n }, Destination { values, value, .. }| {
            let copied = |copy: CopyValues, dst: *mut u8, size: usize| {
                let mut fits = true;
                run.parts(from, n, stored.size(), |src, done, n| {
                    // SAFETY: `run.parts` gives `n` readable elements; the slot has room for the row's entries,
                    // of which these are numbers `to + done..`, and no other task writes them.
                    fits &= unsafe { copy.run(src, dst.add((to + done) * size), n) };
                })?;
                Ok(fits)
            };
            let mut dst = values;
            if value != staged {
                let narrow = copy_whole_values(stored, value).ok_or_else(|| no_cast(stored, value))?;
                if copied(narrow, values, value.size())? {
                    return Ok(());
                }
                dst = self.widened_values(slot, task, to..to + n)?;
            }
            if copied(wide, dst, staged.size())? { Ok(()) } else { Err(overflow(self.plan.slot(task, slot).row)) }
        })
    }

    fn scatter_indices(&self, task: &ChunkTask, csr: &CsrSource, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        let element = &self.collection.elements()[task.element as usize];
        let ElementKind::Csr { n_var } = element.kind else {
            return Err(Error::Internal { message: "indices of a dense element".into() });
        };
        let columns = element.join(task.dataset).map(Join::columns);
        let n_var = columns.map_or(n_var, |columns| columns.len() as u64);
        let stored = csr.indices.dtype();
        let look = element.merges();
        let place = |to: &Destination| (to.indices, to.index.size());
        copy_announced(
            self.destined(task, csr, array),
            place,
            |Piece { slot, from, to, n }, Destination { indices: dst, index, .. }| {
                let copy = copy_indices(stored, index).ok_or_else(|| no_cast(stored, index))?;
                let (mut largest, mut columns) = (0, Columns::new(columns.unwrap_or_default(), look));
                run.parts(from, n, stored.size(), |src, done, n| {
                    // SAFETY: as in `scatter_values`, with the index size of this batch.
                    largest = largest.max(unsafe { copy.run(src, dst.add((to + done) * index.size()), n, &mut columns) });
                })?;
                if look {
                    let slot = self.plan.slot(task, slot);
                    let (start, end) = csr.rows.range(slot.row);
                    if !columns.rise() || (n as u64) < end - start {
                        self.repeating(slot.batch as usize).push(slot.position());
                    }
                }
                if largest >= n_var {
                    return Err(Error::corrupt(
                        format!("row {}", self.plan.slot(task, slot).row),
                        format!(
                            "a column index is negative or not below n_var = {n_var} (largest, read as unsigned: {largest}); the matrix \
                         is damaged, or its shape is not its own: write it again"
                        ),
                    ));
                }
                Ok(())
            },
        )
    }

    fn scatter_dense(&self, task: &ChunkTask, source: &ArraySource, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        let element = &self.collection.elements()[task.element as usize];
        let (stored, delivered) = (source.dtype(), element.dtype);
        let copy = copy_values(stored, delivered).ok_or_else(|| no_cast(stored, delivered))?;
        let block = DenseBlock::new(source.shape(), array, task.chunk);
        if let Some(join) = element.join(task.dataset) {
            return self.scatter_joined(task, join, &block, run, copy);
        }
        for (number, slot) in task.slots.clone().zip(self.plan.slots_of(task)) {
            let dst = self.destination(number, task).values;
            let (from, to) = (block.elements(slot.row).start, slot.position() * block.delivered_row);
            block.stretches(|stored_at, delivered_at| {
                let mut fits = true;
                run.parts(from + stored_at, block.stretch, stored.size(), |src, done, n| {
                    // SAFETY: the stretch lies within the slot's row, and no other chunk holds these columns.
                    fits &= unsafe { copy.run(src, dst.add((to + delivered_at + done) * delivered.size()), n) };
                })?;
                if fits { Ok(()) } else { Err(overflow(slot.row)) }
            })?;
        }
        Ok(())
    }

    /// The same for rows of a matrix whose columns are joined: each to its place, zeros where the dataset has no column.
    fn scatter_joined(&self, task: &ChunkTask, join: &Join, block: &DenseBlock, run: &Run, copy: CopyValues) -> Result<()> {
        let element = &self.collection.elements()[task.element as usize];
        let (stored, size) = (self.source(task).dtype().size(), element.dtype.size());
        let columns = &join.columns()[block.origin..block.origin + block.stretch];
        // converted and still in the nearest cache
        let mut line = [0u64; STREAMED_BYTES / 8];
        for (number, slot) in task.slots.clone().zip(self.plan.slots_of(task)) {
            // SAFETY: within the batch, which has a row of joined columns for each slot.
            let row = unsafe { self.destination(number, task).values.add(slot.position() * element.dense_row_bytes()) };
            if block.origin == 0 {
                for &column in join.absent() {
                    // SAFETY: within the row, and no other task of this row has its first columns; none writes to this one.
                    unsafe { row.add(column as usize * size).write_bytes(0, size) };
                }
            }
            let from = block.elements(slot.row).start;
            let (mut fits, at_once) = (true, (STREAMED_BYTES - 1) / size);
            for (number, columns) in columns.chunks(at_once).enumerate() {
                run.parts(from + number * at_once, columns.len(), stored, |src, done, n| {
                    let line = line.as_mut_ptr().cast::<u8>();
                    // SAFETY: there are `n` elements and the line has room for them; joined columns lie within the row, and
                    // those of different stored ones are different.
                    unsafe {
                        fits &= copy.run(src, line, n);
                        spread(line, row, size, &columns[done..done + n]);
                    }
                })?;
            }
            if !fits {
                return Err(overflow(slot.row));
            }
        }
        Ok(())
    }

    /// Rows of a dense matrix as sparse ones, with an entry for each column.
    fn scatter_as_sparse(&self, task: &ChunkTask, source: &ArraySource, array: Option<&ChunkedArray>, run: &Run) -> Result<()> {
        let block = DenseBlock::new(source.shape(), array, task.chunk);
        let pieces = || self.dense_pieces(task, &block).map(|piece| (piece, self.destination(piece.slot, task)));
        self.scatter_values(task, source.dtype(), pieces(), run)?;
        let join = self.collection.elements()[task.element as usize].join(task.dataset);
        let mut line = [0u32; COLUMNS_AT_ONCE];
        for (Piece { to, n, .. }, Destination { indices: dst, index, .. }) in pieces() {
            let copy = copy_indices(DType::UInt32, index).ok_or_else(|| no_cast(DType::UInt32, index))?;
            for done in (0..n).step_by(COLUMNS_AT_ONCE) {
                let stored = block.origin + done..block.origin + n.min(done + COLUMNS_AT_ONCE);
                let columns = match join {
                    Some(join) => &join.columns()[stored],
                    None => {
                        let columns = &mut line[..stored.len()];
                        columns.iter_mut().zip(stored).for_each(|(column, number)| *column = number as u32);
                        &*columns
                    }
                };
                // SAFETY: numbers have no invalid bytes.
                let bytes = Stored::Items(unsafe { columns.align_to::<u8>().1 });
                // SAFETY: as in `scatter_values`, with the index size of this batch: the slot has room for all columns of the
                // dataset, and no other chunk holds these.
                unsafe { copy.run(bytes, dst.add((to + done) * index.size()), columns.len(), &mut Columns::new(&[], false)) };
            }
        }
        Ok(())
    }

    /// Where the values of an element go that do not fit, of which these are some.
    fn widened_values(&self, slot: usize, task: &ChunkTask, some: Range<usize>) -> Result<*mut u8> {
        let (element, n_values) = (task.element as usize, self.destination(slot, task).n_values);
        let mut widened = self.widened(self.plan.slot(task, slot).batch as usize);
        let at = match widened.iter().position(|w| w.element() == element) {
            Some(at) => at,
            None => {
                let values = self.pool.lease(n_values * self.collection.elements()[element].dtype.size())?;
                widened.push(Widened::new(element, values));
                widened.len() - 1
            }
        };
        widened[at].add(some)
    }
}

impl Run<'_> {
    /// Calls `copy(elements, elements done, n)` for contiguous parts that together are `n` elements from `from`.
    fn parts(&self, from: usize, n: usize, size: usize, mut copy: impl FnMut(Stored, usize, usize)) -> Result<()> {
        match self {
            Self::Elements(bytes) => {
                let part = bytes.get(from * size..(from + n) * size).ok_or_else(|| Error::Internal {
                    message: format!("elements {from}..{} of a chunk of {} bytes", from + n, bytes.len()),
                })?;
                copy(Stored::Items(part), 0, n);
            }
            Self::Decoded(decoded) => decoded.runs(from..from + n, &mut copy)?,
            Self::Fill(block) => {
                let mut done = 0;
                while done < n {
                    let now = (n - done).min(FILL_BLOCK);
                    copy(Stored::Items(&block[..now * size]), done, now);
                    done += now;
                }
            }
        }
        Ok(())
    }
}

fn no_cast(from: DType, to: DType) -> Error {
    Error::Internal { message: format!("no copy from {from} to {to}") }
}

fn overflow(row: u64) -> Error {
    Error::corrupt(
        format!("row {row}"),
        "holds a uint64 value above 2^63-1, which int64 cannot hold; ask for dtype \"native\" (of a Loader: to=None)",
    )
}
