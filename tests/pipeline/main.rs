//! The pipeline through stores that count, wait and fail.

mod backpressure;
mod faults;
mod lifetime;
mod reads;
#[path = "../reference/mod.rs"]
mod reference;

use std::sync::Arc;
use std::time::{Duration, Instant};

use annbatch::batch::HostBatch;
use annbatch::collection::Source;
use annbatch::sampler::LoadRequest;
use annbatch::store::{LocalStore, OpenFiles, Store};
use annbatch::{Collection, Next, OpenConfig, Pipeline, Runtime};
use reference::moody::{Mood, Moody};
use reference::{Chunking, Matrix, SlowReader, config, rows_of};

struct Setup {
    dir: tempfile::TempDir,
    config: OpenConfig,
    mood: Arc<Mood>,
    collection: Arc<Collection>,
}

/// 400 rows of about 20 entries in chunks of 100 entries, uncompressed with a checksum, windows of 40 rows in batches of 10.
fn setup(extra: &str, kind: &str) -> Setup {
    let sampling = format!(r#"{{"kind":"{kind}","chunk_size":10,"preload_nchunks":4,"batch_size":10}}"#);
    setup_of(&Matrix::random(400, 90, 20, 3), Chunking { chunk: 100, chunks_per_shard: 4, codec: 5 }, &sampling, extra)
}

fn setup_of(matrix: &Matrix, chunking: Chunking, sampling: &str, extra: &str) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d");
    matrix.write(&path.join("X"), chunking);
    let config = config(&[path.display().to_string()], sampling, extra);
    let mood = Arc::new(Mood::default());
    let files = OpenFiles::new(4);
    let stores = |path: &str| -> annbatch::Result<Arc<dyn Store>> {
        Ok(Arc::new(Moody { inner: Arc::new(LocalStore::new(path, Arc::clone(&files))), mood: Arc::clone(&mood) }))
    };
    let collection = Collection::open_through(&config, &[], Arc::new(Runtime::start(2, 4).unwrap()), &stores).unwrap();
    Setup { dir, config, mood, collection }
}

impl Setup {
    /// Entries of each row.
    fn lengths(&self) -> Vec<u64> {
        let rows = &self.collection.elements()[0].sources[0];
        let Source::Csr(csr) = rows else { panic!("X is sparse") };
        (0..csr.rows.n_obs()).map(|row| csr.rows.len_of(row)).collect()
    }

    fn pipeline(&self) -> Pipeline {
        Pipeline::new(Arc::clone(&self.collection), self.config.stream()).unwrap()
    }
}

/// Starts a pipeline on these rows, batch by batch.
fn submitted(setup: &Setup, batches: &[Vec<u64>]) -> Pipeline {
    let pipeline = setup.pipeline();
    submit(&pipeline, batches);
    pipeline
}

fn submit(pipeline: &Pipeline, batches: &[Vec<u64>]) {
    pipeline.start(0, 0).unwrap();
    let (rows, sizes) = (batches.concat(), batches.iter().map(|b| b.len() as u32).collect());
    pipeline.submit(LoadRequest { positions: (0..rows.len() as u32).collect(), rows, sizes }).unwrap();
    pipeline.finish().unwrap();
}

/// Takes a batch and compares it, row by row, with what the slow twin reads.
fn take_and_check(setup: &Setup, pipeline: &Pipeline, expected: &[u64]) {
    let Next::Batch(batch) = pipeline.next(Some(Duration::from_secs(10))).unwrap() else { panic!("a batch") };
    assert_eq!(check_rows(setup, &batch), expected);
}

/// Compares a batch, row by row, with what the slow twin reads; its rows.
fn check_rows(setup: &Setup, batch: &HostBatch) -> Vec<u64> {
    let reader = SlowReader::open(&setup.dir.path().join("d/X"));
    let check = |(row, columns, values): (i64, Vec<i32>, Vec<f32>)| {
        let (expected_columns, expected_values) = reader.row(row as u64);
        assert_eq!(columns, expected_columns.iter().map(|&c| i32::from(c)).collect::<Vec<_>>());
        assert_eq!(values, expected_values);
        row as u64
    };
    rows_of(batch).into_iter().map(check).collect()
}

/// One chunk of 20 MB per array, uncompressed.
fn verbatim(extra: &str) -> Setup {
    let chunking = Chunking { chunk: 5_000_000, chunks_per_shard: 0, codec: 0 };
    setup_of(&Matrix::random(50_000, 200, 100, 3), chunking, r#"{"kind":"submitted"}"#, extra)
}

/// Waits until `what` holds, or fails after ten seconds.
fn eventually(message: &str, what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "{message}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn stat(pipeline: &Pipeline, name: &str) -> u64 {
    pipeline.stats()[name].as_u64().unwrap()
}

/// Checks that an error says which dataset, array, chunk, file and bytes, and why.
fn names_all(error: &str, reason: &str) {
    for part in ["dataset", "X/data", "chunk [", "file ", "data/c/", reason] {
        assert!(error.contains(part), "{part:?} in {error:?}");
    }
    let (_, range) = error.split_once("bytes ").unwrap_or_else(|| panic!("a byte range in {error:?}"));
    let (start, end) = range.split_once(':').unwrap().0.split_once("..").unwrap();
    assert!(start.parse::<u64>().unwrap() < end.parse().unwrap(), "{error}");
}
