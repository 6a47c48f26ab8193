//! Questions to libhdf5 that its Rust interface does not ask, or answers with less.
//!
//! Every call runs behind libhdf5's lock (`sync`), on identifiers of objects that the arguments keep open.

use std::ffi::{CStr, CString};
use std::mem::{ManuallyDrop, MaybeUninit};

use hdf5_metno::sync::sync;
use hdf5_metno::{Attribute, Dataset, Datatype, File, Location, from_id, h5check};
use hdf5_metno_sys::h5a::{H5Aexists, H5Aread};
use hdf5_metno_sys::h5d::{H5D_fill_value_t, H5Dread};
use hdf5_metno_sys::h5l::{H5L_info2_t, H5Lget_info2};
use hdf5_metno_sys::h5o::{H5O_INFO_BASIC, H5O_info2_t, H5O_token_t, H5Oget_info_by_name3, H5Oopen_by_token};
use hdf5_metno_sys::h5p::{
    H5P_DEFAULT, H5Pfill_value_defined, H5Pget_external_count, H5Pget_fill_value, H5Pget_filter2, H5Pget_istore_k, H5Pget_nfilters,
};
use hdf5_metno_sys::h5s::H5S_ALL;
use hdf5_metno_sys::h5t::{
    H5T_class_t, H5T_norm_t, H5T_order_t, H5T_sign_t, H5Tclose, H5Tenum_valueof, H5Tget_class, H5Tget_ebias, H5Tget_fields,
    H5Tget_nmembers, H5Tget_norm, H5Tget_offset, H5Tget_order, H5Tget_precision, H5Tget_sign, H5Tget_size, H5Tget_super,
    H5Tis_variable_str,
};

use crate::base::error::Error;
use crate::schema::DType;

/// The error of a call of libhdf5 on a file that it has opened.
pub(super) fn failed(at: &str, why: &hdf5_metno::Error) -> Error {
    Error::corrupt(at, format!("cannot be read: {why}; the file is damaged, or being written"))
}

/// Longest text of an attribute that is read.
pub(super) const MAX_TEXT_BYTES: usize = 4096;

/// What kind of link there is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    /// To an object of this file.
    Hard,
    /// To a path of this file.
    Soft,
    /// Of a kind that may lead to another file.
    Other,
}

/// The kind of the link at `path`; `None` if there is none.
pub(super) fn link(file: &File, path: &str) -> Option<Link> {
    let path = CString::new(path).ok()?;
    let mut info = MaybeUninit::<H5L_info2_t>::zeroed();
    // SAFETY: a path that ends with a zero byte, and a place for the answer.
    let got = sync(|| unsafe { H5Lget_info2(file.id(), path.as_ptr(), info.as_mut_ptr(), H5P_DEFAULT) });
    if got < 0 {
        return None;
    }
    // SAFETY: the structure begins with the kind, a C enum. It is read as a number, because kinds beyond those that the
    // Rust enum has may be registered.
    Some(match unsafe { info.as_ptr().cast::<i32>().read() } {
        0 => Link::Hard,
        1 => Link::Soft,
        _ => Link::Other,
    })
}

pub(super) fn has_attribute(location: &Location, name: &CStr) -> hdf5_metno::Result<bool> {
    // SAFETY: a name that ends with a zero byte.
    Ok(sync(|| h5check(unsafe { H5Aexists(location.id(), name.as_ptr()) }))? > 0)
}

/// What a path leads to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Object {
    /// Of the file that it lies in.
    pub(super) file: u64,
    pub(super) token: H5O_token_t,
    /// The place of its kind in `H5O_type_t`.
    pub(super) kind: i32,
}

impl Object {
    pub(super) const GROUP: i32 = 0;
    pub(super) const DATASET: i32 = 1;

    /// Without the number of its attributes, for which libhdf5 would look into an index of them.
    pub(super) fn at(file: &File, path: &str) -> hdf5_metno::Result<Self> {
        let path = CString::new(path).map_err(|e| e.to_string())?;
        let mut info = MaybeUninit::<H5O_info2_t>::zeroed();
        sync(|| {
            // SAFETY: a path that ends with a zero byte, and a place for the answer.
            h5check(unsafe { H5Oget_info_by_name3(file.id(), path.as_ptr(), info.as_mut_ptr(), H5O_INFO_BASIC, H5P_DEFAULT) })
        })?;
        let info = info.as_ptr();
        // SAFETY: the fields that were asked for. The kind, a C enum, is read as a number, which may be any.
        unsafe {
            let file = (&raw const (*info).fileno).read();
            Ok(Self { file, token: (&raw const (*info).token).read(), kind: (&raw const (*info).type_).cast::<i32>().read() })
        }
    }

    /// Of its header in the file, from where that begins for libhdf5.
    pub(super) fn address(&self) -> u64 {
        // SAFETY: 16 bytes, in which files on disk have an address of up to 8, the lowest first, and zeros.
        u64::from_le_bytes(unsafe { (&raw const self.token).cast::<[u8; 8]>().read() })
    }

    /// Opens it in a file.
    pub(super) fn open(&self, file: &File) -> hdf5_metno::Result<Location> {
        // SAFETY: a token of this file, or of another opening of it; the identifier that comes belongs to nobody else.
        sync(|| unsafe { from_id(h5check(H5Oopen_by_token(file.id(), self.token))?) })
    }
}

/// An object that was opened, as a dataset.
pub(super) fn into_dataset(location: Location) -> hdf5_metno::Result<Dataset> {
    let location = ManuallyDrop::new(location);
    // SAFETY: the identifier is the object's own, which no longer closes it; one of another kind is an error.
    unsafe { from_id(location.id()) }
}

/// Most children that a node of a tree of chunks of version 1 has in a file.
pub(super) fn max_children(file: &File) -> hdf5_metno::Result<usize> {
    let created = file.fcpl()?;
    let mut half = 0;
    // SAFETY: an open list, and a place for the answer.
    sync(|| h5check(unsafe { H5Pget_istore_k(created.id(), &raw mut half) }))?;
    Ok(2 * half as usize)
}

/// Whether a type is a text or a whole number, and what libhdf5 allocates for one of it is no more than the text has: of other
/// types the Rust interface takes names for UTF-8 that need be none.
pub(super) fn is_text_or_integer(dtype: &Datatype) -> bool {
    sync(|| {
        // SAFETY: the type is open.
        match unsafe { H5Tget_class(dtype.id()) } {
            H5T_class_t::H5T_INTEGER => true,
            // SAFETY: a text; what it is of, if it is of variable length, is closed again.
            H5T_class_t::H5T_STRING => unsafe {
                H5Tis_variable_str(dtype.id()) <= 0 || {
                    let letter = H5Tget_super(dtype.id());
                    letter >= 0 && (H5Tget_size(letter), H5Tclose(letter)).0 == 1
                }
            },
            _ => false,
        }
    })
}

/// Whether a type is a text of variable length, of letters of one byte.
pub(super) fn is_variable_text(dtype: &Datatype) -> bool {
    // SAFETY: the type is open.
    let is_variable = sync(|| unsafe { H5Tis_variable_str(dtype.id()) }) > 0;
    is_variable && is_text_or_integer(dtype)
}

/// A text of fixed length, up to its first zero byte.
pub(super) fn fixed_text(attribute: &Attribute) -> hdf5_metno::Result<String> {
    let dtype = attribute.dtype()?;
    if attribute.size() != 1 || dtype.size() > MAX_TEXT_BYTES {
        return Err("is no single short text".into());
    }
    let mut text = vec![0u8; dtype.size() + 1];
    // SAFETY: the buffer holds the one element of the attribute, in the type it is stored in.
    sync(|| h5check(unsafe { H5Aread(attribute.id(), dtype.id(), text.as_mut_ptr().cast()) }))?;
    let text = CStr::from_bytes_until_nul(&text).map_err(|e| e.to_string())?;
    Ok(text.to_string_lossy().trim_end_matches(' ').to_owned())
}

/// Whether a dataset keeps its data in other files.
pub(super) fn is_external(plist: &hdf5_metno::dataset::DatasetCreate) -> hdf5_metno::Result<bool> {
    // SAFETY: the list is open.
    Ok(sync(|| h5check(unsafe { H5Pget_external_count(plist.id()) }))? > 0)
}

/// Number, name and parameters of each filter of a dataset, in the order in which they are applied.
pub(super) fn filters(plist: &hdf5_metno::dataset::DatasetCreate) -> hdf5_metno::Result<Vec<(i32, String, Vec<u32>)>> {
    // SAFETY: the list is open.
    let n = sync(|| h5check(unsafe { H5Pget_nfilters(plist.id()) }))?;
    let filter = |i| {
        // more than any filter here looks at; where there are more, only these are given
        let (mut parameters, mut n_parameters) = (vec![0u32; 32], 32usize);
        let (mut name, mut flags, mut config) = ([0u8; 64], 0, 0);
        // SAFETY: two buffers of the lengths given, and places for the answers.
        let id = sync(|| unsafe {
            H5Pget_filter2(
                plist.id(),
                i,
                &raw mut flags,
                &raw mut n_parameters,
                parameters.as_mut_ptr(),
                name.len() - 1,
                name.as_mut_ptr().cast(),
                &raw mut config,
            )
        });
        if id < 0 {
            return Err("a filter of the dataset cannot be read".into());
        }
        parameters.truncate(n_parameters);
        let name = CStr::from_bytes_until_nul(&name).map_or("?".into(), CStr::to_string_lossy).into_owned();
        Ok((id, name, parameters))
    };
    (0..n as u32).map(filter).collect()
}

/// Whether a fill value was set.
pub(super) fn has_fill_value(plist: &hdf5_metno::dataset::DatasetCreate) -> hdf5_metno::Result<bool> {
    let mut status = H5D_fill_value_t::H5D_FILL_VALUE_UNDEFINED;
    // SAFETY: a place for the answer, which is one of the three that the enum has.
    sync(|| h5check(unsafe { H5Pfill_value_defined(plist.id(), &raw mut status) }))?;
    Ok(status == H5D_fill_value_t::H5D_FILL_VALUE_USER_DEFINED)
}

/// The fill value that was set, as an element of a type of numbers is stored.
pub(super) fn fill_value(plist: &hdf5_metno::dataset::DatasetCreate, dtype: &Datatype) -> hdf5_metno::Result<Vec<u8>> {
    let mut value = vec![0u8; dtype.size()];
    // SAFETY: room for one element of the type.
    sync(|| h5check(unsafe { H5Pget_fill_value(plist.id(), dtype.id(), value.as_mut_ptr().cast()) }))?;
    Ok(value)
}

/// All elements of a small dataset, as they are stored.
pub(super) fn read_all(dataset: &Dataset, dtype: &Datatype, n_bytes: usize) -> hdf5_metno::Result<Vec<u8>> {
    let mut bytes = vec![0u8; n_bytes];
    // SAFETY: room for all elements of the dataset (`n_bytes`), in the type they are stored in.
    sync(|| h5check(unsafe { H5Dread(dataset.id(), dtype.id(), H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.as_mut_ptr().cast()) }))?;
    Ok(bytes)
}

/// What a datatype is, in a few words.
pub(super) fn kind(dtype: &Datatype) -> String {
    // SAFETY: the type is open.
    let (class, size) = sync(|| unsafe { (H5Tget_class(dtype.id()), H5Tget_size(dtype.id())) });
    let (class, has_bits) = match class {
        H5T_class_t::H5T_INTEGER => ("an integer", true),
        H5T_class_t::H5T_FLOAT => ("a floating-point", true),
        H5T_class_t::H5T_TIME => ("a time", false),
        H5T_class_t::H5T_STRING => ("a text", false),
        H5T_class_t::H5T_BITFIELD => ("a bitfield", true),
        H5T_class_t::H5T_OPAQUE => ("an opaque", false),
        H5T_class_t::H5T_COMPOUND => ("a compound", false),
        H5T_class_t::H5T_REFERENCE => ("a reference", false),
        H5T_class_t::H5T_ENUM => ("an enumeration", false),
        H5T_class_t::H5T_VLEN => ("a variable-length", false),
        H5T_class_t::H5T_ARRAY => ("an array", false),
        H5T_class_t::H5T_COMPLEX => ("a complex", false),
        _ => ("an unknown", false),
    };
    // SAFETY: a type that has a precision.
    let bits = has_bits.then(|| sync(|| unsafe { H5Tget_precision(dtype.id()) }));
    let bits = bits.filter(|bits| *bits != 8 * size).map(|bits| format!(" ({bits} bits)")).unwrap_or_default();
    format!("{class} type of {size} byte{}{bits}", if size == 1 { "" } else { "s" })
}

/// Whether an enumeration is h5py's bool.
fn is_bool(dtype: &Datatype) -> bool {
    let value = |name: &CStr| {
        let mut value = -1i8;
        // SAFETY: a name that ends with a zero byte, and room for a value of a type of one byte; called behind the lock.
        let got = unsafe { H5Tenum_valueof(dtype.id(), name.as_ptr(), (&raw mut value).cast()) };
        (got >= 0).then_some(value)
    };
    // SAFETY: an enumeration; called behind the lock.
    dtype.size() == 1 && unsafe { H5Tget_nmembers(dtype.id()) } == 2 && (value(c"FALSE"), value(c"TRUE")) == (Some(0), Some(1))
}

/// The number type that a datatype is, and whether its bytes are in the order of big-endian machines.
///
/// h5py stores bool as an enumeration of FALSE and TRUE over int8. Julia stores it as a bitfield of 8 bits; those are read as
/// unsigned integers of their size, as h5py reads them.
pub(super) fn number_type(dtype: &Datatype) -> Option<(DType, bool)> {
    sync(|| {
        let id = dtype.id();
        // SAFETY: the type is open.
        let (class, size) = unsafe { (H5Tget_class(id), H5Tget_size(id)) };
        let found = match class {
            H5T_class_t::H5T_ENUM => return is_bool(dtype).then_some((DType::Bool, false)),
            H5T_class_t::H5T_INTEGER => {
                // SAFETY: an integer type.
                let sign = unsafe { H5Tget_sign(id) };
                match (sign, size) {
                    (H5T_sign_t::H5T_SGN_2, 1) => DType::Int8,
                    (H5T_sign_t::H5T_SGN_2, 2) => DType::Int16,
                    (H5T_sign_t::H5T_SGN_2, 4) => DType::Int32,
                    (H5T_sign_t::H5T_SGN_2, 8) => DType::Int64,
                    (H5T_sign_t::H5T_SGN_NONE, 1) => DType::UInt8,
                    (H5T_sign_t::H5T_SGN_NONE, 2) => DType::UInt16,
                    (H5T_sign_t::H5T_SGN_NONE, 4) => DType::UInt32,
                    (H5T_sign_t::H5T_SGN_NONE, 8) => DType::UInt64,
                    _ => return None,
                }
            }
            H5T_class_t::H5T_BITFIELD => match size {
                1 => DType::UInt8,
                2 => DType::UInt16,
                4 => DType::UInt32,
                8 => DType::UInt64,
                _ => return None,
            },
            H5T_class_t::H5T_FLOAT => ieee(dtype)?,
            _ => return None,
        };
        // SAFETY: a number type.
        let (precision, offset, order) = unsafe { (H5Tget_precision(id), H5Tget_offset(id), H5Tget_order(id)) };
        let big_endian = match order {
            H5T_order_t::H5T_ORDER_LE => false,
            H5T_order_t::H5T_ORDER_BE => true,
            _ => return None,
        };
        (precision == 8 * size && offset == 0).then_some((found, big_endian))
    })
}

/// The IEEE 754 type that a floating-point datatype is: others of the same size, such as bfloat16, share nothing but that.
fn ieee(dtype: &Datatype) -> Option<DType> {
    let id = dtype.id();
    let mut fields = [0usize; 5];
    let [sign, exponent, exponent_bits, mantissa, mantissa_bits] = &mut fields;
    // SAFETY: a floating-point type, and places for the answers; called behind the lock.
    let (got, bias, norm) = unsafe {
        let got = H5Tget_fields(id, sign, exponent, exponent_bits, mantissa, mantissa_bits);
        (got, H5Tget_ebias(id), H5Tget_norm(id))
    };
    let (found, expected, expected_bias) = match dtype.size() {
        2 => (DType::Float16, [15, 10, 5, 0, 10], 15),
        4 => (DType::Float32, [31, 23, 8, 0, 23], 127),
        8 => (DType::Float64, [63, 52, 11, 0, 52], 1023),
        _ => return None,
    };
    (got >= 0 && fields == expected && bias == expected_bias && norm == H5T_norm_t::H5T_NORM_IMPLIED).then_some(found)
}
