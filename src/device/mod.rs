//! Batches in the memory of a GPU.
//!
//! ```text
//!                 "annbatch-transfer" thread                          consumer's thread, inside the op
//! HostBatch ──▶ staging block ──h2d on the copy stream──▶ DeviceBatch ──place()──▶ tensors of torch's allocator
//! (page-locked)      ▲            copy_done ────────────────┘  waits on copy_done,   │
//!      ▲             └── the copy stream waits on reuse_ready ◀── records it ◀───────┘
//!      └── lease given back once copy_done has passed
//! ```
//!
//! Two copies, one over the bus and one within the device, because memory has two owners here: staging blocks are ours
//! and written ahead of time on a stream of ours, delivered tensors are torch's, allocated and filled on the consumer's
//! stream, so that torch's allocator needs to know nothing of us. The second copy costs a fortieth of the first. Only
//! streams wait, and the transfer thread; a consumer's thread never waits for the GPU.
//!
//! | module | decides |
//! |---|---|
//! | [`driver`] | which calls of a driver there are |
//! | `cuda` | how they reach NVIDIA's |
//! | [`pinned`], [`numa`] | whether host memory is page-locked, and near the GPU |
//! | [`staging`] | which block of device memory a batch is copied to, and when it is used again |
//! | [`transfer`] | the thread; what is copied when |
//! | [`loaded`] | which kernels there are for a stream, and their column maps |
//! | [`batch`] | how a batch is handed over |
//! | [`kernels`], [`nvrtc`] | the kernels: their source, and their machine code |

pub mod batch;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod driver;
#[cfg(test)]
pub(crate) mod fake;
pub mod kernels;
pub mod loaded;
pub mod numa;
pub mod nvrtc;
#[cfg(test)]
pub(crate) mod on_cpu;
pub mod pinned;
pub mod staging;
pub mod transfer;

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::base::error::{Error, Result};
use crate::base::fork;
use crate::base::lock::lock;
pub use batch::DeviceBatch;
use driver::{Before, Called, Driver, EventHandle, Fault, OUT_OF_MEMORY, Stream};

/// One GPU, as everything of one stream of batches shares it.
#[derive(Debug)]
pub struct Device {
    /// Leaked in a forked child, where no call of the driver is allowed.
    driver: ManuallyDrop<Arc<dyn Driver>>,
    ordinal: u32,
    /// Events that nobody uses: those without a time, and those with one.
    events: Mutex<[Vec<EventHandle>; 2]>,
    generation: u64,
}

/// This thread may call the driver until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Entered<'a> {
    device: &'a Device,
    before: Before,
}

/// An event of a [`Device`], which has it back when this is dropped.
#[derive(Debug)]
pub struct Event {
    handle: EventHandle,
    timed: bool,
    device: Arc<Device>,
}

impl Device {
    /// The GPU of that number.
    #[cfg(feature = "cuda")]
    pub fn open(ordinal: u32) -> Result<Arc<Self>> {
        Ok(Self::with(Arc::new(cuda::Cuda::open(ordinal)?), ordinal))
    }

    /// The GPU of that number, in a build without GPUs.
    #[cfg(not(feature = "cuda"))]
    pub fn open(ordinal: u32) -> Result<Arc<Self>> {
        Err(Error::Device {
            device: ordinal,
            what: "cannot be opened".into(),
            reason: "annbatch was built without its feature `cuda`".into(),
            remedy: "build with it (it is a default one), or leave the device out for batches in host memory".into(),
        })
    }

    /// A device behind any driver.
    #[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "there is no driver but that of tests"))]
    pub(crate) fn with(driver: Arc<dyn Driver>, ordinal: u32) -> Arc<Self> {
        Arc::new(Self { driver: ManuallyDrop::new(driver), ordinal, events: Mutex::default(), generation: fork::generation() })
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Whether a fork lies between the opening and now: then nothing may be called, and everything is leaked.
    pub fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    /// Lets this thread call the driver.
    pub fn enter(&self) -> Result<Entered<'_>> {
        if self.is_inherited() {
            return Err(Error::closed("the GPU was opened in the parent process; open it again after the fork"));
        }
        let before = self.driver.enter().map_err(|fault| self.error("cannot be used by this thread", fault))?;
        Ok(Entered { device: self, before })
    }

    fn error(&self, what: &str, fault: Fault) -> Error {
        let remedy = match fault.code {
            OUT_OF_MEMORY => "lower batch_size, or leave the device more memory",
            _ => "if the GPU itself failed, only a new process can use it again (nvidia-smi and dmesg say more)",
        };
        Error::Device { device: self.ordinal, what: what.to_owned(), reason: fault.reason, remedy: remedy.to_owned() }
    }

    fn free_events(&self) -> MutexGuard<'_, [Vec<EventHandle>; 2]> {
        lock(&self.events)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.is_inherited() {
            return;
        }
        if let Ok(entered) = self.enter() {
            for event in std::mem::take(&mut *self.free_events()).into_iter().flatten() {
                // SAFETY: events in the list are used by nobody.
                let _ = unsafe { entered.driver().event_destroy(event) };
            }
        }
        // SAFETY: dropped here alone, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.driver) };
    }
}

impl Entered<'_> {
    /// The calls.
    pub fn driver(&self) -> &dyn Driver {
        &**self.device.driver
    }

    /// The error of a call that failed while doing `what`.
    pub fn check<T>(&self, what: &str, called: Called<T>) -> Result<T> {
        called.map_err(|fault| self.device.error(what, fault))
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.device.driver.leave(self.before);
    }
}

impl Event {
    /// The point that `stream` has reached when it has done all that it holds now.
    pub(crate) fn record(device: &Arc<Device>, entered: &Entered, stream: Stream) -> Result<Arc<Self>> {
        Self::record_as(device, entered, stream, false)
    }

    /// The same, with the time at which the stream gets there.
    pub(crate) fn record_timed(device: &Arc<Device>, entered: &Entered, stream: Stream) -> Result<Arc<Self>> {
        Self::record_as(device, entered, stream, true)
    }

    fn record_as(device: &Arc<Device>, entered: &Entered, stream: Stream, timed: bool) -> Result<Arc<Self>> {
        let unused = device.free_events()[usize::from(timed)].pop();
        let handle = match unused {
            Some(handle) => handle,
            None => entered.check("cannot make an event", entered.driver().event_create(timed))?,
        };
        let event = Self { handle, timed, device: Arc::clone(device) };
        // SAFETY: the event is ours alone; the stream is alive by the caller's promise. Who waits for an earlier record
        // of this event in a stream waits for that one still.
        entered.check("cannot record an event", unsafe { entered.driver().record(handle, stream) })?;
        Ok(Arc::new(event))
    }

    /// Whether it has been passed.
    pub(crate) fn is_passed(&self, entered: &Entered) -> Result<bool> {
        // SAFETY: the event lives as long as `self`.
        entered.check("failed", unsafe { entered.driver().query(self.handle) })
    }

    /// Waits until it has been passed.
    pub(crate) fn wait(&self, entered: &Entered) -> Result<()> {
        // SAFETY: the event lives as long as `self`.
        entered.check("failed", unsafe { entered.driver().synchronize(self.handle) })
    }

    /// Nanoseconds between two timed events that were passed; `None` where the driver does not say.
    pub(crate) fn ns_since(&self, earlier: &Self, entered: &Entered) -> Option<u64> {
        // SAFETY: both events live.
        unsafe { entered.driver().elapsed_ns(earlier.handle, self.handle) }.ok()
    }

    /// Lets `stream` wait for it.
    pub(crate) fn hold(&self, entered: &Entered, stream: Stream) -> Result<()> {
        // SAFETY: the event lives as long as `self`; the stream is alive by the caller's promise.
        entered.check("cannot let a stream wait", unsafe { entered.driver().stream_wait(stream, self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.device.is_inherited() {
            self.device.free_events()[usize::from(self.timed)].push(self.handle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_named_with_the_remedy() {
        // where there are GPUs, there are not as many
        let error = Device::open(4711).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), "Device");
        assert!(text.starts_with("GPU 4711 "), "{text}");
        let remedies = ["leave the device out", "CUDA_VISIBLE_DEVICES"];
        assert!(remedies.iter().any(|remedy| text.contains(remedy)), "{text}");
    }
}
