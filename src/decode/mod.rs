//! Encoded chunk → elements → rows in their slots.
//!
//! [`codec`] turns the bytes of one chunk into native-endian elements in per-thread scratch, with [`blosc`] and [`lz4`]
//! for what writers use by default and `filters` for HDF5; [`scatter`] copies runs of those elements to where they belong, widening the type
//! on the way.

mod bits;
mod blosc;
mod c_blosc;
mod codec;
mod deflate;
mod elements;
#[cfg(feature = "hdf5")]
mod filters;
mod limits;
mod lz4;
#[cfg(feature = "hdf5")]
mod lzf;
pub mod scatter;
mod stored;
#[cfg(feature = "zfp")]
mod zfp;
mod zstandard;

pub use blosc::{Extract, Outline};
pub use codec::ChunkCodec;
pub use elements::{Decoded, Scratch};
#[cfg(feature = "hdf5")]
pub use filters::Filter;
