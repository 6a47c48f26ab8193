//! Storage that takes 2 ms for every read: does reading run at depth / latency whatever decodes?
//!
//! ```text
//! cargo bench --features internals --bench slow -- COLLECTION [CHUNK_SIZE PRELOAD_NCHUNKS BATCH_SIZE] [THREADS] [SECONDS]
//! ```
//!
//! For several I/O depths it streams windows through a store that waits before each read, and compares the reads per
//! second with the smaller of two bounds: depth / latency, and the rate at which the same pipeline goes without the
//! wait (which the page cache and the decoding threads bound). One line of JSON each; `ratio` should be at least 0.9.
//! The latency is measured, because a sleep of 2 ms takes somewhat longer.

#[path = "../tests/reference/mod.rs"]
mod reference;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use annbatch::store::{LocalStore, OpenFiles, Store};
use annbatch::{Collection, Next, OpenConfig, Pipeline, Runtime};
use reference::moody::{Mood, Moody};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    // cargo bench adds --bench
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |i: usize, default: u64| arguments.get(i).map_or(Ok(default), |a| a.parse());
    let Some(path) = arguments.first() else {
        eprintln!("usage: slow COLLECTION [CHUNK_SIZE PRELOAD_NCHUNKS BATCH_SIZE] [THREADS] [SECONDS]");
        return Ok(());
    };
    let (chunk_size, preload, batch) = (number(1, 64)?, number(2, 256)?, number(3, 4096)?);
    let threads = number(4, std::thread::available_parallelism()?.get() as u64)? as usize;
    let seconds = number(5, 5)? as f64;
    let mut datasets: Vec<_> = std::fs::read_dir(path)?.filter_map(|e| e.ok().map(|e| e.path()).filter(|p| p.is_dir())).collect();
    datasets.sort();
    let config = serde_json::json!({
        "elements": [{"name": "X"}],
        "datasets": datasets.iter().map(|p| serde_json::json!({"path": p})).collect::<Vec<_>>(),
        "sampling": {"kind": "random", "chunk_size": chunk_size, "preload_nchunks": preload, "batch_size": batch},
    });
    let config = OpenConfig::parse(&config.to_string())?;
    for depth in [2, 8, 32, 128] {
        let mood = Arc::new(Mood::default());
        let files = OpenFiles::for_this_process();
        let stores = |path: &str| -> annbatch::Result<Arc<dyn Store>> {
            Ok(Arc::new(Moody { inner: Arc::new(LocalStore::new(path, Arc::clone(&files))), mood: Arc::clone(&mood) }))
        };
        let collection = Collection::open_through(&config, &[], Arc::new(Runtime::start(threads, depth)?), &stores)?;
        let pipeline = Pipeline::new(collection, config.stream())?;
        // warms the page cache and loads the shard indexes
        reads_per_second(&pipeline, seconds)?;
        let unhindered = reads_per_second(&pipeline, seconds)?;
        mood.latency_us.store(2000, Ordering::Relaxed);
        mood.took_ns.store(0, Ordering::Relaxed);
        mood.done.store(0, Ordering::Relaxed);
        let measured = reads_per_second(&pipeline, seconds)?;
        let mean = mood.took_ns.load(Ordering::Relaxed) as f64 / mood.done.load(Ordering::Relaxed) as f64 / 1e9;
        let bound = depth as f64 / mean;
        let out = serde_json::json!({"io_depth": depth, "latency_ms": mean * 1e3, "reads_per_s": measured,
            "bound_by_storage": bound, "bound_by_decoding": unhindered, "ratio": measured / bound.min(unhindered)});
        println!("{out}");
    }
    Ok(())
}

/// Reads per second of an epoch's steady state, over as many epochs as take `seconds`.
fn reads_per_second(pipeline: &Pipeline, seconds: f64) -> Result<f64> {
    let reads = || pipeline.stats()["reads"].as_u64().unwrap_or(0);
    let (mut begun, mut from, mut seed) = (Instant::now(), reads(), 0);
    let mut first = true;
    loop {
        pipeline.start(seed, 0)?;
        while let Next::Batch(_) = pipeline.next(None)? {
            if std::mem::take(&mut first) {
                (begun, from) = (Instant::now(), reads());
            }
            if begun.elapsed().as_secs_f64() > seconds {
                return Ok((reads() - from) as f64 / begun.elapsed().as_secs_f64());
            }
        }
        seed += 1;
    }
}
