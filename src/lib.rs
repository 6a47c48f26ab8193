//! Mini-batches from out-of-core AnnData stores.
//!
//! Turns rows of sparse and dense matrices in Zarr stores and HDF5 files into batches in pooled host memory, reading ahead
//! of the consumer: plan, fetch, decode and scatter, all bounded. Data flows one way through these modules:
//!
//! | module | turns | into |
//! |---|---|---|
//! | [`store`] | object, byte ranges | bytes |
//! | `layout` | array metadata | chunk → (object, byte range, codec chain) |
//! | `decode` | encoded chunk | elements; elements into slots |
//! | [`collection`] | datasets | one observation axis of elements |
//! | [`sampler`] | epoch seed | [`LoadRequest`](sampler::LoadRequest)s |
//! | `plan` | request | which chunks for which slots, pure |
//! | [`arena`] | sizes | pooled leases |
//! | `fetch` | plan | encoded chunks, within a byte budget and an I/O depth |
//! | [`batch`] | layout | [`HostBatch`](batch::HostBatch) |
//! | `finish` | filled batch | delivered batch, on the host or for a device |
//! | [`device`] | `HostBatch` | [`DeviceBatch`](device::DeviceBatch), in the memory of a GPU |
//! | [`pipeline`] | all of the above | batches in order, ahead of the consumer |
//!
//! `ARCHITECTURE.md` in the repository says why each is as it is.
//!
//! ```no_run
//! use annbatch::{Collection, Next, OpenConfig, Pipeline, Runtime};
//!
//! # fn main() -> annbatch::Result<()> {
//! let config = OpenConfig::parse(r#"{
//!     "elements": [{"name": "X"}],
//!     "datasets": [{"path": "collection.zarr/dataset_0"}],
//!     "sampling": {"kind": "random", "chunk_size": 256, "preload_nchunks": 64, "batch_size": 4096}
//! }"#)?;
//! let collection = Collection::open(&config, &[], Runtime::start(2, 32)?.into())?;
//! let pipeline = Pipeline::new(collection, config.stream())?;
//! pipeline.start(42, 0)?;
//! while let Next::Batch(batch) = pipeline.next(None)? {
//!     println!("{} rows", batch.n_rows());
//! }
//! # Ok(())
//! # }
//! ```

#![allow(rustdoc::private_intra_doc_links, reason = "who reads them reads the source")]
#![cfg_attr(
    not(feature = "internals"),
    allow(dead_code, unreachable_pub, unused_imports, reason = "what only tests and benches look into is public with `internals`")
)]

pub mod arena;
mod base;
pub mod batch;
pub mod collection;
mod config;
pub mod device;
mod ffi;
pub mod pipeline;
mod registry;
mod runtime;
pub mod sampler;
mod schema;
pub mod store;
#[cfg(feature = "tch")]
pub mod tch;

// Stages that this crate's tests and benches look into. Nothing of them is promised to stay.
#[cfg(not(feature = "internals"))]
mod coalesce;
#[cfg(feature = "internals")]
pub mod coalesce;
#[cfg(not(feature = "internals"))]
mod decode;
#[cfg(feature = "internals")]
pub mod decode;
#[cfg(not(feature = "internals"))]
mod fetch;
#[cfg(feature = "internals")]
pub mod fetch;
#[cfg(not(feature = "internals"))]
mod finish;
#[cfg(feature = "internals")]
pub mod finish;
#[cfg(not(feature = "internals"))]
mod layout;
#[cfg(feature = "internals")]
pub mod layout;
#[cfg(not(feature = "internals"))]
mod plan;
#[cfg(feature = "internals")]
pub mod plan;
#[cfg(not(feature = "internals"))]
mod transform;
#[cfg(feature = "internals")]
pub mod transform;

pub use base::error::{Error, Result};
pub use base::stats;
pub use collection::Collection;
pub use config::{
    ByteSize, ChunkParameters, DatasetConfig, ElementConfig, Hdf5Place, OpenConfig, Sampling, SourceConfig, StepConfig,
    StreamConfig, TransformConfig,
};
pub use pipeline::{Next, Pipeline};
pub use runtime::Runtime;
pub use schema::{DType, Delivery};
