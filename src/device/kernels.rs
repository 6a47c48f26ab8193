//! Kernels: their source, and their machine code.
//!
//! The source is text: `kernels.cu`, then one instantiation for each pair of types that is wanted, or a kernel generated
//! for a [`Transform`], its steps unrolled. It is compiled at run time for the GPU at hand, once per process.
//!
//! Rows are worked on by warps, one row each: sums over a row need no memory but registers. A transform reads its rows
//! once for each normalisation and once more to write; rows of some KiB stay in the cache meanwhile.

use std::fmt::Write as _;

use crate::dtype::DType;
use crate::error::{Error, Result};

/// What every kernel's source begins with.
const COMMON: &str = include_str!("kernels.cu");

/// The name of a type in `kernels.cu`.
fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "b8",
        DType::Int8 => "i8",
        DType::Int16 => "i16",
        DType::Int32 => "i32",
        DType::Int64 => "i64",
        DType::UInt8 => "u8",
        DType::UInt16 => "u16",
        DType::UInt32 => "u32",
        DType::UInt64 => "u64",
        DType::Float16 => "f16",
        DType::Float32 => "f32",
        DType::Float64 => "f64",
        DType::BFloat16 => "bf16",
    }
}

/// One thing done to each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Each row is divided by (its sum / `target_sum`); rows whose sum is 0 stay as they are (as in scanpy's
    /// `normalize_total`).
    NormalizeTotal {
        /// What rows add up to afterwards.
        target_sum: f64,
    },
    /// log(1 + x), to `base`, or the natural one.
    Log1p {
        /// The base.
        base: Option<f64>,
    },
    /// Columns go to others, by a map of int32 that the kernel is given; those of -1 are dropped, also from later sums.
    Columns,
}

/// How rows come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Values of CSR rows, in place of values: no [`Step::Columns`].
    /// Parameters: indptr, values, out, rows.
    CsrValues,
    /// CSR rows to dense ones. Where a row names a column twice, one of the values is delivered.
    /// Parameters: indptr, indices, values, out, rows, columns out, then the maps in order.
    CsrToDense,
    /// Dense rows to dense rows.
    /// Parameters: values, out, rows, columns in, columns out, then the maps in order.
    Dense,
}

/// A kernel that transforms rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    /// How rows come and go.
    pub form: Form,
    /// Type of the values that come.
    pub stored: DType,
    /// Type of the values that go: a floating-point one.
    pub delivered: DType,
    /// Whether indptr and indices are int64, not int32.
    pub wide: bool,
    /// What is done, in this order.
    pub steps: Vec<Step>,
}

/// The name of the kernel that copies `stored` as `delivered`. Parameters: values, out, n.
pub fn widen_name(stored: DType, delivered: DType) -> String {
    format!("widen_{}_{}", name_of(stored), name_of(delivered))
}

/// The source of the kernels that copy the first type of each pair as the second.
pub fn widen_source(pairs: &[(DType, DType)]) -> String {
    let mut source = COMMON.to_owned();
    for (stored, delivered) in pairs {
        let _ = writeln!(source, "WIDEN({}, {})", name_of(*stored), name_of(*delivered));
    }
    source
}

impl Transform {
    fn check(&self) -> Result<()> {
        if !DType::COMPUTED.contains(&self.delivered) {
            return Err(Error::argument("transform", "delivers floating-point numbers only"));
        }
        for step in &self.steps {
            match step {
                Step::NormalizeTotal { target_sum } if !(target_sum.is_finite() && *target_sum > 0.0) => {
                    return Err(Error::argument("transform", format!("target_sum is {target_sum}; expected a number above 0")));
                }
                Step::Log1p { base: Some(base) } if !(base.is_finite() && *base > 0.0 && base.ln().abs() > 0.0) => {
                    return Err(Error::argument("transform", format!("base is {base}; expected a number above 0 other than 1")));
                }
                Step::Columns if self.form == Form::CsrValues => {
                    return Err(Error::argument("transform", "columns of sparse rows cannot be chosen on the device"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The source of a kernel called `name`.
    pub fn source(&self, name: &str) -> Result<String> {
        Ok(format!("{COMMON}{}", self.kernel(name)?))
    }

    fn kernel(&self, name: &str) -> Result<String> {
        self.check()?;
        let (index, stored, delivered) = (if self.wide { "i64" } else { "i32" }, name_of(self.stored), name_of(self.delivered));
        let maps: String = (0..self.maps(self.steps.len())).fold(String::new(), |out, map| out + &format!(", const i32* map{map}"));
        let parameters = match self.form {
            Form::CsrValues => format!("const {index}* indptr, const {stored}* in, {delivered}* out, i64 n_rows"),
            Form::CsrToDense => format!(
                "const {index}* indptr, const {index}* indices, const {stored}* in, {delivered}* out, i64 n_rows, i64 n_out{maps}"
            ),
            Form::Dense => format!("const {stored}* in, {delivered}* out, i64 n_rows, i64 n_in, i64 n_out{maps}"),
        };
        let bounds = match self.form {
            Form::Dense => "const i64 begin = row * n_in, end = begin + n_in;",
            _ => "const i64 begin = indptr[row], end = indptr[row + 1];",
        };
        let mut body = String::new();
        for (place, step) in self.steps.iter().enumerate() {
            if let Step::NormalizeTotal { target_sum } = step {
                let prefix = self.prefix(place);
                let _ = write!(
                    body,
                    "    f64 sum{place} = 0;\n    for (i64 i = begin + lane(); i < end; i += LANES) {{\n{prefix}      \
                     sum{place} += x;\n    }}\n    const f32 divisor{place} = divisor(sum_over_lanes(sum{place}), {target_sum:e});\n"
                );
            }
        }
        if self.form != Form::CsrValues {
            // on the way through every value of the row unless all are written anyway
            body.push_str(
                "    for (i64 j = lane(); j < n_out; j += LANES) out[row * n_out + j] = Deliver<DELIVERED>::from(0.0f);\n    \
                 lanes_meet();\n",
            );
        }
        let target = if self.form == Form::CsrValues { "i" } else { "row * n_out + column" };
        let prefix = self.prefix(self.steps.len());
        let _ = write!(
            body,
            "    for (i64 i = begin + lane(); i < end; i += LANES) {{\n{prefix}      \
             out[{target}] = Deliver<DELIVERED>::from(x);\n    }}\n"
        );
        let body = body.replace("DELIVERED", delivered);
        Ok(format!(
            "\nextern \"C\" __global__ void {name}({parameters}) {{\n  \
             for (i64 row = warp_number(); row < n_rows; row += warp_count()) {{\n    {bounds}\n{body}  }}\n}}\n"
        ))
    }

    /// [`Step::Columns`] among the first `n` steps.
    fn maps(&self, n: usize) -> usize {
        self.steps[..n].iter().filter(|step| **step == Step::Columns).count()
    }

    /// Statements that load value `i` as `x`, with its `column`, and do the first `n` steps to it.
    fn prefix(&self, n: usize) -> String {
        let mut out = match self.form {
            Form::CsrValues => String::new(),
            Form::CsrToDense => "      i64 column = indices[i];\n".to_owned(),
            Form::Dense => "      i64 column = i - begin;\n".to_owned(),
        };
        out.push_str("      f32 x = (f32)loaded(in[i]);\n");
        let mut map = 0;
        for (place, step) in self.steps[..n].iter().enumerate() {
            let _ = match step {
                Step::NormalizeTotal { .. } => writeln!(out, "      x /= divisor{place};"),
                Step::Log1p { base: None } => writeln!(out, "      x = log1pf(x);"),
                Step::Log1p { base: Some(base) } => writeln!(out, "      x = log1pf(x) / (f32){:e};", base.ln()),
                Step::Columns => {
                    map += 1;
                    writeln!(out, "      column = map{}[column];\n      if (column < 0) continue;", map - 1)
                }
            };
        }
        if self.maps(n) == 0 && n < self.steps.len() {
            // sums need no column
            out = out.replace("      i64 column = indices[i];\n", "").replace("      i64 column = i - begin;\n", "");
        }
        out
    }
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
#[cfg(all(test, feature = "cuda"))]
pub(crate) use tests::nvrtc_of_torch;
