//! Kernels: their source.
//!
//! The source is text: `kernels.cu`, then one instantiation for each pair of types that is widened, or a kernel generated
//! for the rows of one element, the steps of its [`Transform`] unrolled. It is compiled at run time for the GPU at hand,
//! once per process.
//!
//! Rows are worked on by warps, one row each: sums over a row need no memory but registers. A transform reads its rows
//! once for each normalisation and once more to write; rows of some KiB stay in the cache meanwhile. Results are those of
//! [`RowSealer`](crate::transform::RowSealer) to the last bit where float32 is computed in and the sums of rows are exact
//! (counts are); other sums are added up in another order, and logarithms in float64 are CUDA's.

use std::fmt::Write as _;

use crate::finish::narrow;
use crate::schema::{DType, ElementKind};
use crate::transform::{Arithmetic, ColumnMap, Step, Transform};

/// What every kernel's source begins with.
pub(super) const COMMON: &str = include_str!("kernels.cu");

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

/// The name of the kernel that copies `stored` as `delivered`. Parameters: values, out, n.
pub fn widen_name(stored: DType, delivered: DType) -> String {
    format!("widen_{}_{}", name_of(stored), name_of(delivered))
}

/// The kernels that copy the first type of each pair as the second.
pub fn widen_source(pairs: &[(DType, DType)]) -> String {
    pairs.iter().fold(String::new(), |mut source, (stored, delivered)| {
        let _ = writeln!(source, "WIDEN({}, {})", name_of(*stored), name_of(*delivered));
        source
    })
}

/// How rows come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowForm {
    /// Values of CSR rows, in place of values.
    /// Parameters: indptr, column indices where the [transform merges](Transform::merges), values, out, rows.
    CsrValues,
    /// CSR rows to dense ones.
    /// Parameters: indptr, indices, values, out, rows, columns out, then the maps in order.
    CsrToDense,
    /// Dense rows to dense rows.
    /// Parameters: values, out, rows, columns in, columns out, then the maps in order.
    Dense,
}

/// What a GPU does to the rows of one element.
#[derive(Debug, Clone, PartialEq)]
pub struct RowKernel {
    form: RowForm,
    transform: Transform,
    /// Columns of a row before.
    n_in: u64,
}

/// Types in which rows may arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// Of the values.
    pub values: DType,
    /// Of the column indices, where they are [read](RowKernel::reads_columns).
    pub indices: DType,
    /// Of the row pointers of CSR rows.
    pub indptr: DType,
}

impl RowKernel {
    /// The kernel for an element that is read as `kind`, or `None` for what is not done on a GPU: sparse rows of which
    /// entries are dropped or moved, and that stay sparse.
    pub fn new(kind: &ElementKind, transform: &Transform) -> Option<Self> {
        let (form, n_in) = match (kind, transform.kind()) {
            (ElementKind::Csr { n_var }, ElementKind::Dense { .. }) => (RowForm::CsrToDense, *n_var),
            (ElementKind::Csr { n_var }, _) => (RowForm::CsrValues, *n_var),
            (ElementKind::Dense { tail }, _) => (RowForm::Dense, tail[0]),
        };
        let done_here = form != RowForm::CsrValues || !transform.moves_columns();
        done_here.then(|| Self { form, transform: transform.clone(), n_in })
    }

    /// How rows come and go.
    pub fn form(&self) -> RowForm {
        self.form
    }

    /// What is done to them.
    pub fn transform(&self) -> &Transform {
        &self.transform
    }

    /// Columns of a row before.
    pub fn n_in(&self) -> u64 {
        self.n_in
    }

    /// Whether the kernel looks at column indices: to spread entries out, or to add up those of one column. These stand one
    /// behind the other in their row.
    pub fn reads_columns(&self) -> bool {
        self.form != RowForm::Dense && self.transform.merges()
    }

    /// The types in which rows may arrive. Column indices are uint16 where that is enough for all of them.
    pub fn variants(&self) -> Vec<Variant> {
        let staged = self.transform.staged();
        let widths = if self.form == RowForm::Dense { &[DType::Int32][..] } else { &[DType::Int32, DType::Int64] };
        std::iter::once(staged)
            .chain(narrow::TYPES.into_iter().filter(|_| narrow::can_be_narrow(staged)))
            .flat_map(|values| {
                widths.iter().map(move |&indptr| {
                    let indices = if self.reads_columns() && narrow::fits_columns(self.n_in) { DType::UInt16 } else { indptr };
                    Variant { values, indices, indptr }
                })
            })
            .collect()
    }

    /// The delivered column of each stored one, -1 where it is dropped, for every step that moves columns, in order.
    pub fn maps(&self) -> impl Iterator<Item = &[u32]> {
        self.transform.maps().map(ColumnMap::places)
    }

    /// The source of a kernel called `name`.
    pub fn source(&self, variant: Variant, name: &str) -> String {
        let (indptr, indices, stored) = (name_of(variant.indptr), name_of(variant.indices), name_of(variant.values));
        let delivered = name_of(self.transform.dtype());
        let n_maps = self.maps().count();
        let maps: String = (0..n_maps).fold(String::new(), |out, map| out + &format!(", const i32* map{map}"));
        let parameters = match self.form {
            RowForm::CsrValues => {
                let columns = if self.reads_columns() { format!("const {indices}* indices, ") } else { String::new() };
                format!("const {indptr}* indptr, {columns}const {stored}* in, {delivered}* out, i64 n_rows")
            }
            RowForm::CsrToDense => format!(
                "const {indptr}* indptr, const {indices}* indices, const {stored}* in, {delivered}* out, i64 n_rows, i64 n_out{maps}"
            ),
            RowForm::Dense => format!("const {stored}* in, {delivered}* out, i64 n_rows, i64 n_in, i64 n_out{maps}"),
        };
        let bounds = match self.form {
            RowForm::Dense => "const i64 begin = row * n_in, end = begin + n_in;",
            _ => "const i64 begin = indptr[row], end = indptr[row + 1];",
        };
        let mut body = self.stored();
        for (place, step) in self.transform.steps().iter().enumerate() {
            if let Step::NormalizeTotal { target_sum } = step {
                let _ = write!(
                    body,
                    "{value}    f64 sum{place} = 0;\n    for (i64 i = begin + lane(); i < end; i += LANES) {{\n{skip}{column}      \
                     sum{place} += value{place}(i);\n    }}\n    const {number} divisor{place} = \
                     divisor<{number}>(sum_over_lanes(sum{place}), {target_sum:e});\n",
                    value = self.value(place, self.needs_sums(place)),
                    skip = if self.needs_sums(place) { "      if (again(i)) continue;\n" } else { "" },
                    column = self.column(place),
                    number = self.number(),
                );
            }
        }
        let n_steps = self.transform.steps().len();
        body.push_str(&self.value(n_steps, self.reads_columns()));
        // of several entries of one column the first has what all add up to
        let (before, skip, value, target) = match self.form {
            RowForm::CsrValues if self.reads_columns() => ("", "", format!("again(i) ? 0 : value{n_steps}(i)"), "i"),
            RowForm::CsrValues => ("", "", format!("value{n_steps}(i)"), "i"),
            RowForm::CsrToDense => (
                "    zero_row(out + row * n_out, n_out);\n    lanes_meet();\n",
                "      if (again(i)) continue;\n",
                format!("value{n_steps}(i)"),
                "row * n_out + column",
            ),
            RowForm::Dense => ("", "", format!("value{n_steps}(i)"), "row * n_out + column"),
        };
        let deliver =
            if self.transform.arithmetic() == Arithmetic::None { "x".into() } else { format!("Deliver<{delivered}>::from(x)") };
        let _ = write!(
            body,
            "{before}    for (i64 i = begin + lane(); i < end; i += LANES) {{\n{skip}{column}      const {number} x = {value};\n      \
             out[{target}] = {deliver};\n    }}\n",
            column =
                if self.form == RowForm::CsrValues { String::new() } else { self.column(n_steps) + &self.default_column(n_steps) },
            number = self.number(),
        );
        format!(
            "\nextern \"C\" __global__ void {name}({parameters}) {{\n  \
             for (i64 row = warp_number(); row < n_rows; row += warp_count()) {{\n    {bounds}\n{body}  }}\n}}\n"
        )
    }

    /// The type that is computed in.
    fn number(&self) -> &'static str {
        match self.transform.arithmetic() {
            Arithmetic::None => name_of(self.transform.dtype()),
            Arithmetic::Float32 => "f32",
            Arithmetic::Float64 => "f64",
        }
    }

    /// The column that entry `i` is in, as it was stored.
    fn stored_column(&self) -> &'static str {
        if self.form == RowForm::Dense { "i - begin" } else { "indices[i]" }
    }

    /// Statements that find the `column` of entry `i` after the first `n` steps, and pass over those that were dropped;
    /// none where no step moves columns.
    fn column(&self, n: usize) -> String {
        let maps = self.transform.steps()[..n].iter().filter(|step| matches!(step, Step::Columns(_))).count();
        (0..maps).fold(String::new(), |mut out, map| {
            if map == 0 {
                let _ = writeln!(out, "      i64 column = {};", self.stored_column());
            }
            let _ = writeln!(out, "      column = map{map}[column];\n      if (column < 0) continue;");
            out
        })
    }

    /// The `column` where no step moves it.
    fn default_column(&self, n: usize) -> String {
        if self.column(n).is_empty() { format!("      const i64 column = {};\n", self.stored_column()) } else { String::new() }
    }

    /// Whether the first `n` steps are done to the sums of the entries of one column, not to each of them: what is not linear
    /// is.
    fn needs_sums(&self, n: usize) -> bool {
        self.form != RowForm::Dense && !self.transform.steps()[..n].iter().all(Step::is_linear)
    }

    /// Functions of entry `i`: its value as it was stored, and, where column indices are read, whether the one before it has
    /// the same column, and what it and those of its column behind it add up to.
    fn stored(&self) -> String {
        let number = self.number();
        let load = if self.transform.arithmetic() == Arithmetic::None { "in[i]" } else { "loaded(in[i])" };
        let mut out = format!("    const auto stored = [&](i64 i) {{ return ({number}){load}; }};\n");
        if self.reads_columns() {
            let _ = write!(
                out,
                "    const auto again = [&](i64 i) {{ return i > begin && indices[i - 1] == indices[i]; }};\n    \
                 const auto sum = [&](i64 i) {{\n      {number} x = stored(i);\n      \
                 for (i64 j = i + 1; j < end && indices[j] == indices[i]; ++j) x = plus(x, stored(j));\n      \
                 return x;\n    }};\n"
            );
        }
        out
    }

    /// A function `value{n}` of entry `i`: its value after the first `n` steps, or what they make of the sum of the entries of
    /// its column.
    fn value(&self, n: usize, of_sum: bool) -> String {
        let (number, load) = (self.number(), if of_sum { "sum" } else { "stored" });
        let mut out = format!("    const auto value{n} = [&](i64 i) {{\n      {number} x = {load}(i);\n");
        for (place, step) in self.transform.steps()[..n].iter().enumerate() {
            let _ = match step {
                Step::NormalizeTotal { .. } => writeln!(out, "      x /= divisor{place};"),
                Step::Log1p { base: None } => writeln!(out, "      x = log_of_one_more(x);"),
                Step::Log1p { base: Some(base) } => writeln!(out, "      x = log_of_one_more(x) / ({number}){:e};", base.ln()),
                Step::Columns(_) => Ok(()),
            };
        }
        out + "      return x;\n    };\n"
    }
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
pub(crate) mod tests;
