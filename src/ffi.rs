//! The cxx bridge, and nothing else: each function converts, calls the crate once and catches panics.

use std::time::Duration;

use crate::base::error::{Error, Result, catch};
use crate::base::fork;
use crate::batch::Tensor;
use crate::collection::{self, Buffer, Collection};
use crate::config::{OpenConfig, StreamConfig};
use crate::device::DeviceBatch;
use crate::device::batch::Output;
use crate::device::driver::Stream;
use crate::device::transfer::Ready;
use crate::pipeline::{Next, Pipeline};
use crate::registry::tables;
use crate::runtime::Runtime;
use crate::sampler::LoadRequest;
use crate::schema;
use std::sync::Arc;

// cxx writes items without documentation and with unsafe of its own
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks, unreachable_pub)]
#[cxx::bridge(namespace = "annbatch::core")]
mod bridge {
    /// Element types; the order is part of the bridge.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum DType {
        Bool,
        Int8,
        Int16,
        Int32,
        Int64,
        UInt8,
        UInt16,
        UInt32,
        UInt64,
        Float16,
        Float32,
        Float64,
        BFloat16,
    }

    /// A contiguous row-major tensor lent by the caller until the state tensor dies.
    struct BufferView {
        address: usize,
        dtype: DType,
        shape: Vec<i64>,
    }

    extern "Rust" {
        /// One batch, or word that there is none yet.
        type Delivered;
        /// One tensor of a batch; dropping it returns the memory to the pool.
        type Lease;

        fn is_pending(self: &Delivered) -> bool;
        fn n_tensors(self: &Delivered) -> usize;
        fn take(self: &mut Delivered, i: usize) -> Result<Box<Lease>>;
        fn address(self: &Lease) -> usize;
        fn dtype(self: &Lease) -> DType;
        fn shape(self: &Lease) -> Vec<i64>;

        /// One batch on its way to a GPU, or word that there is none yet. Dropped before it was placed, it is the next one
        /// again.
        type DeviceDelivered;

        fn is_pending(self: &DeviceDelivered) -> bool;
        fn n_tensors(self: &DeviceDelivered) -> usize;
        fn dtype(self: &DeviceDelivered, i: usize) -> Result<DType>;
        fn shape(self: &DeviceDelivered, i: usize) -> Result<Vec<i64>>;
        fn rows(self: &DeviceDelivered) -> &[i64];
        unsafe fn place(self: &mut DeviceDelivered, addresses: &[u64], stream: usize) -> Result<()>;

        fn open(config: &str, buffers: &Vec<BufferView>) -> Result<i64>;
        fn stream(id: i64, address: usize, config: &str) -> Result<i64>;
        fn bind(id: i64, address: usize) -> Result<()>;
        fn check(id: i64, address: usize) -> Result<()>;
        fn layout_number(id: i64) -> Result<i64>;
        fn layout_json(number: i64) -> Result<String>;
        fn start(id: i64, address: usize, epoch_seed: i64, first_batch: i64) -> Result<()>;
        fn submit(id: i64, address: usize, rows: &[i64], positions: &[i64], sizes: &[i64]) -> Result<()>;
        fn finish(id: i64, address: usize) -> Result<()>;
        fn ready(id: i64, address: usize, timeout_ms: i64) -> Result<bool>;
        fn load(id: i64, address: usize, timeout_ms: i64) -> Result<Box<Delivered>>;
        fn device_of(id: i64, address: usize) -> Result<i64>;
        fn load_on_device(id: i64, address: usize, timeout_ms: i64) -> Result<Box<DeviceDelivered>>;
        fn describe(id: i64, address: usize) -> Result<String>;
        fn stats(id: i64, address: usize) -> Result<String>;
        fn locate(id: i64, address: usize, rows: &[i64]) -> Result<String>;
        fn texts(file: &str, path: &str) -> Result<Vec<u8>>;
        fn close(id: i64, address: usize) -> Result<()>;
        fn abandon(id: i64);
        fn close_all();
        /// To be called when the library is loaded: a fork while another thread is in the middle of the first call would
        /// come too early to be noticed.
        fn watch_forks();
        fn version() -> String;
    }
}

use bridge::{BufferView, DType};

/// Tensors of one batch, each to be taken once.
struct Delivered {
    tensors: Option<Vec<Option<Tensor>>>,
}

/// A batch whose tensors C++ is to make, and the queue that has it back if it cannot.
struct DeviceDelivered {
    batch: Option<DeviceBatch>,
    from: Option<Arc<Ready>>,
}

/// One tensor on loan to torch.
struct Lease(Tensor);

/// An error as the op library throws it: `[annbatch:Kind] message`.
struct Thrown(Error);

impl std::fmt::Display for Thrown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[annbatch:{}] {}", self.0.kind(), self.0)
    }
}

/// Runs `f` so that neither an error's kind nor a panic is lost on the way to C++.
fn guard<T>(f: impl FnOnce() -> Result<T>) -> std::result::Result<T, Thrown> {
    catch(f).map_err(Thrown)
}

impl DType {
    fn from_core(dtype: schema::DType) -> Self {
        use schema::DType as D;
        match dtype {
            D::Bool => Self::Bool,
            D::Int8 => Self::Int8,
            D::Int16 => Self::Int16,
            D::Int32 => Self::Int32,
            D::Int64 => Self::Int64,
            D::UInt8 => Self::UInt8,
            D::UInt16 => Self::UInt16,
            D::UInt32 => Self::UInt32,
            D::UInt64 => Self::UInt64,
            D::Float16 => Self::Float16,
            D::Float32 => Self::Float32,
            D::Float64 => Self::Float64,
            D::BFloat16 => Self::BFloat16,
        }
    }

    fn to_core(self) -> Result<schema::DType> {
        schema::DType::ALL
            .into_iter()
            .find(|&d| Self::from_core(d) == self)
            .ok_or_else(|| Error::argument("buffers", "has a type that is no element type"))
    }
}

fn sizes(shape: &[i64]) -> Result<Vec<u64>> {
    shape.iter().map(|&d| u64::try_from(d).map_err(|_| Error::argument("buffers", format!("has shape {shape:?}")))).collect()
}

impl Delivered {
    fn is_pending(&self) -> bool {
        self.tensors.is_none()
    }

    fn n_tensors(&self) -> usize {
        self.tensors.as_ref().map_or(0, Vec::len)
    }

    fn take(&mut self, i: usize) -> std::result::Result<Box<Lease>, Thrown> {
        let tensor = self.tensors.as_mut().and_then(|t| t.get_mut(i)).and_then(Option::take);
        guard(|| tensor.map(|t| Box::new(Lease(t))).ok_or_else(|| Error::Internal { message: format!("tensor {i} taken twice") }))
    }
}

impl DeviceDelivered {
    fn is_pending(&self) -> bool {
        self.batch.is_none()
    }

    fn n_tensors(&self) -> usize {
        self.batch.as_ref().map_or(0, |batch| batch.outputs().len())
    }

    fn output(&self, i: usize) -> Result<&Output> {
        let output = self.batch.as_ref().and_then(|batch| batch.outputs().get(i));
        output.ok_or_else(|| Error::Internal { message: format!("there is no tensor {i}") })
    }

    fn dtype(&self, i: usize) -> std::result::Result<DType, Thrown> {
        guard(|| Ok(DType::from_core(self.output(i)?.dtype)))
    }

    fn shape(&self, i: usize) -> std::result::Result<Vec<i64>, Thrown> {
        guard(|| Ok(self.output(i)?.shape.iter().map(|&d| d as i64).collect()))
    }

    fn rows(&self) -> &[i64] {
        self.batch.as_ref().map_or(&[], DeviceBatch::rows)
    }

    /// # Safety
    /// As for [`DeviceBatch::place`].
    unsafe fn place(&mut self, addresses: &[u64], stream: usize) -> std::result::Result<(), Thrown> {
        guard(|| {
            let batch = self.batch.as_mut().ok_or_else(|| Error::Internal { message: "no batch to place".into() })?;
            // SAFETY: the caller's promise.
            unsafe { batch.place(addresses, Stream(stream as u64)) }?;
            self.batch = None;
            Ok(())
        })
    }
}

impl Drop for DeviceDelivered {
    fn drop(&mut self) {
        if let (Some(batch), Some(from)) = (self.batch.take(), self.from.take()) {
            // dropped by C++, which nobody's panic may reach
            let _ = guard(|| {
                from.put_back(batch);
                Ok(())
            });
        }
    }
}

impl Lease {
    fn address(&self) -> usize {
        self.0.lease.base().addr()
    }

    fn dtype(&self) -> DType {
        DType::from_core(self.0.dtype)
    }

    fn shape(&self) -> Vec<i64> {
        self.0.shape.iter().map(|&d| d as i64).collect()
    }
}

#[expect(clippy::ptr_arg, reason = "the bridge passes a rust::Vec")]
fn open(config: &str, buffers: &Vec<BufferView>) -> std::result::Result<i64, Thrown> {
    guard(|| {
        let config = OpenConfig::parse(config)?;
        let buffers = buffers
            .iter()
            .map(|b| Ok(Buffer { address: b.address, dtype: b.dtype.to_core()?, shape: sizes(&b.shape)? }))
            .collect::<Result<Vec<_>>>()?;
        let runtime = Runtime::get(config.threads, config.io_depth, &tables().runtimes)?;
        let collection = Collection::open(&config, &buffers, runtime)?;
        Ok(tables().insert(Pipeline::new(collection, config.stream())?))
    })
}

fn stream(id: i64, address: usize, config: &str) -> std::result::Result<i64, Thrown> {
    guard(|| {
        let collection = Arc::clone(tables().get(id, address)?.collection());
        Ok(tables().insert(Pipeline::new(collection, StreamConfig::parse(config)?)?))
    })
}

fn bind(id: i64, address: usize) -> std::result::Result<(), Thrown> {
    guard(|| tables().bind(id, address))
}

fn check(id: i64, address: usize) -> std::result::Result<(), Thrown> {
    guard(|| tables().get(id, address).map(drop))
}

fn layout_number(id: i64) -> std::result::Result<i64, Thrown> {
    guard(|| Ok(tables().layout_number(&tables().get_unbound(id)?.collection().layout_json())))
}

fn layout_json(number: i64) -> std::result::Result<String, Thrown> {
    guard(|| tables().layout(number))
}

fn start(id: i64, address: usize, epoch_seed: i64, first_batch: i64) -> std::result::Result<(), Thrown> {
    guard(|| {
        let first = u64::try_from(first_batch)
            .map_err(|_| Error::argument("first_batch", format!("is {first_batch}; expected at least 0")))?;
        tables().get(id, address)?.start(epoch_seed as u64, first)
    })
}

fn submit(id: i64, address: usize, rows: &[i64], positions: &[i64], sizes: &[i64]) -> std::result::Result<(), Thrown> {
    guard(|| {
        let pipeline = tables().get(id, address)?;
        pipeline.submit(request(pipeline.collection(), rows, positions, sizes)?)
    })
}

/// Checks a submitted request against the collection and itself.
fn request(collection: &Collection, rows: &[i64], positions: &[i64], sizes: &[i64]) -> Result<LoadRequest> {
    let rows = rows.iter().map(|&r| collection.check_row(r)).collect::<Result<Vec<_>>>()?;
    let positions = positions
        .iter()
        .map(|&p| {
            let inside = u32::try_from(p).ok().filter(|&p| (p as usize) < rows.len());
            inside.ok_or_else(|| Error::argument("positions", format!("{p} is out of range for {} rows", rows.len())))
        })
        .collect::<Result<Vec<_>>>()?;
    let sizes = sizes
        .iter()
        .map(|&s| {
            let size = u32::try_from(s).ok().filter(|&s| s > 0);
            size.ok_or_else(|| Error::argument("sizes", format!("{s} is no batch size; expected at least 1")))
        })
        .collect::<Result<Vec<_>>>()?;
    let total: u64 = sizes.iter().map(|&s| u64::from(s)).sum();
    if total != positions.len() as u64 {
        return Err(Error::argument("sizes", format!("add up to {total}; expected {} (the number of positions)", positions.len())));
    }
    Ok(LoadRequest { rows, positions, sizes })
}

fn finish(id: i64, address: usize) -> std::result::Result<(), Thrown> {
    guard(|| tables().get(id, address)?.finish())
}

fn timeout(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

fn ready(id: i64, address: usize, timeout_ms: i64) -> std::result::Result<bool, Thrown> {
    guard(|| tables().get(id, address)?.is_ready(timeout(timeout_ms)))
}

fn load(id: i64, address: usize, timeout_ms: i64) -> std::result::Result<Box<Delivered>, Thrown> {
    guard(|| {
        let pipeline = tables().get(id, address)?;
        let batch = match pipeline.next(Some(timeout(timeout_ms)))? {
            Next::Pending => return Ok(Box::new(Delivered { tensors: None })),
            Next::Batch(batch) => batch,
            Next::End => pipeline.end_batch()?,
        };
        Ok(Box::new(Delivered { tensors: Some(batch.into_tensors().into_iter().map(Some).collect()) }))
    })
}

/// Number of the GPU that a stream delivers to, -1 for host memory.
fn device_of(id: i64, address: usize) -> std::result::Result<i64, Thrown> {
    guard(|| Ok(tables().get(id, address)?.device().map_or(-1, i64::from)))
}

fn load_on_device(id: i64, address: usize, timeout_ms: i64) -> std::result::Result<Box<DeviceDelivered>, Thrown> {
    guard(|| {
        let pipeline = tables().get(id, address)?;
        let (batch, from) = match pipeline.next_on_device(Some(timeout(timeout_ms)))? {
            Next::Pending => (None, None),
            Next::Batch((batch, from)) => (Some(batch), Some(from)),
            Next::End => (Some(pipeline.end_batch_on_device()?), None),
        };
        Ok(Box::new(DeviceDelivered { batch, from }))
    })
}

fn describe(id: i64, address: usize) -> std::result::Result<String, Thrown> {
    guard(|| Ok(tables().get(id, address)?.describe()?.to_string()))
}

fn stats(id: i64, address: usize) -> std::result::Result<String, Thrown> {
    guard(|| Ok(tables().get(id, address)?.stats().to_string()))
}

fn locate(id: i64, address: usize, rows: &[i64]) -> std::result::Result<String, Thrown> {
    guard(|| Ok(tables().get(id, address)?.collection().locate(rows)?.to_string()))
}

fn texts(file: &str, path: &str) -> std::result::Result<Vec<u8>, Thrown> {
    guard(|| collection::read_texts(file, path))
}

fn close(id: i64, address: usize) -> std::result::Result<(), Thrown> {
    guard(|| {
        tables().get(id, address)?;
        if let Some(pipeline) = tables().remove(id) {
            pipeline.close();
        }
        Ok(())
    })
}

fn abandon(id: i64) {
    // a state tensor's deleter has nobody to report to
    let _ = guard(|| {
        if let Some(pipeline) = tables().remove(id) {
            pipeline.close();
        }
        Ok(())
    });
}

fn close_all() {
    let _ = guard(|| {
        tables().close_all();
        Ok(())
    });
}

fn watch_forks() {
    fork::generation();
}

fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}
