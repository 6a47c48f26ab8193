//! Every kernel, run on the CPU against an obvious twin, and compiled for GPUs where their compiler is.

use std::ffi::CString;
use std::process::Command;

use half::{bf16, f16};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::*;

/// What kernels find instead of CUDA: warps of one lane, threads one after another.
const SHIM: &str = r#"
#include <cmath>
#define ANNBATCH_SHIM 1
#define LANES 1
#define __global__
#define __device__
struct Place { unsigned x; };
static Place blockIdx, threadIdx, blockDim, gridDim;
static inline double sum_over_lanes(double x) { return x; }
static inline void lanes_meet() {}
extern "C" void be_thread(unsigned block, unsigned thread, unsigned blocks, unsigned threads) {
  blockIdx.x = block; threadIdx.x = thread; gridDim.x = blocks; blockDim.x = threads;
}
"#;

/// Kernels as functions of this process.
struct OnCpu {
    handle: *mut std::ffi::c_void,
    _folder: tempfile::TempDir,
}

impl OnCpu {
    /// `None`, with a word why, where there is no C++ compiler.
    fn compile(source: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (text, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
        std::fs::write(&text, format!("{SHIM}{source}")).unwrap();
        let mut command = Command::new("g++");
        command.args([
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Werror",
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
        Some(Self { handle, _folder: folder })
    }

    fn symbol(&self, name: &str) -> *mut std::ffi::c_void {
        let text = CString::new(name).unwrap();
        // SAFETY: the handle is open.
        let symbol = unsafe { libc::dlsym(self.handle, text.as_ptr()) };
        assert!(!symbol.is_null(), "no kernel {name}");
        symbol
    }

    /// Runs a kernel; as on a GPU, every parameter is 8 bytes.
    fn launch(&self, name: &str, parameters: &[u64]) {
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

/// A number as exact as any stored one.
#[derive(Debug, Clone, Copy)]
enum Value {
    Int(i64),
    Float(f64),
}

impl Value {
    fn real(self) -> f64 {
        match self {
            Self::Int(i) => i as f64,
            Self::Float(f) => f,
        }
    }

    fn int(self) -> i64 {
        match self {
            Self::Int(i) => i,
            Self::Float(f) => f as i64,
        }
    }

    fn f32(self) -> f32 {
        match self {
            Self::Int(i) => i as f32,
            Self::Float(f) => f as f32,
        }
    }

    /// The bytes of this value as `number`, rounded if need be.
    fn store(self, number: DType) -> Vec<u8> {
        match number {
            DType::Bool => vec![u8::from(self.int() != 0)],
            DType::Int8 | DType::UInt8 => vec![self.int() as u8],
            DType::Int16 | DType::UInt16 => (self.int() as u16).to_ne_bytes().to_vec(),
            DType::Int32 | DType::UInt32 => (self.int() as u32).to_ne_bytes().to_vec(),
            DType::Int64 | DType::UInt64 => self.int().to_ne_bytes().to_vec(),
            DType::Float16 => f16::from_f32(self.f32()).to_bits().to_ne_bytes().to_vec(),
            DType::Float32 => self.f32().to_ne_bytes().to_vec(),
            DType::Float64 => self.real().to_ne_bytes().to_vec(),
            DType::BFloat16 => bf16::from_f32(self.f32()).to_bits().to_ne_bytes().to_vec(),
        }
    }

    fn load(bytes: &[u8], number: DType) -> Self {
        let two = || u16::from_ne_bytes(bytes.try_into().unwrap());
        let four = || u32::from_ne_bytes(bytes.try_into().unwrap());
        let eight = || u64::from_ne_bytes(bytes.try_into().unwrap());
        match number {
            DType::Bool | DType::UInt8 => Self::Int(bytes[0].into()),
            DType::Int8 => Self::Int((bytes[0] as i8).into()),
            DType::Int16 => Self::Int((two() as i16).into()),
            DType::UInt16 => Self::Int(two().into()),
            DType::Int32 => Self::Int((four() as i32).into()),
            DType::UInt32 => Self::Int(four().into()),
            DType::Int64 | DType::UInt64 => Self::Int(eight() as i64),
            DType::Float16 => Self::Float(f16::from_bits(two()).to_f64()),
            DType::Float32 => Self::Float(f32::from_bits(four()).into()),
            DType::Float64 => Self::Float(f64::from_bits(eight())),
            DType::BFloat16 => Self::Float(bf16::from_bits(two()).to_f64()),
        }
    }
}

/// Memory aligned to 64 bytes, `offset` bytes in.
struct Memory {
    words: Vec<[u64; 8]>,
    offset: usize,
    len: usize,
}

impl Memory {
    fn new(bytes: &[u8], offset: usize) -> Self {
        let mut words = vec![[0xABAB_ABAB_ABAB_ABAB_u64; 8]; (bytes.len() + offset) / 64 + 3];
        let start = words.as_mut_ptr().cast::<u8>();
        let skip = start.align_offset(64) + offset;
        // SAFETY: there is room for 64 bytes more than these.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(skip), bytes.len()) };
        Self { words, offset: skip, len: bytes.len() }
    }

    fn address(&self) -> u64 {
        self.words.as_ptr() as u64 + self.offset as u64
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: within the words.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>().add(self.offset), self.len) }
    }
}

/// Equal, but for the payload of what is not a number.
fn same(found: &[u8], expected: &[u8], number: DType) -> bool {
    let is_nan = |bytes| matches!(Value::load(bytes, number), Value::Float(f) if f.is_nan());
    found == expected || (is_nan(found) && is_nan(expected))
}

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn all_pairs() -> Vec<(DType, DType)> {
    let stored = DType::ALL.into_iter().filter(|dtype| *dtype != DType::UInt64);
    stored.flat_map(|s| DType::COMPUTED.into_iter().chain([DType::Int32, DType::Int64]).map(move |d| (s, d))).collect()
}

/// Numbers of a stored type: its ends, and others; those of floating-point types within 32 bits.
fn numbers(stored: DType, n: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut values: Vec<Value> = match stored {
        dtype if dtype.is_integer() || dtype == DType::Bool => {
            [0, 1, -1, 127, 128, 255, 32_767, 65_535, i64::MAX, i64::MIN, 16_777_217].map(Value::Int).to_vec()
        }
        _ => [0.0, -0.0, 1.0, -2.5, 0.1, 1e-7, 65_504.0, 2_147_483_392.0].map(Value::Float).to_vec(),
    };
    values.resize_with(n, || Value::Float((rng.random::<f64>() - 0.5) * 1e5));
    // what is infinite has no integer
    let finite = |v: &Value| if stored == DType::Float16 { Value::Float(v.real().clamp(-6e4, 6e4)) } else { *v };
    values.iter().flat_map(|v| finite(v).store(stored)).collect()
}

#[test]
fn every_pair_of_types_is_widened_as_a_cast_does() {
    let Some(cpu) = OnCpu::compile(&widen_source(&all_pairs())) else { return };
    let mut rng = rng(1);
    for (stored, delivered) in all_pairs() {
        for n in [0, 1, 3, 4, 37, 150] {
            for (skip_in, skip_out) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                let values = numbers(stored, n, &mut rng)[..n * stored.size()].to_vec();
                let input = Memory::new(&values, skip_in * stored.size());
                let output = Memory::new(&vec![0xCD; n * delivered.size()], skip_out * delivered.size());
                cpu.launch(&widen_name(stored, delivered), &[input.address(), output.address(), n as u64]);
                for (value, found) in values.chunks(stored.size()).zip(output.bytes().chunks(delivered.size())) {
                    let value = Value::load(value, stored);
                    let expected = value.store(delivered);
                    assert!(
                        same(found, &expected, delivered),
                        "{stored:?} {value:?} as {delivered:?}: {found:?}, not {expected:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn sixteen_bits_are_rounded_to_even_everywhere() {
    let (half, single) = (DType::Float16, DType::Float32);
    let Some(cpu) = OnCpu::compile(&widen_source(&[(half, single), (single, half), (single, DType::BFloat16)])) else { return };
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    let (input, output) = (Memory::new(&halves, 0), Memory::new(&vec![0; halves.len() * 2], 0));
    cpu.launch(&widen_name(half, single), &[input.address(), output.address(), halves.len() as u64 / 2]);
    for (value, found) in halves.chunks(2).zip(output.bytes().chunks(4)) {
        assert!(same(found, &Value::load(value, half).store(single), single), "{value:?}");
    }
    // around every half and every point between two, around every bfloat16, and anywhere
    let mut floats: Vec<u32> = Vec::new();
    for bits in 0..=u16::MAX {
        let (a, b) = (f16::from_bits(bits).to_f32().to_bits(), u32::from(bits) << 16);
        for around in [a, a.wrapping_add(1 << 12), b, b.wrapping_add(1 << 15)] {
            floats.extend((0..3).map(|k| around.wrapping_add(k).wrapping_sub(1)));
        }
    }
    let mut rng = rng(2);
    floats.extend((0..200_000).map(|_| rng.random::<u32>()));
    let bytes: Vec<u8> = floats.iter().flat_map(|f| f.to_ne_bytes()).collect();
    for delivered in [half, DType::BFloat16] {
        let (input, output) = (Memory::new(&bytes, 0), Memory::new(&vec![0; floats.len() * 2], 0));
        cpu.launch(&widen_name(single, delivered), &[input.address(), output.address(), floats.len() as u64]);
        for (bits, found) in floats.iter().zip(output.bytes().chunks(2)) {
            let value = f32::from_bits(*bits);
            let expected = match delivered {
                DType::BFloat16 => bf16::from_f32(value).to_bits(),
                _ => f16::from_f32(value).to_bits(),
            };
            assert!(same(found, &expected.to_ne_bytes(), delivered), "{value:e} ({bits:#x}) as {delivered:?}");
        }
    }
}

const N_COLUMNS: usize = 13;
const N_OUT: usize = 9;

fn step_lists() -> Vec<Vec<Step>> {
    let norm = |target_sum| Step::NormalizeTotal { target_sum };
    let (log, log2) = (Step::Log1p { base: None }, Step::Log1p { base: Some(2.0) });
    vec![
        vec![],
        vec![norm(1e4)],
        vec![log],
        vec![norm(1e4), log],
        vec![log2, norm(0.5)],
        vec![norm(100.0), log, norm(1.0)],
        vec![Step::Columns],
        vec![Step::Columns, norm(10.0), log],
        vec![norm(10.0), Step::Columns, log],
        vec![norm(10.0), log2, Step::Columns, norm(7.0)],
    ]
}

fn transforms() -> Vec<Transform> {
    let kinds = [
        (DType::Float32, DType::Float32, false),
        (DType::UInt16, DType::Float32, true),
        (DType::UInt8, DType::BFloat16, false),
        (DType::Float64, DType::Float16, true),
        (DType::Int32, DType::Float64, false),
        (DType::Bool, DType::Float32, false),
        (DType::Float16, DType::BFloat16, true),
    ];
    transforms_of(&kinds)
}

fn transforms_of(kinds: &[(DType, DType, bool)]) -> Vec<Transform> {
    let mut all = Vec::new();
    for form in [Form::CsrValues, Form::CsrToDense, Form::Dense] {
        for &(stored, delivered, wide) in kinds {
            for steps in step_lists() {
                let transform = Transform { form, stored, delivered, wide, steps };
                if transform.check().is_ok() {
                    all.push(transform);
                }
            }
        }
    }
    all
}

fn source_of(transforms: &[Transform]) -> String {
    let kernel = |(i, t): (usize, &Transform)| t.kernel(&format!("transform_{i}")).unwrap();
    COMMON.to_owned() + &transforms.iter().enumerate().map(kernel).collect::<String>()
}

/// One row by the book: (column, value) in, the same out.
fn transformed(row: &[(usize, f64)], steps: &[Step], map: &[i32]) -> Vec<(usize, f64)> {
    let mut row = row.to_vec();
    for step in steps {
        match step {
            Step::NormalizeTotal { target_sum } => {
                let sum: f64 = row.iter().map(|(_, x)| x).sum();
                if sum != 0.0 {
                    for (_, x) in &mut row {
                        *x /= sum / target_sum;
                    }
                }
            }
            Step::Log1p { base } => row.iter_mut().for_each(|(_, x)| *x = x.ln_1p() / base.map_or(1.0, f64::ln)),
            Step::Columns => row = row.iter().filter(|(c, _)| map[*c] >= 0).map(|(c, x)| (map[*c] as usize, *x)).collect(),
        }
    }
    row
}

#[test]
fn transforms_do_their_steps_in_order() {
    let Some(cpu) = OnCpu::compile(&source_of(&transforms())) else { return };
    let mut rng = rng(3);
    let n_rows = 41;
    for (number, t) in transforms().iter().enumerate() {
        let count = |rng: &mut ChaCha8Rng| Value::Int(i64::from(rng.random::<u32>() % 9 + 1));
        // rows without values among them, and rows of zeros
        let rows: Vec<Vec<(usize, Value)>> = (0..n_rows)
            .map(|row| {
                let columns = (0..N_COLUMNS).filter(|_| row % 5 != 1 && rng.random::<f64>() < 0.5).collect::<Vec<_>>();
                columns.into_iter().map(|c| (c, if row % 7 == 2 { Value::Int(0) } else { count(&mut rng) })).collect()
            })
            .collect();
        // delivered columns 0 and up, in another order; some are dropped, one is filled by none
        let mut map = vec![-1i32; N_COLUMNS];
        for (k, c) in [4usize, 0, 11, 7, 12, 2, 5, 9].into_iter().enumerate() {
            map[c] = k as i32;
        }
        let n_out = if t.maps(t.steps.len()) > 0 { N_OUT } else { N_COLUMNS };
        let index = if t.wide { DType::Int64 } else { DType::Int32 };
        let mut at = 0;
        let mut indptr = Value::Int(0).store(index);
        let (mut indices, mut data, mut dense) = (Vec::new(), Vec::new(), Vec::new());
        for row in &rows {
            at += row.len() as i64;
            indptr.extend(Value::Int(at).store(index));
            let mut full = [Value::Int(0); N_COLUMNS];
            for (c, value) in row {
                indices.extend(Value::Int(*c as i64).store(index));
                data.extend(value.store(t.stored));
                full[*c] = *value;
            }
            dense.extend(full.iter().flat_map(|v| v.store(t.stored)));
        }
        let n_values = if t.form == Form::CsrValues { at as usize } else { n_rows * n_out };
        let [indptr, indices, data, dense] = [indptr, indices, data, dense].map(|bytes| Memory::new(&bytes, 0));
        let map_memory = Memory::new(&map.iter().flat_map(|m| m.to_ne_bytes()).collect::<Vec<_>>(), 0);
        let output = Memory::new(&vec![0xCD; n_values * t.delivered.size()], 0);
        let rows_out = [output.address(), n_rows as u64];
        let parameters = match t.form {
            Form::CsrValues => vec![indptr.address(), data.address(), rows_out[0], rows_out[1]],
            Form::CsrToDense => {
                let [a, b, c] = [&indptr, &indices, &data].map(Memory::address);
                vec![a, b, c, rows_out[0], rows_out[1], n_out as u64, map_memory.address()]
            }
            Form::Dense => {
                vec![dense.address(), rows_out[0], rows_out[1], N_COLUMNS as u64, n_out as u64, map_memory.address()]
            }
        };
        cpu.launch(&format!("transform_{number}"), &parameters);
        let mut expected = Vec::new();
        for row in &rows {
            let stored = |v: &Value| Value::load(&v.store(t.stored), t.stored).real();
            let out = transformed(&row.iter().map(|(c, v)| (*c, stored(v))).collect::<Vec<_>>(), &t.steps, &map);
            if t.form == Form::CsrValues {
                expected.extend(out.iter().map(|(_, x)| *x));
            } else {
                let mut full = vec![0.0; n_out];
                for (c, x) in &out {
                    full[*c] = *x;
                }
                expected.extend(full);
            }
        }
        let tolerance = match t.delivered {
            DType::BFloat16 => 5e-3,
            DType::Float16 => 1e-3,
            _ => 1e-6,
        };
        assert_eq!(expected.len(), n_values);
        for (place, (x, found)) in expected.iter().zip(output.bytes().chunks(t.delivered.size())).enumerate() {
            let found = Value::load(found, t.delivered).real();
            assert!((found - x).abs() <= tolerance * x.abs(), "{t:?}, value {place}: {found}, not {x}");
        }
    }
}

#[test]
fn transforms_that_make_no_sense_are_refused() {
    let float = DType::Float32;
    let with = |form, delivered, step| Transform { form, stored: float, delivered, wide: false, steps: vec![step] }.source("k");
    let log = |base| Step::Log1p { base };
    assert!(with(Form::Dense, float, log(Some(10.0))).is_ok());
    for base in [0.0, 1.0, -2.0, f64::NAN, f64::INFINITY] {
        assert!(with(Form::Dense, float, log(Some(base))).is_err());
    }
    assert!(with(Form::Dense, float, Step::NormalizeTotal { target_sum: 0.0 }).is_err());
    assert!(with(Form::Dense, DType::Int32, log(None)).is_err());
    assert!(with(Form::CsrValues, float, Step::Columns).is_err());
}

/// libnvrtc among the packages of the Python on PATH.
pub(crate) fn nvrtc_of_torch() -> Option<String> {
    let code = "import glob, importlib.util as u, os\n\
                spec = u.find_spec('nvidia')\n\
                for place in (spec.submodule_search_locations if spec else []):\n    \
                    for path in sorted(glob.glob(os.path.join(place, '*', 'lib', 'libnvrtc.so.*'))): print(path)";
    let out = Command::new("python3").args(["-c", code]).output().ok()?;
    String::from_utf8(out.stdout).ok()?.lines().next().map(str::to_owned)
}

#[test]
fn every_kernel_compiles_for_gpus() {
    use crate::device::nvrtc::Nvrtc;
    let path = nvrtc_of_torch();
    let nvrtc = match Nvrtc::load(0, path.as_deref()) {
        Ok(nvrtc) => nvrtc,
        Err(error) => return println!("skipped: {error}"),
    };
    // types meet in the functions that the first source calls, so that one pair of them does for every list of steps
    let transforms = transforms_of(&[(DType::UInt16, DType::BFloat16, false)]);
    for source in [widen_source(&all_pairs()), source_of(&transforms)] {
        for capability in [(8, 0), (9, 0)] {
            let code = nvrtc.compile(0, &source, capability).unwrap();
            assert_eq!(&code[..4], b"\x7fELF", "machine code for {capability:?}");
        }
    }
    // one that no compiler of today knows: PTX of the nearest that it does, which drivers compile
    let code = nvrtc.compile(0, &widen_source(&[]), (99, 0)).unwrap();
    assert!(std::str::from_utf8(&code).unwrap().contains(".target sm_") && code.last() == Some(&0));
    // compiled once
    let again = nvrtc.compile(0, &widen_source(&[]), (99, 0)).unwrap();
    assert!(std::sync::Arc::ptr_eq(&code, &again));
    let error = nvrtc.compile(0, "no kernel", (9, 0)).unwrap_err().to_string();
    assert!(error.contains("annbatch.cu(1)"), "{error}");
}

#[test]
fn a_compiler_that_is_missing_is_named_with_the_remedy() {
    let error = crate::device::nvrtc::Nvrtc::load(2, Some("/nowhere/libnvrtc.so")).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("GPU 2 ") && text.contains("/nowhere/libnvrtc.so") && text.contains("pip install"), "{text}");
}
