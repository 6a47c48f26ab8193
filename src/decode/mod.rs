//! Encoded chunk → elements → rows in their slots.
//!
//! [`codec`] turns the bytes of one chunk into native-endian elements in per-thread scratch, with [`blosc`] and [`lz4`]
//! for what writers use by default; [`scatter`] copies runs of those elements to where they belong, widening the type
//! on the way.

mod blosc;
mod codec;
mod lz4;
pub mod scatter;
#[cfg(feature = "zfp")]
mod zfp;

pub use codec::{ChunkCodec, Decoded, Scratch};
