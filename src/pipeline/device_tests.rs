//! Pipelines to a GPU that is not there: whole epochs over memory sources, compared with those in host memory.

use super::*;
use crate::collection::Buffer;
use crate::device::driver::Stream;
use crate::device::fake::Fake;
use crate::{DType, OpenConfig, Runtime};

const N_OBS: usize = 103;
const N_VAR: usize = 40;

/// A matrix of `N_OBS` rows, lent for as long as the test runs.
struct Lent {
    collection: Arc<Collection>,
    config: StreamConfig,
}

fn lend<T: 'static>(values: Vec<T>, dtype: DType) -> Buffer {
    let values: &'static [T] = values.leak();
    Buffer { address: values.as_ptr().addr(), dtype, shape: vec![values.len() as u64] }
}

fn open(sampling: &str) -> Lent {
    open_with(sampling, "{}", Rows::Sorted)
}

/// How the entries of rows lie.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rows {
    Sorted,
    /// In no order, from the sixth on twice.
    Odd,
}

fn open_with(sampling: &str, transform: &str, rows: Rows) -> Lent {
    let lengths = (0..N_OBS).map(|row| row * 7 % 11);
    let mut indptr = vec![0i32];
    let (mut indices, mut data) = (Vec::new(), Vec::new());
    for (row, n) in lengths.enumerate() {
        match rows {
            Rows::Sorted => indices.extend((0..n).map(|k| (k * 3) as u16)),
            Rows::Odd => indices.extend((0..n).map(|k| (k * 7 % 5 * 3) as u16)),
        }
        data.extend((0..n).map(|k| (row * 100 + k) as f32));
        indptr.push(indices.len() as i32);
    }
    let buffers = [lend(indptr, DType::Int32), lend(indices, DType::UInt16), lend(data, DType::Float32)];
    let json = format!(
        r#"{{"elements":[{{"name":"X","transform":{transform}}}],
            "datasets":[{{"sources":{{"X":{{"csr":{{"indptr":0,"indices":1,"data":2,"shape":[{N_OBS},{N_VAR}]}}}}}}}}],
            "sampling":{sampling}}}"#
    );
    let config = OpenConfig::parse(&json).unwrap();
    let collection = Collection::open(&config, &buffers, Runtime::start(2, 2).unwrap().into()).unwrap();
    Lent { collection, config: config.stream() }
}

const RANDOM: &str = r#"{"kind":"random","chunk_size":5,"preload_nchunks":4,"batch_size":10}"#;

impl Lent {
    fn on(&self, fake: &Arc<Fake>, change: impl FnOnce(&mut StreamConfig)) -> Pipeline {
        self.narrow_on(fake, true, change)
    }

    fn narrow_on(&self, fake: &Arc<Fake>, narrow: bool, change: impl FnOnce(&mut StreamConfig)) -> Pipeline {
        let mut config = self.config.clone();
        change(&mut config);
        let device = Device::with(Arc::clone(fake) as _, 3);
        let rows = row_kernels(&self.collection);
        let source = crate::device::loaded::source(&rows);
        let kernels =
            if narrow { LoadedKernels::load(&device, source.as_bytes(), rows) } else { Err(Error::closed("no compiler")) };
        let device = (device, kernels.map_err(|e| e.to_string()));
        Pipeline::to(Some(device), Arc::clone(&self.collection), config).unwrap()
    }

    /// The tensors of all batches of an epoch in host memory.
    fn expected(&self, seed: u64, first: u64) -> Vec<Vec<Vec<u8>>> {
        let pipeline = Pipeline::new(Arc::clone(&self.collection), self.config.clone()).unwrap();
        pipeline.start(seed, first).unwrap();
        let mut out = Vec::new();
        while let Next::Batch(batch) = pipeline.next(None).unwrap() {
            out.push(batch.into_tensors().into_iter().map(|mut t| t.lease.as_mut_slice().to_vec()).collect());
        }
        out
    }
}

/// Where a batch was placed: (address, bytes) of each tensor.
fn place(fake: &Fake, batch: &mut DeviceBatch, stream: Stream) -> Vec<(u64, u64)> {
    let memory: Vec<_> = batch.outputs().iter().map(|o| (fake.torch_memory(o.bytes()), o.bytes())).collect();
    let addresses: Vec<u64> = memory.iter().map(|m| m.0).collect();
    // SAFETY: memory and stream are the fake's.
    unsafe { batch.place(&addresses, stream) }.unwrap();
    memory
}

fn epoch(fake: &Fake, pipeline: &Pipeline, stream: Stream) -> Vec<Vec<Vec<u8>>> {
    let mut placed = Vec::new();
    while let Next::Batch((mut batch, _)) = pipeline.next_on_device(None).unwrap() {
        placed.push(place(fake, &mut batch, stream));
    }
    fake.run_all();
    placed.iter().map(|tensors| tensors.iter().map(|(at, bytes)| fake.read(*at, *bytes)).collect()).collect()
}

#[test]
fn epochs_on_a_device_are_those_in_host_memory() {
    for narrow in [true, false] {
        let (lent, fake) = (open(RANDOM), Fake::new());
        let stream = fake.torch_stream();
        let pipeline = lent.narrow_on(&fake, narrow, |_| ());
        let mut indices = 0;
        for (seed, first) in [(1, 0), (2, 0), (2, 5), (3, 11)] {
            pipeline.start(seed, first).unwrap();
            let found = epoch(&fake, &pipeline, stream);
            assert_eq!(found.len(), 11 - first as usize);
            assert_eq!(found, lent.expected(seed, first), "seed {seed}, first {first}");
            assert!(matches!(pipeline.next_on_device(None).unwrap(), Next::End));
            indices += found.iter().map(|tensors| tensors[2].len() as u64).sum::<u64>();
        }
        let (stats, description) = (pipeline.stats(), pipeline.describe().unwrap());
        assert_eq!(stats["h2d_batches"], 28);
        let saved = stats["bytes_delivered"].as_u64().unwrap() - stats["h2d_bytes"].as_u64().unwrap();
        // columns in two bytes instead of four, and the values, which are whole numbers above 255, as well
        assert_eq!(saved, if narrow { indices } else { 0 });
        assert_eq!(stats["pinned"], true);
        assert_eq!(stats["leases_out"], 0);
        assert!(stats["staging_bytes"].as_u64().unwrap() <= 4 << 20);
        assert_eq!(description["device"], 3);
        assert_eq!(description["narrow"], if narrow { true.into() } else { Value::from("no compiler") });
        let error = pipeline.next(None).unwrap_err().to_string();
        assert!(error.contains("GPU 3"), "{error}");
        drop((pipeline, lent));
        fake.state_forget_torch();
        assert_eq!(fake.left(), "0 device blocks, 0 host blocks, 0 events, 0 streams, 0 modules");
        assert!(fake.violations().is_empty(), "{:?}", fake.violations());
    }
}

/// Values are scattered as narrow as those before them were; wherever one does not fit, the batch is that in host memory, and
/// crosses the bus in the fewest bytes that hold it.
#[test]
fn values_that_are_wider_than_those_before_them_arrive_whole() {
    const ROWS: usize = 400;
    // by row: the largest value, how it is read, and the bytes of a value on the way
    let kinds = [(200.0, 1u64), (300.0, 2), (0.5, 4), (-0.0, 4), (70_000.0, 4)];
    for (dense, transform) in [(false, "{}"), (true, "{}"), (false, r#"{"steps":[{"log1p":{}}],"dense":true}"#)] {
        let mut widened = 0;
        for seed in 0..12usize {
            // long stretches of small values, so that batches are scattered narrow, with others at places of their own, and many
            // in one place
            let is_odd = |row: usize| (row + 37 * seed).is_multiple_of(29 + 8 * seed) || (row / 40 == 5 && row.is_multiple_of(3));
            let kind = |row: usize| if is_odd(row) { row * 7 % kinds.len() } else { 0 };
            let (mut indptr, mut indices, mut data) = (vec![0i32], Vec::new(), Vec::new());
            for row in 0..ROWS {
                let n = if dense { 5 } else { 1 + row * 7 % 5 };
                indices.extend((0..n).map(|k| (k * 3) as u16));
                data.extend((0..n).map(|k| if k == row % n { kinds[kind(row)].0 } else { k as f32 }));
                indptr.push(indices.len() as i32);
            }
            let nnz_of = |row: usize| u64::from((indptr[row + 1] - indptr[row]).unsigned_abs());
            let values = |rows: std::ops::Range<usize>| {
                let widest = rows.clone().map(|row| kinds[kind(row)].1).max().unwrap_or(0);
                rows.map(|row| if dense { 5 } else { nnz_of(row) }).sum::<u64>() * widest
            };
            let (batch, window) = (10, 40);
            let least: u64 = (0..ROWS / batch).map(|b| values(b * batch..(b + 1) * batch)).sum();
            let source = if dense {
                r#"{"dense":{"data":2}}"#.to_owned()
            } else {
                format!(r#"{{"csr":{{"indptr":0,"indices":1,"data":2,"shape":[{ROWS},{N_VAR}]}}}}"#)
            };
            let mut buffers = vec![lend(indptr.clone(), DType::Int32), lend(indices, DType::UInt16), lend(data, DType::Float32)];
            if dense {
                buffers[2].shape = vec![ROWS as u64, 5];
            }
            let config = |kind: &str, chunk: usize| {
                let json = format!(
                    r#"{{"elements":[{{"name":"X","transform":{transform}}}],"datasets":[{{"sources":{{"X":{source}}}}}],
                        "sampling":{{"kind":"{kind}","chunk_size":{chunk},"preload_nchunks":{},"batch_size":{batch}}}}}"#,
                    window / chunk
                );
                OpenConfig::parse(&json).unwrap()
            };
            let in_order = config("sequential", window);
            let collection = Collection::open(&in_order, &buffers, Runtime::start(3, 1).unwrap().into()).unwrap();
            let (lent, fake) = (Lent { collection, config: in_order.stream() }, Fake::new());
            // one window at a time, so that each knows of the one before
            let pipeline = lent.on(&fake, |config| config.batches_ahead = Some(1));
            let stream = fake.torch_stream();
            for first in [0, 3] {
                pipeline.start(0, first).unwrap();
                assert_eq!(epoch(&fake, &pipeline, stream), lent.expected(0, first), "{dense} {transform} {seed} {first}");
            }
            let shuffled = Lent { collection: Arc::clone(&lent.collection), config: config("random", window).stream() };
            let in_any_order = shuffled.on(&fake, |config| config.batches_ahead = Some(1));
            in_any_order.start(seed as u64, 0).unwrap();
            assert_eq!(epoch(&fake, &in_any_order, stream), shuffled.expected(seed as u64, 0), "{dense} {transform} {seed}");
            drop((in_any_order, shuffled));
            let stats = pipeline.stats();
            widened += stats["batches_widened"].as_u64().unwrap();
            let skipped: u64 = (0..3).map(|b| values(b * batch..(b + 1) * batch)).sum();
            let sparse: u64 = (0..ROWS).map(nnz_of).sum::<u64>() * 2 + (ROWS + ROWS / batch) as u64 * 4;
            let sparse_skipped: u64 = (0..3 * batch).map(nnz_of).sum::<u64>() * 2 + (3 * batch + 3) as u64 * 4;
            let others = (2 * ROWS - 3 * batch) as u64 * 8 + if dense { 0 } else { 2 * sparse - sparse_skipped };
            let found = stats["h2d_bytes"].as_u64().unwrap() - others;
            // of a batch of two bytes that would fit one it is found out later; dense rows are looked at batch by batch
            let least = 2 * least - skipped;
            assert!((least..=if dense { least } else { 2 * least }).contains(&found), "{found} of {least}");
            drop((pipeline, lent));
            fake.state_forget_torch();
            assert_eq!(fake.left(), "0 device blocks, 0 host blocks, 0 events, 0 streams, 0 modules");
            assert!(fake.violations().is_empty(), "{:?}", fake.violations());
        }
        assert_eq!(widened > 12, !dense, "{widened}");
    }
}

/// What the device does to rows has the bits of what the host does, and what crosses the bus is what was stored.
#[test]
fn transforms_on_a_device_are_those_in_host_memory() {
    let norm = r#"{"normalize_total":{"target_sum":10000.0}}"#;
    let all: Vec<u64> = (0..N_VAR as u64).rev().collect();
    // steps and form, whether it is done there, and the bytes of columns and of values on the way
    let cases = [
        (format!(r#"{{"steps":[{norm},{{"log1p":{{}}}}]}}"#), true, (2, 2)),
        (format!(r#"{{"steps":[{norm},{{"log1p":{{}}}}],"dense":true,"dtype":"bfloat16"}}"#), true, (2, 2)),
        (r#"{"steps":[],"dense":true}"#.to_owned(), true, (2, 2)),
        (format!(r#"{{"steps":[{{"columns":{all:?}}},{norm}],"dense":true,"dtype":"float16"}}"#), true, (2, 2)),
        (r#"{"steps":[{"columns":[3,0,9]},{"log1p":{"base":2.0}}],"dense":true}"#.to_owned(), true, (2, 2)),
        (r#"{"steps":[{"log1p":{}}],"dtype":"float64"}"#.to_owned(), true, (2, 2)),
        (format!(r#"{{"steps":[{{"columns":{all:?}}},{norm}]}}"#), false, (4, 4)),
    ];
    for (transform, there, (column, value)) in &cases {
        for rows in [Rows::Sorted, Rows::Odd] {
            let (lent, fake) = (open_with(RANDOM, transform, rows), Fake::new());
            let stream = fake.torch_stream();
            let pipeline = lent.on(&fake, |_| ());
            pipeline.start(1, 0).unwrap();
            assert_eq!(epoch(&fake, &pipeline, stream), lent.expected(1, 0), "{transform}, {rows:?}");
            let (stats, description) = (pipeline.stats(), pipeline.describe().unwrap());
            assert_eq!(description["transformed_on_device"], if *there { serde_json::json!(["X"]) } else { serde_json::json!([]) });
            let nnz = description["elements"][0]["nnz"].as_u64().unwrap();
            let others = (N_OBS * 8 + (N_OBS + 11) * 4) as u64;
            assert_eq!(stats["h2d_bytes"].as_u64().unwrap(), nnz * (column + value) + others, "{transform}");
            let mut end = pipeline.end_batch_on_device().unwrap();
            let shapes: Vec<_> = end.outputs().iter().map(|o| (o.dtype, o.shape.clone())).collect();
            place(&fake, &mut end, stream);
            fake.run_all();
            pipeline.start(2, 10).unwrap();
            let Next::Batch((batch, _)) = pipeline.next_on_device(None).unwrap() else { panic!("a batch") };
            let of_batch = batch.outputs().iter().zip(&shapes);
            assert_eq!(batch.outputs().len(), shapes.len());
            assert!(of_batch.into_iter().all(|(o, (dtype, shape))| o.dtype == *dtype && o.shape[1..] == shape[1..]));
            drop((batch, end, pipeline, lent));
            fake.state_forget_torch();
            assert_eq!(fake.left(), "0 device blocks, 0 host blocks, 0 events, 0 streams, 0 modules");
            assert!(fake.violations().is_empty(), "{:?}", fake.violations());
        }
    }
}

/// Writes a CSR matrix as an uncompressed Zarr store, `chunk` entries to a chunk.
fn write_store(root: &std::path::Path, shape: [usize; 2], chunk: usize, arrays: [(&str, &str, &[u8]); 3]) {
    use serde_json::json;
    let write = |path: &str, document: Value| {
        std::fs::create_dir_all(root.join(path)).unwrap();
        std::fs::write(root.join(path).join("zarr.json"), document.to_string()).unwrap();
    };
    let group = |attributes: Value| json!({"zarr_format": 3, "node_type": "group", "attributes": attributes});
    write("", group(json!({"encoding-type": "anndata", "encoding-version": "0.1.0"})));
    write("X", group(json!({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})));
    for (name, dtype, bytes) in arrays {
        let size = if dtype == "uint16" { 2 } else { 4 };
        let len = if name == "indptr" { bytes.len() / size } else { chunk };
        let array = json!({
            "zarr_format": 3, "node_type": "array", "shape": [bytes.len() / size], "data_type": dtype, "fill_value": 0, "attributes": {},
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [len]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        });
        write(&format!("X/{name}"), array);
        std::fs::create_dir_all(root.join(format!("X/{name}/c"))).unwrap();
        for (number, part) in bytes.chunks(len * size).enumerate() {
            let mut part = part.to_vec();
            part.resize(len * size, 0);
            std::fs::write(root.join(format!("X/{name}/c/{number}")), part).unwrap();
        }
    }
}

/// Rows whose entries are added up on a device have to be sorted where columns come twice: those that are not, and those whose
/// parts are in several chunks, each of which sees its own part alone.
#[test]
fn rows_that_several_chunks_have_parts_of_are_sorted_as_a_whole() {
    const ROWS: usize = 60;
    let norm = r#"{"steps":[{"normalize_total":{"target_sum":100.0}}],"dense":true}"#;
    let logs = r#"{"steps":[{"normalize_total":{"target_sum":100.0}},{"log1p":{}}]}"#;
    let cases = (0..3).flat_map(|case| [4usize, 7, 16, 1000].map(|chunk| (case, chunk)));
    for ((case, chunk), transform) in cases.flat_map(|case| [(case, norm), (case, logs)]) {
        let (mut indptr, mut indices, mut data) = (vec![0i32], Vec::<u16>::new(), Vec::<f32>::new());
        for row in 0..ROWS {
            let n = row * 5 % 9;
            indices.extend((0..n).map(|k| match case {
                0 => k as u16 * 2,
                // twice the same, once in a row that is in order by halves
                1 => (k % 4) as u16 * 2,
                _ if row % 3 == 0 => (8 - k) as u16 / 2,
                _ => k as u16 / 2,
            }));
            data.extend((0..n).map(|k| (row + k + 1) as f32));
            indptr.push(indices.len() as i32);
        }
        let bytes = |numbers: &[i32]| numbers.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let folder = tempfile::tempdir().unwrap();
        let columns: Vec<u8> = indices.iter().flat_map(|v| v.to_le_bytes()).collect();
        let values: Vec<u8> = data.iter().flat_map(|v| v.to_le_bytes()).collect();
        let arrays =
            [("indptr", "int32", &bytes(&indptr)[..]), ("indices", "uint16", &columns[..]), ("data", "float32", &values[..])];
        write_store(folder.path(), [ROWS, 20], chunk, arrays);
        let json = serde_json::json!({
            "elements": [{"name": "X", "transform": serde_json::from_str::<Value>(transform).unwrap()}],
            "datasets": [{"path": folder.path()}],
            "sampling": {"kind": "random", "chunk_size": 3, "preload_nchunks": 5, "batch_size": 5},
        });
        let config = OpenConfig::parse(&json.to_string()).unwrap();
        let collection = Collection::open(&config, &[], Runtime::start(2, 2).unwrap().into()).unwrap();
        let (lent, fake) = (Lent { collection, config: config.stream() }, Fake::new());
        let pipeline = lent.on(&fake, |_| ());
        let stream = fake.torch_stream();
        for seed in 0..3 {
            pipeline.start(seed, 0).unwrap();
            assert_eq!(epoch(&fake, &pipeline, stream), lent.expected(seed, 0), "{case}, {chunk}, {seed}, {transform}");
        }
        assert_eq!(pipeline.describe().unwrap()["transformed_on_device"].as_array().unwrap().len(), 1);
        assert!(fake.violations().is_empty(), "{:?}", fake.violations());
    }
}

/// Rows of joined columns, of one dataset in places of its own: sorted on the host, transformed there only where entries are
/// left out.
#[test]
fn joined_rows_on_a_device_are_those_in_host_memory() {
    let kept: Vec<i32> = (0..N_VAR as i32).collect();
    let reversed: Vec<i32> = kept.iter().map(|c| 45 - c).collect();
    let fewer: Vec<i32> = kept.iter().map(|c| if c % 4 == 0 { -1 } else { *c }).collect();
    let later: Vec<i32> = kept.iter().map(|c| c + 9).collect();
    let norm = r#"{"steps":[{"normalize_total":{"target_sum":100.0}},{"log1p":{}}]"#;
    for transform in ["{}".to_owned(), format!("{norm}}}"), format!(r#"{norm},"dense":true}}"#)] {
        for (columns, there) in [(&reversed, true), (&fewer, false), (&later, true)] {
            let (indptr, indices, data) = (vec![0i32, 3, 3, 5], vec![1u16, 4, 39, 8, 5], vec![1f32, 2.0, 300.0, 0.5, 4.0]);
            let buffers = [
                lend(indptr, DType::Int32),
                lend(indices, DType::UInt16),
                lend(data, DType::Float32),
                lend(columns.clone(), DType::Int32),
            ];
            let csr = r#"{"X":{"csr":{"indptr":0,"indices":1,"data":2,"shape":[3,40]}}}"#;
            let json = format!(
                r#"{{"elements":[{{"name":"X","n_var":50,"transform":{transform}}}],
                    "datasets":[{{"sources":{csr},"columns":{{"X":3}}}},{{"sources":{csr},"columns":{{"X":3}}}}],
                    "sampling":{{"kind":"sequential","chunk_size":2,"preload_nchunks":2,"batch_size":2}}}}"#
            );
            let config = OpenConfig::parse(&json).unwrap();
            let collection = Collection::open(&config, &buffers, Runtime::start(1, 1).unwrap().into()).unwrap();
            let (lent, fake) = (Lent { collection, config: config.stream() }, Fake::new());
            let pipeline = lent.on(&fake, |_| ());
            pipeline.start(0, 0).unwrap();
            let stream = fake.torch_stream();
            assert_eq!(epoch(&fake, &pipeline, stream), lent.expected(0, 0), "{transform}, {columns:?}");
            let description = pipeline.describe().unwrap();
            let there = there && transform != "{}";
            assert_eq!(description["transformed_on_device"].as_array().unwrap().len(), usize::from(there));
            assert!(fake.violations().is_empty(), "{:?}", fake.violations());
        }
    }
}

/// Wherever loading kernels and column maps fails, nothing is left behind.
#[test]
fn what_fails_while_kernels_are_loaded_leaves_nothing_behind() {
    let transform = r#"{"steps":[{"columns":[3,0,9]},{"columns":[2,1]}],"dense":true}"#;
    let lent = open_with(RANDOM, transform, Rows::Sorted);
    let mut calls = 0;
    loop {
        let fake = Fake::new();
        let device = Device::with(Arc::clone(&fake) as _, 3);
        let rows = row_kernels(&lent.collection);
        let source = crate::device::loaded::source(&rows);
        fake.fail_in(calls, 719, false);
        let loaded = LoadedKernels::load(&device, source.as_bytes(), rows);
        let all_done = fake.mend();
        // who cannot give back a stream of its own goes on without
        let only_kept = fake.failed() == Some("stream_destroy");
        assert_eq!(loaded.is_ok(), all_done || only_kept, "call {calls}");
        drop((loaded, device));
        let streams = usize::from(only_kept);
        assert_eq!(fake.left(), format!("0 device blocks, 0 host blocks, 0 events, {streams} streams, 0 modules"), "call {calls}");
        assert!(fake.violations().is_empty(), "{:?}", fake.violations());
        if all_done {
            break;
        }
        calls += 1;
    }
    assert!(calls > 20, "only {calls} calls");
}

/// Indices are cut to 16 bits as they are scattered: one that does not fit is still an error.
#[test]
fn narrow_indices_are_checked_before_they_are_narrow() {
    let buffers =
        [lend(vec![0i32, 1, 2], DType::Int32), lend(vec![1i32, 65_537], DType::Int32), lend(vec![1f32, 2.0], DType::Float32)];
    let json = r#"{"elements":[{"name":"X"}],
        "datasets":[{"sources":{"X":{"csr":{"indptr":0,"indices":1,"data":2,"shape":[2,40]}}}}],
        "sampling":{"kind":"sequential","chunk_size":2,"preload_nchunks":1,"batch_size":2}}"#;
    let config = OpenConfig::parse(json).unwrap();
    let collection = Collection::open(&config, &buffers, Runtime::start(1, 1).unwrap().into()).unwrap();
    let (lent, fake) = (Lent { collection, config: config.stream() }, Fake::new());
    let pipeline = lent.on(&fake, |_| ());
    pipeline.start(0, 0).unwrap();
    let error = pipeline.next_on_device(None).unwrap_err().to_string();
    assert!(error.contains("not below n_var = 40"), "{error}");
}

#[test]
fn the_end_is_a_batch_of_no_rows_whose_row_pointers_are_zero() {
    let (lent, fake) = (open(RANDOM), Fake::new());
    let stream = fake.torch_stream();
    let pipeline = lent.on(&fake, |_| ());
    let mut end = pipeline.end_batch_on_device().unwrap();
    assert_eq!((end.n_rows(), end.is_end()), (0, true));
    let placed = place(&fake, &mut end, stream);
    fake.run_all();
    let bytes: Vec<u64> = placed.iter().map(|p| p.1).collect();
    assert_eq!(bytes, [0, 4, 0, 0]);
    assert_eq!(fake.read(placed[1].0, 4), [0; 4]);
}

#[test]
fn epochs_restart_by_themselves_and_on_demand_and_are_dropped_anywhere() {
    let (lent, fake) = (open(RANDOM), Fake::new());
    let stream = fake.torch_stream();
    let pipeline = lent.on(&fake, |config| config.auto_restart = true);
    let first = epoch(&fake, &pipeline, stream);
    let second = epoch(&fake, &pipeline, stream);
    assert_eq!((first.len(), second.len()), (11, 11));
    assert_ne!(first, second);
    for taken in 0..5 {
        pipeline.start(9, 0).unwrap();
        for _ in 0..taken {
            let Next::Batch((mut batch, from)) = pipeline.next_on_device(None).unwrap() else { panic!("a batch") };
            if batch.number() % 2 == 0 && taken == 4 {
                from.put_back(batch);
            } else {
                place(&fake, &mut batch, stream);
            }
        }
    }
    let Next::Batch((held, from)) = pipeline.next_on_device(None).unwrap() else { panic!("a batch") };
    assert!(pipeline.is_ready(Duration::from_secs(9)).unwrap());
    drop((pipeline, lent));
    drop((held, from));
    fake.state_forget_torch();
    fake.run_all();
    assert_eq!(fake.left(), "0 device blocks, 0 host blocks, 0 events, 0 streams, 0 modules");
    assert!(fake.violations().is_empty(), "{:?}", fake.violations());
}

#[test]
fn a_batch_that_is_put_back_counts_once() {
    let (lent, fake) = (open(RANDOM), Fake::new());
    let stream = fake.torch_stream();
    let pipeline = lent.on(&fake, |_| ());
    pipeline.start(1, 0).unwrap();
    for _ in 0..3 {
        let Next::Batch((batch, from)) = pipeline.next_on_device(None).unwrap() else { panic!("a batch") };
        from.put_back(batch);
    }
    assert_eq!(epoch(&fake, &pipeline, stream).len(), 11);
    let stats = pipeline.stats();
    assert_eq!((&stats["batches_delivered"], &stats["rows_delivered"]), (&Value::from(11), &Value::from(N_OBS)));
}

#[test]
fn streams_to_host_memory_have_no_batches_on_a_device() {
    let lent = open(RANDOM);
    let pipeline = Pipeline::new(Arc::clone(&lent.collection), lent.config.clone()).unwrap();
    pipeline.start(0, 0).unwrap();
    let error = pipeline.next_on_device(None).unwrap_err().to_string();
    assert!(error.contains("host memory"), "{error}");
    assert!(pipeline.stats()["pinned"].is_null());
}

/// What a forked child may try; ends it, with 0 where all is well.
#[cfg(target_os = "linux")]
fn in_child(fake: &Fake, pipeline: &Pipeline, held: &mut DeviceBatch, stream: Stream) -> ! {
    let calls = fake.calls();
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // SAFETY: the addresses are not looked at: every call is refused before.
        let placed = unsafe { held.place(&[0; 4], stream) };
        let refused = placed.is_err() && pipeline.next_on_device(None).is_err();
        // SAFETY: the child ends without using either again.
        unsafe {
            std::ptr::drop_in_place(held);
            std::ptr::drop_in_place(std::ptr::from_ref(pipeline).cast_mut());
        }
        refused
    }));
    let good = matches!(refused, Ok(true)) && fake.calls() == calls;
    // SAFETY: ends the child.
    unsafe { libc::_exit(i32::from(!good)) }
}

/// A child may drop everything that it inherits, at any time, without a call of the driver and without a wait.
#[test]
#[cfg(target_os = "linux")]
fn forked_children_leave_the_device_alone() {
    let (lent, fake) = (open(RANDOM), Fake::new());
    let stream = fake.torch_stream();
    let pipeline = lent.on(&fake, |_| ());
    pipeline.start(1, 0).unwrap();
    let Next::Batch((mut held, from)) = pipeline.next_on_device(None).unwrap() else { panic!("a batch") };
    // the device as well is dropped in the child, for nobody else holds it
    let calls = fake.calls();
    std::thread::sleep(Duration::from_millis(50));
    let staging = Arc::clone(pipeline.target.as_ref().unwrap().staging());
    // in the child this lock is held for ever, as one is that a thread held which is not there
    // SAFETY: the child drops values, looks at an atomic and ends without running exit handlers.
    let child = staging.while_locked(|| match unsafe { libc::fork() } {
        0 => in_child(&fake, &pipeline, &mut held, stream),
        child => child,
    });
    drop(staging);
    assert!(child > 0 && fake.calls() >= calls);
    let (mut status, until) = (0, Instant::now() + Duration::from_secs(20));
    loop {
        // SAFETY: waits for the child made above.
        let done = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
        if done == child {
            break;
        }
        if Instant::now() > until {
            // SAFETY: ends the child made above.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(status, 0);
    drop((held, from));
    let rest = epoch(&fake, &pipeline, stream);
    assert!(rest.len() >= 10);
}
