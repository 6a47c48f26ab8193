//! Kernels run on the CPU, for tests.

use std::collections::HashMap;
use std::ffi::CString;
use std::process::Command;
use std::sync::Mutex;

/// What kernels find instead of CUDA: warps of one lane, threads one after another.
const SHIM: &str = r#"
#include <cmath>
#define ANNBATCH_SHIM 1
#define LANES 1
#define __global__
#define __device__
struct CpuPlace { unsigned x; };
static thread_local CpuPlace blockIdx, threadIdx, blockDim, gridDim;
static inline double sum_over_lanes(double x) { return x; }
static inline void lanes_meet() {}
extern "C" void be_thread(unsigned block, unsigned thread, unsigned blocks, unsigned threads) {
  blockIdx.x = block; threadIdx.x = thread; gridDim.x = blocks; blockDim.x = threads;
}
"#;

/// Kernels as functions of this process, for as long as it runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnCpu {
    /// Of the loaded library, as a number.
    handle: usize,
}

impl OnCpu {
    /// Compiles and loads `source`, once per process; `None`, with a word why, where there is no C++ compiler.
    pub(crate) fn compile(source: &str) -> Option<Self> {
        static COMPILED: Mutex<Option<HashMap<String, OnCpu>>> = Mutex::new(None);
        let mut compiled = COMPILED.lock().unwrap();
        let compiled = compiled.get_or_insert_default();
        if let Some(there) = compiled.get(source) {
            return Some(*there);
        }
        let folder = tempfile::tempdir().unwrap();
        let (text, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
        std::fs::write(&text, format!("{SHIM}{source}")).unwrap();
        let mut command = Command::new("g++");
        command.args([
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Werror",
            "-ffp-contract=off",
            "-Wno-unused-variable",
            "-Wno-unused-function",
            "-shared",
            "-fPIC",
            "-o",
        ]);
        let Ok(out) = command.arg(&library).arg(&text).output() else {
            println!("skipped: there is no g++");
            return None;
        };
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let path = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: the library was just compiled and does nothing when it is loaded.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null());
        let there = Self { handle: handle.addr() };
        compiled.insert(source.to_owned(), there);
        Some(there)
    }

    fn symbol(self, name: &str) -> *mut std::ffi::c_void {
        let text = CString::new(name).unwrap();
        // SAFETY: the handle is open.
        let symbol = unsafe { libc::dlsym(self.handle as *mut _, text.as_ptr()) };
        assert!(!symbol.is_null(), "no kernel {name}");
        symbol
    }

    /// Runs a kernel; as on a GPU, every parameter is 8 bytes.
    pub(crate) fn launch(self, name: &str, parameters: &[u64]) {
        type Kernel = unsafe extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64);
        let (blocks, threads) = (3, 5);
        // SAFETY: both functions were compiled with these types: parameters beyond those a kernel has are not looked at.
        let (be_thread, kernel) = unsafe {
            (
                std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn(u32, u32, u32, u32)>(self.symbol("be_thread")),
                std::mem::transmute::<*mut std::ffi::c_void, Kernel>(self.symbol(name)),
            )
        };
        let mut p = [0; 9];
        p[..parameters.len()].copy_from_slice(parameters);
        for block in 0..blocks {
            for thread in 0..threads {
                // SAFETY: the caller's addresses have room for what the kernel reads and writes.
                unsafe {
                    be_thread(block, thread, blocks, threads);
                    kernel(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8]);
                }
            }
        }
    }
}
