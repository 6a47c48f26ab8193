//! Every kernel, run on the CPU against an obvious twin, and compiled for GPUs where their compiler is.

use std::process::Command;

use half::{bf16, f16};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::*;
use crate::config::{StepConfig, TransformConfig};
use crate::device::on_cpu::OnCpu;
use crate::transform::{Joined, RowSealer, RowTarget, StagedRow};

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

/// The source of kernels that widen.
fn widening_source(pairs: &[(DType, DType)]) -> String {
    COMMON.to_owned() + &widen_source(pairs)
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
    let Some(cpu) = OnCpu::compile(&widening_source(&all_pairs())) else { return };
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
    let Some(cpu) = OnCpu::compile(&widening_source(&[(half, single), (single, half), (single, DType::BFloat16)])) else { return };
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

fn step_lists() -> Vec<Vec<StepConfig>> {
    let norm = |target_sum| StepConfig::NormalizeTotal { target_sum };
    let log = || StepConfig::Log1p { base: None };
    let log2 = || StepConfig::Log1p { base: Some(2.0) };
    let some = || StepConfig::Columns(vec![4, 0, 11, 7, 12, 2, 5, 9]);
    let fewer = || StepConfig::Columns(vec![3, 1, 7]);
    vec![
        vec![],
        vec![norm(1e4)],
        vec![log()],
        vec![norm(1e4), log()],
        vec![log2(), norm(0.5)],
        vec![norm(100.0), log(), norm(1.0)],
        vec![some()],
        vec![some(), norm(10.0), log()],
        vec![norm(10.0), some(), log()],
        vec![norm(10.0), some(), log2(), fewer(), norm(7.0)],
    ]
}

/// Stored types, and those asked for.
const TYPES: [(DType, Option<DType>); 12] = [
    (DType::Float32, None),
    (DType::Float32, Some(DType::BFloat16)),
    (DType::UInt16, Some(DType::Float32)),
    (DType::UInt8, Some(DType::BFloat16)),
    (DType::Float64, Some(DType::Float16)),
    (DType::Float64, None),
    (DType::Int32, Some(DType::Float64)),
    (DType::Int64, None),
    (DType::UInt64, None),
    (DType::Bool, None),
    (DType::Float16, None),
    (DType::Float16, Some(DType::BFloat16)),
];

/// A kernel, what its rows are, and the twin on the host is `transform`.
#[derive(Debug)]
struct Case {
    kernel: RowKernel,
    variant: Variant,
    sparse: bool,
}

fn cases(types: &[(DType, Option<DType>)]) -> Vec<Case> {
    let mut all = Vec::new();
    for (sparse, dense) in [(true, false), (true, true), (false, false)] {
        for &(stored, delivered) in types {
            for steps in step_lists() {
                let dtype = delivered.map(|dtype| dtype.name().to_owned());
                let config = TransformConfig { steps, dense, dtype };
                let n = N_COLUMNS as u64;
                let kind = if sparse { ElementKind::Csr { n_var: n } } else { ElementKind::Dense { tail: vec![n] } };
                let transform = Transform::new(&config, &kind, stored, "X").unwrap();
                let Some(kernel) = transform.and_then(|transform| RowKernel::new(&kind, &transform)) else { continue };
                all.extend(kernel.variants().into_iter().map(|variant| Case { kernel: kernel.clone(), variant, sparse }));
            }
        }
    }
    all
}

fn source_of(cases: &[Case]) -> String {
    let kernel = |(i, case): (usize, &Case)| case.kernel.source(case.variant, &format!("rows_{i}"));
    COMMON.to_owned() + &cases.iter().enumerate().map(kernel).collect::<String>()
}

/// Rows of small whole numbers, some of them without entries, some of zeros; sorted, at times two entries of one column.
fn some_rows(rng: &mut ChaCha8Rng, n_rows: usize, repeats: bool) -> Vec<Vec<(usize, Value)>> {
    let row = |row: usize, rng: &mut ChaCha8Rng| {
        let mut entries = Vec::new();
        for column in 0..N_COLUMNS {
            while row % 5 != 1 && rng.random::<f64>() < 0.4 {
                let value = if row % 7 == 2 { 0 } else { i64::from(rng.random::<u32>() % 9 + 1) };
                entries.push((column, Value::Int(value)));
                if !repeats {
                    break;
                }
            }
        }
        entries
    };
    (0..n_rows).map(|number| row(number, rng)).collect()
}

/// What the host makes of a row.
fn on_host(case: &Case, row: &[(usize, Value)], full: &[u8]) -> Vec<u8> {
    let transform = case.kernel.transform();
    let mut sealer = RowSealer::new(transform).unwrap();
    // aligned as rows are in their blocks
    let align = |bytes: &[u8]| Memory::new(bytes, 0);
    let indices = align(&row.iter().flat_map(|(c, _)| (*c as i32).to_ne_bytes()).collect::<Vec<_>>());
    let values = align(&row.iter().flat_map(|(_, v)| v.store(transform.staged())).collect::<Vec<_>>());
    let full = align(full);
    let staged = StagedRow::Csr { indices: indices.bytes(), wide: false, values: values.bytes() };
    let moved = sealer.load(if case.sparse { staged } else { StagedRow::Dense(full.bytes()) }, Joined::default(), true);
    let n = if case.kernel.form() == RowForm::CsrValues { row.len() } else { transform.n_out() };
    let mut out = vec![0u64; n];
    // SAFETY: any bits are bytes.
    let out = &mut unsafe { out.align_to_mut::<u8>() }.1[..n * transform.dtype().size()];
    // rows are sorted, so columns stay where they are
    let mut columns = indices.bytes().to_vec();
    let target = match case.kernel.form() {
        RowForm::CsrToDense => RowTarget::Dense(out),
        RowForm::CsrValues if moved => RowTarget::Csr { indices: &mut columns, wide: false, values: out },
        _ => RowTarget::Values(out),
    };
    sealer.write(target).unwrap();
    assert_eq!(columns, indices.bytes());
    out.to_vec()
}

#[test]
fn rows_are_transformed_as_on_the_host() {
    let cases = cases(&TYPES);
    let Some(cpu) = OnCpu::compile(&source_of(&cases)) else { return };
    let mut rng = rng(3);
    for (number, case) in cases.iter().enumerate() {
        let (transform, variant, n_rows) = (case.kernel.transform(), case.variant, 41);
        let rows = some_rows(&mut rng, n_rows, case.sparse && number % 3 != 0);
        let mut at = 0;
        let mut indptr = Value::Int(0).store(variant.indptr);
        let (mut indices, mut data, mut dense, mut expected) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in &rows {
            at += row.len() as i64;
            indptr.extend(Value::Int(at).store(variant.indptr));
            let mut full = [Value::Int(0); N_COLUMNS];
            for (c, value) in row {
                indices.extend(Value::Int(*c as i64).store(variant.indices));
                data.extend(value.store(variant.values));
                full[*c] = *value;
            }
            dense.extend(full.iter().flat_map(|v| v.store(variant.values)));
            let full: Vec<u8> = full.iter().flat_map(|v| v.store(transform.staged())).collect();
            expected.extend(on_host(case, row, &full));
        }
        let [indptr, indices, data, dense] = [indptr, indices, data, dense].map(|bytes| Memory::new(&bytes, 0));
        let maps: Vec<Memory> =
            case.kernel.maps().map(|map| Memory::new(&map.iter().flat_map(|m| m.to_ne_bytes()).collect::<Vec<_>>(), 0)).collect();
        let (size, n_out) = (transform.dtype().size(), transform.n_out() as u64);
        // as unaligned as torch's tensors never are
        let output = Memory::new(&vec![0xCD; expected.len()], size * (number % 5));
        let out = [output.address(), n_rows as u64];
        let mut parameters = match case.kernel.form() {
            RowForm::CsrValues if case.kernel.reads_columns() => {
                vec![indptr.address(), indices.address(), data.address(), out[0], out[1]]
            }
            RowForm::CsrValues => vec![indptr.address(), data.address(), out[0], out[1]],
            RowForm::CsrToDense => vec![indptr.address(), indices.address(), data.address(), out[0], out[1], n_out],
            RowForm::Dense => vec![dense.address(), out[0], out[1], N_COLUMNS as u64, n_out],
        };
        parameters.extend(maps.iter().map(Memory::address));
        cpu.launch(&format!("rows_{number}"), &parameters);
        // sums of what was computed are added up in another order
        let norms = transform.steps().iter().filter(|step| matches!(step, Step::NormalizeTotal { .. })).count();
        let is_exact = match transform.arithmetic() {
            Arithmetic::None => true,
            Arithmetic::Float32 => norms == 0 || (norms == 1 && !matches!(transform.steps()[0], Step::Log1p { .. })),
            Arithmetic::Float64 => false,
        };
        if is_exact {
            assert_eq!(output.bytes(), expected, "{case:?}");
            continue;
        }
        let tolerance = match transform.dtype() {
            DType::BFloat16 => 8e-3,
            DType::Float16 => 1e-3,
            DType::Float32 => 3e-7,
            _ => 1e-14,
        };
        for (place, (found, x)) in output.bytes().chunks(size).zip(expected.chunks(size)).enumerate() {
            let [found, x] = [found, x].map(|bytes| Value::load(bytes, transform.dtype()).real());
            assert!((found - x).abs() <= tolerance * x.abs(), "{case:?}, value {place}: {found}, not {x}");
        }
    }
}

/// All floats that say something: what counts become, and the edges of what the formula is for.
#[test]
fn the_logarithm_has_the_bits_of_the_host() {
    let kind = ElementKind::Csr { n_var: 5 };
    let config = TransformConfig { steps: vec![StepConfig::Log1p { base: None }], dense: false, dtype: None };
    let transform = Transform::new(&config, &kind, DType::Float32, "X").unwrap().unwrap();
    let kernel = RowKernel::new(&kind, &transform).unwrap();
    let variant = kernel.variants()[0];
    assert_eq!((variant.indptr, variant.indices), (DType::Int32, DType::UInt16));
    let Some(cpu) = OnCpu::compile(&(COMMON.to_owned() + &kernel.source(variant, "logs"))) else { return };
    let mut rng = rng(4);
    let mut floats: Vec<f32> = (0..70_000u32).map(|i| i as f32).collect();
    floats.extend((0..200_000).map(|_| f32::from_bits(rng.random())));
    floats.extend((0..200_000).map(|_| rng.random::<f32>() * 20.0 - 1.0));
    floats.extend([-0.0, -0.999, -0.998_999, -1.0, 1e38, f32::MAX, f32::INFINITY, f32::MIN_POSITIVE, 1e-45]);
    let bytes: Vec<u8> = floats.iter().flat_map(|f| f.to_ne_bytes()).collect();
    let (input, output) = (Memory::new(&bytes, 0), Memory::new(&vec![0; bytes.len()], 0));
    let indptr = Memory::new(&[0i32, floats.len() as i32].iter().flat_map(|i| i.to_ne_bytes()).collect::<Vec<_>>(), 0);
    // no column twice: as many as there are numbers, each other than the one before
    let columns = Memory::new(&(0..floats.len()).flat_map(|i| (i as u16).to_ne_bytes()).collect::<Vec<_>>(), 0);
    cpu.launch("logs", &[indptr.address(), columns.address(), input.address(), output.address(), 1]);
    let mut sealer = RowSealer::new(&transform).unwrap();
    let expected = Memory::new(&vec![0; bytes.len()], 0);
    sealer.load(StagedRow::Csr { indices: &[], wide: false, values: input.bytes() }, Joined::default(), false);
    // SAFETY: nobody else looks at the memory meanwhile.
    let target = unsafe { std::slice::from_raw_parts_mut(expected.address() as *mut u8, bytes.len()) };
    sealer.write(RowTarget::Values(target)).unwrap();
    for ((x, found), expected) in floats.iter().zip(output.bytes().chunks(4)).zip(expected.bytes().chunks(4)) {
        assert!(same(found, expected, DType::Float32), "log(1 + {x:e}): {found:?}, not {expected:?}");
    }
}

#[test]
fn sparse_rows_whose_entries_move_are_for_the_host() {
    let kind = ElementKind::Csr { n_var: 5 };
    for (dense, on_device) in [(false, false), (true, true)] {
        let config = TransformConfig { steps: vec![StepConfig::Columns(vec![2, 1])], dense, dtype: None };
        let transform = Transform::new(&config, &kind, DType::Float32, "X").unwrap().unwrap();
        assert_eq!(RowKernel::new(&kind, &transform).is_some(), on_device);
    }
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
    let mut cases = cases(&[(DType::Float32, Some(DType::BFloat16)), (DType::Float64, None), (DType::Bool, None)]);
    // each takes a tenth of a second; the CPU's compiler has seen the others
    cases.retain(|case| matches!(case.kernel.transform().steps().len(), 0 | 5));
    for source in [widening_source(&all_pairs()), source_of(&cases)] {
        for capability in [(8, 0), (9, 0)] {
            let code = nvrtc.compile(0, &source, capability).unwrap();
            assert_eq!(&code[..4], b"\x7fELF", "machine code for {capability:?}");
        }
    }
    // one that no compiler of today knows: PTX of the nearest that it does, which drivers compile
    let code = nvrtc.compile(0, &widening_source(&[]), (99, 0)).unwrap();
    assert!(std::str::from_utf8(&code).unwrap().contains(".target sm_") && code.last() == Some(&0));
    // compiled once
    let again = nvrtc.compile(0, &widening_source(&[]), (99, 0)).unwrap();
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
