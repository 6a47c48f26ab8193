//! Closing, dropping, forking and restarting; several consumers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::reference::rows_of;
use crate::{eventually, setup, stat};
use annbatch::{Error, Next};

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
