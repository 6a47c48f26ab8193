//! The slow obvious twin: writes small AnnData stores with zarrs and reads rows back one by one through its
//! general API, knowing nothing of plans, slots or threads.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "shared by several test programs, each using a part")]
#![allow(clippy::single_range_in_vec_init, reason = "zarrs takes one range per dimension")]

#[cfg(feature = "hdf5")]
pub mod hdf5;
pub mod moody;
pub mod steps;

use std::path::Path;
use std::sync::Arc;

use annbatch::batch::{BatchElement, HostBatch, Tensor};
use annbatch::{Collection, DType, OpenConfig, Runtime};
use proptest::prelude::ProptestConfig;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use zarrs::array::codec::{
    BloscCodec, BloscCompressionLevel, BloscCompressor, BloscShuffleMode, Crc32cCodec, GzipCodec, ZstdCodec,
};
use zarrs::array::{Array, ArrayBuilder, ArraySubset, data_type};
use zarrs::filesystem::FilesystemStore;
use zarrs::group::GroupBuilder;

/// So many cases of a property, `ANNBATCH_EXAMPLES` times as many where that is set (`make test-long`).
pub fn cases(n: u32) -> ProptestConfig {
    let times = std::env::var("ANNBATCH_EXAMPLES").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    ProptestConfig::with_cases(n.saturating_mul(times))
}

/// A CSR matrix with f32 values, one triple of vectors.
#[derive(Debug, Clone, Default)]
pub struct Matrix {
    pub n_var: u64,
    pub indptr: Vec<i64>,
    pub indices: Vec<u16>,
    pub data: Vec<f32>,
}

/// How a matrix is chunked and compressed.
#[derive(Debug, Clone, Copy)]
pub struct Chunking {
    pub chunk: u64,
    pub chunks_per_shard: u64,
    pub codec: u8,
}

impl Matrix {
    /// `n_obs` rows with up to `2 * mean` entries each; every value tells its row and place.
    pub fn random(n_obs: usize, n_var: u16, mean: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut out = Self { n_var: u64::from(n_var), indptr: vec![0], ..Self::default() };
        for row in 0..n_obs {
            let n = rng.random_range(0..=(2 * mean).min(n_var as usize));
            let mut columns: Vec<u16> = rand::seq::index::sample(&mut rng, n_var as usize, n).iter().map(|c| c as u16).collect();
            columns.sort_unstable();
            out.data.extend(columns.iter().map(|&c| row as f32 + f32::from(c) / 65_536.0));
            out.indices.extend(columns);
            out.indptr.push(out.indices.len() as i64);
        }
        out
    }

    pub fn n_obs(&self) -> u64 {
        self.indptr.len() as u64 - 1
    }

    /// Writes a `csr_matrix` group at `dir`.
    pub fn write(&self, dir: &Path, chunking: Chunking) {
        let store = Arc::new(FilesystemStore::new(dir).unwrap());
        let mut group = GroupBuilder::new();
        let attributes =
            serde_json::json!({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [self.n_obs(), self.n_var]});
        group.attributes(attributes.as_object().unwrap().clone());
        group.build(Arc::clone(&store), "/").unwrap().store_metadata().unwrap();
        let create = |name: &str, len: usize, dtype: zarrs::array::DataType, fill: zarrs::array::FillValue| {
            let (chunk, item_size) = (chunking.chunk.max(1), fill.size());
            let mut builder = ArrayBuilder::new(vec![len as u64], vec![chunk * chunking.chunks_per_shard.max(1)], dtype, fill);
            if chunking.chunks_per_shard > 0 {
                builder.subchunk_shape(vec![chunk]);
            }
            match chunking.codec {
                0 => {}
                1 => {
                    builder.bytes_to_bytes_codecs(vec![Arc::new(blosc(item_size))]);
                }
                2 => {
                    builder.bytes_to_bytes_codecs(vec![Arc::new(ZstdCodec::new(3, false))]);
                }
                3 => {
                    builder.bytes_to_bytes_codecs(vec![Arc::new(GzipCodec::new(2).unwrap())]);
                }
                #[cfg(feature = "zfp")]
                4 => {
                    builder.array_to_bytes_codec(Arc::new(zarrs::array::codec::ZfpCodec::new_reversible()));
                    builder.bytes_to_bytes_codecs(vec![Arc::new(ZstdCodec::new(3, false))]);
                }
                // uncompressed, but not to be read in parts
                5 => {
                    builder.bytes_to_bytes_codecs(vec![Arc::new(Crc32cCodec::new())]);
                }
                other => panic!("no codec {other}"),
            }
            let array = builder.build(Arc::clone(&store), &format!("/{name}")).unwrap();
            array.store_metadata().unwrap();
            array
        };
        let nnz = self.data.len();
        let all = |n: usize| ArraySubset::new_with_ranges(&[0..n as u64]);
        create("indptr", self.indptr.len(), data_type::int64(), 0i64.into())
            .store_array_subset(&all(self.indptr.len()), &self.indptr)
            .unwrap();
        create("indices", nnz, data_type::uint16(), 0u16.into()).store_array_subset(&all(nnz), &self.indices).unwrap();
        create("data", nnz, data_type::float32(), 0f32.into()).store_array_subset(&all(nnz), &self.data).unwrap();
    }
}

/// Writes a dense matrix of f32 at `dir`, in chunks of `chunk` rows and columns.
pub fn write_dense(dir: &Path, rows: &[Vec<f32>], n_var: u64, chunk: [u64; 2], compressed: bool) {
    let store = Arc::new(FilesystemStore::new(dir).unwrap());
    let (shape, fill) = (vec![rows.len() as u64, n_var], 0f32);
    let mut builder = ArrayBuilder::new(shape.clone(), chunk.to_vec(), data_type::float32(), fill);
    if compressed {
        builder.bytes_to_bytes_codecs(vec![Arc::new(blosc(4))]);
    }
    let array = builder.build(store, "/").unwrap();
    array.store_metadata().unwrap();
    let values: Vec<f32> = rows.concat();
    array.store_array_subset(&ArraySubset::new_with_shape(shape), &values).unwrap();
}

/// A row whose column `c` stands in column `columns[c]` of the joined ones, or nowhere where that is -1; sorted where the kept
/// columns do not keep their order.
pub fn joined(row: &[(u64, f64)], columns: &[i64]) -> Vec<(u64, f64)> {
    let entries = row.iter().map(|&(column, value)| (columns[column as usize], value));
    let mut out: Vec<(u64, f64)> = entries.filter(|e| e.0 >= 0).map(|(column, value)| (column as u64, value)).collect();
    let kept: Vec<i64> = columns.iter().copied().filter(|&c| c >= 0).collect();
    if !kept.is_sorted() {
        out.sort_by_key(|e| e.0);
    }
    out
}

fn blosc(item_size: usize) -> BloscCodec {
    let level = BloscCompressionLevel::try_from(3u8).unwrap_or_else(|_| unreachable!("3 is a level"));
    BloscCodec::new(BloscCompressor::LZ4, level, None, BloscShuffleMode::Shuffle, Some(item_size)).unwrap()
}

/// Reads one row through zarrs, from disk, on its own.
pub struct SlowReader {
    indptr: Array<FilesystemStore>,
    indices: Array<FilesystemStore>,
    data: Array<FilesystemStore>,
}

impl SlowReader {
    pub fn open(dir: &Path) -> Self {
        let open = |name: &str| Array::open(Arc::new(FilesystemStore::new(dir).unwrap()), &format!("/{name}")).unwrap();
        Self { indptr: open("indptr"), indices: open("indices"), data: open("data") }
    }

    pub fn row(&self, row: u64) -> (Vec<u16>, Vec<f32>) {
        let bounds: Vec<i64> = self.indptr.retrieve_array_subset(&ArraySubset::new_with_ranges(&[row..row + 2])).unwrap();
        let entries = ArraySubset::new_with_ranges(&[bounds[0] as u64..bounds[1] as u64]);
        (self.indices.retrieve_array_subset(&entries).unwrap(), self.data.retrieve_array_subset(&entries).unwrap())
    }
}

/// The JSON of a configuration with `X` only.
pub fn config(paths: &[String], sampling: &str, extra: &str) -> OpenConfig {
    let datasets: Vec<String> = paths.iter().map(|p| format!(r#"{{"path":"{p}"}}"#)).collect();
    let json = format!(r#"{{"elements":[{{"name":"X"}}],"datasets":[{}],"sampling":{sampling}{extra}}}"#, datasets.join(","));
    OpenConfig::parse(&json).unwrap()
}

pub fn open(config: &OpenConfig) -> annbatch::Result<Arc<Collection>> {
    Collection::open(config, &[], Arc::new(Runtime::start(2, 8)?))
}

/// The elements of a tensor whose batch has been delivered.
pub fn values<T: Copy>(tensor: &Tensor) -> Vec<T> {
    assert_eq!(tensor.lease.len() % size_of::<T>(), 0);
    // SAFETY: the batch was delivered, so every element is written and no thread writes any more; the lease
    // is page-aligned and the caller names the type that `dtype` says.
    unsafe { std::slice::from_raw_parts(tensor.lease.base().cast::<T>(), tensor.lease.len() / size_of::<T>()) }.to_vec()
}

/// Rows of a delivered batch with f32 values: (global row, columns, values).
pub fn rows_of(batch: &HostBatch) -> Vec<(i64, Vec<i32>, Vec<f32>)> {
    let BatchElement::Csr { indptr, indices, data } = &batch.elements[0] else { panic!("X is sparse") };
    assert_eq!((indptr.dtype, indices.dtype, data.dtype), (DType::Int32, DType::Int32, DType::Float32));
    let (rows, indptr): (Vec<i64>, Vec<i32>) = (values(&batch.rows), values(indptr));
    let (indices, data): (Vec<i32>, Vec<f32>) = (values(indices), values(data));
    assert_eq!(indptr.len(), rows.len() + 1);
    assert_eq!(*indptr.last().unwrap() as usize, data.len());
    rows.iter()
        .zip(indptr.windows(2))
        .map(|(&row, p)| (row, indices[p[0] as usize..p[1] as usize].to_vec(), data[p[0] as usize..p[1] as usize].to_vec()))
        .collect()
}
