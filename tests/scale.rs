//! Cost that does not grow with the data set: two stores of the same kind, one with a hundred times the rows, are read
//! with the same number of steps, reads and bytes per batch.

mod reference;

use std::path::Path;
use std::sync::Arc;

use annbatch::sampler::LoadRequest;
use annbatch::{Collection, Next, Pipeline, StreamConfig};
use reference::{Chunking, Matrix, config, open, rows_of};

const ENTRIES_PER_ROW: usize = 3;
/// 64 rows per inner chunk, as the writers choose; 16,384 rows per shard.
const CHUNKING: Chunking = Chunking { chunk: 64 * ENTRIES_PER_ROW as u64, chunks_per_shard: 256, codec: 1 };
const ROWS_PER_SHARD: u64 = 64 * 256;

/// A store whose rows are all alike, so that all of its chunks are equally long.
fn store(dir: &Path, n_obs: usize) -> Arc<Collection> {
    let nnz = n_obs * ENTRIES_PER_ROW;
    let matrix = Matrix {
        n_var: ENTRIES_PER_ROW as u64,
        indptr: (0..=nnz as i64).step_by(ENTRIES_PER_ROW).collect(),
        indices: (0..nnz).map(|i| (i % ENTRIES_PER_ROW) as u16).collect(),
        data: (0..nnz).map(|i| (i % ENTRIES_PER_ROW) as f32 + 1.0).collect(),
    };
    let path = dir.join(format!("{n_obs}"));
    matrix.write(&path.join("X"), CHUNKING);
    open(&config(&[path.display().to_string()], r#"{"kind":"submitted"}"#, "")).unwrap()
}

/// Reads a row of every shard, so that every shard's index is at hand.
fn load_indexes(collection: &Arc<Collection>) {
    let rows: Vec<u64> = (0..collection.n_obs()).step_by(ROWS_PER_SHARD as usize).collect();
    let n = rows.len() as u32;
    let stream = StreamConfig::parse(r#"{"sampling":{"kind":"submitted"}}"#).unwrap();
    let pipeline = Pipeline::new(Arc::clone(collection), stream).unwrap();
    pipeline.start(0, 0).unwrap();
    pipeline.submit(LoadRequest { rows, positions: (0..n).collect(), sizes: vec![n] }).unwrap();
    pipeline.finish().unwrap();
    while let Next::Batch(_) = pipeline.next(None).unwrap() {}
}

/// What so many random batches cost: windows, units, chunks decoded, reads and bytes read.
fn cost(collection: &Arc<Collection>, chunk_size: u64, preload: u64, batch_size: u64, n_batches: u64) -> [u64; 5] {
    let stream = serde_json::json!({"sampling": {"kind": "random", "chunk_size": chunk_size, "preload_nchunks": preload,
        "batch_size": batch_size, "num_samples": batch_size * n_batches}});
    let pipeline = Pipeline::new(Arc::clone(collection), StreamConfig::parse(&stream.to_string()).unwrap()).unwrap();
    pipeline.start(5, 0).unwrap();
    let mut rows = std::collections::HashSet::new();
    while let Next::Batch(batch) = pipeline.next(None).unwrap() {
        for (row, columns, values) in rows_of(&batch) {
            assert_eq!((columns.as_slice(), values.as_slice()), ([0, 1, 2].as_slice(), [1.0, 2.0, 3.0].as_slice()));
            rows.insert(row);
        }
    }
    assert_eq!(rows.len() as u64, batch_size * n_batches);
    assert!(rows.iter().any(|r| *r > collection.n_obs() as i64 / 2), "rows come from all of the store");
    let stats = pipeline.stats();
    ["windows_planned", "units_planned", "chunks_decoded", "reads", "bytes_read"].map(|name| stats[name].as_u64().unwrap())
}

#[test]
fn a_hundred_times_the_rows_cost_the_same_per_batch() {
    let dir = tempfile::tempdir().unwrap();
    // 49,152 and 4,915,200 rows
    let (small, large) = (store(dir.path(), 3 * ROWS_PER_SHARD as usize), store(dir.path(), 300 * ROWS_PER_SHARD as usize));
    for collection in [&small, &large] {
        load_indexes(collection);
    }
    // One run of rows per window, for then no two runs lie close enough to be read together, however few rows there are.
    for (chunk_size, n_batches) in [(1, 300), (16, 300), (64, 300), (256, 100), (1024, 40)] {
        let cost = |collection| cost(collection, chunk_size, 1, chunk_size, n_batches);
        let (here, there) = (cost(&small), cost(&large));
        assert_eq!(here, there, "chunk_size {chunk_size}: [windows, units, chunks, reads, bytes] of {n_batches} batches");
        assert_eq!(here[2], 2 * n_batches * chunk_size.div_ceil(64), "chunks decoded");
    }
    // Many runs: a run is a chunk, so that as many are decoded; the larger store has fewer neighbours to read together.
    let (here, there) = (cost(&small, 64, 16, 256, 64), cost(&large, 64, 16, 256, 64));
    assert_eq!(here[..3], there[..3], "[windows, units, chunks]");
    assert!(there[3] <= there[2] && there[4] <= here[4], "{here:?}, {there:?}: no read more than chunks, no byte more");
    // Row by row: rows of the smaller store share a chunk now and then.
    let (here, there) = (cost(&small, 1, 64, 64, 32), cost(&large, 1, 64, 64, 32));
    assert!(here[2] <= there[2] && there[2] <= 2 * 64 * 32, "{here:?}, {there:?}");
}
