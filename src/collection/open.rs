//! Opening the datasets of a configuration, each in parallel.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Display;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::encoding::{ATTRIBUTES, Encoding};
use super::h5ad::Files;
use super::source::{ArraySource, Buffer, CsrSource, MemoryArray, Source};
use super::{Collection, DatasetInfo, Element, ElementKind, Join, Joins, Stores};
use crate::base::error::{Error, Result};
use crate::base::lock::lock;
use crate::config::{CsrBuffers, DatasetConfig, ElementConfig, OpenConfig, SourceConfig};
use crate::decode::Scratch;
use crate::layout::read_chunks_now;
use crate::layout::zarr::{Node, open_array, open_array_with, read_node};
use crate::layout::{ChunkedArray, DEFAULT_INDEX_BYTES, Filled, IndexCache, PointerPiece, RowPointers, RowPointersBuilder};
use crate::runtime::Runtime;
use crate::schema::{DType, Delivery};
use crate::store::{self, Standing};
use crate::transform::{Joined, Transform};

/// Row pointers that one thread reads and decodes at a time, unless one chunk holds more: enough for large reads, which
/// join the chunks of a shard.
const MIN_PIECE_ROWS: u64 = 1 << 16;
/// Chunks that one thread reads at a time: each may be a file.
const MAX_PIECE_CHUNKS: u64 = 1024;
/// Bytes of row pointers being decoded that need no weighing against the number of rows.
const FREE_PIECE_BYTES: u64 = 16 << 20;

impl Collection {
    /// Opens every dataset of `config`; `buffers` are the tensors it refers to by number.
    pub fn open(config: &OpenConfig, buffers: &[Buffer], runtime: Arc<Runtime>) -> Result<Arc<Self>> {
        let files = Arc::clone(runtime.files());
        let stores = |place: &str| store::at(place, &files, config.direct_io);
        Self::open_through(config, buffers, runtime, &stores)
    }

    /// Opens through other stores: `stores` is called with the place of each array, group and file.
    pub fn open_through(config: &OpenConfig, buffers: &[Buffer], runtime: Arc<Runtime>, stores: Stores) -> Result<Arc<Self>> {
        opened(config, buffers, runtime, stores).map(Arc::new)
    }
}

fn opened(config: &OpenConfig, buffers: &[Buffer], runtime: Arc<Runtime>, stores: Stores) -> Result<Collection> {
    let index_bytes = config.shard_index_memory.map_or(DEFAULT_INDEX_BYTES, |b| b.0);
    let opener = Opener { config, buffers, runtime: &runtime, stores, indexes: IndexCache::new(index_bytes), index_bytes };
    let opened: Vec<Vec<(Source, Option<u64>)>> = runtime
        .decode()
        .install(|| config.datasets.par_iter().enumerate().map(|(i, d)| opener.dataset(i, d)).collect::<Result<_>>())?;
    let datasets: Vec<DatasetInfo> = (0..config.datasets.len())
        .map(|i| DatasetInfo { name: dataset_name(config, i), path: config.datasets[i].path.clone() })
        .collect();
    let mut offsets = vec![0u64];
    for (info, sources) in datasets.iter().zip(&opened) {
        let n_obs = common_n_obs(config, info, sources)?;
        let total = offsets[offsets.len() - 1].checked_add(n_obs).filter(|t| i64::try_from(*t).is_ok());
        offsets.push(total.ok_or_else(|| Error::unsupported(&info.name, "more than 2^63 rows over all datasets"))?);
    }
    let mut columns: Vec<Vec<(Source, Option<u64>)>> = config.elements.iter().map(|_| Vec::new()).collect();
    for sources in opened {
        for (column, source) in columns.iter_mut().zip(sources) {
            column.push(source);
        }
    }
    let elements = config.elements.iter().zip(columns).map(|(e, c)| opener.element(e, c, &datasets)).collect::<Result<_>>()?;
    Ok(Collection { elements, datasets, offsets, runtime, pools: Mutex::default() })
}

fn dataset_name(config: &OpenConfig, i: usize) -> String {
    let dataset = &config.datasets[i];
    dataset.name.clone().or_else(|| dataset.path.clone()).unwrap_or_else(|| format!("#{i}"))
}

fn common_n_obs(config: &OpenConfig, info: &DatasetInfo, sources: &[(Source, Option<u64>)]) -> Result<u64> {
    let n_obs = sources[0].0.n_obs();
    for (element, (source, _)) in config.elements.iter().zip(sources) {
        if source.n_obs() != n_obs {
            return Err(Error::corrupt(
                format!("dataset {:?}", info.name),
                format!(
                    "{} has {} rows but {} has {n_obs}; expected them equal",
                    element.name,
                    source.n_obs(),
                    config.elements[0].name
                ),
            ));
        }
    }
    Ok(n_obs)
}

/// Sparse or dense, as stored.
fn kind_of((source, n_var): &(Source, Option<u64>)) -> ElementKind {
    match source {
        Source::Csr(_) => ElementKind::Csr { n_var: n_var.unwrap_or(0) },
        Source::Dense(array) => ElementKind::Dense { tail: array.shape()[1..].to_vec() },
    }
}

fn n_var(kind: &ElementKind) -> Option<u64> {
    match kind {
        ElementKind::Csr { n_var } => Some(*n_var),
        ElementKind::Dense { tail } => tail.first().copied(),
    }
}

fn words(kind: &ElementKind) -> String {
    match kind {
        ElementKind::Csr { n_var } => format!("sparse with {n_var} columns"),
        ElementKind::Dense { tail } => format!("dense with rows of shape {tail:?}"),
    }
}

/// What an element is read as that is of these `kinds` in the datasets. Where some have sparse rows and some dense ones, and all
/// are delivered `dense`, it is sparse: dense rows are read with an entry for each column.
fn common_kind(kinds: &[ElementKind], dense: bool, datasets: &[DatasetInfo], at: &str) -> Result<ElementKind> {
    let is_matrix = |kind: &ElementKind| !matches!(kind, ElementKind::Dense { tail } if tail.len() != 1);
    let first = &kinds[0];
    let mut kind = first.clone();
    for (other, info) in kinds.iter().zip(datasets).filter(|(other, _)| *other != first) {
        let may_mix = n_var(other) == n_var(first) && is_matrix(other) && is_matrix(first);
        if may_mix && dense {
            kind = ElementKind::Csr { n_var: n_var(first).unwrap_or(0) };
            continue;
        }
        let remedy = if may_mix {
            "ask for dense rows of both (dense=True), or store it in one way in all datasets"
        } else {
            "all datasets must have the same shape along the var axis: give each its columns, or leave out those that differ"
        };
        let found = format!("is {}, but in dataset {:?} it is {}", words(other), datasets[0].name, words(first));
        return Err(Error::unsupported(format!("dataset {:?}, {at}", info.name), format!("{found}; {remedy}")));
    }
    Ok(kind)
}

/// Gives row pointers of any type of integers as an iterator over them.
macro_rules! with_pointers {
    ($dtype:expr, $bytes:expr, |$pointers:ident| $body:expr) => {
        with_pointers!($dtype, $bytes, |$pointers| $body, Int8: i8, Int16: i16, Int32: i32, Int64: i64, UInt8: u8, UInt16: u16,
            UInt32: u32, UInt64: u64)
    };
    ($dtype:expr, $bytes:expr, |$pointers:ident| $body:expr, $($name:ident: $t:ty),+) => {
        match $dtype {
            $(DType::$name => {
                let $pointers = $bytes.as_chunks().0.iter().map(|bytes| <$t>::from_ne_bytes(*bytes));
                $body
            })+
            other => Err(Error::Internal { message: format!("row pointers of {other}") }),
        }
    };
}

struct Opener<'a> {
    config: &'a OpenConfig,
    buffers: &'a [Buffer],
    runtime: &'a Arc<Runtime>,
    stores: Stores<'a>,
    /// Shared by all arrays that are streamed.
    indexes: Arc<IndexCache>,
    index_bytes: u64,
}

impl Opener<'_> {
    /// Joins one element's sources over the datasets: one kind, same columns or joined ones, promoted dtype.
    fn element(&self, config: &ElementConfig, sources: Vec<(Source, Option<u64>)>, datasets: &[DatasetInfo]) -> Result<Element> {
        let name = config.name.clone();
        let at = format!("element {name:?}");
        let (kinds, joins) = self.joins(config, &sources, datasets)?;
        let kind = common_kind(&kinds, config.transform.dense, datasets, &at)?;
        let stored: Vec<DType> = sources.iter().map(|(s, _)| s.dtype()).collect();
        let delivery = config.dtype.as_deref().map_or(Ok(Delivery::default()), |d| Delivery::parse(d, "elements.dtype"))?;
        let dtype = delivery.resolve(&stored, |number| format!("dataset {:?}, {at}", datasets[number].name))?;
        let mut transform = Transform::new(&config.transform, &kind, dtype, &at)?;
        let unfinished = match kind {
            ElementKind::Csr { .. } => joins.iter().flatten().fold(Joined::default(), |all, join| all.or(join.joined())),
            ElementKind::Dense { .. } => Joined::default(),
        };
        if unfinished != Joined::default() {
            transform.get_or_insert_with(|| Transform::none(&kind, dtype));
        }
        let sources = sources.into_iter().map(|(s, _)| s).collect();
        Ok(Element { name, axis: 0, kind, dtype, transform, sources, joins, unfinished })
    }

    /// What each dataset has once its columns are joined, and how they are; no joins where all columns keep their places.
    fn joins(
        &self,
        config: &ElementConfig,
        sources: &[(Source, Option<u64>)],
        datasets: &[DatasetInfo],
    ) -> Result<(Vec<ElementKind>, Joins)> {
        let mut kinds: Vec<ElementKind> = sources.iter().map(kind_of).collect();
        let mut joins = vec![None; kinds.len()];
        // many datasets may have the same columns
        let mut known: HashMap<(usize, u64), Option<Arc<Join>>> = HashMap::new();
        for (number, kind) in kinds.iter_mut().enumerate() {
            let at = format!("dataset {:?}, element {:?}", datasets[number].name, config.name);
            let Some(&columns) = self.config.datasets[number].columns.get(&config.name) else { continue };
            let n_joined = config.n_var.ok_or_else(|| {
                Error::config("elements", format!("{at} has columns; the element needs n_var, the number of joined ones"))
            })?;
            let n_var = match kind {
                ElementKind::Csr { n_var } => n_var,
                ElementKind::Dense { tail } => match tail.as_mut_slice() {
                    // no chunk would be read whose rows could be filled up with zeros
                    [0] => return Err(Error::unsupported(at, "has no columns; leave the dataset out of the join")),
                    [n_var] => n_var,
                    tail => {
                        let message = format!("has rows of shape {tail:?}; only the columns of matrices can be joined");
                        return Err(Error::unsupported(at, message));
                    }
                },
            };
            joins[number] = match known.entry((columns, *n_var)) {
                Entry::Occupied(join) => join.get().clone(),
                Entry::Vacant(place) => {
                    // SAFETY: buffers are lent for as long as the collection is streamed.
                    place.insert(unsafe { Join::new(self.buffer(columns, &at)?, *n_var, n_joined, &at)? }).clone()
                }
            };
            *n_var = n_joined;
        }
        if joins.iter().all(Option::is_none) {
            joins.clear();
        }
        if let (Some(n_joined), Some(number)) = (config.n_var, kinds.iter().position(|kind| n_var(kind) != config.n_var)) {
            let at = format!("dataset {:?}, element {:?}", datasets[number].name, config.name);
            let message = format!("is {}, but n_var is {n_joined}; give the dataset columns for it", words(&kinds[number]));
            return Err(Error::unsupported(at, message));
        }
        Ok((kinds, joins))
    }

    fn dataset(&self, i: usize, dataset: &DatasetConfig) -> Result<Vec<(Source, Option<u64>)>> {
        let name = dataset_name(self.config, i);
        let stands = dataset.path.as_ref().map(|path| (self.stores)(path)?.look("")).transpose();
        let stands = stands.map_err(|e| e.within(&format!("dataset {name:?}")))?;
        let is_file = matches!(stands, Some(Some(Standing::Object(_))));
        if let (Some(path), Some(None)) = (&dataset.path, stands) {
            return Err(Error::NotFound {
                at: format!("dataset {name:?} ({path})"),
                hint: "; expected an .h5ad file, or the directory of a Zarr group, written by anndata".into(),
            });
        }
        let mut files = Files::new(self.stores);
        let sources = self
            .config
            .elements
            .iter()
            .map(|e| {
                let at = format!("dataset {name:?}, array {}", e.name);
                match dataset.sources.get(&e.name) {
                    None => match &dataset.path {
                        Some(path) if is_file => self.in_file(&mut files, path, &e.name, &at),
                        Some(path) => self.stored(&format!("{}/{}", path.trim_end_matches('/'), e.name), &at),
                        None => Err(Error::config(
                            format!("datasets[{i}]"),
                            format!("has neither a path nor a source for {:?}", e.name),
                        )),
                    },
                    Some(SourceConfig::Path(path)) => self.stored(path, &at),
                    Some(SourceConfig::Hdf5(place)) => self.in_file(&mut files, &place.file, &place.path, &at),
                    Some(SourceConfig::Csr(csr)) => self.memory_csr(csr, &at),
                    Some(SourceConfig::Dense(dense)) => {
                        let buffer = self.buffer(dense.data, &at)?.clone();
                        dense_source(ArraySource::Memory(MemoryArray { buffer }), &at)
                    }
                }
            })
            .collect::<Result<_>>()?;
        files.close()?;
        Ok(sources)
    }

    fn buffer(&self, number: usize, at: &str) -> Result<&Buffer> {
        self.buffers.get(number).ok_or_else(|| {
            Error::config("datasets.sources", format!("{at} refers to buffer {number}, but {} were given", self.buffers.len()))
        })
    }

    /// Opens the array or the `csr_matrix` group in a directory.
    fn stored(&self, path: &str, at: &str) -> Result<(Source, Option<u64>)> {
        let store = (self.stores)(path).map_err(|e| e.within(at))?;
        let node = read_node(&*store, at)?;
        match (Encoding::of(matches!(node, Node::Group { .. }), node.attributes(), at)?, node) {
            (Encoding::Csr { shape }, _) => {
                let part = |name: &str, indexes: &Arc<IndexCache>| {
                    open_array(&(self.stores)(&format!("{path}/{name}"))?, &format!("{at}/{name}"), indexes)
                };
                // indptr is read once, here: its indexes go with it
                let (data, indices) = (part("data", &self.indexes)?, part("indices", &self.indexes)?);
                self.stored_csr(shape, data, indices, &part("indptr", &IndexCache::new(self.index_bytes))?, at)
            }
            (Encoding::Dense, Node::Array { metadata, .. }) => {
                let array = open_array_with(&store, at, metadata, &self.indexes)?;
                dense_source(ArraySource::Chunked(Arc::new(array)), at)
            }
            (Encoding::Dense, Node::Group { .. }) => Err(Error::Internal { message: "a group taken for an array".into() }),
        }
    }

    /// Opens the dataset or the CSR group at `path` in an HDF5 file.
    fn in_file(&self, files: &mut Files, file: &str, path: &str, at: &str) -> Result<(Source, Option<u64>)> {
        let file = files.get(file, at)?;
        let path = file.path_of(path);
        let node = file.node(path, &ATTRIBUTES, at)?;
        match Encoding::of(node.is_group, &node.attributes, at)? {
            Encoding::Csr { shape } => {
                let part = |name: &str| file.array(&format!("{path}/{name}"), &format!("{at}/{name}"));
                self.stored_csr(shape, part("data")?, part("indices")?, &part("indptr")?, at)
            }
            Encoding::Dense => dense_source(ArraySource::Chunked(Arc::new(file.array(path, at)?)), at),
        }
    }

    fn stored_csr(
        &self,
        [n_obs, n_var]: [u64; 2],
        data: ChunkedArray,
        indices: ChunkedArray,
        indptr: &ChunkedArray,
        at: &str,
    ) -> Result<(Source, Option<u64>)> {
        let nnz = check_csr(&data.shape, &indices.shape, &indptr.shape, n_obs, at)?;
        check_index_dtype("column indices", indices.dtype, &indices.at)?;
        let rows = self.read_row_pointers(indptr, n_obs, nnz)?;
        let (indices, data) = (ArraySource::Chunked(Arc::new(indices)), ArraySource::Chunked(Arc::new(data)));
        Ok((Source::Csr(CsrSource { rows, indices, data }), Some(n_var)))
    }

    fn read_row_pointers(&self, indptr: &ChunkedArray, n_obs: u64, nnz: u64) -> Result<RowPointers> {
        check_index_dtype("row pointers", indptr.dtype, &indptr.at)?;
        indptr.check_claim()?;
        let mut builder = RowPointersBuilder::new(n_obs, &indptr.at)?;
        let chunk_rows = indptr.chunk_shape[0];
        let chunks_per_piece = MIN_PIECE_ROWS.div_ceil(chunk_rows).min(MAX_PIECE_CHUNKS);
        let pieces = builder.pieces(chunk_rows.saturating_mul(chunks_per_piece));
        // at once: as many as can be decoded without much memory beside that of the finished pointers
        let piece_bytes = indptr.chunk_bytes() as u64 * (1 + chunks_per_piece);
        let at_once = ((n_obs / 4).max(FREE_PIECE_BYTES) / piece_bytes).clamp(1, self.runtime.n_threads() as u64);
        let (n_pieces, pieces) = (pieces.len(), Mutex::new(pieces.into_iter().enumerate()));
        let filled = Mutex::new(Vec::with_capacity(n_pieces));
        let failed = AtomicBool::new(false);
        // pieces are taken in order, so those before a failed one are all filled in the end
        let lane = || {
            let mut scratch = Scratch::default();
            while !failed.load(Ordering::Relaxed) {
                let Some((number, piece)) = lock(&pieces).next() else { return };
                let first = number as u64 * chunks_per_piece;
                let chunks = first..(first + chunks_per_piece).min(indptr.grid()[0]);
                let done = fill_piece(piece, indptr, chunks, self.runtime.io(), &mut scratch);
                failed.fetch_or(done.failed(), Ordering::Relaxed);
                lock(&filled).push(done);
            }
        };
        // These tasks wait for reads, which need no decoding thread, and for nothing else.
        rayon::scope(|scope| {
            for _ in 1..at_once.min(n_pieces as u64) {
                scope.spawn(|_| lane());
            }
            lane();
        });
        let mut filled = filled.into_inner().expect("piece list lock");
        filled.sort_unstable_by_key(Filled::first_row);
        builder.join(filled, nnz)
    }

    fn memory_csr(&self, csr: &CsrBuffers, at: &str) -> Result<(Source, Option<u64>)> {
        let [n_obs, n_var] = csr.shape;
        let (indptr, indices, data) = (self.buffer(csr.indptr, at)?, self.buffer(csr.indices, at)?, self.buffer(csr.data, at)?);
        check_index_dtype("indptr: row pointers", indptr.dtype, at)?;
        check_index_dtype("indices: column indices", indices.dtype, at)?;
        for (name, buffer) in [("indptr", indptr), ("indices", indices), ("data", data)] {
            if buffer.shape.len() != 1 {
                return Err(Error::argument(
                    "buffers",
                    format!("{at}: {name} has shape {:?}; expected one dimension", buffer.shape),
                ));
            }
        }
        if Some(indptr.len()) != n_obs.checked_add(1) {
            let message = format!("{at}: indptr has {} numbers for {n_obs} rows; expected one more than rows", indptr.len());
            return Err(Error::argument("buffers", message));
        }
        // SAFETY: the buffers are lent for as long as the collection is streamed.
        let bytes = unsafe { indptr.bytes() };
        let rows = with_pointers!(indptr.dtype, bytes, |pointers| lent_row_pointers(pointers, &format!("{at}/indptr")))?;
        let nnz = rows.start(n_obs);
        // scipy allows spare room behind the last entry
        if nnz > indices.len() || nnz > data.len() {
            return Err(Error::argument(
                "buffers",
                format!("{at}: indptr ends with {nnz}, but indices has {} entries and data {}", indices.len(), data.len()),
            ));
        }
        let memory = |b: &Buffer| ArraySource::Memory(MemoryArray { buffer: b.clone() });
        let source = CsrSource { rows, indices: memory(indices), data: memory(data) };
        Ok((Source::Csr(source), Some(n_var)))
    }
}

/// Row pointers in memory: the last of them says how many entries there are.
fn lent_row_pointers<V: TryInto<u64> + Copy + Display>(
    pointers: impl DoubleEndedIterator<Item = V> + ExactSizeIterator + Clone,
    at: &str,
) -> Result<RowPointers> {
    let last = pointers.clone().next_back().and_then(|last| last.try_into().ok());
    RowPointers::from_values(pointers, last.unwrap_or(0), at)
}

/// Reads the chunks that hold the piece's row pointers.
fn fill_piece(
    mut piece: PointerPiece,
    indptr: &ChunkedArray,
    chunks: Range<u64>,
    io: &tokio::runtime::Runtime,
    scratch: &mut Scratch,
) -> Filled {
    let mut left = piece.room();
    let result = read_chunks_now(indptr, chunks, io, scratch, |_, bytes| {
        let n = left.min(indptr.chunk_shape[0] as usize);
        left -= n;
        with_pointers!(indptr.dtype, bytes, |pointers| pointers.take(n).try_for_each(|v| piece.push(v)))
    });
    piece.end(result)
}

fn check_csr(data: &[u64], indices: &[u64], indptr: &[u64], n_obs: u64, at: &str) -> Result<u64> {
    if data.len() != 1 || indices.len() != 1 || indptr.len() != 1 {
        return Err(Error::corrupt(
            at,
            format!("data, indices and indptr have shapes {data:?}, {indices:?} and {indptr:?}; expected one dimension each"),
        ));
    }
    if data[0] != indices[0] {
        return Err(Error::corrupt(at, format!("data holds {} entries but indices {}; expected them equal", data[0], indices[0])));
    }
    if n_obs.checked_add(1) != Some(indptr[0]) {
        return Err(Error::corrupt(
            at,
            format!("indptr holds {} numbers for {n_obs} rows; expected one more than rows", indptr[0]),
        ));
    }
    Ok(data[0])
}

fn check_index_dtype(what: &str, dtype: DType, at: &str) -> Result<()> {
    if dtype.is_integer() {
        return Ok(());
    }
    Err(Error::unsupported(
        at,
        format!("{what} have type {dtype}; expected a type of integers, e.g. int64: write the matrix again"),
    ))
}

fn dense_source(array: ArraySource, at: &str) -> Result<(Source, Option<u64>)> {
    if array.shape().len() < 2 {
        return Err(Error::unsupported(
            at,
            format!("has shape {:?}; expected at least two dimensions, the first of them observations", array.shape()),
        ));
    }
    Ok((Source::Dense(array), None))
}
