//! NVIDIA's run-time compiler, if it is here.
//!
//! It comes with torch (`nvidia/cu13/lib/libnvrtc.so.13`), in a folder that no loader searches, and torch loads it only
//! when it needs it. So it is looked for in this order: a path that was given, a library of the process, the system's
//! folders. Its few functions are looked up by name: cudarc would search by names of its own, and panic.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::{Arc, Mutex};

use crate::base::error::{Error, Result};
use crate::base::lock::lock;

/// Names under which it may be loaded or found, newest first.
const NAMES: [&CStr; 3] = [c"libnvrtc.so.13", c"libnvrtc.so.12", c"libnvrtc.so"];

type Program = *mut c_void;
type Create =
    unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Count = unsafe extern "C" fn(*mut c_int) -> c_int;

/// The functions of one loaded library, which stays loaded.
#[derive(Debug, Clone, Copy)]
pub struct Nvrtc {
    create: Create,
    compile: Compile,
    destroy: Destroy,
    log: (Size, Get),
    cubin: (Size, Get),
    ptx: (Size, Get),
    arch_count: Count,
    archs: Count,
}

/// Machine code by (source, compute capability): a kernel is compiled once per process.
static COMPILED: Mutex<Option<Compiled>> = Mutex::new(None);

type Compiled = HashMap<(String, u32), Arc<[u8]>>;

/// A program, destroyed when this is.
struct Made<'a>(Program, &'a Nvrtc);

impl Drop for Made<'_> {
    fn drop(&mut self) {
        // SAFETY: created by this library and not yet destroyed.
        unsafe { (self.1.destroy)(&raw mut self.0) };
    }
}

fn fail(device: u32, reason: impl Into<String>) -> Error {
    Error::Device {
        device,
        what: "has no kernels".into(),
        reason: reason.into(),
        remedy: "install the CUDA compiler that belongs to torch (pip install nvidia-cuda-nvrtc), or name it as \"nvrtc\"".into(),
    }
}

/// Loads the compiler's own headers, a library that it asks for by name alone: from beside the library that `symbol` is
/// in. Where that fails the compiler says so.
fn load_beside(symbol: *mut c_void) {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: writes the information about an address.
    if unsafe { libc::dladdr(symbol, &raw mut info) } == 0 || info.dli_fname.is_null() {
        return;
    }
    // SAFETY: the loader's string for a library that stays loaded.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    let Some(folder) = std::path::Path::new(std::ffi::OsStr::from_bytes(path.to_bytes())).parent() else { return };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().as_bytes().starts_with(b"libnvrtc-builtins.so")
            && let Ok(path) = CString::new(entry.path().into_os_string().into_vec())
        {
            // SAFETY: a library of data.
            unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        }
    }
}

impl Nvrtc {
    /// The library at `path`, or one that is loaded or that the system finds.
    pub fn load(device: u32, path: Option<&str>) -> Result<Self> {
        let open = |name: &CStr, flags| {
            // SAFETY: loading runs the library's initialisers, as torch does.
            unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | flags) }
        };
        let handle = match path {
            Some(path) => {
                let name = CString::new(path).map_err(|_| fail(device, "its path holds a zero byte"))?;
                open(&name, libc::RTLD_LOCAL)
            }
            None => [libc::RTLD_NOLOAD, libc::RTLD_LOCAL]
                .into_iter()
                .flat_map(|flags| NAMES.map(|name| open(name, flags)))
                .find(|handle| !handle.is_null())
                .unwrap_or(std::ptr::null_mut()),
        };
        if handle.is_null() {
            return Err(fail(device, format!("libnvrtc is not at {}", path.unwrap_or("any place where libraries are looked for"))));
        }
        let symbol = |name: &CStr| {
            // SAFETY: the handle is open and stays so.
            let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
            if address.is_null() { Err(fail(device, format!("libnvrtc has no {}", name.to_string_lossy()))) } else { Ok(address) }
        };
        load_beside(symbol(c"nvrtcCreateProgram")?);
        // SAFETY: the types are those of nvrtc.h, unchanged since CUDA 11.2.
        unsafe {
            use std::mem::transmute;
            Ok(Self {
                create: transmute::<*mut c_void, Create>(symbol(c"nvrtcCreateProgram")?),
                compile: transmute::<*mut c_void, Compile>(symbol(c"nvrtcCompileProgram")?),
                destroy: transmute::<*mut c_void, Destroy>(symbol(c"nvrtcDestroyProgram")?),
                log: (
                    transmute::<*mut c_void, Size>(symbol(c"nvrtcGetProgramLogSize")?),
                    transmute::<*mut c_void, Get>(symbol(c"nvrtcGetProgramLog")?),
                ),
                cubin: (
                    transmute::<*mut c_void, Size>(symbol(c"nvrtcGetCUBINSize")?),
                    transmute::<*mut c_void, Get>(symbol(c"nvrtcGetCUBIN")?),
                ),
                ptx: (
                    transmute::<*mut c_void, Size>(symbol(c"nvrtcGetPTXSize")?),
                    transmute::<*mut c_void, Get>(symbol(c"nvrtcGetPTX")?),
                ),
                arch_count: transmute::<*mut c_void, Count>(symbol(c"nvrtcGetNumSupportedArchs")?),
                archs: transmute::<*mut c_void, Count>(symbol(c"nvrtcGetSupportedArchs")?),
            })
        }
    }

    /// Compute capabilities (90 for 9.0) that machine code can be made for.
    fn supported(&self) -> Vec<u32> {
        let mut count = 0;
        // SAFETY: writes the number.
        if unsafe { (self.arch_count)(&raw mut count) } != 0 {
            return Vec::new();
        }
        let mut archs = vec![0 as c_int; count.max(0) as usize];
        // SAFETY: there is room for as many as were counted.
        if unsafe { (self.archs)(archs.as_mut_ptr()) } != 0 {
            return Vec::new();
        }
        archs.into_iter().map(|arch| arch as u32).collect()
    }

    /// What a driver loads for a GPU of this compute capability: machine code, or for a GPU that is newer than the
    /// compiler PTX, which the driver compiles.
    pub fn compile(&self, device: u32, source: &str, capability: (u32, u32)) -> Result<Arc<[u8]>> {
        let wanted = capability.0 * 10 + capability.1;
        let key = (source.to_owned(), wanted);
        let mut compiled = lock(&COMPILED);
        let compiled = compiled.get_or_insert_default();
        if let Some(image) = compiled.get(&key) {
            return Ok(Arc::clone(image));
        }
        let supported = self.supported();
        let (option, is_machine_code) = if supported.contains(&wanted) {
            (format!("--gpu-architecture=sm_{wanted}"), true)
        } else {
            let nearest = supported.into_iter().filter(|arch| *arch < wanted).max();
            let nearest = nearest.ok_or_else(|| fail(device, format!("libnvrtc does not know compute capability {wanted}")))?;
            (format!("--gpu-architecture=compute_{nearest}"), false)
        };
        let text = CString::new(source).map_err(|_| fail(device, "the source holds a zero byte"))?;
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the strings live through the call, which copies them; there are no headers.
        let code = unsafe { (self.create)(&raw mut program, text.as_ptr(), c"annbatch.cu".as_ptr(), 0, none, none) };
        if code != 0 {
            return Err(fail(device, format!("libnvrtc refuses a program (error {code})")));
        }
        let made = Made(program, self);
        let option = CString::new(option).map_err(|_| fail(device, "an option holds a zero byte"))?;
        // nothing fused: results are those of the host to the last bit
        let options = [option, c"--std=c++17".into(), c"--fmad=false".into()];
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive, the options live through the call.
        let code = unsafe { (self.compile)(made.0, options.len() as c_int, options.as_ptr()) };
        if code != 0 {
            let log = Self::get(&made, self.log).unwrap_or_default();
            let message = format!("a kernel does not compile (error {code}): {}", String::from_utf8_lossy(&log));
            return Err(Error::Internal { message });
        }
        let image = Self::get(&made, if is_machine_code { self.cubin } else { self.ptx });
        let image: Arc<[u8]> = image.ok_or_else(|| fail(device, "libnvrtc gives no code"))?.into();
        compiled.insert(key, Arc::clone(&image));
        Ok(image)
    }

    fn get(made: &Made, (size, get): (Size, Get)) -> Option<Vec<u8>> {
        let mut bytes = 0usize;
        // SAFETY: the program is alive; the call writes the number.
        if unsafe { size(made.0, &raw mut bytes) } != 0 || bytes == 0 {
            return None;
        }
        let mut out = vec![0u8; bytes];
        // SAFETY: there is room for as many bytes as were asked for.
        (unsafe { get(made.0, out.as_mut_ptr().cast()) } == 0).then_some(out)
    }
}
