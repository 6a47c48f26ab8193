//! Reads that fail and files that change: which batch says so, and what goes on.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::reference::{Chunking, Matrix, rows_of};
use crate::{check_rows, eventually, names_all, reference, setup, setup_of, stat, submit, submitted, take_and_check, verbatim};
use annbatch::{Next, Pipeline};

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
