//! What of a chunk a task needs, reads and decodes.

use std::ops::Range;

use super::filling::{Filling, Piece};
use super::scatter::{FILL_BLOCK, Run};
use crate::base::error::Result;
use crate::collection::{ArraySource, Source};
use crate::decode::{Decoded, Scratch};
use crate::fetch::{ChunkPart, Fetched};
use crate::layout::ChunkedArray;
use crate::pipeline::dense::DenseBlock;
use crate::plan::ChunkTask;

/// Whether reading a part of a chunk leaves out enough of it: a quarter.
fn leaves_out_enough(part: usize, whole: usize) -> bool {
    whole.saturating_sub(part) * 4 >= whole
}

impl Filling {
    /// What of a chunk is read, unless it is all.
    pub(super) fn part(&self, task: &ChunkTask, array: &ChunkedArray) -> Option<ChunkPart> {
        if array.is_verbatim() {
            let (needed, size) = (self.needed(task, array), array.dtype.size());
            return Some(ChunkPart { bytes: (needed.start * size) as u64..(needed.end * size) as u64, outline: None });
        }
        let outline = array.is_read_by_block().then(|| array.outline(task.chunk))??;
        let needed = Some(self.needed(task, array)).filter(|needed| !needed.is_empty())?;
        let bytes = outline.bytes_of(needed);
        // several small reads for one that is hardly larger save nothing
        let saved = outline.encoded_bytes().checked_sub(bytes.len())?;
        // reads that lie closer are joined anyway
        let gap = array.store().io_shape().joined.max_gap_bytes;
        let pays = saved as u64 >= gap && leaves_out_enough(bytes.len(), outline.encoded_bytes());
        pays.then_some(ChunkPart { bytes: bytes.start as u64..bytes.end as u64, outline: Some(outline) })
    }

    pub(super) fn run(&self, task: &ChunkTask, fetched: &Fetched, scratch: &mut Scratch) -> Result<()> {
        match self.array(task) {
            ArraySource::Memory(array) => {
                // SAFETY: the lender keeps the buffer alive and unchanged until every stream is closed.
                let elements = unsafe { array.buffer.bytes() };
                self.scatter(task, None, &Run::Elements(elements))
            }
            ArraySource::Chunked(array) => match fetched.bytes() {
                Some(encoded) => {
                    let decoded = self.decode(task, array, fetched, encoded, scratch)?;
                    self.stats.chunks_decoded.add(1);
                    self.stats.bytes_decoded.add(decoded.bytes() as u64);
                    if array.codec_of(task.chunk).is_general() {
                        self.stats.chunks_general_path.add(1);
                    }
                    self.scatter(task, Some(array), &Run::Decoded(&decoded))
                }
                None => {
                    self.stats.chunks_filled.add(1);
                    self.scatter(task, Some(array), &Run::Fill(scratch.repeated(&array.fill, FILL_BLOCK)?))
                }
            },
        }
    }

    /// Decodes the elements of a chunk that the task's rows need; of a verbatim one they are all that was read.
    fn decode<'a>(
        &self,
        task: &ChunkTask,
        array: &ChunkedArray,
        fetched: &'a Fetched,
        encoded: &'a [u8],
        scratch: &'a mut Scratch,
    ) -> Result<Decoded<'a>> {
        if array.is_verbatim() {
            return array.codec.verbatim_part(encoded, self.needed(task, array).start, scratch);
        }
        match self.source(task) {
            Source::Csr(csr) => {
                let needed = self.pieces(task, csr, Some(array)).map(Piece::stored);
                self.decode_needed(task, array, fetched, encoded, needed, scratch)
            }
            Source::Dense(source) => {
                let block = DenseBlock::new(source.shape(), Some(array), task.chunk);
                let slots = self.plan.slots_of(task);
                self.decode_needed(task, array, fetched, encoded, slots.iter().map(|slot| block.elements(slot.row)), scratch)
            }
        }
    }

    fn decode_needed<'a>(
        &self,
        task: &ChunkTask,
        array: &ChunkedArray,
        fetched: &'a Fetched,
        encoded: &'a [u8],
        needed: impl Iterator<Item = Range<usize>>,
        scratch: &'a mut Scratch,
    ) -> Result<Decoded<'a>> {
        if let Some(extract) = fetched.extract() {
            return array.codec.decode_extract(extract, needed, scratch).inspect_err(|_| array.forget(task.chunk));
        }
        let decoded = array.codec_of(task.chunk).decode_ranges(encoded, needed, scratch)?;
        // of a chunk that gives all it has nothing is saved the next time either
        if array.is_read_by_block() && leaves_out_enough(self.needed(task, array).len(), array.chunk_len() as usize) {
            array.learn(task.chunk, encoded);
        }
        Ok(decoded)
    }

    /// Elements of the chunk from the first to the last that the task's rows need.
    fn needed(&self, task: &ChunkTask, array: &ChunkedArray) -> Range<usize> {
        // slots are sorted by row
        match self.source(task) {
            Source::Csr(csr) => {
                let mut pieces = self.pieces(task, csr, Some(array)).map(Piece::stored);
                let Some(first) = pieces.next() else { return 0..0 };
                first.start..pieces.next_back().map_or(first.end, |last| last.end)
            }
            Source::Dense(source) => {
                let block = DenseBlock::new(source.shape(), Some(array), task.chunk);
                let slots = self.plan.slots_of(task);
                block.elements(slots[0].row).start..block.elements(slots[slots.len() - 1].row).end
            }
        }
    }
}
