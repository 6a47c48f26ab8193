//! Encoded chunk → elements → rows in their slots.
//!
//! [`codec`] turns the bytes of one chunk into native-endian elements in per-thread scratch; [`scatter`]
//! copies runs of those elements to where they belong, widening the type on the way.

mod codec;
pub mod scatter;
#[cfg(feature = "zfp")]
mod zfp;

pub use codec::{ChunkCodec, Decoded, Scratch};
