//! Datasets of different columns as one: batches against the slow twin, over random stores and maps of columns.

mod reference;

use annbatch::batch::BatchElement;
use annbatch::collection::Buffer;
use annbatch::{Collection, DType, Next, OpenConfig, Pipeline, Runtime};
use proptest::prelude::*;
use reference::steps::{Step, floats, spread_out, steps, steps_json, transformed};
use reference::{Chunking, Matrix, joined, values, write_dense};

/// How the columns of a dataset relate to the joined ones.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Map {
    /// No map: the dataset has all columns, in order.
    Absent,
    Identity,
    Ascending,
    Permuting,
    Dropping,
    DroppingAscending,
}

/// How the element is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Sparse,
    Dense,
    /// Sparse in some datasets and dense in others.
    Mixed,
}

/// A dataset to be made: rows, map, where it lies, types, and dice for the rest.
#[derive(Debug, Clone)]
struct Plan {
    rows: Vec<Vec<(u64, u8)>>,
    map: Map,
    n_stored: u64,
    in_memory: bool,
    index: DType,
    value: DType,
    chunk: u64,
    codec: u8,
    dice: u64,
}

const N_JOINED: u64 = 70;

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let map = prop::sample::select(vec![
        Map::Absent,
        Map::Identity,
        Map::Ascending,
        Map::Permuting,
        Map::Dropping,
        Map::DroppingAscending,
    ]);
    let index = prop::sample::select(vec![
        DType::Int8,
        DType::Int16,
        DType::Int32,
        DType::Int64,
        DType::UInt8,
        DType::UInt16,
        DType::UInt32,
        DType::UInt64,
    ]);
    let value = prop::sample::select(vec![DType::Float32, DType::Int32, DType::UInt8]);
    // so small that entries of one column add up to a uint8
    let rows = prop::collection::vec(prop::collection::vec((0..1000u64, 1u8..3), 0..90), 1..40);
    let plan = (rows, map, 1..=N_JOINED, any::<bool>(), index, value, 1u64..200, 0u8..4, any::<u64>());
    let plan = plan.prop_map(|(mut rows, map, n_stored, in_memory, index, value, chunk, codec, dice)| {
        let n_stored = if matches!(map, Map::Absent | Map::Identity) { N_JOINED } else { n_stored };
        for row in &mut rows {
            for entry in row.iter_mut() {
                entry.0 %= n_stored;
            }
            // half of the rows in memory stay as they come: unsorted, columns more than once
            if !in_memory || dice % 2 == 0 {
                row.sort_by_key(|e| e.0);
                row.dedup_by_key(|e| e.0);
            }
        }
        Plan { rows, map, n_stored, in_memory, index, value, chunk, codec, dice }
    });
    prop::collection::vec(plan, 1..5)
}

impl Plan {
    fn is_sparse(&self, form: Form) -> bool {
        match form {
            Form::Sparse => true,
            Form::Dense => false,
            Form::Mixed => self.dice % 5 < 3,
        }
    }

    /// Joined column of each stored one.
    fn columns(&self) -> Vec<i64> {
        use rand::seq::{SliceRandom, index};
        use rand::{SeedableRng, rngs::ChaCha8Rng};
        let mut rng = ChaCha8Rng::seed_from_u64(self.dice);
        let n = self.n_stored as usize;
        let mut columns: Vec<i64> = index::sample(&mut rng, N_JOINED as usize, n).iter().map(|c| c as i64).collect();
        if matches!(self.map, Map::Absent | Map::Identity) {
            columns = (0..N_JOINED as i64).collect();
        }
        if matches!(self.map, Map::Ascending | Map::DroppingAscending) {
            columns.sort_unstable();
        }
        if matches!(self.map, Map::Dropping | Map::DroppingAscending) {
            let mut left_out: Vec<usize> = (0..n).collect();
            left_out.shuffle(&mut rng);
            left_out[..n.div_ceil(2)].iter().for_each(|&c| columns[c] = -1);
        }
        columns
    }

    fn entries(&self, row: usize) -> Vec<(u64, f64)> {
        self.rows[row].iter().map(|&(c, v)| (c, f64::from(v))).collect()
    }

    fn full(&self, row: usize) -> Vec<(u64, f64)> {
        let mut full: Vec<(u64, f64)> = (0..self.n_stored).map(|c| (c, 0.0)).collect();
        self.rows[row].iter().for_each(|&(c, v)| full[c as usize].1 = f64::from(v));
        full
    }
}

/// Elements in the bytes of a type, kept alive and aligned.
fn bytes_of(dtype: DType, numbers: impl Iterator<Item = u64>) -> Vec<u64> {
    let bytes: Vec<u8> = numbers
        .flat_map(|n| match dtype {
            DType::Float32 => (n as f32).to_ne_bytes().to_vec(),
            // little-endian machines only, as the integers' low bytes come first
            _ => n.to_le_bytes()[..dtype.size()].to_vec(),
        })
        .collect();
    let mut out = vec![0u64; bytes.len().div_ceil(8) + 1];
    // SAFETY: as many bytes as the vector has, at least.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.as_mut_ptr().cast(), bytes.len()) };
    out
}

#[derive(Default)]
struct Lent {
    held: Vec<Vec<u64>>,
    buffers: Vec<Buffer>,
}

impl Lent {
    fn add(&mut self, dtype: DType, shape: Vec<u64>, numbers: impl Iterator<Item = u64>) -> usize {
        let held = bytes_of(dtype, numbers);
        self.buffers.push(Buffer { address: held.as_ptr().addr(), dtype, shape });
        self.held.push(held);
        self.buffers.len() - 1
    }
}

struct Case {
    config: OpenConfig,
    lent: Lent,
    _dir: tempfile::TempDir,
}

fn case(plans: &[Plan], form: Form, steps: &[Step], dense: bool, batch: usize) -> Case {
    let dir = tempfile::tempdir().unwrap();
    let mut lent = Lent::default();
    let mut datasets = Vec::new();
    for (number, plan) in plans.iter().enumerate() {
        let (n, n_stored, sparse) = (plan.rows.len() as u64, plan.n_stored, plan.is_sparse(form));
        let path = dir.path().join(format!("d{number}/X"));
        let ends = plan.rows.iter().scan(0, |end, row| {
            *end += row.len() as u64;
            Some(*end)
        });
        let indptr: Vec<u64> = std::iter::once(0).chain(ends).collect();
        let source = if sparse && plan.in_memory {
            let columns: Vec<u64> = plan.rows.iter().flatten().map(|e| e.0).collect();
            let nnz = vec![columns.len() as u64];
            let indptr = lent.add(DType::Int64, vec![n + 1], indptr.into_iter());
            let indices = lent.add(plan.index, nnz.clone(), columns.into_iter());
            let data = lent.add(plan.value, nnz, plan.rows.iter().flatten().map(|e| u64::from(e.1)));
            serde_json::json!({"csr": {"indptr": indptr, "indices": indices, "data": data, "shape": [n, n_stored]}})
        } else if sparse {
            let entries = plan.rows.iter().flatten();
            Matrix {
                n_var: n_stored,
                indptr: indptr.into_iter().map(|p| p as i64).collect(),
                indices: entries.clone().map(|e| e.0 as u16).collect(),
                data: entries.map(|e| f32::from(e.1)).collect(),
            }
            .write(&path, Chunking { chunk: plan.chunk, chunks_per_shard: plan.dice % 4, codec: plan.codec });
            serde_json::json!({"path": path})
        } else if plan.in_memory {
            let cells = (0..plan.rows.len()).flat_map(|row| plan.full(row)).map(|e| e.1 as u64);
            serde_json::json!({"dense": {"data": lent.add(plan.value, vec![n, n_stored], cells)}})
        } else {
            let rows: Vec<Vec<f32>> = (0..plan.rows.len()).map(|r| plan.full(r).iter().map(|e| e.1 as f32).collect()).collect();
            let chunk = [plan.chunk.min(17), 1 + plan.dice % n_stored];
            write_dense(&path, &rows, n_stored, chunk, plan.codec > 0);
            serde_json::json!({"path": path})
        };
        let mut dataset = serde_json::json!({"sources": {"X": source}});
        if plan.map != Map::Absent {
            let wide = plan.dice % 3 == 0;
            let columns = plan.columns().into_iter().map(|c| c as u64);
            let dtype = if wide { DType::Int64 } else { DType::Int32 };
            dataset["columns"] = serde_json::json!({"X": lent.add(dtype, vec![n_stored], columns)});
        }
        datasets.push(dataset);
    }
    let transform = serde_json::json!({"steps": steps_json(steps, N_JOINED), "dense": dense});
    let json = serde_json::json!({
        "elements": [{"name": "X", "dtype": "native", "n_var": N_JOINED, "transform": transform}],
        "datasets": datasets,
        "sampling": {"kind": "random", "chunk_size": 3, "preload_nchunks": batch, "batch_size": batch},
    });
    Case { config: OpenConfig::parse(&json.to_string()).unwrap(), lent, _dir: dir }
}

/// Whole numbers are exact, others were computed in float32.
fn same(got: f64, expected: f64) -> bool {
    (got - expected).abs() <= 1e-5 * expected.abs() + 1e-6
}

fn check(plans: &[Plan], form: Form, steps: &[Step], dense: bool, batch: usize) {
    let case = case(plans, form, steps, dense, batch);
    let runtime = Runtime::start(2, 4).unwrap();
    let collection = Collection::open(&case.config, &case.lent.buffers, runtime.into());
    if !dense && plans.iter().any(|plan| plan.is_sparse(form) != plans[0].is_sparse(form)) {
        let error = collection.unwrap_err().to_string();
        assert!(["is sparse with 70 columns", "is dense with rows of shape [70]", "dense=True"].iter().all(|w| error.contains(w)));
        return;
    }
    let collection = collection.unwrap();
    let pipeline = Pipeline::new(collection, case.config.stream()).unwrap();
    let maps: Vec<Vec<i64>> = plans.iter().map(Plan::columns).collect();
    let expected = |row: i64| {
        let (mut row, mut dataset) = (row as usize, 0);
        while row >= plans[dataset].rows.len() {
            row -= plans[dataset].rows.len();
            dataset += 1;
        }
        if plans[dataset].is_sparse(form) {
            return transformed(&joined(&plans[dataset].entries(row), &maps[dataset]), N_JOINED, steps);
        }
        let mut full: Vec<(u64, f64)> = (0..N_JOINED).map(|c| (c, 0.0)).collect();
        for (column, value) in joined(&plans[dataset].full(row), &maps[dataset]) {
            full[column as usize].1 = value;
        }
        transformed(&full, N_JOINED, steps)
    };
    let mut seen = Vec::new();
    // twice: the second time in memory that was used before
    for seed in [5, 6] {
        pipeline.start(seed, 0).unwrap();
        while let Next::Batch(batch) = pipeline.next(None).unwrap() {
            let numbers = values::<i64>(&batch.rows);
            match &batch.elements[0] {
                BatchElement::Csr { indptr, indices, data } => {
                    let (ends, columns, got) = (values::<i32>(indptr), values::<i32>(indices), floats(data));
                    assert_eq!((ends[numbers.len()] as usize, columns.len()), (columns.len(), got.len()));
                    for (row, part) in numbers.iter().zip(ends.windows(2)) {
                        let part = part[0] as usize..part[1] as usize;
                        let (mut expected, _) = expected(*row);
                        let entries = columns[part.clone()].iter().map(|&c| c as u64).zip(got[part].iter().copied());
                        let mut got: Vec<(u64, f64)> = entries.collect();
                        if steps.iter().any(|step| !matches!(step, Step::Normalize(_))) {
                            // sorted where the order of columns, or of entries to be added up, asks for it
                            got.sort_by_key(|e| e.0);
                            expected.sort_by_key(|e| e.0);
                        }
                        assert_eq!(got.len(), expected.len(), "row {row}: {got:?}, expected {expected:?}");
                        let all = got.iter().zip(&expected).all(|(g, e)| g.0 == e.0 && same(g.1, e.1));
                        assert!(all, "row {row}: {got:?}, expected {expected:?}");
                    }
                }
                BatchElement::Dense(tensor) => {
                    let n_out = tensor.shape[1] as usize;
                    for (row, got) in numbers.iter().zip(floats(tensor).chunks(n_out)) {
                        let (expected, n_var) = expected(*row);
                        assert_eq!(n_out as u64, n_var);
                        let sums = spread_out(expected, n_out);
                        assert!(got.iter().zip(&sums).all(|(g, e)| same(*g, *e)), "row {row}: {got:?}, expected {sums:?}");
                    }
                }
            }
            seen.extend(numbers);
        }
    }
    seen.sort_unstable();
    let n = plans.iter().map(|p| p.rows.len() as i64).sum::<i64>();
    assert_eq!(seen, (0..n).flat_map(|row| [row, row]).collect::<Vec<_>>());
    pipeline.close();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..reference::cases(200) })]
    #[test]
    fn batches_are_those_of_the_slow_twin(
        plans in plans(),
        steps in prop_oneof![Just(Vec::new()), steps()],
        form in prop::sample::select(vec![Form::Sparse, Form::Dense, Form::Mixed, Form::Mixed]),
        dense: bool,
        batch in 1usize..40,
    ) {
        check(&plans, form, &steps, dense, batch);
    }
}

/// A store of random rows with `n_var` columns, and the configuration that gives it this map, or none.
fn stored(dir: &std::path::Path, n_var: u64, map: Option<&[i32]>, n_joined: Option<u64>) -> (OpenConfig, Vec<Buffer>) {
    let buffers = map.iter().map(|map| {
        let shape = vec![map.len() as u64];
        Buffer { address: map.as_ptr().addr(), dtype: DType::Int32, shape }
    });
    let mut dataset = serde_json::json!({"name": "a", "sources": {"X": {"path": dir.join("X")}}});
    if map.is_some() {
        dataset["columns"] = serde_json::json!({"X": 0});
    }
    if !dir.join("X").exists() {
        let mut matrix = Matrix::random(400, 50, 10, 1);
        matrix.n_var = n_var;
        matrix.write(&dir.join("X"), Chunking { chunk: 100, chunks_per_shard: 3, codec: 1 });
    }
    let json = serde_json::json!({
        "elements": [{"name": "X", "n_var": n_joined}],
        "datasets": [dataset],
        "sampling": {"kind": "random", "chunk_size": 5, "preload_nchunks": 10, "batch_size": 50},
    });
    (OpenConfig::parse(&json.to_string()).unwrap(), buffers.collect())
}

fn open(config: &OpenConfig, buffers: &[Buffer]) -> annbatch::Result<Pipeline> {
    let collection = Collection::open(config, buffers, Runtime::start(1, 2)?.into())?;
    Pipeline::new(collection, config.stream())
}

#[test]
fn joining_reads_and_decodes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (wider, dropping): (Vec<i32>, Vec<i32>) = (0..50).map(|c| (2 * c, (c - 25).max(-1))).unzip();
    let counts = |map: Option<&[i32]>, n_joined| {
        let (config, buffers) = stored(dir.path(), 50, map, n_joined);
        let pipeline = open(&config, &buffers).unwrap();
        let described = pipeline.describe().unwrap();
        assert_eq!(described["elements"][0]["n_var"].as_u64(), Some(n_joined.unwrap_or(50)));
        assert_eq!(described["elements"][0]["stored_n_var"], map.map_or(serde_json::Value::Null, |_| serde_json::json!([50])));
        pipeline.start(1, 0).unwrap();
        while let Next::Batch(_) = pipeline.next(None).unwrap() {}
        let stats = pipeline.stats();
        ["reads", "bytes_read", "chunks_decoded", "bytes_decoded"].map(|name| stats[name].as_u64().unwrap())
    };
    let plain = counts(None, None);
    assert!(plain.iter().all(|&n| n > 0));
    assert_eq!(counts(Some(&wider), Some(99)), plain);
    assert_eq!(counts(Some(&dropping), Some(25)), plain);
}

#[test]
fn a_stored_column_that_the_map_does_not_reach_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let map: Vec<i32> = (0..20).rev().collect();
    let (config, buffers) = stored(dir.path(), 20, Some(&map), Some(100));
    let pipeline = open(&config, &buffers).unwrap();
    pipeline.start(1, 0).unwrap();
    let error = loop {
        match pipeline.next(None) {
            Ok(Next::Batch(_)) => {}
            Ok(_) => panic!("columns 20 to 49 are there"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("not below n_var = 20 (largest, read as unsigned: 4"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused_at_open() {
    let dir = tempfile::tempdir().unwrap();
    let map: Vec<i32> = (0..50).collect();
    let refused = |map: Option<&[i32]>, n_joined, words: &str| {
        let (config, buffers) = stored(dir.path(), 50, map, n_joined);
        let error = open(&config, &buffers).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("\"a\"") && error.contains("\"X\""), "{words:?} in {error:?}");
    };
    refused(Some(&map), None, "the element needs n_var");
    refused(Some(&map[..49]), Some(60), "columns have shape [49]; expected [50]");
    refused(Some(&map), Some(49), "send stored column 49 to 49; expected -1, to leave it out, or 0 to 48");
    refused(None, Some(60), "is sparse with 50 columns, but n_var is 60; give the dataset columns for it");
    let (config, _) = stored(dir.path(), 50, Some(&map), Some(60));
    let error = open(&config, &[]).unwrap_err().to_string();
    assert!(error.contains("refers to buffer 0, but 0 were given"), "{error}");
}

#[test]
fn rows_of_images_cannot_be_joined() {
    let (values, map) = ([0.0f32; 24], [0i32, 1]);
    let buffers = [
        Buffer { address: values.as_ptr().addr(), dtype: DType::Float32, shape: vec![4, 2, 3] },
        Buffer { address: map.as_ptr().addr(), dtype: DType::Int32, shape: vec![2] },
    ];
    let config = OpenConfig::parse(
        r#"{"elements":[{"name":"X","n_var":2}],"datasets":[{"sources":{"X":{"dense":{"data":0}}},"columns":{"X":1}}]}"#,
    );
    let error = Collection::open(&config.unwrap(), &buffers, Runtime::start(1, 1).unwrap().into()).unwrap_err().to_string();
    assert!(error.contains("has rows of shape [2, 3]; only the columns of matrices can be joined"), "{error}");
}
