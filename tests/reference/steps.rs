//! What a transform does to a row, one entry after the other in float64.

use annbatch::DType;
use half::{bf16, f16};
use proptest::prelude::*;

use super::values;

#[derive(Debug, Clone)]
pub enum Step {
    Normalize(f64),
    Log1p(Option<f64>),
    /// Seeds of a choice among the columns that there are then.
    Columns(Vec<prop::sample::Index>),
}

pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0.5f64..2e4).prop_map(Step::Normalize),
        prop_oneof![Just(None), Just(Some(2.0)), Just(Some(10.0))].prop_map(Step::Log1p),
        prop::collection::vec(any::<prop::sample::Index>(), 1..30).prop_map(Step::Columns),
    ];
    prop::collection::vec(step, 0..4)
}

/// As the configuration has them, for rows of `n_var` columns.
pub fn steps_json(steps: &[Step], mut n_var: u64) -> Vec<serde_json::Value> {
    let json = steps.iter().map(|step| match step {
        Step::Normalize(target_sum) => serde_json::json!({"normalize_total": {"target_sum": target_sum}}),
        Step::Log1p(base) => serde_json::json!({"log1p": {"base": base}}),
        Step::Columns(picks) => {
            let columns = columns(picks, n_var);
            n_var = columns.len() as u64;
            serde_json::json!({"columns": columns})
        }
    });
    json.collect()
}

/// Entries of a delivered row, and its number of columns.
pub fn transformed(row: &[(u64, f64)], mut n_var: u64, steps: &[Step]) -> (Vec<(u64, f64)>, u64) {
    let mut row = row.to_vec();
    for step in steps {
        match step {
            Step::Normalize(target) => {
                let sum: f64 = row.iter().map(|(_, v)| v).sum();
                if sum != 0.0 {
                    for (_, value) in &mut row {
                        *value = *value / sum * target;
                    }
                }
            }
            Step::Log1p(base) => {
                // of what the entries of a column add up to: the first has it, the others nothing
                let sum = |column| row.iter().filter(|entry| entry.0 == column).map(|entry| entry.1).sum::<f64>();
                let is_first = |at: usize| row[..at].iter().all(|entry| entry.0 != row[at].0);
                let value = |at: usize| if is_first(at) { sum(row[at].0).ln_1p() / base.map_or(1.0, f64::ln) } else { 0.0 };
                row = (0..row.len()).map(|at| (row[at].0, value(at))).collect();
            }
            Step::Columns(picks) => {
                let columns = columns(picks, n_var);
                n_var = columns.len() as u64;
                row = row
                    .iter()
                    .filter_map(|&(c, v)| columns.iter().position(|&kept| kept == c).map(|place| (place as u64, v)))
                    .collect();
            }
        }
    }
    (row, n_var)
}

fn columns(picks: &[prop::sample::Index], n_var: u64) -> Vec<u64> {
    let mut out = Vec::new();
    for pick in picks {
        let column = pick.index(n_var as usize) as u64;
        if !out.contains(&column) {
            out.push(column);
        }
    }
    out
}

/// A delivered row as a dense one of `n` columns: `sprs` adds up the entries of one column.
pub fn spread_out(entries: Vec<(u64, f64)>, n: usize) -> Vec<f64> {
    let mut row = sprs::TriMat::new((1, n));
    for (column, value) in entries {
        row.add_triplet(0, column as usize, value);
    }
    row.to_csr::<usize>().to_dense().into_iter().collect()
}

/// Elements of a delivered tensor of any type.
pub fn floats(tensor: &annbatch::batch::Tensor) -> Vec<f64> {
    match tensor.dtype {
        DType::Float32 => values::<f32>(tensor).into_iter().map(f64::from).collect(),
        DType::Float64 => values::<f64>(tensor),
        DType::UInt8 => values::<u8>(tensor).into_iter().map(f64::from).collect(),
        DType::Int32 => values::<i32>(tensor).into_iter().map(f64::from).collect(),
        DType::Int64 => values::<i64>(tensor).into_iter().map(|v| v as f64).collect(),
        DType::Float16 => values::<f16>(tensor).into_iter().map(f64::from).collect(),
        DType::BFloat16 => values::<bf16>(tensor).into_iter().map(f64::from).collect(),
        other => panic!("{other}"),
    }
}
