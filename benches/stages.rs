//! The stages of a window on their own, each checked against a plain twin before it is timed.
//!
//! ```text
//! cargo bench --features internals --bench stages                          all of them, in a few minutes
//! cargo bench --features internals --bench stages -- --quick               roughly, in a few seconds
//! cargo bench --features internals --bench stages -- plan                  one stage: plan, coalesce, decode_scatter or seal
//! cargo bench --features internals --bench stages -- decode_scatter/zstd   some of its cases (a regular expression)
//! ```
//!
//! - `plan`: `measure` and `plan` of a window of 16,384 rows among a million whose lengths vary; elements are rows.
//! - `coalesce`: the byte ranges of that window's chunks; elements are ranges.
//! - `decode_scatter`: one chunk of 64 rows or so to its slots on one thread, as the pipeline's tasks do it: all of its
//!   rows, or one in 16; elements are those delivered.
//! - `seal`: rows of joined columns of which a tenth is dropped, or that have to be sorted; elements are those read.

#[path = "../tests/reference/mod.rs"]
mod reference;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use annbatch::batch::BatchLayout;
use annbatch::coalesce::{Wanted, coalesce};
use annbatch::collection::ElementKind;
use annbatch::decode::scatter::{Columns, Stored, copy_indices, copy_values, publish};
use annbatch::decode::{ChunkCodec, Scratch};
use annbatch::plan::{Part, ReadPlan, batches_of, measure, plan};
use annbatch::store::IoShape;
use annbatch::transform::{Joined, RowSealer, RowTarget, StagedRow, Transform};
use annbatch::{Collection, DType, StreamConfig};
use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput};
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use zarrs::array::codec::api::CodecMetadataOptions;
use zarrs::array::codec::{BloscCodec, BloscCompressionLevel, BloscCompressor, BloscShuffleMode, GzipCodec, ZstdCodec};
use zarrs::array::{ArrayBuilder, ArraySubset, BytesToBytesCodecTraits, DataType, Element, FillValue, data_type};
use zarrs::filesystem::FilesystemStore;
use zarrs::group::GroupBuilder;
use zarrs::storage::store::MemoryStore;

/// Rows of each of the datasets that are planned over.
const ROWS: u64 = 1 << 18;
const DATASETS: usize = 4;
/// Genes, as many as an atlas has.
const N_VAR: usize = 36_000;
/// Entries of a chunk: 64 rows of a thousand.
const CHUNK: u64 = 64 * 1024;
const CHUNKS_PER_SHARD: u64 = 256;
/// (`chunk_size`, `preload_nchunks`) of the windows.
const WINDOWS: [(u64, u64); 3] = [(256, 64), (32, 512), (1, 16_384)];
/// What the rows of a chunk are scattered over in turn: batches are larger than the caches too.
const OUT_BYTES: usize = 64 << 20;

fn main() {
    let mut criterion = Criterion::default().measurement_time(Duration::from_secs(3)).configure_from_args();
    windows(&mut criterion);
    decode_scatter(&mut criterion);
    seal(&mut criterion);
    criterion.final_summary();
}

// ---- plan and coalesce -------------------------------------------------------------------------------------------------

/// A collection of which nothing is stored but its row pointers, and where the rows of each dataset begin.
fn collection(dir: &Path) -> (Arc<Collection>, Vec<Vec<i64>>) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let write = |number: usize| {
        let lengths = std::iter::repeat_with(|| rng.random_range(200..1800));
        let starts = lengths.scan(0, |end, n| Some(std::mem::replace(end, *end + n)));
        let indptr: Vec<i64> = starts.take(ROWS as usize + 1).collect();
        let path = dir.join(number.to_string());
        write_row_pointers(&path.join("X"), &indptr);
        (path.display().to_string(), indptr)
    };
    let (paths, pointers): (Vec<_>, Vec<_>) = (0..DATASETS).map(write).unzip();
    (reference::open(&reference::config(&paths, r#"{"kind":"submitted"}"#, "")).expect("a collection"), pointers)
}

fn write_row_pointers(dir: &Path, indptr: &[i64]) {
    let store = Arc::new(FilesystemStore::new(dir).expect("a store"));
    let attributes = serde_json::json!({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [ROWS, N_VAR]});
    let mut group = GroupBuilder::new();
    group.attributes(attributes.as_object().expect("an object").clone());
    group.build(Arc::clone(&store), "/").and_then(|g| Ok(g.store_metadata()?)).expect("a group");
    let create = |name: &str, len: u64, shard: u64, chunk: u64, dtype: DataType, fill: FillValue| {
        let mut builder = ArrayBuilder::new(vec![len], vec![shard], dtype, fill);
        // uncompressed chunks would be read, and so planned, in parts
        builder.subchunk_shape(vec![chunk]).bytes_to_bytes_codecs(vec![Arc::new(ZstdCodec::new(1, false))]);
        let array = builder.build(Arc::clone(&store), &format!("/{name}")).expect("an array");
        array.store_metadata().expect("metadata");
        array
    };
    let (len, nnz) = (indptr.len() as u64, *indptr.last().expect("row pointers begin with 0") as u64);
    create("indices", nnz, CHUNK * CHUNKS_PER_SHARD, CHUNK, data_type::uint16(), 0u16.into());
    create("data", nnz, CHUNK * CHUNKS_PER_SHARD, CHUNK, data_type::float32(), 0f32.into());
    let stored = create("indptr", len, CHUNK * 8, CHUNK, data_type::int64(), 0i64.into());
    stored.store_array_subset(&all_of(len), indptr).expect("row pointers");
}

fn all_of(len: u64) -> ArraySubset {
    ArraySubset::new_with_shape(vec![len])
}

fn windows(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    let (collection, pointers) = collection(dir.path());
    let plans: Vec<_> = WINDOWS
        .iter()
        .map(|&(chunk_size, preload)| {
            let batches = window(&collection, chunk_size, preload);
            let plan = planned(&collection, batches.clone());
            check_plan(&plan, &batches, &pointers);
            (format!("{chunk_size}x{preload}"), batches, plan)
        })
        .collect();
    let mut group = criterion.benchmark_group("plan");
    for (name, batches, plan) in &plans {
        group.throughput(Throughput::Elements(plan.slots[0].len() as u64));
        group
            .bench_function(name, |b| b.iter_batched(|| batches.clone(), |rows| planned(&collection, rows), BatchSize::LargeInput));
    }
    group.finish();
    let mut group = criterion.benchmark_group("coalesce");
    for (name, _, plan) in &plans {
        let wanted = wanted(plan);
        check_reads(&wanted);
        group.throughput(Throughput::Elements(wanted.len() as u64));
        let joined = |mut wanted: Vec<Wanted>| (coalesce(&mut wanted, |_| IoShape::LOCAL.joined), wanted);
        group.bench_function(name, |b| b.iter_batched(|| wanted.clone(), joined, BatchSize::LargeInput));
    }
}

/// The row lists of a window in the middle of an epoch.
fn window(collection: &Collection, chunk_size: u64, preload: u64) -> Vec<Vec<u64>> {
    let sampling = serde_json::json!({"kind": "random", "chunk_size": chunk_size, "preload_nchunks": preload, "batch_size": 4096});
    let stream = StreamConfig::parse(&serde_json::json!({"sampling": sampling}).to_string()).expect("a configuration");
    let order = stream.sampling.expect("sampling").order(collection.n_obs(), 3).expect("parameters").expect("a native order");
    batches_of(&order.window(order.n_windows() / 2).expect("a window"))
}

fn planned(collection: &Collection, batches: Vec<Vec<u64>>) -> ReadPlan {
    let layouts: annbatch::Result<Vec<BatchLayout>> = batches.into_iter().map(|rows| measure(collection, rows, None)).collect();
    plan(collection, layouts.expect("batches that fit memory"))
}

/// The twin asks every row for its chunks, and every chunk for its rows.
fn check_plan(plan: &ReadPlan, batches: &[Vec<u64>], pointers: &[Vec<i64>]) {
    type Rows = BTreeSet<(u32, u32)>;
    let mut expected: BTreeMap<(u32, Part, u64), Rows> = BTreeMap::new();
    for (batch, rows) in (0u32..).zip(batches) {
        let layout = &plan.batches[batch as usize];
        let indptr = &layout.elements[0].indptr;
        assert_eq!((&layout.rows, indptr.len(), indptr[0]), (rows, rows.len() + 1, 0));
        for (position, row) in (0u32..).zip(rows) {
            let (dataset, local) = ((row / ROWS) as u32, (row % ROWS) as usize);
            let (start, end) = (pointers[dataset as usize][local] as u64, pointers[dataset as usize][local + 1] as u64);
            assert_eq!(indptr[position as usize + 1] - indptr[position as usize], end - start, "length of row {row}");
            for (part, chunk) in (start / CHUNK..=(end - 1) / CHUNK).flat_map(|c| [(Part::Indices, c), (Part::Data, c)]) {
                expected.entry((dataset, part, chunk)).or_default().insert((batch, position));
            }
        }
    }
    assert_eq!(plan.tasks.len(), expected.len(), "each chunk once");
    let mut tasks = vec![0; batches.len()];
    for task in &plan.tasks {
        let slots: Rows = plan.slots_of(task).iter().map(|s| (s.batch, s.position)).collect();
        let fed: BTreeSet<u32> = plan.task_batches[task.batches.clone()].iter().copied().collect();
        assert_eq!(Some(&slots), expected.get(&(task.dataset, task.part, task.chunk)));
        assert_eq!(fed, slots.iter().map(|s| s.0).collect());
        for batch in fed {
            tasks[batch as usize] += 1;
        }
    }
    assert_eq!(plan.tasks_per_batch, tasks);
}

/// The byte ranges of a plan's chunks, in the order and with the numbers that `fetch` gives them. What is made up is how
/// long the chunks are: about a byte of data and one of indices per entry, as LZ4 leaves of counts.
fn wanted(plan: &ReadPlan) -> Vec<Wanted> {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut ends: HashMap<_, Vec<u64>> = HashMap::new();
    let mut objects = HashMap::new();
    let wanted = plan.tasks.iter().zip(0..).map(|(task, tag)| {
        let (object, inner) = ((task.dataset, task.part, task.chunk / CHUNKS_PER_SHARD), (task.chunk % CHUNKS_PER_SHARD) as usize);
        let ends = ends.entry(object).or_insert_with(|| {
            (0..CHUNKS_PER_SHARD as usize).fold(vec![0], |mut ends, i| {
                ends.push(ends[i] + rng.random_range(50_000..80_000));
                ends
            })
        });
        let next = objects.len() as u32;
        Wanted { object: *objects.entry(object).or_insert(next), range: (ends[inner], ends[inner + 1]), tag }
    });
    wanted.collect()
}

/// The twin grows one read at a time, range by range.
fn check_reads(wanted: &[Wanted]) {
    let options = IoShape::LOCAL.joined;
    let mut sorted: Vec<(u32, u64, u64, u32)> = wanted.iter().map(|w| (w.object, w.range.0, w.range.1, w.tag)).collect();
    sorted.sort_unstable();
    let mut expected: Vec<(u32, u64, u64, Vec<u32>)> = Vec::new();
    for (object, start, end, tag) in sorted {
        match expected.last_mut() {
            Some((o, from, to, tags))
                if *o == object && start - *to <= options.max_gap_bytes && end - *from <= options.target_read_bytes =>
            {
                *to = end;
                tags.push(tag);
            }
            _ => expected.push((object, start, end, vec![tag])),
        }
    }
    let mut ranges = wanted.to_vec();
    let reads = coalesce(&mut ranges, |_| options)
        .into_iter()
        .map(|read| (read.object, read.range.start, read.range.end, ranges[read.members].iter().map(|w| w.tag).collect()));
    assert_eq!(reads.collect::<Vec<_>>(), expected);
}

// ---- decode and scatter ------------------------------------------------------------------------------------------------

/// A stored chunk of CSR entries.
struct Chunk {
    codec: ChunkCodec,
    encoded: Vec<u8>,
}

/// Where a row's entries are in the chunk and in the batch, and how many.
type Piece = (usize, usize, usize);

fn decode_scatter(criterion: &mut Criterion) {
    let (rows, indices, data) = entries();
    let widened: Vec<i32> = indices.iter().map(|&i| i32::from(i)).collect();
    let (f32s, i32s) = (copy_values(DType::Float32, DType::Float32), copy_indices(DType::UInt16, DType::Int32));
    let (f32s, i32s) = (f32s.expect("a copy"), i32s.expect("a copy"));
    // SAFETY: `bench` gives as many elements and as much room as there are.
    let f32s = |src: Stored, out, n| assert!(unsafe { f32s.run(src, out, n) });
    let copy = |src: Stored, out, n, columns: &[u32]| {
        // SAFETY: as above.
        assert!(unsafe { i32s.run(src, out, n, &mut Columns::new(columns, false)) } < N_VAR as u64);
    };
    // every tenth of the joined columns is one that this dataset lacks
    let joined: Vec<u32> = (0..N_VAR as u32).map(|c| c + c / 9).collect();
    let moved: Vec<i32> = indices.iter().map(|&i| joined[usize::from(i)] as i32).collect();
    let mut group = criterion.benchmark_group("decode_scatter");
    for (codec, values, columns) in [
        ("blosc-lz4", blosc(BloscCompressor::LZ4, 4), blosc(BloscCompressor::LZ4, 2)),
        ("blosc-zstd", blosc(BloscCompressor::Zstd, 4), blosc(BloscCompressor::Zstd, 2)),
        ("zstd", zstd(), zstd()),
        ("gzip", gzip(), gzip()),
        ("raw", vec![], vec![]),
    ] {
        let values = Chunk::new(&data, data_type::float32(), 0f32.into(), DType::Float32, values);
        let columns = Chunk::new(&indices, data_type::uint16(), 0u16.into(), DType::UInt16, columns);
        for (share, step) in [("all", 1), ("one-in-16", 16)] {
            let pieces = slots(rows.iter().skip(step / 2).step_by(step).copied());
            let of = |part| format!("{codec}/{part}/{share}");
            bench(&mut group, &of("f32"), &values, &pieces, f32s, &data);
            bench(&mut group, &of("u16"), &columns, &pieces, |src, out, n| copy(src, out, n, &[]), &widened);
            bench(&mut group, &of("u16-joined"), &columns, &pieces, |src, out, n| copy(src, out, n, &joined), &moved);
        }
    }
}

fn seal(criterion: &mut Criterion) {
    let (rows, indices, data) = entries();
    let transform = Transform::none(&ElementKind::Csr { n_var: N_VAR as u64 }, DType::Float32);
    let mut places: Vec<u32> = (0..N_VAR as u32).collect();
    places.shuffle(&mut ChaCha8Rng::seed_from_u64(6));
    let dropping: Vec<u32> = (0..N_VAR as u32).map(|c| if c % 10 == 9 { u32::MAX } else { c - c / 10 }).collect();
    let mut group = criterion.benchmark_group("seal");
    for (name, map, joined) in
        [("drops", dropping, Joined { drops: true, sorts: false }), ("sorts", places, Joined { drops: false, sorts: true })]
    {
        let columns: Vec<u32> = indices.iter().map(|&i| map[usize::from(i)]).collect();
        let (columns, values): (Vec<u8>, Vec<u8>) =
            (columns.iter().flat_map(|c| c.to_ne_bytes()).collect(), data.iter().flat_map(|v| v.to_ne_bytes()).collect());
        let mut sealer = RowSealer::new(&transform).expect("a sealer");
        let mut out = (vec![0u32; CHUNK as usize], vec![0f32; CHUNK as usize]);
        let mut pass = |from: usize, n: usize| {
            let (indices, values) = (&columns[4 * from..4 * (from + n)], &values[4 * from..4 * (from + n)]);
            sealer.load(StagedRow::Csr { indices, wide: false, values }, joined, false);
            let kept = transform.kept(indices, false);
            // SAFETY: numbers have no invalid bytes.
            let (indices, values) = unsafe { (out.0[..kept].align_to_mut().1, out.1[..kept].align_to_mut().1) };
            sealer.write(RowTarget::Csr { indices, wide: false, values }).expect("room for the row");
            out.0[..kept].iter().copied().zip(out.1[..kept].iter().copied()).collect::<Vec<_>>()
        };
        for &(from, n) in &rows {
            let entries = indices[from..from + n].iter().map(|&i| map[usize::from(i)]).zip(data[from..from + n].iter().copied());
            let mut expected: Vec<(u32, f32)> = entries.filter(|e| e.0 != u32::MAX).collect();
            expected.sort_by_key(|e| e.0);
            assert_eq!(pass(from, n), expected, "{name}");
        }
        group.throughput(Throughput::Elements(CHUNK));
        group.bench_function(name, |b| b.iter(|| rows.iter().map(|&(from, n)| pass(from, n).len()).sum::<usize>()));
    }
}

/// The rows of one chunk: where each begins and how long it is, columns of genes of which few are in most cells and most in
/// few, as compressors find them in atlases, and counts as floats.
fn entries() -> (Vec<(usize, usize)>, Vec<u16>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    // on average 1/36, which makes a thousand genes a cell
    let rates: Vec<f32> = (0..N_VAR).map(|_| rng.random_range(0.0..1.0f32).powi(35)).collect();
    let (mut rows, mut indices) = (Vec::new(), Vec::new());
    while indices.len() < CHUNK as usize {
        let (begin, depth) = (indices.len(), rng.random_range(0.2..1.8f32));
        let genes = (0u16..).zip(&rates).filter(|(_, rate)| rng.random_range(0.0..1.0f32) < depth * **rate);
        indices.extend(genes.map(|(gene, _)| gene).take(CHUNK as usize - begin));
        rows.push((begin, indices.len() - begin));
    }
    // mostly ones, and the larger the rarer
    let data = (0..CHUNK).map(|_| (1.0 / rng.random_range(0.01..1.0f32)).floor()).collect();
    (rows, indices, data)
}

/// The rows in the order in which a shuffled batch has them, one behind the other.
fn slots(rows: impl Iterator<Item = (usize, usize)>) -> Vec<Piece> {
    let rows: Vec<_> = rows.collect();
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(5));
    let mut places = vec![0; rows.len()];
    order.iter().fold(0, |end, &i| std::mem::replace(&mut places[i], end) + end + rows[i].1);
    rows.into_iter().zip(places).map(|((from, n), to)| (from, to, n)).collect()
}

type Compressors = Vec<Arc<dyn BytesToBytesCodecTraits>>;

fn blosc(compressor: BloscCompressor, item_size: usize) -> Compressors {
    let level = BloscCompressionLevel::try_from(3u8).unwrap_or_else(|_| unreachable!("3 is a level"));
    vec![Arc::new(BloscCodec::new(compressor, level, None, BloscShuffleMode::Shuffle, Some(item_size)).expect("a codec"))]
}

fn zstd() -> Compressors {
    vec![Arc::new(ZstdCodec::new(3, false))]
}

fn gzip() -> Compressors {
    vec![Arc::new(GzipCodec::new(5).expect("a codec"))]
}

impl Chunk {
    fn new<T: Element>(elements: &[T], data_type: DataType, fill: FillValue, dtype: DType, compressors: Compressors) -> Self {
        let mut builder = ArrayBuilder::new(vec![CHUNK], vec![CHUNK], data_type, fill);
        builder.bytes_to_bytes_codecs(compressors);
        let array = builder.build(Arc::new(MemoryStore::new()), "/a").expect("an array");
        array.store_array_subset(&all_of(CHUNK), elements).expect("a chunk");
        let metadatas = array.codecs().create_metadatas(&CodecMetadataOptions::default());
        let codec = ChunkCodec::new(array.codecs(), &metadatas, &[CHUNK], array.data_type(), array.fill_value(), dtype);
        let codec = codec.expect("a chain of codecs");
        assert!(!codec.is_general(), "what writers use takes the direct path");
        Self { codec, encoded: array.retrieve_encoded_chunk(&[0]).expect("a chunk").expect("a chunk") }
    }

    /// Decodes and copies the pieces as a task of `pipeline::unit` does.
    ///
    /// # Safety
    /// `out` is aligned to elements of `item` bytes and has room for those of all pieces, and `copy` can be called with as many.
    unsafe fn scatter(
        &self,
        pieces: &[Piece],
        copy: impl Fn(Stored, *mut u8, usize),
        out: *mut u8,
        item: usize,
        scratch: &mut Scratch,
    ) -> annbatch::Result<()> {
        let needed = pieces.iter().map(|&(from, _, n)| from..from + n);
        let decoded = self.codec.decode_ranges(&self.encoded, needed, scratch)?;
        for &(from, to, n) in pieces {
            decoded.runs(from..from + n, |src, done, n| {
                // SAFETY: the caller has room for the elements of all pieces.
                copy(src, unsafe { out.add((to + done) * item) }, n);
            })?;
        }
        publish();
        Ok(())
    }
}

/// Times a chunk's way to `pieces`, whose elements are those of `plain`.
fn bench<T: Copy + PartialEq + Debug>(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    chunk: &Chunk,
    pieces: &[Piece],
    copy: impl Fn(Stored, *mut u8, usize),
    plain: &[T],
) {
    let (wanted, item) = (pieces.iter().map(|p| p.2).sum::<usize>(), size_of::<T>());
    // not zeros, so that the pages are there
    let mut out = vec![plain[0]; OUT_BYTES / item];
    let mut scratch = Scratch::default();
    let mut places = (0..out.len() / wanted).map(|i| i * wanted).cycle();
    let mut pass = |out: &mut [T]| {
        let place = &mut out[places.next().expect("a cycle")..][..wanted];
        // SAFETY: the place has as many elements as the pieces have, which are of type `T`.
        unsafe { chunk.scatter(pieces, &copy, place.as_mut_ptr().cast(), item, &mut scratch) }.expect("a good chunk");
    };
    pass(&mut out);
    for &(from, to, n) in pieces {
        assert_eq!(out[to..to + n], plain[from..from + n], "{name}");
    }
    group.throughput(Throughput::Elements(wanted as u64));
    group.bench_function(name, |b| b.iter(|| pass(&mut out)));
}
