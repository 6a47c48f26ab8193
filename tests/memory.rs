//! What the steady state allocates, and that memory does not grow: counted by the allocator of this program.

mod reference;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use annbatch::collection::Buffer;
use annbatch::{Collection, DType, Next, Pipeline, Runtime};
use reference::{Chunking, Matrix, config};

/// Counts the allocations of each kind of thread, told apart by name (the system keeps 15 bytes of it).
struct Counting;

static WATCHING: AtomicBool = AtomicBool::new(false);
static DECODING: AtomicU64 = AtomicU64::new(0);
static CONSUMING: AtomicU64 = AtomicU64::new(0);
/// Planning and reading.
static OTHERS: AtomicU64 = AtomicU64::new(0);
static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);

fn note() {
    if !WATCHING.load(Ordering::Relaxed) {
        return;
    }
    let mut name = [0u8; 16];
    // SAFETY: the name and its terminator take at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let counter = match name.split(|&b| b == 0).next().unwrap_or_default() {
        b"annbatch-decode" => &DECODING,
        b"annbatch-io" | b"annbatch-driver" => &OTHERS,
        _ => &CONSUMING,
    };
    counter.fetch_add(1, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        LIVE_BYTES.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note();
        LIVE_BYTES.fetch_add(new_size as i64 - layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The tests of this program run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Stands for an HDF5 file of shuffled and deflated chunks.
const HDF5: u8 = u8::MAX;

/// A stream of 4,096 rows in windows of 512, of which two are under way at most: planning and reading go on while batches
/// are consumed, and what the pools hold at most they hold after the first epochs.
/// Its columns are every other one of 1,000 where `joined`.
fn stream(codec: u8, joined: bool) -> (Pipeline, tempfile::TempDir) {
    let (dir, matrix) = (tempfile::tempdir().unwrap(), Matrix::random(4096, 500, 60, 3));
    match codec {
        #[cfg(feature = "hdf5")]
        HDF5 => matrix.write_h5ad(&dir.path().join("d"), reference::hdf5::Storage::Deflated(1000)),
        _ => matrix.write(&dir.path().join("d/X"), Chunking { chunk: 1000, chunks_per_shard: 16, codec }),
    }
    let sampling = r#"{"kind":"random","chunk_size":16,"preload_nchunks":32,"batch_size":64}"#;
    let mut config = config(&[dir.path().join("d").display().to_string()], sampling, r#","batches_ahead":8"#);
    let columns: Vec<i32> = (0..1000).step_by(2).collect();
    let buffer = Buffer { address: columns.as_ptr().addr(), dtype: DType::Int32, shape: vec![500] };
    if joined {
        config.elements[0].n_var = Some(1000);
        config.datasets[0].columns.insert("X".into(), 0);
    }
    let collection = Collection::open(&config, &[buffer], Runtime::start(2, 8).unwrap().into()).unwrap();
    (Pipeline::new(collection, config.stream()).unwrap(), dir)
}

/// Streams whole epochs; a batch is dropped before the next is asked for, as a training loop does.
fn epochs(pipeline: &Pipeline, n: u64) -> u64 {
    let mut batches = 0;
    for seed in 0..n {
        pipeline.start(seed, 0).unwrap();
        while let Next::Batch(batch) = pipeline.next(None).unwrap() {
            assert_eq!(batch.n_rows(), 64);
            batches += 1;
        }
    }
    batches
}

#[test]
fn in_the_steady_state_decoding_and_delivering_allocate_nothing() {
    let _alone = alone();
    let hdf5 = if cfg!(feature = "hdf5") { HDF5 } else { 0 };
    for (codec, joined) in [(0, false), (1, false), (2, false), (5, false), (1, true), (hdf5, false)] {
        let (pipeline, _dir) = stream(codec, joined);
        // scratch grows to the largest chunk, queues to their longest
        epochs(&pipeline, 8);
        let counters = [&DECODING, &CONSUMING, &OTHERS];
        let count = || counters.map(|c| c.load(Ordering::Relaxed));
        let chunks = || pipeline.stats()["chunks_decoded"].as_u64().unwrap();
        pipeline.start(8, 0).unwrap();
        // the consumer watches from its first batch on; windows behind it are still to come
        assert!(matches!(pipeline.next(None).unwrap(), Next::Batch(_)));
        let (before, chunks_before) = (count(), chunks());
        WATCHING.store(true, Ordering::SeqCst);
        let mut batches = 1;
        while let Next::Batch(_) = pipeline.next(None).unwrap() {
            batches += 1;
        }
        WATCHING.store(false, Ordering::SeqCst);
        let [decoding, consuming, others] = std::array::from_fn(|i| count()[i] - before[i]);
        let chunks = chunks() - chunks_before;
        assert_eq!(batches, 64);
        assert!(chunks > 200, "{chunks} chunks were decoded meanwhile");
        assert_eq!((decoding, consuming), (0, 0), "codec {codec}: {chunks} chunks");
        // planning and reading allocate their lists, so that the counters do count
        assert!(others > 0);
    }
}

#[test]
fn a_thousand_batches_leave_no_more_memory_in_use() {
    let _alone = alone();
    let (pipeline, _dir) = stream(1, false);
    let in_use = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let resident: i64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
        (LIVE_BYTES.load(Ordering::Relaxed), resident * 4096)
    };
    epochs(&pipeline, 16);
    // a pool may still reach its largest size in one of these; a leak grows in all of them
    let growth: Vec<(i64, i64)> = (0..3)
        .map(|_| {
            let before = in_use();
            assert_eq!(epochs(&pipeline, 16), 1024);
            let after = in_use();
            (after.0 - before.0, after.1 - before.1)
        })
        .collect();
    // 1,024 batches of 32 KB, their plans and reads: 64 bytes lost with each would show
    assert!(growth.iter().any(|g| g.0 < 64 << 10), "bytes allocated, bytes resident: {growth:?}");
    assert!(growth.iter().any(|g| g.1 < 1 << 20), "bytes allocated, bytes resident: {growth:?}");
}
