//! Backpressure, read-ahead, faults, cancellation and shutdown, through stores that count, wait and fail.

#[path = "../reference/mod.rs"]
mod reference;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use annbatch::batch::HostBatch;
use annbatch::collection::Source;
use annbatch::sampler::LoadRequest;
use annbatch::store::{LocalStore, OpenFiles, Store};
use annbatch::{Collection, Error, Next, OpenConfig, Pipeline, Runtime};
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

#[test]
fn the_first_batch_does_not_wait_for_the_reads_of_the_others() {
    let (matrix, chunking) = (Matrix::random(400, 90, 20, 3), Chunking { chunk: 100, chunks_per_shard: 4, codec: 1 });
    let setup = setup_of(&matrix, chunking, r#"{"kind":"submitted"}"#, "");
    // from the end of the store to its beginning, each in shards (files) of its own
    let batches: Vec<Vec<u64>> = (0..8).rev().map(|i| (i * 50..i * 50 + 10).collect()).collect();
    let pipeline = submitted(&setup, &batches);
    // once, so that the shards' indexes are at hand
    for rows in &batches {
        take_and_check(&setup, &pipeline, rows);
    }
    for (i, rows) in batches.iter().enumerate() {
        // rows of one batch lie in two shards at most: of each array that many reads, and at least one
        let before = setup.mood.reads.load(Ordering::SeqCst);
        setup.mood.hold_from.store(before + 4 * (i as u64 + 1), Ordering::SeqCst);
        submit(&pipeline, &batches);
        batches[..i].iter().for_each(|rows| take_and_check(&setup, &pipeline, rows));
        take_and_check(&setup, &pipeline, rows);
        setup.mood.hold_from.store(0, Ordering::SeqCst);
        batches[i + 1..].iter().for_each(|rows| take_and_check(&setup, &pipeline, rows));
    }
}

#[test]
fn of_chunks_that_were_read_before_only_blocks_are_read() {
    // some 5 MB of values and 2.5 MB of column indices, a chunk each
    let chunking = Chunking { chunk: 1_250_000, chunks_per_shard: 2, codec: 1 };
    let setup = setup_of(&Matrix::random(12_000, 200, 100, 3), chunking, r#"{"kind":"submitted"}"#, "");
    // each row twice, on its own and with one far away, and one row that needs all there is between
    let batches: Vec<Vec<u64>> = [5, 11_990, 6_000, 5].iter().map(|&row| vec![row]).chain([vec![3, 11_000], vec![7]]).collect();
    let pipeline = setup.pipeline();
    let mut bytes = Vec::new();
    for rows in &batches {
        let before = setup.mood.bytes.load(Ordering::SeqCst);
        submit(&pipeline, std::slice::from_ref(rows));
        take_and_check(&setup, &pipeline, rows);
        bytes.push(setup.mood.bytes.load(Ordering::SeqCst) - before);
    }
    let whole = bytes[0];
    assert!(whole > 1_000_000, "{bytes:?}: chunks and indexes");
    assert!(bytes[1] <= whole / 4 && bytes[2] <= whole / 4, "{bytes:?}: a block or two of each array, and no index");
    assert_eq!(bytes[3], bytes[5], "{bytes:?}: of the same blocks");
    assert!(bytes[4] > whole * 4 / 5, "{bytes:?}: read at once where most lies between");
}

/// A chunk whose blocks are known is overwritten: an error that says so, and when it is whole again it is read whole.
#[test]
fn where_blocks_lie_is_forgotten_once_they_are_damaged() {
    let chunking = Chunking { chunk: 1_250_000, chunks_per_shard: 0, codec: 1 };
    let setup = setup_of(&Matrix::random(12_000, 200, 100, 3), chunking, r#"{"kind":"submitted"}"#, "");
    let pipeline = setup.pipeline();
    let read = |row: u64| {
        let before = setup.mood.bytes.load(Ordering::SeqCst);
        submit(&pipeline, &[vec![row]]);
        let batch = pipeline.next(Some(Duration::from_secs(10)));
        (
            batch.map(|next| matches!(next, Next::Batch(batch) if check_rows(&setup, &batch) == [row])),
            setup.mood.bytes.load(Ordering::SeqCst) - before,
        )
    };
    let (first, whole) = read(5);
    let (second, blocks) = read(11_000);
    assert!(first.unwrap() && second.unwrap() && blocks < whole / 4, "{blocks} of {whole}");
    let path = setup.dir.path().join("d/X/data/c/0");
    let good = std::fs::read(&path).unwrap();
    let table = 16 + 4 * good.len() / 1000;
    let overwrite = |bytes: &[u8]| {
        use std::io::Write;
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(bytes).unwrap();
    };
    overwrite(&[&good[..table], &vec![255; good.len() - table]].concat());
    let error = read(11_000).0.unwrap_err().to_string();
    assert!(error.contains("data, chunk [0]") && error.contains("damaged"), "{error}");
    overwrite(&good);
    let (again, bytes) = read(11_000);
    assert!(again.unwrap() && bytes > whole / 3, "{bytes} of {whole}: all of the values, blocks of the column indices");
    let (last, bytes) = read(11_000);
    assert!(last.unwrap() && bytes == blocks, "{bytes} of {whole}");
}

/// One chunk of 20 MB per array, uncompressed.
fn verbatim(extra: &str) -> Setup {
    let chunking = Chunking { chunk: 5_000_000, chunks_per_shard: 0, codec: 0 };
    setup_of(&Matrix::random(50_000, 200, 100, 3), chunking, r#"{"kind":"submitted"}"#, extra)
}

#[test]
fn of_uncompressed_chunks_only_the_rows_are_read_in_few_calls() {
    let setup = verbatim("");
    let counters = || [&setup.mood.calls, &setup.mood.reads, &setup.mood.bytes].map(|c| c.load(Ordering::SeqCst));
    // the same 100 rows in every batch, with 200 KB of values and 100 KB of column indices between neighbours
    let batches: Vec<Vec<u64>> = (0..4).map(|b| (0..100).map(|i| (i * 7919 + b * 331) % 100 * 500).collect()).collect();
    let before = counters();
    let pipeline = submitted(&setup, &batches);
    for rows in &batches {
        take_and_check(&setup, &pipeline, rows);
    }
    let [calls, reads, bytes] = std::array::from_fn(|i| counters()[i] - before[i]);
    assert_eq!((stat(&pipeline, "reads"), stat(&pipeline, "bytes_read"), stat(&pipeline, "bytes_decoded")), (reads, bytes, 0));
    let lengths = setup.lengths();
    let len_of = |row: u64| lengths[row as usize];
    let entries: u64 = (0..100).map(|i| len_of(i * 500)).sum();
    let with_entries = (0..100).filter(|i| len_of(i * 500) > 0).count() as u64;
    assert_eq!((reads, bytes), (2 * with_entries, entries * 6), "of both arrays each row once, and nothing else");
    // 4 reads at once
    assert!((4..reads / 8).contains(&calls), "{calls} calls for {reads} reads");
    // rows next to each other: one read per MiB and array, of these rows alone
    let before = counters();
    let rows: Vec<u64> = (1000..6000).collect();
    submit(&pipeline, std::slice::from_ref(&rows));
    take_and_check(&setup, &pipeline, &rows);
    let [_, reads, bytes] = std::array::from_fn(|i| counters()[i] - before[i]);
    assert!((3..=5).contains(&reads), "{reads} reads");
    assert_eq!(bytes, rows.iter().map(|&row| len_of(row)).sum::<u64>() * 6);
}

#[test]
fn a_failing_read_among_several_of_a_call_fails_only_its_batch() {
    let setup = verbatim("");
    let batches: Vec<Vec<u64>> = (0..8).map(|b| (0..50).map(|i| 125 * (50 * b + i)).collect()).collect();
    // the last batches' values
    setup.mood.fail_from.store(4 * 100 * 125 * 325, Ordering::SeqCst);
    let pipeline = submitted(&setup, &batches);
    batches[..6].iter().for_each(|rows| take_and_check(&setup, &pipeline, rows));
    let error = pipeline.next(None).unwrap_err().to_string();
    names_all(&error, "os error 5");
    pipeline.close();
    let_go_of_all(&pipeline);
}

#[test]
fn a_failed_call_is_not_repeated_once_nobody_waits() {
    let setup = verbatim("");
    let rows: Vec<u64> = (0..400).map(|i| 125 * i).collect();
    let lengths = setup.lengths();
    let with_entries = rows.iter().filter(|&&row| lengths[row as usize] > 0).count() as u64;
    let counters = || [&setup.mood.calls, &setup.mood.reads].map(|c| c.load(Ordering::SeqCst));
    let before = counters();
    // the column indices come first
    setup.mood.hold_from.store(before[1] + with_entries, Ordering::SeqCst);
    let pipeline = submitted(&setup, &[rows]);
    eventually("all column indices are read", || counters()[1] - before[1] > with_entries);
    eventually("four calls are under way", || setup.mood.in_flight.load(Ordering::SeqCst) == 4);
    let [calls, reads] = std::array::from_fn(|i| counters()[i] - before[i]);
    assert!(reads >= 8 * calls, "{reads} reads in {calls} calls");
    setup.mood.fail_from.store(1, Ordering::SeqCst);
    std::thread::scope(|scope| {
        scope.spawn(|| pipeline.close());
        eventually("it is being closed", || pipeline.next(Some(Duration::ZERO)).is_err());
        std::thread::sleep(Duration::from_millis(100));
        setup.mood.hold_from.store(0, Ordering::SeqCst);
    });
    let_go_of_all(&pipeline);
    // some that were being sent may still have come; each of the held ones is of eight reads at least
    assert!(counters()[0] - before[0] <= calls + 4, "{} calls after {calls}", counters()[0] - before[0]);
}

#[test]
fn a_call_takes_no_more_reads_than_the_byte_budget_holds() {
    // half of it is for encoded bytes; the bytes of one row take a unit of 4 KiB
    let setup = verbatim(r#","memory_budget":60000"#);
    let batches: Vec<Vec<u64>> = (0..20).map(|b| (0..20).map(|i| 125 * (20 * b + i)).collect()).collect();
    let pipeline = submitted(&setup, &batches);
    for rows in &batches {
        take_and_check(&setup, &pipeline, rows);
    }
    let most = setup.mood.most_per_call.load(Ordering::SeqCst);
    assert!((2..=30_000 / 4096).contains(&most), "{most} reads in a call");
}

#[test]
fn an_uncompressed_chunk_of_the_wrong_length_is_refused_before_it_is_read() {
    for length in [20_000_004, 10_000_000] {
        let setup = verbatim("");
        let path = setup.dir.path().join("d/X/data/c/0");
        std::fs::File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        // opened again: lengths are listed then
        let collection = reference::open(&setup.config).unwrap();
        let pipeline = Pipeline::new(collection, setup.config.stream()).unwrap();
        submit(&pipeline, &[vec![1]]);
        let error = pipeline.next(None).unwrap_err().to_string();
        for part in ["X/data", "chunk [0]", &length.to_string(), "20000000"] {
            assert!(error.contains(part), "{part:?} in {error:?}");
        }
    }
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

#[test]
fn the_next_windows_are_read_while_the_consumer_holds_still() {
    let setup = setup("", "random");
    let pipeline = setup.pipeline();
    pipeline.start(1, 0).unwrap();
    let Next::Batch(_first) = pipeline.next(None).unwrap() else { panic!("a batch") };
    // the consumer takes nothing more, and all ten windows arrive
    eventually("the other windows were read", || stat(&pipeline, "batches_ready") == 40);
    assert_eq!(stat(&pipeline, "batches_delivered"), 1);
}

#[test]
fn with_batches_ahead_zero_the_next_window_waits_for_this_one() {
    let setup = setup(r#","batches_ahead":0"#, "random");
    let pipeline = setup.pipeline();
    pipeline.start(1, 0).unwrap();
    for batch in 1..=3 {
        assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(stat(&pipeline, "units_planned"), 1, "after {batch} of 4 batches");
    }
    assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)));
    eventually("the second window was planned", || stat(&pipeline, "units_planned") == 2);
}

#[test]
fn a_budget_of_one_batch_bounds_what_waits_but_not_what_is_held() {
    let setup = setup(r#","memory_budget":24000"#, "random");
    let pipeline = setup.pipeline();
    pipeline.start(1, 0).unwrap();
    let mut held = Vec::new();
    while let Next::Batch(batch) = pipeline.next(None).unwrap() {
        assert!(stat(&pipeline, "bytes_undelivered") <= 24_000);
        held.push(batch);
    }
    assert_eq!(held.iter().map(|b| rows_of(b).len()).sum::<usize>(), 400);
}

#[test]
fn a_budget_smaller_than_a_batch_names_the_number_needed() {
    let setup = setup(r#","memory_budget":100"#, "random");
    let pipeline = setup.pipeline();
    pipeline.start(1, 0).unwrap();
    let error = pipeline.next(None).unwrap_err();
    assert!(matches!(error, Error::Budget { budget: 100, needed, batch: 0 } if needed > 100), "{error}");
    assert_eq!(pipeline.next(None).unwrap_err().to_string(), error.to_string(), "the error stays the answer");
}

#[test]
fn each_window_reads_each_chunk_once_in_few_reads() {
    let setup = setup("", "sequential");
    let before = (setup.mood.reads.load(Ordering::SeqCst), setup.mood.bytes.load(Ordering::SeqCst));
    let pipeline = setup.pipeline();
    pipeline.start(0, 0).unwrap();
    while let Next::Batch(_) = pipeline.next(None).unwrap() {}
    let (reads, bytes) = (setup.mood.reads.load(Ordering::SeqCst) - before.0, setup.mood.bytes.load(Ordering::SeqCst) - before.1);
    assert_eq!((reads, bytes), (stat(&pipeline, "reads"), stat(&pipeline, "bytes_read")));
    let chunks = stat(&pipeline, "chunks_decoded");
    // 2 arrays × 10 windows; a window's chunks are neighbours within each of its shards (at most 4), and
    // only the chunk that two windows share is read twice
    let data_chunks = setup.collection.describe()["elements"][0]["nnz"].as_u64().unwrap().div_ceil(100);
    assert!(chunks <= 2 * (data_chunks + 9), "{chunks} chunks decoded, {data_chunks} per array");
    assert!(reads <= 2 * data_chunks.div_ceil(4) + 2 * 10 * 4, "{reads} reads");
    assert!(reads < chunks);
}

#[test]
fn shard_indexes_are_bounded_and_read_again_when_needed() {
    let epochs = |extra: &str| {
        let setup = setup(extra, "random");
        let before = setup.mood.index_reads.load(Ordering::SeqCst);
        let pipeline = setup.pipeline();
        for seed in 0..2 {
            pipeline.start(seed, 0).unwrap();
            let mut seen = Vec::new();
            while let Next::Batch(batch) = pipeline.next(None).unwrap() {
                seen.extend(check_rows(&setup, &batch));
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..400).collect::<Vec<_>>());
        }
        setup.mood.index_reads.load(Ordering::SeqCst) - before
    };
    let nnz = setup("", "random").collection.describe()["elements"][0]["nnz"].as_u64().unwrap();
    let shards = 2 * nnz.div_ceil(400);
    assert_eq!(epochs(""), shards, "each once");
    // room for none (one takes 64 bytes and what the tables take), and room for six
    let none = epochs(r#","shard_index_memory":60"#);
    let some = epochs(r#","shard_index_memory":1400"#);
    assert!(none > 4 * shards, "{none} reads of {shards} indexes");
    assert!((shards..none).contains(&some), "{some} reads of {shards} indexes, {none} when none is kept");
}

#[test]
fn a_failing_read_stops_at_the_batch_that_needs_it() {
    let setup = setup("", "sequential");
    let pipeline = setup.pipeline();
    pipeline.start(0, 0).unwrap();
    eventually("an epoch, and with it the indexes", || stat(&pipeline, "batches_ready") == 40);
    // shards of 4 × 100 f32: what begins in the second half of one fails, and the first window begins with a shard
    setup.mood.fail_from.store(800, Ordering::SeqCst);
    pipeline.start(0, 0).unwrap();
    let mut delivered = 0;
    let error = loop {
        match pipeline.next(None) {
            Ok(Next::Batch(batch)) => {
                assert_eq!(rows_of(&batch)[0].0, delivered * 10);
                delivered += 1;
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(delivered > 0, "the batches before it are whole");
    names_all(&error, "os error 5");
    pipeline.close();
    let_go_of_all(&pipeline);
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

/// Checks that a closed pipeline holds no buffer and has nothing going on.
fn let_go_of_all(pipeline: &Pipeline) {
    for gauge in ["leases_out", "units_alive", "decode_queued", "decode_running", "bytes_undelivered"] {
        assert_eq!(stat(pipeline, gauge), 0, "{gauge}");
    }
    // a read's last task may just be on its way out
    eventually("no read is under way", || stat(pipeline, "reads_in_flight") + stat(pipeline, "encoded_bytes_held") == 0);
}

#[test]
fn a_fault_several_windows_ahead_waits_for_its_batch() {
    for shrinks in [false, true] {
        let setup = setup("", "sequential");
        let pipeline = setup.pipeline();
        // the last shard of `data` is damaged; some windows before it are ready when the consumer begins
        let shards = std::fs::read_dir(setup.dir.path().join("d/X/data/c")).unwrap().count();
        let last = setup.dir.path().join(format!("d/X/data/c/{}", shards - 1));
        if shrinks {
            pipeline.start(0, 0).unwrap();
            eventually("an epoch", || stat(&pipeline, "batches_ready") == 40);
            // its index is known now, so that it is a chunk that is short
            std::fs::File::options().write(true).open(&last).unwrap().set_len(10).unwrap();
        } else {
            std::fs::remove_file(&last).unwrap();
        }
        pipeline.start(0, 0).unwrap();
        let ready = stat(&pipeline, "batches_ready");
        eventually("windows were read ahead", || stat(&pipeline, "batches_ready") >= ready.min(40) + 12);
        let mut delivered = 0;
        let error = loop {
            match pipeline.next(None) {
                Ok(Next::Batch(batch)) => {
                    assert_eq!(
                        rows_of(&batch).iter().map(|r| r.0).collect::<Vec<_>>(),
                        (delivered..delivered + 10).collect::<Vec<_>>()
                    );
                    delivered += 10;
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error.to_string(),
            }
        };
        assert!(delivered >= 120, "{delivered} rows came before");
        if shrinks {
            names_all(&error, "truncated");
        } else {
            assert!(error.contains("not found") && error.contains("X/data") && error.contains("chunk ["), "{error}");
        }
        pipeline.close();
        let_go_of_all(&pipeline);
    }
}

/// Keeps every decoding thread busy until dropped.
struct Blocked(Arc<AtomicBool>);

impl Blocked {
    fn new(collection: &Collection) -> Self {
        let (blocked, began) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        for _ in 0..collection.runtime().n_threads() {
            let (blocked, began) = (Arc::clone(&blocked), Arc::clone(&began));
            collection.runtime().decode().spawn(move || {
                began.fetch_add(1, Ordering::SeqCst);
                while blocked.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        eventually("the threads are taken", || began.load(Ordering::SeqCst) == collection.runtime().n_threads() as u64);
        Self(blocked)
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

#[test]
fn reads_do_not_wait_for_decoding_threads() {
    let setup = setup("", "random");
    setup.mood.latency_us.store(2000, Ordering::SeqCst);
    let before = setup.mood.bytes.load(Ordering::SeqCst);
    let pipeline = setup.pipeline();
    let blocked = Blocked::new(&setup.collection);
    pipeline.start(1, 0).unwrap();
    // the whole epoch is read, as many reads at once as the depth of 4 allows, and nothing decoded
    eventually("everything is planned", || stat(&pipeline, "units_planned") == 10);
    eventually("and read", || stat(&pipeline, "reads_in_flight") == 0 && stat(&pipeline, "decode_queued") > 100);
    assert_eq!(setup.mood.peak.load(Ordering::SeqCst), 4);
    assert_eq!(stat(&pipeline, "chunks_decoded"), 0);
    assert_eq!(stat(&pipeline, "units_alive"), 10);
    assert_eq!(stat(&pipeline, "bytes_read"), setup.mood.bytes.load(Ordering::SeqCst) - before);
    assert!(stat(&pipeline, "encoded_bytes_held") > 0 && stat(&pipeline, "fetch_depth_wait_ns") > 0);
    drop(blocked);
    eventually("all is decoded", || stat(&pipeline, "batches_ready") == 40);
    eventually("and let go", || stat(&pipeline, "units_alive") + stat(&pipeline, "encoded_bytes_held") == 0);
    assert!(stat(&pipeline, "decode_idle_ns") > 0 && stat(&pipeline, "active_ns") > 0);
}

#[test]
fn reads_wait_for_decoding_threads_once_the_byte_budget_is_full() {
    // half of it is for encoded bytes, so 12 units of 1 KiB
    let setup = setup(r#","memory_budget":25000"#, "sequential");
    let pipeline = setup.pipeline();
    let blocked = Blocked::new(&setup.collection);
    setup.mood.hold.store(true, Ordering::SeqCst);
    pipeline.start(0, 0).unwrap();
    eventually("reads are under way", || stat(&pipeline, "reads_in_flight") > 0);
    setup.mood.hold.store(false, Ordering::SeqCst);
    eventually("chunks wait", || stat(&pipeline, "decode_queued") > 0 && stat(&pipeline, "reads_in_flight") == 0);
    assert!(stat(&pipeline, "encoded_bytes_held") <= 12 * 1024);
    assert_eq!(stat(&pipeline, "decode_running"), 0);
    drop(blocked);
    let mut rows = 0;
    while let Next::Batch(batch) = pipeline.next(None).unwrap() {
        rows += batch.n_rows();
    }
    assert_eq!(rows, 400);
    eventually("all is let go", || stat(&pipeline, "encoded_bytes_held") == 0);
}

#[test]
fn the_indexes_of_a_unit_load_while_another_issues_its_reads() {
    let setup = setup("", "sequential");
    let pipeline = setup.pipeline();
    setup.mood.hold.store(true, Ordering::SeqCst);
    pipeline.start(0, 0).unwrap();
    // a window of 40 rows has 8 chunks per array: 2 or 3 shards; the depth is 4, so others wait behind it
    eventually("everything is planned", || stat(&pipeline, "units_planned") == 10);
    setup.mood.hold.store(false, Ordering::SeqCst);
    let reads = setup.mood.reads.load(Ordering::SeqCst);
    while let Next::Batch(_) = pipeline.next(None).unwrap() {}
    let shards = 2 * std::fs::read_dir(setup.dir.path().join("d/X/data/c")).unwrap().count() as u64;
    let chunk_reads = stat(&pipeline, "reads") - shards;
    assert!(chunk_reads <= 2 * 10 * 4, "no index is read twice: {chunk_reads} reads of chunks, {reads} at first");
}

#[test]
fn chunks_decoded_again_counts_what_units_share() {
    let again = |extra: &str, kind: &str| {
        let setup = setup(extra, kind);
        let pipeline = setup.pipeline();
        for seed in 0..2 {
            pipeline.start(seed, 0).unwrap();
            while let Next::Batch(_) = pipeline.next(None).unwrap() {}
        }
        let chunks = 2 * setup.collection.describe()["elements"][0]["nnz"].as_u64().unwrap().div_ceil(100);
        let (decoded, again) = (stat(&pipeline, "chunks_decoded"), stat(&pipeline, "chunks_decoded_again"));
        assert_eq!(decoded, 2 * chunks + again, "each chunk once per epoch, and again");
        again
    };
    let (windows, batches) = (again("", "sequential"), again(r#","memory_budget":20000"#, "sequential"));
    assert!(windows <= 2 * 2 * 9, "neighbouring windows share at most the chunk between them");
    assert!(batches > windows, "a window cut into units decodes more");
    assert!(again("", "random") > windows);
}

#[test]
fn direct_reads_give_the_same_batches_and_count_whole_blocks() {
    let setup = setup("", "random");
    let open = |direct: bool| {
        let path = setup.dir.path().join("d").display().to_string();
        let sampling = r#"{"kind":"random","chunk_size":10,"preload_nchunks":4,"batch_size":10}"#;
        let config = config(&[path], sampling, if direct { r#","direct_io":true"# } else { "" });
        let collection = Collection::open(&config, &[], Arc::new(Runtime::start(2, 4).unwrap())).unwrap();
        Pipeline::new(collection, config.stream()).unwrap()
    };
    let (direct, buffered) = (open(true), open(false));
    for pipeline in [&direct, &buffered] {
        pipeline.start(3, 0).unwrap();
    }
    while let Next::Batch(batch) = buffered.next(None).unwrap() {
        let Next::Batch(other) = direct.next(None).unwrap() else { panic!("as many batches") };
        assert_eq!(rows_of(&batch), rows_of(&other));
    }
    assert!(matches!(direct.next(None).unwrap(), Next::End));
    assert!(stat(&direct, "bytes_read").is_multiple_of(4096));
    assert!(stat(&direct, "bytes_read") >= 4096 * stat(&direct, "reads") && !stat(&buffered, "bytes_read").is_multiple_of(4096));
    assert_eq!(stat(&buffered, "direct_reads_refused"), 0);
    // a shard that ends before its index
    let data = setup.dir.path().join("d/X/data/c/0");
    std::fs::File::options().write(true).open(&data).unwrap().set_len(10).unwrap();
    direct.start(3, 0).unwrap();
    let error = loop {
        match direct.next(None) {
            Ok(Next::Batch(_)) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error.to_string(),
        }
    };
    names_all(&error, "truncated");
}

#[test]
fn a_file_that_shrinks_is_an_error_and_the_pipeline_restarts_once_it_is_whole() {
    let setup = setup("", "sequential");
    let data = setup.dir.path().join("d/X/data/c/0");
    let whole = std::fs::read(&data).unwrap();
    std::fs::File::options().write(true).open(&data).unwrap().set_len(10).unwrap();
    let pipeline = setup.pipeline();
    pipeline.start(0, 0).unwrap();
    let error = pipeline.next(None).unwrap_err().to_string();
    assert!(error.contains("truncated") && error.contains("data"), "{error}");
    std::fs::write(&data, whole).unwrap();
    pipeline.start(0, 0).unwrap();
    assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)));
}

#[test]
fn closing_while_reads_hang_waits_for_them_and_leaks_nothing() {
    let setup = setup("", "random");
    let pipeline = Arc::new(setup.pipeline());
    setup.mood.hold.store(true, Ordering::SeqCst);
    pipeline.start(1, 0).unwrap();
    eventually("reads are under way", || setup.mood.reads.load(Ordering::SeqCst) > 4);
    assert!(matches!(pipeline.next(Some(Duration::from_millis(5))).unwrap(), Next::Pending));
    let closer = std::thread::spawn({
        let pipeline = Arc::clone(&pipeline);
        move || pipeline.close()
    });
    std::thread::sleep(Duration::from_millis(20));
    setup.mood.hold.store(false, Ordering::SeqCst);
    closer.join().unwrap();
    assert_eq!(stat(&pipeline, "leases_out"), 0);
    assert!(matches!(pipeline.next(None).unwrap_err(), Error::Closed { .. }));
}

#[test]
fn dropping_without_close_ends_the_threads() {
    let setup = setup("", "random");
    let queue_users = Arc::strong_count(&setup.collection);
    for seed in 0..20 {
        let pipeline = setup.pipeline();
        pipeline.start(seed, 0).unwrap();
        if seed % 2 == 0 {
            assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)));
        }
    }
    eventually("nothing holds the collection any more", || Arc::strong_count(&setup.collection) == queue_users);
}

#[test]
fn a_forked_child_refuses_and_drops_what_it_inherits() {
    let setup = setup("", "random");
    let pipeline = setup.pipeline();
    pipeline.start(1, 0).unwrap();
    assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)));
    // SAFETY: the child only uses what must work after a fork, and leaves without unwinding into the test harness.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: kills this child alone, should it wait for threads that are not here.
        unsafe { libc::alarm(10) };
        let refused = matches!(pipeline.next(None), Err(Error::Closed { .. })) && pipeline.start(2, 0).is_err();
        pipeline.close();
        drop(pipeline);
        drop(setup);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(!refused)) };
    }
    let mut status = 0;
    // SAFETY: `child` is a child of this process, and `status` a place for the answer.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child refused and came to its end");
    assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)), "the parent goes on");
}

#[test]
fn a_batch_outlives_its_pipeline() {
    let setup = setup("", "sequential");
    let pipeline = setup.pipeline();
    pipeline.start(0, 0).unwrap();
    let Next::Batch(batch) = pipeline.next(None).unwrap() else { panic!("a batch") };
    let before = rows_of(&batch);
    drop(pipeline);
    assert_eq!(rows_of(&batch), before);
}

#[test]
fn several_consumers_share_an_epoch() {
    let setup = setup("", "random");
    let pipeline = setup.pipeline();
    pipeline.start(5, 0).unwrap();
    let mut rows: Vec<i64> = std::thread::scope(|scope| {
        let consumers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut rows = Vec::new();
                    while let Next::Batch(batch) = pipeline.next(None).unwrap() {
                        rows.extend(rows_of(&batch).into_iter().map(|(row, ..)| row));
                    }
                    rows
                })
            })
            .collect();
        consumers.into_iter().flat_map(|c| c.join().unwrap()).collect()
    });
    rows.sort_unstable();
    assert_eq!(rows, (0..400).collect::<Vec<_>>());
}

#[test]
fn a_restart_in_the_middle_gives_a_whole_epoch() {
    let setup = setup("", "random");
    let pipeline = setup.pipeline();
    for seed in 0..5 {
        pipeline.start(seed, 0).unwrap();
        for _ in 0..seed * 3 {
            assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)));
        }
    }
    pipeline.start(9, 0).unwrap();
    let mut n = 0;
    while let Next::Batch(_) = pipeline.next(None).unwrap() {
        n += 1;
    }
    assert_eq!(n, 40);
    assert!(matches!(pipeline.next(None).unwrap(), Next::End), "the end stays the answer");
}

#[test]
fn consumers_of_a_restarting_pipeline_share_its_epochs() {
    let setup = setup(r#","auto_restart":true"#, "random");
    for _ in 0..20 {
        let pipeline = setup.pipeline();
        let batches = AtomicU64::new(0);
        let ends = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while ends.load(Ordering::SeqCst) == 0 {
                        match pipeline.next(Some(Duration::from_secs(5))).unwrap() {
                            Next::Batch(_) => batches.fetch_add(1, Ordering::SeqCst),
                            Next::End => ends.fetch_add(1, Ordering::SeqCst),
                            Next::Pending => panic!("nothing within five seconds"),
                        };
                    }
                });
            }
        });
        // every epoch but the running one was delivered whole, whoever started the next
        let (batches, started) = (batches.load(Ordering::SeqCst), stat(&pipeline, "epochs_started"));
        assert!(started >= 2 && batches >= 40 * (started - 1), "{batches} batches of {started} epochs");
    }
}
