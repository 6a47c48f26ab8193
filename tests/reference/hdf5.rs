//! Small .h5ad files, whose chunks are encoded here and written as they are.

use std::ffi::CString;
use std::io::Write;
use std::path::Path;

use hdf5_metno::dataset::DatasetCreate;
use hdf5_metno::sync::sync;
use hdf5_metno::types::VarLenUnicode;
use hdf5_metno::{Dataspace, Datatype, File, Group, H5Type, h5check};
use hdf5_metno_sys::h5d::{H5Dclose, H5Dcreate2, H5Dwrite_chunk};
use hdf5_metno_sys::h5i::hid_t;
use hdf5_metno_sys::h5p::{H5P_DEFAULT, H5Pset_filter};
use hdf5_metno_sys::h5z::{H5Z_FILTER_DEFLATE, H5Z_FLAG_OPTIONAL};

use super::Matrix;

/// How datasets are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Contiguous,
    /// In chunks of so many elements.
    Chunked(usize),
    /// Shuffled, then deflated.
    Deflated(usize),
}

impl Matrix {
    /// Writes an .h5ad file with this matrix as X.
    pub fn write_h5ad(&self, path: &Path, storage: Storage) {
        let file = File::create(path).unwrap();
        let group = file.create_group("X").unwrap();
        let encoding: VarLenUnicode = "csr_matrix".parse().unwrap();
        group.new_attr::<VarLenUnicode>().create("encoding-type").unwrap().write_scalar(&encoding).unwrap();
        let shape = [self.n_obs() as i64, self.n_var as i64];
        group.new_attr_builder().with_data(&shape).create("shape").unwrap();
        write(&group, "data", &self.data, storage);
        write(&group, "indices", &self.indices, storage);
        write(&group, "indptr", &self.indptr, storage);
    }
}

fn write<T: H5Type + Copy>(group: &Group, name: &str, values: &[T], storage: Storage) {
    let builder = group.new_dataset_builder();
    // libhdf5 allows no chunks longer than a dimension that cannot grow
    let at_most = |n: usize| n.min(values.len());
    match storage {
        Storage::Contiguous => drop(builder.no_chunk().with_data(values).create(name).unwrap()),
        Storage::Chunked(n) => drop(builder.chunk(at_most(n)).with_data(values).create(name).unwrap()),
        Storage::Deflated(n) => {
            let n = at_most(n);
            let dataset = create_deflated::<T>(group, name, values.len(), n);
            for (number, part) in values.chunks(n).enumerate() {
                let encoded = deflated(part, n);
                let offset = [(number * n) as u64];
                // SAFETY: an open dataset, a place of its one dimension, and a buffer of the length given.
                let written =
                    || unsafe { H5Dwrite_chunk(dataset, H5P_DEFAULT, 0, offset.as_ptr(), encoded.len(), encoded.as_ptr().cast()) };
                h5check(sync(written)).unwrap();
            }
            // SAFETY: opened above.
            h5check(sync(|| unsafe { H5Dclose(dataset) })).unwrap();
        }
    }
}

/// A dataset of shuffled and deflated chunks. libhdf5 has no zlib here and cannot make them, which its Rust interface would
/// not let pass.
fn create_deflated<T: H5Type>(group: &Group, name: &str, len: usize, chunk: usize) -> hid_t {
    let plist = DatasetCreate::build().chunk(chunk).shuffle().finish().unwrap();
    let (dtype, space) = (Datatype::from_type::<T>().unwrap(), Dataspace::try_new(len).unwrap());
    let (level, name) = (4u32, CString::new(name).unwrap());
    let create = || {
        // SAFETY: open objects, one parameter, and a name that ends with a zero byte.
        unsafe {
            h5check(H5Pset_filter(plist.id(), H5Z_FILTER_DEFLATE, H5Z_FLAG_OPTIONAL, 1, &raw const level))?;
            h5check(H5Dcreate2(group.id(), name.as_ptr(), dtype.id(), space.id(), H5P_DEFAULT, plist.id(), H5P_DEFAULT))
        }
    };
    sync(create).unwrap()
}

/// A whole chunk of `n` elements, of which `values` are the first.
fn deflated<T: Copy>(values: &[T], n: usize) -> Vec<u8> {
    let size = size_of::<T>();
    // SAFETY: numbers without padding.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    let byte = |item: usize, j: usize| bytes.get(item * size + j).copied().unwrap_or(0);
    let planes: Vec<u8> = (0..size).flat_map(|j| (0..n).map(move |item| byte(item, j))).collect();
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&planes).unwrap();
    encoder.finish().unwrap()
}
