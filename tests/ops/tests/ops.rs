//! Epochs of small matrices, from disk and from memory, through the op library alone.

use annbatch_ops_test::{Value, call, write_array};
use tch::{Kind, Tensor};

/// Row r holds r % 4 entries: columns r % 4 apart, values r + column / 100.
fn matrix(n_obs: usize) -> (Vec<i64>, Vec<i32>, Vec<f32>) {
    let (mut indptr, mut indices, mut data) = (vec![0], vec![], vec![]);
    for row in 0..n_obs {
        for column in (0..row % 4).map(|i| i * 5 + row % 4) {
            indices.push(column as i32);
            data.push(row as f32 + column as f32 / 100.0);
        }
        indptr.push(indices.len() as i64);
    }
    (indptr, indices, data)
}

const SAMPLING: &str = r#"{"kind":"random","chunk_size":3,"preload_nchunks":4,"batch_size":6}"#;

/// Runs one epoch and compares every row.
fn check_epoch(state: &Tensor, n_obs: usize) {
    let (indptr, indices, data) = matrix(n_obs);
    call("start", vec![Value::tensor(state), Value::int(7), Value::int(0)]).expect("start");
    let mut seen = Vec::new();
    loop {
        let batch = call("load", vec![Value::tensor(state), Value::none(), Value::int(0)]).expect("load").into_tensors();
        let [rows, got_indptr, got_indices, got_data] = &batch[..] else { panic!("{} tensors", batch.len()) };
        assert_eq!(
            (rows.kind(), got_indptr.kind(), got_indices.kind(), got_data.kind()),
            (Kind::Int64, Kind::Int, Kind::Int, Kind::Float)
        );
        let rows: Vec<i64> = rows.try_into().unwrap();
        if rows.is_empty() {
            break;
        }
        let (p, i, d): (Vec<i32>, Vec<i32>, Vec<f32>) =
            (got_indptr.try_into().unwrap(), got_indices.try_into().unwrap(), got_data.try_into().unwrap());
        for (k, &row) in rows.iter().enumerate() {
            let (got, stored) =
                (p[k] as usize..p[k + 1] as usize, indptr[row as usize] as usize..indptr[row as usize + 1] as usize);
            assert_eq!(i[got.clone()], indices[stored.clone()]);
            assert_eq!(d[got], data[stored]);
        }
        seen.extend(rows);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..n_obs as i64).collect::<Vec<_>>());
}

#[test]
fn an_epoch_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (indptr, indices, data) = matrix(50);
    let x = dir.path().join("X");
    write_array(&x.join("indptr"), "int64", &indptr.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(), 8, 9);
    write_array(&x.join("indices"), "int32", &indices.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(), 4, 7);
    write_array(&x.join("data"), "float32", &data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(), 4, 11);
    let attributes = serde_json::json!({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [50, 20]});
    std::fs::write(
        x.join("zarr.json"),
        serde_json::json!({"zarr_format": 3, "node_type": "group", "attributes": attributes}).to_string(),
    )
    .unwrap();
    let config =
        format!(r#"{{"elements":[{{"name":"X"}}],"datasets":[{{"path":"{}"}}],"sampling":{SAMPLING}}}"#, dir.path().display());
    let state = call("open", vec![Value::text(&config), Value::tensors(&[])]).expect("open").into_tensor();
    check_epoch(&state, 50);
    check_epoch(&state, 50);
    let stats: serde_json::Value = serde_json::from_str(&call("stats", vec![Value::tensor(&state)]).unwrap().into_text()).unwrap();
    assert_eq!(stats["rows_delivered"], 100);
    assert!(stats["bytes_read"].as_u64().unwrap() > 0);
    call("close", vec![Value::tensor(&state)]).expect("close");
    assert!(call("load", vec![Value::tensor(&state), Value::none(), Value::int(0)]).is_none(), "a closed state raises");
}

#[test]
fn an_epoch_from_memory_keeps_its_buffers_alive() {
    let (indptr, indices, data) = matrix(50);
    let config = format!(
        r#"{{"elements":[{{"name":"X"}}],"sampling":{SAMPLING},
            "datasets":[{{"sources":{{"X":{{"csr":{{"indptr":0,"indices":1,"data":2,"shape":[50,20]}}}}}}}}]}}"#
    );
    let state = {
        let (a, b, c) = (Tensor::from_slice(&indptr), Tensor::from_slice(&indices), Tensor::from_slice(&data));
        call("open", vec![Value::text(&config), Value::tensors(&[&a, &b, &c])]).expect("open").into_tensor()
    };
    check_epoch(&state, 50);
    let copy = state.copy();
    assert!(call("load", vec![Value::tensor(&copy), Value::none(), Value::int(0)]).is_none(), "a copy of a state raises");
}
