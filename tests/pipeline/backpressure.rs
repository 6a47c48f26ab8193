//! How far reading and decoding run ahead of the consumer, and what they wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::reference::rows_of;
use crate::{eventually, setup, stat};
use annbatch::{Collection, Error, Next};

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
