//! `torch.ops.annbatch` from Rust: libtorch's dispatcher through its stable C functions, tensors as `tch::Tensor`.

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tch::Tensor;

#[link(name = "torch_cpu")]
unsafe extern "C" {
    fn torch_call_dispatcher(name: *const c_char, overload: *const c_char, stack: *mut u64, version: u64) -> i32;
    fn torch_new_string_handle(data: *const c_char, length: usize, handle: *mut u64) -> i32;
    fn torch_string_length(handle: u64, length: *mut usize) -> i32;
    fn torch_string_c_str(handle: u64, data: *mut *const c_char) -> i32;
    fn torch_delete_string(handle: u64) -> i32;
    fn torch_new_list_reserve_size(size: usize, list: *mut u64) -> i32;
    fn torch_list_push_back(list: u64, element: u64) -> i32;
    fn torch_list_size(list: u64, size: *mut usize) -> i32;
    fn torch_list_get_item(list: u64, index: usize, element: *mut u64) -> i32;
    fn torch_delete_list(list: u64) -> i32;
    fn aoti_torch_new_tensor_handle(tensor: u64, handle: *mut u64) -> i32;
}

/// The ABI that the op library targets: torch 2.11.
const ABI: u64 = 0x020b_0000_0000_0000;

/// An argument or a result of an op, as the stable ABI passes it: one 64-bit word.
pub struct Value(u64);

fn ok(code: i32) {
    assert_eq!(code, 0, "a libtorch function failed");
}

impl Value {
    pub fn int(value: i64) -> Self {
        Self(value as u64)
    }

    /// The absent optional argument.
    pub fn none() -> Self {
        Self(0)
    }

    pub fn text(text: &str) -> Self {
        let mut handle = 0;
        // SAFETY: libtorch copies `length` bytes.
        ok(unsafe { torch_new_string_handle(text.as_ptr().cast(), text.len(), &raw mut handle) });
        Self(handle)
    }

    pub fn tensor(tensor: &Tensor) -> Self {
        let mut handle = 0;
        // SAFETY: both sides name a heap-allocated `at::Tensor`; the new handle is a reference of its own,
        // which the callee takes over.
        ok(unsafe { aoti_torch_new_tensor_handle(tensor.as_ptr() as u64, &raw mut handle) });
        Self(handle)
    }

    pub fn tensors(tensors: &[&Tensor]) -> Self {
        let mut list = 0;
        // SAFETY: the list takes over each element.
        unsafe {
            ok(torch_new_list_reserve_size(tensors.len(), &raw mut list));
            tensors.iter().for_each(|t| ok(torch_list_push_back(list, Self::tensor(t).0)));
        }
        Self(list)
    }

    pub fn into_tensor(self) -> Tensor {
        // SAFETY: the word is a handle that the op handed over, a heap-allocated `at::Tensor`.
        unsafe { Tensor::from_ptr(self.0 as *mut _) }
    }

    pub fn into_tensors(self) -> Vec<Tensor> {
        let mut size = 0;
        // SAFETY: the word is a list that the op handed over; its items are new references.
        unsafe {
            ok(torch_list_size(self.0, &raw mut size));
            let items = (0..size)
                .map(|i| {
                    let mut item = 0;
                    ok(torch_list_get_item(self.0, i, &raw mut item));
                    Self(item).into_tensor()
                })
                .collect();
            ok(torch_delete_list(self.0));
            items
        }
    }

    pub fn into_text(self) -> String {
        let (mut length, mut data) = (0, std::ptr::null());
        // SAFETY: the word is a string that the op handed over, read before it is deleted.
        unsafe {
            ok(torch_string_length(self.0, &raw mut length));
            ok(torch_string_c_str(self.0, &raw mut data));
            let text = String::from_utf8_lossy(std::slice::from_raw_parts(data.cast(), length)).into_owned();
            ok(torch_delete_string(self.0));
            text
        }
    }
}

/// The op library as `cmake --install` puts it.
///
/// Built when the tests run: cargo holds the target folder while build scripts do, and the core's dependencies are in it.
fn library() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let out = root.join("target/ops");
    // CMake starts anew where the cache names another compiler, and then forgets the prefix that it is given
    let _ = std::fs::remove_file(out.join("build/CMakeCache.txt"));
    let installed = cmake::Config::new(&root).host(env!("TARGET")).target(env!("TARGET")).out_dir(&out).profile("Release").build();
    let mut pending = vec![installed];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            if entry.path().is_dir() {
                pending.push(entry.path());
            } else if entry.file_name() == "_annbatch.so" {
                return entry.path();
            }
        }
    }
    panic!("no _annbatch.so under {}", out.display());
}

/// Calls `annbatch::name`; `None` where the op raised.
pub fn call(name: &str, arguments: Vec<Value>) -> Option<Value> {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let path = CString::new(library().into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: loading runs the library's registrations, which only touch libtorch's dispatcher.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW as c_int) };
        // SAFETY: dlerror's text is copied at once.
        assert!(!handle.is_null(), "{:?}", unsafe { std::ffi::CStr::from_ptr(libc::dlerror()) });
    });
    let name = CString::new(format!("annbatch::{name}")).unwrap();
    let mut stack: Vec<u64> = arguments.into_iter().map(|v| v.0).collect();
    stack.resize(stack.len().max(1), 0);
    // SAFETY: the stack holds one owned word per argument of the schema and room for the one result.
    let code = unsafe { torch_call_dispatcher(name.as_ptr(), c"".as_ptr(), stack.as_mut_ptr(), ABI) };
    (code == 0).then(|| Value(stack[0]))
}

/// Writes an uncompressed Zarr v3 array of one dimension in chunks of `chunk` elements.
pub fn write_array(dir: &Path, dtype: &str, bytes: &[u8], item_size: usize, chunk: usize) {
    std::fs::create_dir_all(dir.join("c")).unwrap();
    let metadata = serde_json::json!({
        "zarr_format": 3, "node_type": "array", "shape": [bytes.len() / item_size], "data_type": dtype, "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    });
    std::fs::write(dir.join("zarr.json"), metadata.to_string()).unwrap();
    for (i, part) in bytes.chunks(chunk * item_size).enumerate() {
        let mut whole = part.to_vec();
        whole.resize(chunk * item_size, 0);
        std::fs::write(dir.join(format!("c/{i}")), whole).unwrap();
    }
}
