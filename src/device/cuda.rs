//! The calls of [`Driver`] through NVIDIA's driver.
//!
//! cudarc loads `libcuda` when the first call is made and panics where it is missing, so [`Cuda::open`] asks first. The
//! context is the device's primary one, which torch uses too.

use std::ffi::{CString, c_void};
use std::ptr::NonNull;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::driver::{Before, Called, DevicePtr, Driver, EventHandle, Fault, Function, Grid, Module, NOT_INITIALIZED, Stream};
use super::numa::node_of_pci;
use crate::base::error::{Error, Result};
use crate::base::fork;

/// One device, its primary context retained.
#[derive(Debug)]
pub struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    capability: (u32, u32),
    numa_node: Option<u32>,
    elapsed: Option<Elapsed>,
}

/// `cuEventElapsedTime`: milliseconds between two events. Drivers before 12.8 lack the one that cudarc would call.
type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> std::ffi::c_int;

// SAFETY: a context may be made current on any number of threads; the value only names it.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

impl From<DriverError> for Fault {
    fn from(error: DriverError) -> Self {
        let name = error.error_name().map_or_else(|_| "unknown error".into(), |name| name.to_string_lossy());
        let text = error.error_string().map_or_else(|_| "no description".into(), |text| text.to_string_lossy());
        Self { code: error.0 as u32, reason: format!("{name}: {text}") }
    }
}

fn is_driver_here() -> bool {
    // SAFETY: loads the library, whose initialisers do nothing but set up the library itself.
    unsafe { sys::is_culib_present() }
}

impl Cuda {
    /// The device of that number, as CUDA counts those that are visible.
    pub fn open(ordinal: u32) -> Result<Self> {
        let fail = |what: &str, reason: String, remedy: &str| Error::Device {
            device: ordinal,
            what: what.to_owned(),
            reason,
            remedy: remedy.to_owned(),
        };
        if !is_driver_here() {
            return Err(fail(
                "cannot be opened",
                "NVIDIA's driver (libcuda.so.1) is not on this machine".into(),
                "run where there is a GPU, or leave the device out for batches in host memory",
            ));
        }
        let init = result::init().and_then(|()| result::device::get_count());
        let count = init.map_err(|error| {
            let fault = Fault::from(error);
            let remedy = if fault.code == NOT_INITIALIZED && fork::generation() > 0 {
                "CUDA does not survive fork(): start worker processes with the method \"spawn\" or \"forkserver\""
            } else {
                "see whether nvidia-smi works here, and what CUDA_VISIBLE_DEVICES says"
            };
            fail("cannot be opened: the driver does not start", fault.reason, remedy)
        })?;
        if i64::from(ordinal) >= i64::from(count) {
            return Err(fail(
                "does not exist",
                format!("this process sees {count} devices"),
                "choose a smaller number, or see what CUDA_VISIBLE_DEVICES says",
            ));
        }
        let remedy = "see whether other processes hold the device (nvidia-smi), and whether its mode is exclusive";
        let open = || -> std::result::Result<Self, DriverError> {
            use sys::CUdevice_attribute as Attribute;
            let device = result::device::get(ordinal as i32)?;
            // SAFETY: the device was just given by the driver; its context is released when `Cuda` is dropped.
            unsafe {
                let major = result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
                let minor = result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
                let [domain, bus, slot] = [
                    Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID,
                    Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID,
                    Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID,
                ]
                .map(|attribute| result::device::get_attribute(device, attribute).unwrap_or(-1));
                let numa_node = node_of_pci(domain, bus, slot);
                let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0").ok().map(|symbol| *symbol);
                let context = result::primary_ctx::retain(device)?;
                Ok(Self { device, context, capability: (major as u32, minor as u32), numa_node, elapsed })
            }
        };
        open().map_err(|error| fail("cannot be opened", Fault::from(error).reason, remedy))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // `Device` leaks what a fork left behind, so this is the process that retained it
        // SAFETY: retained once in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

fn stream(stream: Stream) -> sys::CUstream {
    stream.0 as sys::CUstream
}

fn event(event: EventHandle) -> sys::CUevent {
    event.0 as sys::CUevent
}

/// Sets the capture mode of this thread and gives the one before.
fn exchange_capture_mode(mode: u32) -> Called<u32> {
    use sys::CUstreamCaptureMode as Mode;
    let mut mode = match mode {
        0 => Mode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        1 => Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        _ => Mode::CU_STREAM_CAPTURE_MODE_RELAXED,
    };
    // SAFETY: the call reads and writes the mode alone.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()?;
    Ok(mode as u32)
}

const RELAXED: u32 = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED as u32;

// Every block below passes on handles and addresses as the caller gave them.
impl Driver for Cuda {
    fn enter(&self) -> Called<Before> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result()?;
        exchange_capture_mode(RELAXED).map(Before).inspect_err(|_| pop_context())
    }

    fn leave(&self, before: Before) {
        let _ = exchange_capture_mode(before.0);
        pop_context();
    }

    fn finish(&self) -> Called<()> {
        Ok(result::ctx::synchronize()?)
    }

    fn capability(&self) -> (u32, u32) {
        self.capability
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }

    fn host_alloc(&self, bytes: usize) -> Called<NonNull<u8>> {
        // SAFETY: the memory is fresh; whoever gets it fills it before reading.
        let ptr = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }?;
        NonNull::new(ptr.cast()).ok_or_else(|| Fault { code: 0, reason: "the driver gave no address".into() })
    }

    unsafe fn host_free(&self, ptr: NonNull<u8>) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::free_host(ptr.as_ptr().cast()) }?)
    }

    fn alloc(&self, bytes: u64) -> Called<DevicePtr> {
        // SAFETY: the memory is fresh; it is written before it is read.
        Ok(DevicePtr(unsafe { result::malloc_sync(bytes as usize) }?))
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::free_sync(ptr.0) }?)
    }

    fn stream_create(&self) -> Called<Stream> {
        Ok(Stream(result::stream::create(result::stream::StreamKind::NonBlocking)? as u64))
    }

    unsafe fn stream_destroy(&self, handle: Stream) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::stream::destroy(stream(handle)) }?)
    }

    fn event_create(&self, timed: bool) -> Called<EventHandle> {
        use sys::CUevent_flags as Flags;
        let untimed = if timed { 0 } else { Flags::CU_EVENT_DISABLE_TIMING as u32 };
        let flags = untimed | Flags::CU_EVENT_BLOCKING_SYNC as u32;
        let mut handle: sys::CUevent = std::ptr::null_mut();
        // SAFETY: the call writes the handle alone. (cudarc's wrapper takes a single flag.)
        unsafe { sys::cuEventCreate(&raw mut handle, flags) }.result()?;
        Ok(EventHandle(handle as u64))
    }

    unsafe fn event_destroy(&self, handle: EventHandle) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::event::destroy(event(handle)) }?)
    }

    unsafe fn record(&self, handle: EventHandle, on: Stream) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::event::record(event(handle), stream(on)) }?)
    }

    unsafe fn query(&self, handle: EventHandle) -> Called<bool> {
        // SAFETY: the trait's contract.
        match unsafe { result::event::query(event(handle)) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    unsafe fn synchronize(&self, handle: EventHandle) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::event::synchronize(event(handle)) }?)
    }

    unsafe fn elapsed_ns(&self, start: EventHandle, end: EventHandle) -> Called<u64> {
        let unknown = |code| Fault { code, reason: "the driver tells no times".into() };
        let mut ms = 0f32;
        // SAFETY: the trait's contract; the call writes the number.
        match unsafe { self.elapsed.ok_or_else(|| unknown(0))?(&raw mut ms, event(start), event(end)) } {
            0 => Ok((f64::from(ms) * 1e6) as u64),
            code => Err(unknown(code as u32)),
        }
    }

    unsafe fn stream_wait(&self, waiting: Stream, handle: EventHandle) -> Called<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the trait's contract.
        Ok(unsafe { result::stream::wait_event(stream(waiting), event(handle), flags) }?)
    }

    unsafe fn h2d(&self, dst: DevicePtr, src: NonNull<u8>, bytes: u64, on: Stream) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { sys::cuMemcpyHtoDAsync_v2(dst.0, src.as_ptr().cast(), bytes as usize, stream(on)) }.result()?)
    }

    unsafe fn d2d(&self, dst: DevicePtr, src: DevicePtr, bytes: u64, on: Stream) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::memcpy_dtod_async(dst.0, src.0, bytes as usize, stream(on)) }?)
    }

    unsafe fn zero(&self, dst: DevicePtr, bytes: u64, on: Stream) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::memset_d8_async(dst.0, 0, bytes as usize, stream(on)) }?)
    }

    fn module_load(&self, image: &[u8]) -> Called<Module> {
        // SAFETY: an image that is no machine code is refused with an error.
        Ok(Module(unsafe { result::module::load_data(image.as_ptr().cast()) }? as u64))
    }

    unsafe fn module_unload(&self, module: Module) -> Called<()> {
        // SAFETY: the trait's contract.
        Ok(unsafe { result::module::unload(module.0 as sys::CUmodule) }?)
    }

    unsafe fn function(&self, module: Module, name: &str) -> Called<Function> {
        let name = CString::new(name).map_err(|_| Fault { code: 0, reason: "a kernel's name holds a zero byte".into() })?;
        // SAFETY: the trait's contract.
        Ok(Function(unsafe { result::module::get_function(module.0 as sys::CUmodule, name) }? as u64))
    }

    unsafe fn launch(&self, function: Function, grid: Grid, parameters: &[u64], on: Stream) -> Called<()> {
        let mut pointers: Vec<*mut c_void> = parameters.iter().map(|p| std::ptr::from_ref(p).cast_mut().cast()).collect();
        let (blocks, threads) = ((grid.blocks, 1, 1), (grid.threads, 1, 1));
        let function = function.0 as sys::CUfunction;
        // SAFETY: the trait's contract; the driver copies the parameters before it returns.
        Ok(unsafe { result::launch_kernel(function, blocks, threads, 0, stream(on), &mut pointers) }?)
    }
}

fn pop_context() {
    let mut popped: sys::CUcontext = std::ptr::null_mut();
    // SAFETY: takes off what `enter` put on.
    let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
}

#[cfg(test)]
#[path = "cuda_tests.rs"]
mod tests;
