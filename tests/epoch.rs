//! Whole epochs against the slow reader, over random stores.

mod reference;

use annbatch::{Next, Pipeline};
use proptest::prelude::*;
use reference::{Chunking, Matrix, SlowReader, config, open, rows_of};

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..reference::cases(40) })]

    #[test]
    fn every_row_once_and_equal_to_the_slow_reader(
        sizes in prop::collection::vec(1usize..60, 1..4),
        n_var in 1u16..200,
        mean in 0usize..30,
        chunk in 1u64..300,
        chunks_per_shard in 0u64..5,
        codec in 0u8..if cfg!(feature = "zfp") { 5 } else { 4 },
        chunk_size in 1u64..20,
        preload in 1u64..6,
        random: bool,
        budget in prop::option::of(1u64..3),
        seed: u64,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let chunking = Chunking { chunk, chunks_per_shard, codec };
        let mut paths = Vec::new();
        let mut readers = Vec::new();
        for (i, &n_obs) in sizes.iter().enumerate() {
            let path = dir.path().join(format!("dataset_{i}"));
            Matrix::random(n_obs, n_var, mean, seed.wrapping_add(i as u64)).write(&path.join("X"), chunking);
            readers.push((n_obs as i64, SlowReader::open(&path.join("X"))));
            paths.push(path.display().to_string());
        }
        let kind = if random { "random" } else { "sequential" };
        let sampling = format!(r#"{{"kind":"{kind}","chunk_size":{chunk_size},"preload_nchunks":{preload},"batch_size":{chunk_size}}}"#);
        // budgets of about one or two batches make units smaller than windows
        let extra = budget.map_or(String::new(), |b| format!(r#","memory_budget":{}"#, b * 40_000));
        let config = config(&paths, &sampling, &extra);
        let pipeline = Pipeline::new(open(&config).unwrap(), config.stream()).unwrap();
        pipeline.start(seed, 0).unwrap();
        let mut seen = Vec::new();
        // every batch is held to the end: budgets count only what is not delivered
        let mut held = Vec::new();
        while let Next::Batch(batch) = pipeline.next(None).unwrap() {
            for (row, columns, values) in rows_of(&batch) {
                let mut local = row;
                let (_, reader) = readers.iter().find(|(n, _)| { let here = local < *n; if !here { local -= n; } here }).unwrap();
                let (expected_columns, expected_values) = reader.row(local as u64);
                prop_assert_eq!(columns, expected_columns.iter().map(|&c| i32::from(c)).collect::<Vec<_>>());
                prop_assert_eq!(values, expected_values);
                seen.push(row);
            }
            held.push(batch);
        }
        if !random {
            prop_assert!(seen.is_sorted());
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..sizes.iter().sum::<usize>() as i64).collect::<Vec<_>>());
        let stats = pipeline.stats();
        prop_assert_eq!(stats["chunks_general_path"] == 0, codec < 4 || stats["chunks_decoded"] == 0);
        prop_assert_eq!(&stats["bytes_undelivered"], 0);
    }
}

#[test]
fn an_epoch_begins_at_any_batch_without_reading_what_came_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d");
    Matrix::random(300, 50, 10, 1).write(&path.join("X"), Chunking { chunk: 64, chunks_per_shard: 3, codec: 1 });
    let sampling = r#"{"kind":"random","chunk_size":5,"preload_nchunks":6,"batch_size":10}"#;
    let config = config(&[path.display().to_string()], sampling, "");
    let collection = open(&config).unwrap();
    let rows_from = |first: u64| {
        let pipeline = Pipeline::new(collection.clone(), config.stream()).unwrap();
        pipeline.start(9, first).unwrap();
        let mut rows = Vec::new();
        while let Next::Batch(batch) = pipeline.next(None).unwrap() {
            rows.extend(rows_of(&batch).into_iter().map(|(row, ..)| row));
        }
        (rows, pipeline.stats()["windows_planned"].as_u64().unwrap())
    };
    let (all, windows) = rows_from(0);
    assert_eq!((all.len(), windows), (300, 10));
    for first in [1, 2, 3, 17, 29, 30] {
        let (rest, windows) = rows_from(first);
        assert_eq!(rest, all[first as usize * 10..]);
        assert_eq!(windows, 10 - first / 3);
    }
}

#[test]
fn a_store_rewritten_at_the_same_path_is_read_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d");
    let runtime = std::sync::Arc::new(annbatch::Runtime::start(1, 2).unwrap());
    let sampling = r#"{"kind":"sequential","chunk_size":20,"preload_nchunks":1,"batch_size":20}"#;
    let mut first_rows = Vec::new();
    let mut kept = Vec::new();
    for seed in [1, 2] {
        let _ = std::fs::remove_dir_all(&path);
        Matrix::random(20, 50, 10, seed).write(&path.join("X"), Chunking { chunk: 1000, chunks_per_shard: 1, codec: 0 });
        let config = config(&[path.display().to_string()], sampling, "");
        let collection = annbatch::Collection::open(&config, &[], runtime.clone()).unwrap();
        let pipeline = Pipeline::new(collection.clone(), config.stream()).unwrap();
        pipeline.start(0, 0).unwrap();
        let Next::Batch(batch) = pipeline.next(None).unwrap() else { panic!("a batch") };
        let reader = SlowReader::open(&path.join("X"));
        for (row, columns, _) in rows_of(&batch) {
            assert_eq!(columns, reader.row(row as u64).0.iter().map(|&c| i32::from(c)).collect::<Vec<_>>());
        }
        first_rows.push(rows_of(&batch)[0].clone());
        kept.push(collection);
    }
    assert_ne!(first_rows[0], first_rows[1], "the two stores differ");
}

/// Row pointers in thousands of chunks, for many datasets at once and few threads: nobody waits for somebody who waits.
#[test]
fn many_datasets_with_many_chunks_of_row_pointers_open_together() {
    let dir = tempfile::tempdir().unwrap();
    let (mut paths, mut readers) = (Vec::new(), Vec::new());
    for i in 0..24 {
        let path = dir.path().join(format!("dataset_{i}"));
        let chunking = Chunking { chunk: 1, chunks_per_shard: [4096, 700][i % 2], codec: 0 };
        Matrix::random(2500, 3, 1, i as u64).write(&path.join("X"), chunking);
        readers.push(SlowReader::open(&path.join("X")));
        paths.push(path.display().to_string());
    }
    let config = config(&paths, r#"{"kind":"random","chunk_size":5,"preload_nchunks":8,"batch_size":40,"num_samples":400}"#, "");
    let pipeline = Pipeline::new(open(&config).unwrap(), config.stream()).unwrap();
    pipeline.start(0, 0).unwrap();
    let mut n = 0;
    while let Next::Batch(batch) = pipeline.next(None).unwrap() {
        for (row, columns, values) in rows_of(&batch) {
            let (expected_columns, expected_values) = readers[row as usize / 2500].row(row as u64 % 2500);
            assert_eq!(columns, expected_columns.iter().map(|&c| i32::from(c)).collect::<Vec<_>>());
            assert_eq!(values, expected_values);
            n += 1;
        }
    }
    assert_eq!(n, 400);
}
