//! What elements are: sparse or dense, of which type, and `NumPy`'s rules for promoting types.

use serde::{Deserialize, Serialize};

use crate::base::error::{Error, Result};

/// Type of the values of an array, as stored or as delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names are NumPy's")]
pub enum DType {
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    Float16,
    Float32,
    Float64,
    /// Brain floating point: delivered where it is asked for, never stored.
    BFloat16,
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum NumberClass {
    Bool,
    Signed,
    Unsigned,
    Float,
}

impl DType {
    /// All that are stored.
    pub const ALL: [Self; 12] = [
        Self::Bool,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::UInt8,
        Self::UInt16,
        Self::UInt32,
        Self::UInt64,
        Self::Float16,
        Self::Float32,
        Self::Float64,
    ];

    /// Those that values can be computed to; see [`crate::transform`].
    pub const COMPUTED: [Self; 4] = [Self::Float32, Self::BFloat16, Self::Float16, Self::Float64];

    /// `NumPy`'s name, e.g. `uint16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Int8 => "int8",
            Self::Int16 => "int16",
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::UInt8 => "uint8",
            Self::UInt16 => "uint16",
            Self::UInt32 => "uint32",
            Self::UInt64 => "uint64",
            Self::Float16 => "float16",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::BFloat16 => "bfloat16",
        }
    }

    /// The stored type of that name (`NumPy`'s and Zarr v3's names are the same).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::Int8 | Self::UInt8 => 1,
            Self::Int16 | Self::UInt16 | Self::Float16 | Self::BFloat16 => 2,
            Self::Int32 | Self::UInt32 | Self::Float32 => 4,
            Self::Int64 | Self::UInt64 | Self::Float64 => 8,
        }
    }

    fn class(self) -> NumberClass {
        match self {
            Self::Bool => NumberClass::Bool,
            Self::Int8 | Self::Int16 | Self::Int32 | Self::Int64 => NumberClass::Signed,
            Self::UInt8 | Self::UInt16 | Self::UInt32 | Self::UInt64 => NumberClass::Unsigned,
            Self::Float16 | Self::Float32 | Self::Float64 | Self::BFloat16 => NumberClass::Float,
        }
    }

    /// Whether this is a signed or unsigned integer type (not bool).
    pub fn is_integer(self) -> bool {
        matches!(self.class(), NumberClass::Signed | NumberClass::Unsigned)
    }

    /// The smallest type that holds both, as `numpy.result_type` gives it for arrays.
    #[must_use]
    pub fn promote(self, other: Self) -> Self {
        let (a, b) = if self.class_rank() <= other.class_rank() { (self, other) } else { (other, self) };
        match (a.class(), b.class()) {
            (NumberClass::Bool, _) => b,
            (x, y) if x == y => {
                if a.size() >= b.size() {
                    a
                } else {
                    b
                }
            }
            // unsigned with signed: the next wider signed type unless the signed one is wider already
            (NumberClass::Unsigned, NumberClass::Signed) => {
                if a.size() < b.size() {
                    b
                } else {
                    match a.size() {
                        1 => Self::Int16,
                        2 => Self::Int32,
                        4 => Self::Int64,
                        _ => Self::Float64,
                    }
                }
            }
            // integer with float: the float must have room for the integer's digits
            _ => {
                let room = match a.size() {
                    1 => Self::Float16,
                    2 => Self::Float32,
                    _ => Self::Float64,
                };
                if room.size() >= b.size() { room } else { b }
            }
        }
    }

    fn class_rank(self) -> u8 {
        match self.class() {
            NumberClass::Bool => 0,
            NumberClass::Unsigned => 1,
            NumberClass::Signed => 2,
            NumberClass::Float => 3,
        }
    }

    /// Whether every value of `self` is kept when cast to `to` (`numpy.can_cast(…, "safe")`).
    pub fn casts_safely_to(self, to: Self) -> bool {
        self.promote(to) == to
    }

    /// The type in which torch computes with these values: torch has next to no operations for
    /// `uint16`, `uint32` and `uint64` (no `to_dense`, no `matmul`), so they arrive as `int32`, `int64`
    /// and `int64`; a `uint64` above 2⁶³−1 is an error when it is read.
    #[must_use]
    pub fn torch(self) -> Self {
        match self {
            Self::UInt16 => Self::Int32,
            Self::UInt32 | Self::UInt64 => Self::Int64,
            other => other,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Form of the rows of one element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ElementKind {
    /// Sparse rows of `n_var` columns.
    Csr {
        /// Number of columns.
        n_var: u64,
    },
    /// Dense rows of this shape.
    Dense {
        /// Shape without the observation axis.
        tail: Vec<u64>,
    },
}

/// How the values of an element are to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// `NumPy` promotion over the datasets, then [`DType::torch`].
    #[default]
    Torch,
    /// `NumPy` promotion over the datasets.
    Native,
    /// This type; every stored type must cast to it safely.
    Exactly(DType),
}

impl Delivery {
    /// Parses `"torch"`, `"native"` or a type's name.
    pub fn parse(text: &str, field: &str) -> Result<Self> {
        match text {
            "torch" => Ok(Self::Torch),
            "native" => Ok(Self::Native),
            name => DType::from_name(name).map(Self::Exactly).ok_or_else(|| {
                Error::config(
                    field,
                    format!("unknown dtype {name:?}; expected \"torch\", \"native\" or a NumPy name such as \"float32\""),
                )
            }),
        }
    }

    /// The delivered type for arrays stored as `stored` (at least one); `at` names each of them in errors, by its number.
    pub fn resolve(self, stored: &[DType], at: impl Fn(usize) -> String) -> Result<DType> {
        // pairwise promotion is not associative across kinds; widest kind first is what `numpy.result_type`
        // of all of them gives
        let mut by_kind = stored.to_vec();
        by_kind.sort_unstable_by_key(|d| std::cmp::Reverse(d.class_rank()));
        let promoted = by_kind.into_iter().reduce(DType::promote).expect("at least one dataset");
        match self {
            Self::Native => Ok(promoted),
            Self::Torch => Ok(promoted.torch()),
            Self::Exactly(dtype) => match stored.iter().enumerate().find(|(_, s)| !s.casts_safely_to(dtype)) {
                None => Ok(dtype),
                Some((number, s)) => Err(Error::unsupported(
                    at(number),
                    format!(
                        "stored as {s}, which does not cast safely to the requested {dtype}; ask for {} or leave the dtype out",
                        promoted.torch()
                    ),
                )),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promotion_is_numpys() {
        use DType::{Bool, Float16, Float32, Float64, Int8, Int16, Int32, Int64, UInt8, UInt16, UInt32, UInt64};
        // rows of numpy.result_type, written out by hand
        for (a, b, want) in [
            (Bool, UInt8, UInt8),
            (Bool, Float16, Float16),
            (UInt8, Int8, Int16),
            (UInt16, Int8, Int32),
            (UInt16, Int32, Int32),
            (UInt32, Int32, Int64),
            (UInt64, Int8, Float64),
            (UInt8, Float16, Float16),
            (Int16, Float16, Float32),
            (Int32, Float16, Float64),
            (UInt16, Float32, Float32),
            (Int32, Float32, Float64),
            (Int64, Float32, Float64),
            (Float32, Float64, Float64),
            (UInt32, UInt64, UInt64),
        ] {
            assert_eq!(a.promote(b), want, "{a} with {b}");
            assert_eq!(b.promote(a), want, "{b} with {a}");
        }
    }

    #[test]
    fn promotion_of_many_does_not_depend_on_their_order() {
        use DType::{Float16, Float32, Int8, UInt8, UInt16};
        for (mut stored, want) in [(vec![Int8, UInt8, Float16], Float16), (vec![Int8, UInt16, Float32], Float32)] {
            for _ in 0..stored.len() {
                stored.rotate_left(1);
                assert_eq!(Delivery::Native.resolve(&stored, |_| String::new()).unwrap(), want, "{stored:?}");
            }
        }
    }

    #[test]
    fn promotion_is_symmetric_and_idempotent() {
        for a in DType::ALL {
            assert_eq!(a.promote(a), a);
            for b in DType::ALL {
                assert_eq!(a.promote(b), b.promote(a));
            }
        }
    }
}
