//! The needed ceiling: bare multi-threaded decompression of exactly the inner chunks that windows need.
//!
//! ```text
//! cargo bench --features internals --bench ceiling -- COLLECTION CHUNK_SIZE PRELOAD_NCHUNKS BATCH_SIZE [SECONDS] [THREADS] [ELEMENT]
//! ```
//!
//! Plans windows of an epoch as the pipeline would, holds the encoded chunks of one window in memory at a time, and times
//! nothing but decompression into per-thread scratch, each chunk once: whole chunks by C-Blosc (the ceiling), and by our own
//! decoder, which leaves shuffled bytes where they are. COLLECTION may be an .h5ad file, whose deflated chunks are only
//! inflated, by libdeflate as always. Prints one line of JSON: for both, cells per second of wall time and of processor
//! time (a machine that is shared shows in the one and not in the other); rows decoded per row delivered.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use annbatch::collection::{ArraySource, Source};
use annbatch::decode::Scratch;
use annbatch::layout::{Address, ChunkedArray};
use annbatch::plan::{ChunkTask, Part, ReadPlan, batches_of, measure, plan};
use annbatch::{Collection, OpenConfig, Runtime};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    // cargo bench adds --bench
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [path, chunk_size, preload, batch, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: ceiling COLLECTION CHUNK_SIZE PRELOAD_NCHUNKS BATCH_SIZE [SECONDS] [THREADS] [ELEMENT]");
        return Ok(());
    };
    let seconds: f64 = rest.first().map_or(Ok(3.0), |s| s.parse())?;
    let threads: usize = rest.get(1).map_or(Ok(std::thread::available_parallelism()?.get()), |s| s.parse())?;
    let is_file = std::path::Path::new(path).is_file();
    let mut datasets = vec![std::path::PathBuf::from(path)];
    if !is_file {
        datasets = std::fs::read_dir(path)?.filter_map(|e| e.ok().map(|e| e.path()).filter(|p| p.is_dir())).collect();
    }
    datasets.sort();
    let config = serde_json::json!({
        "elements": [{"name": rest.get(2).map_or("X", String::as_str)}],
        "datasets": datasets.iter().map(|p| serde_json::json!({"path": p})).collect::<Vec<_>>(),
        "sampling": {"kind": "random", "chunk_size": chunk_size.parse::<u64>()?, "preload_nchunks": preload.parse::<u64>()?,
                     "batch_size": batch.parse::<u64>()?},
    });
    let config = OpenConfig::parse(&config.to_string())?;
    let collection = Collection::open(&config, &[], Arc::new(Runtime::start(threads, 8)?))?;
    let sampling = config.stream().sampling.ok_or("no sampling")?;
    let (mut rows, mut decoded_rows) = (0usize, 0.0f64);
    let mut spent = [Spent::default(); 2];
    for seed in 0.. {
        let order = sampling.order(collection.n_obs(), seed)?.ok_or("no native order")?;
        for number in 0..order.n_windows() {
            let layouts = batches_of(&order.window(number)?)
                .into_iter()
                .map(|r| measure(&collection, r, None))
                .collect::<annbatch::Result<_>>()?;
            let window = plan(&collection, layouts);
            let chunks = encoded(&collection, &window)?;
            rows += window.slots[0].len();
            decoded_rows += rows_in(&collection, &window);
            for (spent, own) in spent.iter_mut().zip([is_file, true]) {
                let now = decode_all(&chunks, threads, own);
                spent.wall_s += now.wall_s;
                spent.cpu_s += now.cpu_s;
            }
            if spent[0].wall_s > seconds {
                let per = |s: f64| rows as f64 / s;
                let out = serde_json::json!({
                    "cells_per_s": per(spent[0].wall_s), "cells_per_cpu_s": per(spent[0].cpu_s),
                    "own_cells_per_s": per(spent[1].wall_s), "own_cells_per_cpu_s": per(spent[1].cpu_s),
                    "rows_decoded_per_row": decoded_rows / rows as f64, "threads": threads,
                });
                println!("{out}");
                return Ok(());
            }
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    wall_s: f64,
    cpu_s: f64,
}

fn array_of<'a>(collection: &'a Collection, task: &ChunkTask) -> Option<&'a Arc<ChunkedArray>> {
    match task.array(collection) {
        ArraySource::Chunked(array) => Some(array),
        ArraySource::Memory(_) => None,
    }
}

/// Encoded bytes of every chunk of the plan.
fn encoded(collection: &Collection, plan: &ReadPlan) -> Result<Vec<(Arc<ChunkedArray>, Vec<u8>)>> {
    let mut out = Vec::with_capacity(plan.tasks.len());
    let mut files = std::collections::HashMap::new();
    for task in &plan.tasks {
        let Some(array) = array_of(collection, task) else { continue };
        if let Ok(Address::InShard(_)) = array.address(task.chunk) {
            // loads the shard's index on the way
            annbatch::layout::read_chunk_now(array, task.chunk, collection.runtime().io(), &mut Scratch::default(), |_| Ok(()))?;
        }
        let Address::Stored(key, range) = array.address(task.chunk)? else { continue };
        let path = array.store().display(&key);
        if !files.contains_key(&path) {
            files.insert(path.clone(), std::fs::File::open(&path)?);
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        std::os::unix::fs::FileExt::read_exact_at(&files[&path], &mut bytes, range.start)?;
        out.push((Arc::clone(array), bytes));
    }
    Ok(out)
}

/// Rows that the plan's chunks hold, by their share of the entries.
fn rows_in(collection: &Collection, plan: &ReadPlan) -> f64 {
    plan.tasks
        .iter()
        .filter(|t| t.part != Part::Indices)
        .filter_map(|t| array_of(collection, t))
        .map(|array| match array.shape.len() {
            1 => array.chunk_shape[0] as f64 / array.shape[0] as f64 * rows_of(collection, array),
            _ => array.chunk_len() as f64 / array.shape[1..].iter().product::<u64>() as f64,
        })
        .sum()
}

fn rows_of(collection: &Collection, array: &Arc<ChunkedArray>) -> f64 {
    let sources = collection.elements().iter().flat_map(|e| &e.sources);
    let csr = sources.filter_map(|s| if let Source::Csr(csr) = s { Some(csr) } else { None });
    let mut own = csr.filter(|c| matches!(&c.data, ArraySource::Chunked(a) if Arc::ptr_eq(a, array)));
    own.next().map_or(0.0, |c| c.rows.n_obs() as f64)
}

/// Processor time of this thread, in nanoseconds.
fn cpu_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn decode_all(chunks: &[(Arc<ChunkedArray>, Vec<u8>)], threads: usize, own: bool) -> Spent {
    let next = AtomicUsize::new(0);
    let cpu = AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let begin = cpu_ns();
                let (mut raw, mut scratch) = (vec![0u8; 1 << 20], Scratch::default());
                while let Some((array, encoded)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let n = array.chunk_bytes();
                    raw.resize(raw.len().max(n), 0);
                    // SAFETY: a chunk of our own store; C-Blosc writes at most `n` bytes.
                    let whole = !own
                        && n as i32
                            == unsafe { blosc_src::blosc_decompress_ctx(encoded.as_ptr().cast(), raw.as_mut_ptr().cast(), n, 1) };
                    if !whole {
                        // asked for, or no Blosc
                        array.codec.decode(encoded, &mut scratch).expect("a chunk of our own store");
                    }
                }
                cpu.fetch_add(cpu_ns() - begin, Ordering::Relaxed);
            });
        }
    });
    Spent { wall_s: start.elapsed().as_secs_f64(), cpu_s: cpu.into_inner() as f64 / 1e9 }
}
