//! Where the elements of a dense chunk lie in the rows of a batch.

use std::ops::Range;

use smallvec::SmallVec;

use crate::base::error::Result;
use crate::collection::Join;
use crate::layout::ChunkedArray;

/// How the rows of one dense chunk map to delivered rows: stretches of `stretch` contiguous elements, which lie as
/// the nested loops of `loops` say. They are walked, never listed: metadata may claim any number of them.
pub(super) struct DenseBlock {
    first_row: u64,
    /// Elements of a row within the chunk and within a batch.
    stored_row: usize,
    pub(super) delivered_row: usize,
    /// Element of the delivered row where the chunk's part begins.
    pub(super) origin: usize,
    pub(super) stretch: usize,
    /// Outermost first: (repeats, elements between two in the chunk, elements between two in the delivered row).
    loops: SmallVec<[Loop; 4]>,
}

type Loop = (usize, usize, usize);

impl DenseBlock {
    pub(super) fn new(shape: &[u64], array: Option<&ChunkedArray>, chunk: u64) -> Self {
        let delivered_row = shape[1..].iter().product::<u64>() as usize;
        let Some(array) = array else {
            return Self {
                first_row: 0,
                stored_row: delivered_row,
                delivered_row,
                origin: 0,
                stretch: delivered_row,
                loops: SmallVec::new(),
            };
        };
        let grid = &array.grid()[1..];
        // row-major: what is left of it once the inner dimensions are taken off is the block of rows
        let mut number = chunk;
        let (tail, width) = (&shape[1..], &array.chunk_shape[1..]);
        let mut block = Self {
            first_row: 0,
            stored_row: width.iter().product::<u64>() as usize,
            delivered_row,
            origin: 0,
            stretch: 1,
            loops: SmallVec::new(),
        };
        // from the innermost dimension outwards; while the chunk spans whole dimensions its elements are one stretch
        let (mut below_chunk, mut below_row, mut contiguous) = (1usize, 1usize, true);
        for d in (0..tail.len()).rev() {
            let begin = number % grid[d] * width[d];
            number /= grid[d];
            // the part of the chunk that lies inside the array: edge chunks are stored whole
            let inside = width[d].min(tail[d] - begin) as usize;
            block.origin += begin as usize * below_row;
            if contiguous {
                block.stretch *= inside;
            } else {
                block.loops.push((inside, below_chunk, below_row));
            }
            contiguous &= inside as u64 == width[d] && width[d] == tail[d];
            below_chunk *= width[d] as usize;
            below_row *= tail[d] as usize;
        }
        block.first_row = number * array.chunk_shape[0];
        block.loops.reverse();
        block
    }

    /// Elements of the chunk that hold its part of a row.
    pub(super) fn elements(&self, row: u64) -> Range<usize> {
        let first = (row - self.first_row) as usize * self.stored_row;
        first..first + self.stored_row
    }

    /// Calls `copy(element within the stored row, element within the delivered row)` for each stretch of a row.
    pub(super) fn stretches(&self, mut copy: impl FnMut(usize, usize) -> Result<()>) -> Result<()> {
        fn walk(loops: &[Loop], from: usize, to: usize, copy: &mut impl FnMut(usize, usize) -> Result<()>) -> Result<()> {
            match loops.split_first() {
                None => copy(from, to),
                Some((&(n, stored, delivered), inner)) => {
                    (0..n).try_for_each(|i| walk(inner, from + i * stored, to + i * delivered, copy))
                }
            }
        }
        walk(&self.loops, 0, self.origin, &mut copy)
    }
}

/// Puts elements of `size` bytes where `columns` says, or nowhere.
///
/// # Safety
/// `from` holds as many elements as there are columns, both are aligned to them, and nobody else has to do with those columns of
/// `row`, which all lie in it.
pub(super) unsafe fn spread(from: *const u8, row: *mut u8, size: usize, columns: &[u32]) {
    /// # Safety
    /// As above.
    unsafe fn typed<T: Copy>(from: *const u8, row: *mut u8, columns: &[u32]) {
        for (i, &column) in columns.iter().enumerate() {
            if column != Join::DROPPED {
                // SAFETY: the caller's promise.
                unsafe { row.cast::<T>().add(column as usize).write(from.cast::<T>().add(i).read()) };
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => typed::<u8>(from, row, columns),
            2 => typed::<u16>(from, row, columns),
            4 => typed::<u32>(from, row, columns),
            _ => typed::<u64>(from, row, columns),
        }
    }
}
