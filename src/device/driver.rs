//! The calls of a GPU driver that this crate makes, and nothing else of it.
//!
//! Two types make them: [`cuda`](super::cuda) through NVIDIA's driver, and `fake` in tests, which checks the protocol
//! that the modules around it keep. Handles are plain numbers; who may use one when is the caller's business, which is
//! why nearly every call is unsafe.

use std::fmt::Debug;
use std::ptr::NonNull;

/// Defines handles: numbers that only the driver which gave them understands.
macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        $($(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u64);)+
    };
}

handles! {
    /// An address in device memory.
    DevicePtr,
    /// A queue of work of one device. Those of torch are the pointers that it gives.
    Stream,
    /// A point in a stream that others wait for.
    EventHandle,
    /// Loaded machine code.
    Module,
    /// One kernel of a [`Module`].
    Function,
}

impl DevicePtr {
    /// The address `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// How a kernel is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
}

/// A call of the driver that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The driver's number for the error.
    pub code: u32,
    /// Its name, e.g. `CUDA_ERROR_OUT_OF_MEMORY`, with the driver's description.
    pub reason: String,
}

/// `CUDA_ERROR_OUT_OF_MEMORY`: the one error that is answered by trying with less.
pub const OUT_OF_MEMORY: u32 = 2;
/// `CUDA_ERROR_NOT_INITIALIZED`: what a forked child gets whose parent used the GPU.
pub const NOT_INITIALIZED: u32 = 3;

/// Result of a call of the driver.
pub type Called<T> = std::result::Result<T, Fault>;

/// What a thread had before [`Driver::enter`], for [`Driver::leave`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Before(pub u32);

/// The driver, for one device. Calls other than [`enter`](Driver::enter) are made by threads that have entered.
///
/// # Safety of the unsafe calls
/// Handles and addresses were given by this driver (or by torch for the same device) and are not destroyed. Memory that
/// is named stays allocated, and unwritten where it is read, until the stream has passed the call.
#[expect(clippy::missing_safety_doc, reason = "one contract for all, stated above")]
pub trait Driver: Send + Sync + Debug {
    /// Makes the device current on this thread, and lets it make calls that are not for streams while another thread
    /// captures a CUDA graph.
    fn enter(&self) -> Called<Before>;
    /// Undoes [`Driver::enter`].
    fn leave(&self, before: Before);

    /// Waits until the device has done everything that it was given.
    fn finish(&self) -> Called<()>;

    /// Compute capability, e.g. `(9, 0)`.
    fn capability(&self) -> (u32, u32);

    /// The NUMA node that the device is next to, if the machine says.
    fn numa_node(&self) -> Option<u32>;

    /// Page-locked memory that every context may copy from. Never write-combined: decoding threads read it back.
    fn host_alloc(&self, bytes: usize) -> Called<NonNull<u8>>;
    /// Gives page-locked memory back. May wait for the device.
    unsafe fn host_free(&self, ptr: NonNull<u8>) -> Called<()>;

    /// Device memory outside of torch's allocator. May wait for the device.
    fn alloc(&self, bytes: u64) -> Called<DevicePtr>;
    /// Gives device memory back. May wait for the device.
    unsafe fn free(&self, ptr: DevicePtr) -> Called<()>;

    /// A stream that does not wait for the default stream.
    fn stream_create(&self) -> Called<Stream>;
    /// Destroys a stream; work in it still runs.
    unsafe fn stream_destroy(&self, stream: Stream) -> Called<()>;

    /// An event whose [`synchronize`](Driver::synchronize) sleeps; with a time, if it is to be `timed`.
    fn event_create(&self, timed: bool) -> Called<EventHandle>;
    /// Destroys an event; waits for it that are in streams hold.
    unsafe fn event_destroy(&self, event: EventHandle) -> Called<()>;
    /// Moves `event` to the end of what `stream` holds now.
    unsafe fn record(&self, event: EventHandle, stream: Stream) -> Called<()>;
    /// Whether the last record of `event` was passed.
    unsafe fn query(&self, event: EventHandle) -> Called<bool>;
    /// Waits until the last record of `event` was passed.
    unsafe fn synchronize(&self, event: EventHandle) -> Called<()>;
    /// Nanoseconds between two timed events whose last records were passed.
    unsafe fn elapsed_ns(&self, start: EventHandle, end: EventHandle) -> Called<u64>;
    /// Lets `stream` wait for the last record of `event`; the host does not.
    unsafe fn stream_wait(&self, stream: Stream, event: EventHandle) -> Called<()>;

    /// Copies host memory into device memory.
    unsafe fn h2d(&self, dst: DevicePtr, src: NonNull<u8>, bytes: u64, stream: Stream) -> Called<()>;
    /// Copies device memory.
    unsafe fn d2d(&self, dst: DevicePtr, src: DevicePtr, bytes: u64, stream: Stream) -> Called<()>;
    /// Zeroes device memory.
    unsafe fn zero(&self, dst: DevicePtr, bytes: u64, stream: Stream) -> Called<()>;

    /// Loads machine code (a cubin).
    fn module_load(&self, image: &[u8]) -> Called<Module>;
    /// Gives machine code back.
    unsafe fn module_unload(&self, module: Module) -> Called<()>;
    /// The kernel of that name.
    unsafe fn function(&self, module: Module, name: &str) -> Called<Function>;
    /// Starts a kernel. Every parameter is 8 bytes long: an address or an int64.
    unsafe fn launch(&self, function: Function, grid: Grid, parameters: &[u64], stream: Stream) -> Called<()>;
}
