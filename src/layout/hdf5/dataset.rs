//! One dataset → where its bytes lie, and how to decode them.

use std::sync::Arc;

use hdf5_metno::Dataset;
use hdf5_metno::dataset::{ChunkInfoRef, ChunkOpts, DatasetCreate, Layout};

use super::bytes::Chunked;
use super::raw::{self, failed};
use crate::base::error::{Error, Result};
use crate::decode::{ChunkCodec, Filter};
use crate::layout::listing::Listed;
use crate::layout::{Addressing, ChunkedArray, Contiguous, Listing, Outlines, check_sizes, grid_of, ravel, unravel};
use crate::schema::DType;
use crate::store::{MemoryStore, Store};

/// Elements of the pieces into which a contiguous dataset is cut: rows are read by range whatever it is, and this many are
/// read at a time where all are.
const PIECE_ELEMENTS: u64 = 1 << 16;

/// What the elements of a dataset must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElementClass {
    Numbers,
    /// Texts of variable length, in one dimension. Listed are the places that stand for them, of [`PLACE_WORDS`] words each.
    Texts,
}

/// Words, little-endian and of 8 bytes, of the place of a text: length (4 bytes), address of a collection (8) and number in
/// it (4).
pub(super) const PLACE_WORDS: u64 = 2;

/// Number of the filter that puts bytes of equal significance together.
const SHUFFLE: i32 = 2;

/// What is known of a dataset before its storage is looked at.
struct Parts<'a> {
    at: &'a str,
    dtype: DType,
    /// Of `dtype` that an element is.
    words: u64,
    /// Elements are of the other byte order.
    swap: bool,
    /// In words, as all that follows from it.
    shape: Vec<u64>,
    file_bytes: u64,
}

/// Lists a dataset of a file of so many bytes that is read through `store`; `at` names it in errors, with its file. `expect`
/// is told what its chunks are before libhdf5 reads where they are.
pub(super) fn array(
    dataset: &Dataset,
    elements: ElementClass,
    store: &Arc<dyn Store>,
    file_bytes: u64,
    at: &str,
    expect: &dyn Fn(Chunked),
) -> Result<ChunkedArray> {
    let fail = |e: hdf5_metno::Error| failed(at, &e);
    let datatype = dataset.dtype().map_err(fail)?;
    let (known, expected) = match elements {
        ElementClass::Numbers => (
            raw::number_type(&datatype).map(|(dtype, big_endian)| (dtype, big_endian, 1)),
            "bool, an integer or an IEEE float of up to 64 bits; convert the array to one of these, e.g. with numpy's astype, and write it again",
        ),
        ElementClass::Texts => {
            (raw::is_variable_text(&datatype).then_some((DType::UInt64, false, PLACE_WORDS)), "text of variable length")
        }
    };
    let (dtype, big_endian, words) = known.ok_or_else(|| {
        let found = raw::kind(&datatype);
        Error::unsupported(at, format!("has elements of {found}; expected {expected}"))
    })?;
    let space = dataset.space().map_err(fail)?;
    if space.is_null() {
        return Err(Error::unsupported(at, "holds nothing (a null dataspace); expected an array of at least one dimension"));
    }
    let shape = in_words(&space.shape(), words, at)?;
    if words > 1 && shape.len() != 1 {
        return Err(Error::unsupported(at, format!("has texts in {} dimensions; expected one", shape.len())));
    }
    let parts = Parts { at, dtype, words, swap: big_endian == cfg!(target_endian = "little"), shape, file_bytes };
    let plist = dataset.dcpl().map_err(fail)?;
    let has_fill = raw::has_fill_value(&plist).map_err(fail)?;
    if words > 1 && has_fill {
        return Err(Error::unsupported(at, "has a text for what was never written"));
    }
    let mut fill = if has_fill { raw::fill_value(&plist, &datatype).map_err(fail)? } else { vec![0; dtype.size()] };
    if parts.swap {
        fill.reverse();
    }
    let unfiltered = |shape: &[u64]| ChunkCodec::of_filters(&[], 0, shape.iter().product::<u64>() as usize, dtype, parts.swap);
    let (chunk_shape, codec, store, addressing) = match plist.get_layout().map_err(fail)? {
        Layout::Chunked => {
            let (chunk_shape, codec, listing) = chunked(dataset, &plist, &parts, expect)?;
            (chunk_shape, codec, Arc::clone(store), Addressing::Listed(listing))
        }
        Layout::Contiguous => {
            if raw::is_external(&plist).map_err(fail)? {
                let message = "keeps its data in another file, which is not read; write it again with h5py or anndata";
                return Err(Error::unsupported(at, message));
            }
            let pieces = parts.pieces()?;
            let contiguous = parts.contiguous(dataset.offset(), &pieces)?;
            (pieces.clone(), unfiltered(&pieces), Arc::clone(store), Addressing::Contiguous(contiguous))
        }
        // libhdf5 would put texts in the place of where they are
        Layout::Compact if words > 1 => return Err(Error::unsupported(at, "has texts in its header")),
        Layout::Compact => {
            let pieces = parts.pieces()?;
            let n = parts.n_bytes();
            if n > 1 << 16 {
                return Err(Error::corrupt(at, format!("{n} bytes in an object header, which holds at most 65,536")));
            }
            let bytes = raw::read_all(dataset, &datatype, n as usize).map_err(fail)?;
            let contiguous = Contiguous { key: "".into(), bytes: 0..n, chunk_bytes: piece_bytes(&pieces, dtype) };
            let held: Arc<dyn Store> = Arc::new(MemoryStore::new(at, [(String::new(), bytes)]));
            (pieces.clone(), unfiltered(&pieces), held, Addressing::Contiguous(contiguous))
        }
        Layout::Virtual => {
            let message =
                "is a virtual dataset, made of other files' data; copy it into a dataset of its own (h5repack, or anndata)";
            return Err(Error::unsupported(at, message));
        }
    };
    let grid = grid_of(&parts.shape, &chunk_shape);
    Ok(ChunkedArray {
        at: at.to_owned(),
        dtype,
        shape: parts.shape,
        chunk_shape,
        fill,
        codec,
        store,
        grid,
        addressing,
        outlines: Outlines::default(),
    })
}

/// Dimensions in words, of which an element has so many.
fn in_words(dimensions: &[usize], words: u64, at: &str) -> Result<Vec<u64>> {
    let scaled = dimensions.iter().map(|&d| (d as u64).checked_mul(words));
    scaled.collect::<Option<_>>().ok_or_else(|| Error::corrupt(at, format!("impossible size: {dimensions:?} elements")))
}

fn piece_bytes(pieces: &[u64], dtype: DType) -> u64 {
    pieces.iter().product::<u64>() * dtype.size() as u64
}

impl Parts<'_> {
    /// Bytes of all elements; [`check_sizes`] has found that there are so many at most.
    fn n_bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size() as u64
    }

    /// Shape of the pieces of a dataset without chunks: whole rows.
    fn pieces(&self) -> Result<Vec<u64>> {
        let Some((_, row)) = self.shape.split_first() else {
            check_sizes(self.at, &self.shape, &self.shape, self.dtype)?;
            return Ok(Vec::new());
        };
        let of_row = row.iter().fold(1u64, |n, &d| n.saturating_mul(d)).max(1);
        let mut pieces = self.shape.clone();
        pieces[0] = (PIECE_ELEMENTS / of_row).max(1);
        for d in &mut pieces[1..] {
            *d = (*d).max(1);
        }
        check_sizes(self.at, &self.shape, &pieces, self.dtype)?;
        Ok(pieces)
    }

    fn contiguous(&self, offset: Option<u64>, pieces: &[u64]) -> Result<Contiguous> {
        let n = self.n_bytes();
        // without storage: nothing was ever written
        let start = offset.unwrap_or(0);
        let bytes = start..if offset.is_some() { start.saturating_add(n) } else { start };
        if bytes.end > self.file_bytes {
            return Err(self.beyond_the_end(self.at, bytes.start, n));
        }
        Ok(Contiguous { key: "".into(), bytes, chunk_bytes: piece_bytes(pieces, self.dtype) })
    }

    fn beyond_the_end(&self, at: &str, start: u64, n: u64) -> Error {
        let file_bytes = self.file_bytes;
        Error::corrupt(at, format!("{n} bytes at {start} of a file of {file_bytes}; the file is truncated or damaged"))
    }
}

/// Shape of the chunks, the codec of most of them, and where each is.
fn chunked(
    dataset: &Dataset,
    plist: &DatasetCreate,
    parts: &Parts,
    expect: &dyn Fn(Chunked),
) -> Result<(Vec<u64>, ChunkCodec, Listing)> {
    let Parts { at, dtype, words, swap, ref shape, .. } = *parts;
    let fail = |e: hdf5_metno::Error| failed(at, &e);
    let chunk_shape = in_words(&plist.get_chunk().map_err(fail)?.unwrap_or_default(), words, at)?;
    if chunk_shape.len() != shape.len() || chunk_shape.contains(&0) {
        return Err(Error::corrupt(at, format!("has shape {shape:?} and chunks of shape {chunk_shape:?}")));
    }
    check_sizes(at, shape, &chunk_shape, dtype)?;
    let filters: Vec<Filter> = raw::filters(plist)
        .map_err(fail)?
        .iter()
        .map(|(id, name, parameters)| match (*id, &parameters[..]) {
            // libhdf5 has all chunks of texts skip it, and leaves out what it shuffles
            (SHUFFLE, []) if words > 1 => Ok(Filter::Shuffle(1)),
            (id, parameters) => Filter::new(id, name, parameters),
        })
        .collect::<Result<_>>()
        .map_err(|e| e.within(at))?;
    let whole_only = plist.get_chunk_opts().map_err(fail)?.is_some_and(|o| o.contains(ChunkOpts::DONT_FILTER_PARTIAL_CHUNKS));
    let n = chunk_shape.iter().product::<u64>() as usize;
    expect(Chunked { n_dims: shape.len(), is_filtered: !filters.is_empty(), chunk_bytes: (n * dtype.size()) as u64 });
    let all = u32::MAX.checked_shr(32 - filters.len().min(32) as u32).unwrap_or(0);
    let grid = grid_of(shape, &chunk_shape);
    let (chunks, masks) = (Vec::new(), Vec::new());
    let mut visitor = Visitor { parts, chunk_shape: &chunk_shape, grid, all, whole_only, visited: 0, chunks, masks };
    let (mut error, mut visited) = (None, Ok(()));
    // a dataset without elements has no index of chunks either
    if !shape.contains(&0) {
        visited = dataset.chunks_visit(|info| match visitor.chunk(&info) {
            Ok(()) => 0,
            Err(e) => {
                error = Some(e);
                -1
            }
        });
    }
    if let Some(error) = error {
        return Err(error);
    }
    visited.map_err(fail)?;
    let Visitor { grid, chunks, masks, .. } = visitor;
    let exceptions = masks.into_iter().map(|mask| ChunkCodec::of_filters(&filters, mask, n, dtype, swap)).collect();
    let codec = ChunkCodec::of_filters(&filters, 0, n, dtype, swap);
    let listing = Listing::new("".into(), chunks, exceptions)
        .map_err(|chunk| Error::corrupt(at, format!("lists chunk {:?} twice; the file is damaged", unravel(chunk, &grid))))?;
    Ok((chunk_shape, codec, listing))
}

/// Takes chunks as libhdf5 lists them.
struct Visitor<'a> {
    parts: &'a Parts<'a>,
    chunk_shape: &'a [u64],
    grid: Vec<u64>,
    /// The mask of all filters.
    all: u32,
    /// Chunks at the edges are not filtered.
    whole_only: bool,
    visited: u64,
    chunks: Vec<Listed>,
    /// Sets of filters that were skipped, each once.
    masks: Vec<u32>,
}

impl Visitor<'_> {
    fn chunk(&mut self, info: &ChunkInfoRef) -> Result<()> {
        let Parts { at, words, ref shape, file_bytes, .. } = *self.parts;
        // each takes a byte at least, of its own or of an index
        self.visited += 1;
        if self.visited > file_bytes {
            return Err(Error::corrupt(at, format!("lists more chunks than fit into its {file_bytes} bytes; the file is damaged")));
        }
        let offset = || info.offset.iter().map(|o| o.saturating_mul(words));
        // of a dataset that was made smaller
        if offset().zip(shape).any(|(o, s)| o >= *s) {
            return Ok(());
        }
        let coordinates = || offset().zip(self.chunk_shape).map(|(o, c)| o / c);
        let place = || format!("{at}, chunk {:?}", coordinates().collect::<Vec<_>>());
        let (start, Ok(size)) = (info.addr, u32::try_from(info.size)) else {
            let remedy = "write it again in chunks of less than 4 GiB";
            return Err(Error::unsupported(place(), format!("has {} bytes; {remedy}", info.size)));
        };
        if start.checked_add(info.size).is_none_or(|end| end > file_bytes) {
            return Err(self.parts.beyond_the_end(&place(), start, info.size));
        }
        let partial = || offset().zip(self.chunk_shape).zip(shape).any(|((o, c), s)| o + c > *s);
        let mask = if self.whole_only && partial() { self.all } else { info.filter_mask & self.all };
        let chunk = ravel(coordinates(), &self.grid);
        let codec = self.codec(mask).ok_or_else(|| Error::corrupt(at, "more than 255 sets of filters were skipped"))?;
        self.chunks.push(Listed { chunk, offset: start, size, codec });
        Ok(())
    }

    fn codec(&mut self, mask: u32) -> Option<u8> {
        if mask == 0 {
            return Some(0);
        }
        let number = self.masks.iter().position(|&m| m == mask).unwrap_or_else(|| {
            self.masks.push(mask);
            self.masks.len() - 1
        });
        u8::try_from(number + 1).ok()
    }
}
