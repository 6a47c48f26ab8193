//! Encoded chunk → elements → rows in their slots.
//!
//! [`codec`] turns the bytes of one chunk into native-endian elements in per-thread scratch. [`scatter`] copies runs of those
//! elements to where they belong, and widens their type on the way. Below them stand, from the lowest up:
//!
//! - `limits`: what every decoder checks; `stored`: how elements lie, item by item or plane by plane;
//! - decoders of streams: `deflate`, `zstandard`, [`lz4`], `lzf`, `bits` (bit planes), and `c_blosc` for whatever [`blosc`] leaves;
//! - [`blosc`], block by block; `elements`: what was decoded, however it lies;
//! - `filters` of HDF5, and `zfp`.

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
