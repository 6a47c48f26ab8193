//! The calls as NVIDIA's driver would get them: a library with its names stands in for it, in a process of its own.

use std::process::Command;

use crate::collection::Buffer;
use crate::device::driver::Stream;
use crate::{Collection, DType, Next, OpenConfig, Pipeline, Runtime};

/// A driver whose device is the host, and which does everything at once. Signatures are those of cuda.h.
const STUB: &str = r#"
#include <cstdio>
#include <cstdlib>
#include <cstring>
typedef unsigned long long ptr;
typedef void* handle;
static void say(const char* format, long long a = 0, long long b = 0) {
  char line[200];
  snprintf(line, sizeof line, format, a, b);
  fprintf(stderr, "%s\n", line);
}
static thread_local int depth = 0;
static thread_local unsigned mode_now = 0;
static int entered() { if (depth == 0) { say("CALL WITHOUT A CONTEXT"); return 201; } return 0; }
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
  return device == 40 ? 0 : 101;
}
int cuDevicePrimaryCtxRetain(handle* context, int) { say("retain"); *context = (handle)0x77; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { say("release"); return 0; }
int cuCtxPushCurrent_v2(handle context) { depth++; return context == (handle)0x77 ? 0 : 201; }
int cuCtxPopCurrent_v2(handle* context) { depth--; *context = (handle)0x77; return 0; }
int cuThreadExchangeStreamCaptureMode(unsigned* mode) { unsigned old = mode_now; mode_now = *mode; say("capture mode %lld", *mode); *mode = old; return 0; }
int cuCtxSynchronize() { return entered(); }
int cuMemHostAlloc(void** p, size_t bytes, unsigned flags) { say("host alloc, flags %lld", flags); *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096); return entered(); }
int cuMemFreeHost(void* p) { say("host free"); free(p); return entered(); }
int cuMemAlloc_v2(ptr* p, size_t bytes) { say("alloc"); *p = (ptr)malloc(bytes); return entered(); }
int cuMemFree_v2(ptr p) { say("free"); free((void*)p); return entered(); }
int cuStreamCreate(handle* stream, unsigned flags) { say("stream, flags %lld", flags); *stream = (handle)0x500; return entered(); }
int cuStreamDestroy_v2(handle) { say("stream destroyed"); return entered(); }
int cuEventCreate(handle* event, unsigned flags) { say("event, flags %lld", flags); *event = malloc(8); return entered(); }
int cuEventDestroy_v2(handle event) { say("event destroyed"); free(event); return entered(); }
int cuEventRecord(handle, handle stream) { say("record on %lld", (long long)stream); return entered(); }
int cuEventQuery(handle) { static int calls = 0; return ++calls % 2 ? 600 : entered(); }
int cuEventElapsedTime(float* ms, handle, handle) { say("elapsed"); *ms = 0.5f; return entered(); }
int cuEventSynchronize(handle) { return entered(); }
int cuStreamWaitEvent(handle stream, handle, unsigned flags) { say("wait on %lld, flags %lld", (long long)stream, flags); return entered(); }
int cuMemcpyHtoDAsync_v2(ptr to, const void* from, size_t n, handle stream) { say("h2d on %lld", (long long)stream); memcpy((void*)to, from, n); return entered(); }
int cuMemcpyDtoDAsync_v2(ptr to, ptr from, size_t n, handle stream) { say("d2d on %lld", (long long)stream); memcpy((void*)to, (void*)from, n); return entered(); }
int cuMemsetD8Async(ptr to, unsigned char value, size_t n, handle) { memset((void*)to, value, n); return entered(); }
int cuModuleLoadData(handle* module, const void* image) { say("module %lld", *(const unsigned char*)image); *module = (handle)0x600; return entered(); }
int cuModuleUnload(handle) { say("module unloaded"); return entered(); }
int cuModuleGetFunction(handle* function, handle, const char* name) { *function = strdup(name); return entered(); }
int cuLaunchKernel(handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, handle stream, void** p, void** extra) {
  say("launch on %lld, %lld threads a block", (long long)stream, bx);
  if (strcmp((const char*)function, "widen_u16_i32") || gy * gz * by * bz != 1 || gx == 0 || shared || extra) return 1;
  const unsigned short* from = *(const unsigned short**)p[0];
  int* to = *(int**)p[1];
  long long n = *(long long*)p[2];
  for (long long i = 0; i < n; ++i) to[i] = from[i];
  return entered();
}
int cuGetErrorName(int code, const char** text) { *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_STUB"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "described"; return 0; }
}
"#;

/// What happens in the other process: an epoch of two batches.
#[test]
#[ignore = "run by the test below, where the driver is a stub"]
fn an_epoch_where_the_driver_is_a_stub() {
    let (indptr, indices, data) = ([0i32, 2, 2, 3, 4], [1u16, 4, 0, 3], [1.5f32, 2.5, 3.5, 4.5]);
    let buffers = [
        Buffer { address: indptr.as_ptr().addr(), dtype: DType::Int32, shape: vec![5] },
        Buffer { address: indices.as_ptr().addr(), dtype: DType::UInt16, shape: vec![4] },
        Buffer { address: data.as_ptr().addr(), dtype: DType::Float32, shape: vec![4] },
    ];
    let config = OpenConfig::parse(
        r#"{"elements":[{"name":"X"}], "device": 0,
            "datasets":[{"sources":{"X":{"csr":{"indptr":0,"indices":1,"data":2,"shape":[4,5]}}}}],
            "sampling":{"kind":"sequential","chunk_size":2,"preload_nchunks":1,"batch_size":2}}"#,
    )
    .unwrap();
    let open = || Collection::open(&config, &buffers, Runtime::start(1, 1).unwrap().into()).unwrap();
    let mut other = config.stream();
    other.device = Some(1);
    let error = Pipeline::new(open(), other).unwrap_err().to_string();
    assert!(error.starts_with("GPU 1 does not exist: this process sees 1 devices"), "{error}");
    let mut stream = config.stream();
    stream.nvrtc = std::env::var("STUB_NVRTC").ok();
    let pipeline = Pipeline::new(open(), stream).unwrap();
    let narrow = pipeline.describe().unwrap()["narrow"] == true;
    assert_eq!(narrow, std::env::var("STUB_NVRTC").is_ok());
    pipeline.start(0, 0).unwrap();
    let mut found = Vec::new();
    while let Next::Batch((mut batch, _)) = pipeline.next_on_device(None).unwrap() {
        let mut tensors: Vec<Vec<u8>> = batch.outputs().iter().map(|o| vec![0xAB; o.bytes() as usize]).collect();
        let addresses: Vec<u64> = tensors.iter_mut().map(|t| t.as_mut_ptr() as u64).collect();
        // SAFETY: the stub's device memory is the host's, and it does everything at once.
        unsafe { batch.place(&addresses, Stream(0)) }.unwrap();
        found.push(tensors);
    }
    let ints = |values: &[i32]| values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<_>>();
    let longs = |values: &[i64]| values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<_>>();
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<_>>();
    assert_eq!(found[0], [longs(&[0, 1]), ints(&[0, 2, 2]), ints(&[1, 4]), floats(&[1.5, 2.5])]);
    assert_eq!(found[1], [longs(&[2, 3]), ints(&[0, 1, 2]), ints(&[0, 3]), floats(&[3.5, 4.5])]);
    pipeline.close();
    assert_eq!(pipeline.stats()["h2d_ns"], 2 * 500_000);
    drop(pipeline);
    eprintln!("the end");
}

#[test]
fn calls_reach_the_driver_as_they_are_meant() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("stub.cpp");
    std::fs::write(&source, STUB).unwrap();
    let compiled = Command::new("g++").args(["-shared", "-fPIC", "-o"]).arg(folder.path().join("libcuda.so")).arg(&source).output();
    let Ok(compiled) = compiled else { return println!("skipped: there is no g++") };
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    for nvrtc in [None, crate::device::kernels::tests::nvrtc_of_torch()] {
        let narrow = nvrtc.is_some();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--ignored", "--exact", "--nocapture", "device::cuda::tests::an_epoch_where_the_driver_is_a_stub"]);
        // in front of what this program itself may need
        let own = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        child.env("LD_LIBRARY_PATH", format!("{}:{own}", folder.path().display())).env_remove("STUB_NVRTC");
        if let Some(nvrtc) = nvrtc {
            child.env("STUB_NVRTC", nvrtc);
        }
        let out = child.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success() && said.contains("the end"), "{said}{}", String::from_utf8_lossy(&out.stdout));
        let count = |line: &str| said.lines().filter(|l| *l == line).count();
        assert_eq!(count("CALL WITHOUT A CONTEXT"), 0, "{said}");
        // page-locked for every context and never write-combined; a stream that does not wait for the default one;
        // events that are waited for asleep, without a time and with one
        for line in [
            "host alloc, flags 1",
            "stream, flags 1",
            "event, flags 3",
            "event, flags 1",
            "capture mode 2",
            "h2d on 1280",
            "record on 1280",
            "elapsed",
        ] {
            assert!(count(line) > 0, "{line}: {said}");
        }
        // on the consumer's stream
        for line in ["wait on 0, flags 0", "record on 0", "d2d on 0"] {
            assert!(count(line) > 0, "{line}: {said}");
        }
        assert_eq!(count("launch on 0, 256 threads a block"), if narrow { 2 } else { 0 }, "{said}");
        // machine code begins with 0x7f, "ELF"
        assert_eq!((count("module 127"), count("module unloaded")), if narrow { (1, 1) } else { (0, 0) }, "{said}");
        for (made, gone) in [("alloc", "free"), ("stream, flags 1", "stream destroyed")] {
            assert_eq!(count(made), count(gone), "{made}: {said}");
        }
        assert_eq!(count("event, flags 3") + count("event, flags 1"), count("event destroyed"), "{said}");
        assert!(said.lines().filter(|l| l.starts_with("host alloc, flags ")).all(|l| l.ends_with(" 1")), "{said}");
    }
}
