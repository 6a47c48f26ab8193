//! What is read, when, and in how many calls.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::reference::{Chunking, Matrix, config, rows_of};
use crate::{check_rows, eventually, names_all, setup, setup_of, stat, submit, submitted, take_and_check, verbatim};
use annbatch::{Collection, Next, Pipeline, Runtime};

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
