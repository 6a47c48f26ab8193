//! HDF5 files against the matrix that they were made of, and by the reads that they cost.
//!
//! What h5py writes is covered by `tests/python/formats/test_hdf5.py`, which has all of libhdf5's filters.
#![cfg(feature = "hdf5")]

mod reference;

use std::path::Path;
use std::sync::Arc;

use annbatch::collection::{ArraySource, Source};
use annbatch::layout::{Address, ChunkedArray};
use annbatch::{Collection, Next, Pipeline};
use hdf5_metno::dataset::ChunkOpts;
use proptest::prelude::*;
use reference::hdf5::Storage;
use reference::{Matrix, config, open, rows_of};

fn sampling(kind: &str) -> String {
    format!(r#"{{"kind":"{kind}","chunk_size":5,"preload_nchunks":6,"batch_size":10}}"#)
}

/// Streams an epoch and compares every row.
fn check(path: &Path, matrix: &Matrix) -> Arc<Collection> {
    let config = config(&[path.display().to_string()], &sampling("random"), "");
    let collection = open(&config).unwrap();
    let pipeline = Pipeline::new(Arc::clone(&collection), config.stream()).unwrap();
    pipeline.start(3, 0).unwrap();
    let mut seen = 0;
    while let Next::Batch(batch) = pipeline.next(None).unwrap() {
        for (row, columns, values) in rows_of(&batch) {
            let entries = matrix.indptr[row as usize] as usize..matrix.indptr[row as usize + 1] as usize;
            assert!(columns.iter().copied().eq(matrix.indices[entries.clone()].iter().map(|&c| i32::from(c))), "row {row}");
            assert_eq!(values, matrix.data[entries], "row {row}");
            seen += 1;
        }
    }
    assert_eq!(seen, matrix.n_obs());
    assert_eq!(pipeline.stats()["chunks_general_path"], 0);
    collection
}

fn data_of(collection: &Collection) -> &Arc<ChunkedArray> {
    let Source::Csr(csr) = &collection.elements()[0].sources[0] else { panic!("X is sparse") };
    let ArraySource::Chunked(data) = &csr.data else { panic!("data is stored") };
    data
}

proptest! {
    #![proptest_config(reference::cases(30))]
    #[test]
    fn epochs_equal_the_matrix(
        n_obs in 1usize..150, n_var in 1u16..300, mean in 0usize..40, seed in any::<u64>(),
        storage in prop_oneof![
            Just(Storage::Contiguous), (1usize..700).prop_map(Storage::Chunked), (1usize..700).prop_map(Storage::Deflated),
        ],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.h5ad");
        let matrix = Matrix::random(n_obs, n_var, mean, seed);
        // libhdf5 makes no chunked dataset of a fixed number of no elements
        prop_assume!(!matrix.data.is_empty());
        matrix.write_h5ad(&path, storage);
        check(&path, &matrix);
    }
}

#[test]
fn chunks_lie_where_libhdf5_says_and_rows_are_read_by_range() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.h5ad");
    let matrix = Matrix::random(200, 900, 100, 5);
    for storage in [Storage::Contiguous, Storage::Chunked(1000), Storage::Deflated(1000)] {
        matrix.write_h5ad(&path, storage);
        let collection = check(&path, &matrix);
        let data = data_of(&collection);
        assert_eq!(data.is_verbatim(), !matches!(storage, Storage::Deflated(_)));
        let file = std::fs::read(&path).unwrap();
        let Address::Stored(key, range) = data.address(1).unwrap_or(Address::Fill) else {
            assert_eq!(storage, Storage::Contiguous, "which is one piece");
            continue;
        };
        assert_eq!(&*key, "");
        if data.is_verbatim() {
            let expected: Vec<u8> = matrix.data[1000..2000].iter().flat_map(|v| v.to_ne_bytes()).collect();
            assert_eq!(&file[range.start as usize..range.end as usize], &expected);
        }
        assert_eq!(data.address(data.grid()[0]).unwrap(), Address::Fill);
    }
}

/// An option of which h5py knows nothing: chunks at the edges are stored whole, but not filtered.
#[test]
fn edge_chunks_may_be_unfiltered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.h5ad");
    let matrix = Matrix::random(100, 90, 20, 5);
    matrix.write_h5ad(&path, Storage::Chunked(64));
    assert_ne!(matrix.data.len() % 64, 0);
    {
        let file = hdf5_metno::File::open_rw(&path).unwrap();
        let group = file.group("X").unwrap();
        group.unlink("data").unwrap();
        let builder = group.new_dataset_builder().chunk(64).shuffle().fletcher32();
        let builder = builder.chunk_opts(ChunkOpts::DONT_FILTER_PARTIAL_CHUNKS);
        builder.with_data(&matrix.data[..]).create("data").unwrap();
    }
    let collection = check(&path, &matrix);
    let data = data_of(&collection);
    let last = data.grid()[0] - 1;
    assert!(data.codec_of(last).is_verbatim() && !data.codec_of(0).is_verbatim() && !data.is_verbatim());
    assert!(matches!(data.address(last).unwrap(), Address::Stored(_, range) if range.end - range.start == 256));
}
