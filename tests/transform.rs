//! Transforms of whole batches against a slow twin that does one row at a time in float64.

mod reference;

use annbatch::batch::BatchElement;
use annbatch::collection::Buffer;
use annbatch::{Collection, DType, Next, OpenConfig, Pipeline, Runtime};
use proptest::prelude::*;
use reference::steps::{Step, floats, spread_out, steps, steps_json, transformed};

const N_VAR: u64 = 23;

/// Rows of (column, value); columns in any order and more than once.
fn rows() -> impl Strategy<Value = Vec<Vec<(u16, f32)>>> {
    let value = prop_oneof![4 => (1u8..200).prop_map(f32::from), 1 => 0.001f32..1e5];
    prop::collection::vec(prop::collection::vec((0..N_VAR as u16, value), 0..40), 1..700)
}

fn config(steps: &[Step], dense: bool, dtype: Option<&str>, source: &str, batch: usize) -> OpenConfig {
    let transform = serde_json::json!({"steps": steps_json(steps, N_VAR), "dense": dense, "dtype": dtype});
    let sampling = format!(r#"{{"kind":"random","chunk_size":1,"preload_nchunks":{},"batch_size":{batch}}}"#, batch * 2);
    OpenConfig::parse(&format!(
        r#"{{"elements":[{{"name":"X","transform":{transform}}}],"datasets":[{{"sources":{{"X":{source}}}}}],"sampling":{sampling}}}"#
    ))
    .unwrap()
}

fn entries(row: &[(u16, f32)]) -> Vec<(u64, f64)> {
    row.iter().map(|&(c, v)| (u64::from(c), f64::from(v))).collect()
}

fn check(rows: &[Vec<(u16, f32)>], steps: &[Step], sparse: bool, dense: bool, dtype: Option<&str>, batch: usize) {
    let n = rows.len() as u64;
    let ends = rows.iter().scan(0i64, |end, row| {
        *end += row.len() as i64;
        Some(*end)
    });
    let indptr: Vec<i64> = std::iter::once(0).chain(ends).collect();
    let indices: Vec<u16> = rows.iter().flatten().map(|&(c, _)| c).collect();
    let data: Vec<f32> = rows.iter().flatten().map(|&(_, v)| v).collect();
    // dense rows, of which every column is an entry
    let full: Vec<Vec<(u16, f32)>> = rows
        .iter()
        .map(|row| {
            let mut full: Vec<(u16, f32)> = (0..N_VAR as u16).map(|c| (c, 0.0)).collect();
            for &(column, value) in row {
                full[column as usize].1 = value;
            }
            full
        })
        .collect();
    let values: Vec<f32> = full.iter().flatten().map(|&(_, v)| v).collect();
    let (buffers, source, rows) = if sparse {
        let buffers = vec![
            Buffer { address: indptr.as_ptr().addr(), dtype: DType::Int64, shape: vec![n + 1] },
            Buffer { address: indices.as_ptr().addr(), dtype: DType::UInt16, shape: vec![indices.len() as u64] },
            Buffer { address: data.as_ptr().addr(), dtype: DType::Float32, shape: vec![data.len() as u64] },
        ];
        (buffers, format!(r#"{{"csr":{{"indptr":0,"indices":1,"data":2,"shape":[{n},{N_VAR}]}}}}"#), rows)
    } else {
        let shape = vec![n, N_VAR];
        let buffers = vec![Buffer { address: values.as_ptr().addr(), dtype: DType::Float32, shape }];
        (buffers, r#"{"dense":{"data":0}}"#.to_owned(), full.as_slice())
    };
    let config = config(steps, dense, dtype, &source, batch);
    let collection = Collection::open(&config, &buffers, Runtime::start(2, 4).unwrap().into()).unwrap();
    let pipeline = Pipeline::new(collection, config.stream()).unwrap();
    pipeline.start(5, 0).unwrap();
    let mut seen = Vec::new();
    let tolerance = match dtype {
        Some("bfloat16") => 1e-2,
        Some("float16") => 2e-3,
        _ => 1e-5,
    };
    // half precision ends at 65,504
    let same = |got: f64, expected: f64| {
        (got - expected).abs() <= tolerance * expected.abs() + 1e-6 || (got.is_infinite() && expected.abs() > 65_000.0)
    };
    while let Next::Batch(batch) = pipeline.next(None).unwrap() {
        let numbers = reference::values::<i64>(&batch.rows);
        match &batch.elements[0] {
            BatchElement::Csr { indptr, indices, data } => {
                let (ends, columns, got) = (reference::values::<i32>(indptr), reference::values::<i32>(indices), floats(data));
                assert_eq!((ends[numbers.len()] as usize, columns.len()), (columns.len(), got.len()));
                // sorted where the order of columns, or of entries to be added up, asks for it
                let may_move = steps.iter().any(|step| !matches!(step, Step::Normalize(_)));
                for (row, part) in numbers.iter().zip(ends.windows(2)) {
                    let part = part[0] as usize..part[1] as usize;
                    let (mut expected, _) = transformed(&entries(&rows[*row as usize]), N_VAR, steps);
                    let mut got: Vec<(u64, f64)> =
                        columns[part.clone()].iter().map(|&c| c as u64).zip(got[part].iter().copied()).collect();
                    if may_move {
                        // those that were not sorted may stay so
                        got.sort_by_key(|e| e.0);
                        expected.sort_by_key(|e| e.0);
                    }
                    assert_eq!(got.len(), expected.len());
                    for (g, e) in got.iter().zip(&expected) {
                        assert!(g.0 == e.0 && same(g.1, e.1), "row {row}: {g:?}, expected {e:?}");
                    }
                }
            }
            BatchElement::Dense(tensor) => {
                let n_out = tensor.shape[1] as usize;
                let got = floats(tensor);
                for (row, got) in numbers.iter().zip(got.chunks(n_out)) {
                    let (expected, n_var) = transformed(&entries(&rows[*row as usize]), N_VAR, steps);
                    assert_eq!(n_out as u64, n_var);
                    let sums = spread_out(expected, n_out);
                    assert!(got.iter().zip(&sums).all(|(g, e)| same(*g, *e)), "row {row}: {got:?}, expected {sums:?}");
                }
            }
        }
        seen.extend(numbers);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..n as i64).collect::<Vec<_>>());
    pipeline.close();
}

proptest! {
    #![proptest_config(reference::cases(300))]
    #[test]
    fn batches_are_those_of_the_slow_twin(
        rows in rows(),
        steps in steps(),
        (sparse, dense) in any::<(bool, bool)>(),
        dtype in prop_oneof![Just(None), Just(Some("float32")), Just(Some("bfloat16")), Just(Some("float16")), Just(Some("float64"))],
        batch in prop_oneof![1usize..20, 200usize..600],
    ) {
        check(&rows, &steps, sparse, dense, dtype, batch);
    }
}
