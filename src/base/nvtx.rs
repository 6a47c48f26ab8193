//! Ranges that NVIDIA's profilers show beside the GPU's work (`nsys profile`): what this crate's threads do when.
//!
//! A profiler sets `NVTX_INJECTION64_PATH` for the process; without it nothing is looked for and a range costs one load.
//! The library with NVTX's functions comes with torch.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

const NAMES: [&CStr; 2] = [c"libnvtx3interop.so.1", c"libnvToolsExt.so.1"];

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;

static FUNCTIONS: OnceLock<(Push, Pop)> = OnceLock::new();

/// A range of the thread that made it, until it is dropped; ranges of one thread nest.
#[must_use]
pub(crate) struct Range(Option<Pop>);

/// Begins a range, where somebody profiles.
pub(crate) fn range(name: &CStr) -> Range {
    Range(FUNCTIONS.get().map(|&(push, pop)| {
        // SAFETY: NVTX's function, which copies the text.
        unsafe { push(name.as_ptr()) };
        pop
    }))
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(pop) = self.0 {
            // SAFETY: NVTX's function; this thread began the range.
            unsafe { pop() };
        }
    }
}

/// Looks for NVTX if a profiler is there: in the process, where the system looks, and beside the library at `beside`.
pub(crate) fn look_for(beside: Option<&str>) {
    if std::env::var_os("NVTX_INJECTION64_PATH").is_some() && FUNCTIONS.get().is_none() {
        load(beside.and_then(|path| Path::new(path).parent()));
    }
}

fn load(folder: Option<&Path>) {
    let in_folder = |name: &&CStr| CString::new(folder?.join(name.to_str().ok()?).as_os_str().as_bytes()).ok();
    let names = NAMES.iter().filter_map(in_folder).chain(NAMES.iter().map(|name| CString::from(*name)));
    for name in names {
        // SAFETY: loading runs the library's initialisers, which torch has run in other programs.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            continue;
        }
        // SAFETY: the handle is open and stays so.
        let [push, pop] = [c"nvtxRangePushA", c"nvtxRangePop"].map(|name| unsafe { libc::dlsym(handle, name.as_ptr()) });
        if !push.is_null() && !pop.is_null() {
            // SAFETY: the types are those of NVTX, unchanged since its version 1.
            let functions =
                unsafe { (std::mem::transmute::<*mut c_void, Push>(push), std::mem::transmute::<*mut c_void, Pop>(pop)) };
            // of two threads the first is as good
            let _ = FUNCTIONS.set(functions);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library with NVTX's names that counts.
    const STUB: &str = r#"
#include <cstring>
static thread_local int depth = 0; static thread_local char last[64];
extern "C" int nvtxRangePushA(const char* name) { strncpy(last, name, 63); return depth++; }
extern "C" int nvtxRangePop() { return --depth; }
extern "C" int depth_now() { return depth; }
extern "C" const char* last_name() { return last; }
"#;

    #[test]
    fn ranges_reach_the_profiler_and_nest() {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("stub.cpp"), folder.path().join("libnvtx3interop.so.1"));
        std::fs::write(&source, STUB).unwrap();
        let compiled = std::process::Command::new("g++").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
        let Ok(compiled) = compiled else { return println!("skipped: there is no g++") };
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        drop(range(c"nobody listens"));
        load(Some(folder.path()));
        let path = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: the library that was just loaded, and its functions.
        let (depth, last) = unsafe {
            let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            (
                std::mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(libc::dlsym(handle, c"depth_now".as_ptr())),
                std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(libc::dlsym(handle, c"last_name".as_ptr())),
            )
        };
        let outer = range(c"outer");
        assert_eq!(depth(), 1);
        let inner = range(c"inner");
        // SAFETY: the stub's text.
        assert_eq!((depth(), unsafe { CStr::from_ptr(last()) }), (2, c"inner"));
        drop(inner);
        assert_eq!(depth(), 1);
        drop(outer);
        assert_eq!(depth(), 0);
    }
}
