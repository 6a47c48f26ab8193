//! What happens to the rows of an element between the store and the consumer: a specification, and its meaning.
//!
//! A [`Transform`] is a list of [`Step`]s in the order given, whether sparse rows become dense ones, and the type that
//! values are delivered in. Row by row, nothing looks at another row, so that batches of any composition agree. The
//! meaning is scanpy's (`normalize_total` with a target, `log1p`) and `adata[:, columns]`'s. Of a column that a sparse row has
//! several entries of, the value is their sum, as in scipy.
//!
//! Arithmetic is done in float32, or in float64 where values are stored so; sums of a row in float64. Without arithmetic
//! values keep the type that they are delivered in otherwise.

mod entries;
mod math;
mod rows;
mod sealer;

use std::sync::Arc;

use crate::base::error::{Error, Result, vec_with_room};
use crate::config::{StepConfig, TransformConfig};
use crate::schema::{DType, ElementKind};

pub(crate) use entries::{EntrySorter, copy_kept};
pub use rows::{RowTarget, StagedRow};
pub use sealer::RowSealer;

/// One thing that is done to a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Divides every value by `sum of the row / target_sum`. Rows whose sum is 0 stay as they are
    /// (`scanpy.pp.normalize_total`).
    NormalizeTotal {
        /// What every row adds up to afterwards.
        target_sum: f64,
    },
    /// `log(1 + value)`, divided by `log(base)` where a base is given (`scanpy.pp.log1p`).
    Log1p {
        /// `None`: e.
        base: Option<f64>,
    },
    /// Keeps some columns, in an order of one's own.
    Columns(Arc<ColumnMap>),
}

/// Columns that an element may have: a selection takes 4 bytes for each, and metadata may claim any number.
pub(crate) const MAX_COLUMNS: u64 = 1 << 27;

/// Which columns are kept, and where they come to stand.
#[derive(Debug, PartialEq, Eq)]
pub struct ColumnMap {
    /// Delivered column of each stored one, or [`ColumnMap::ABSENT`].
    to: Vec<u32>,
    /// Stored column of each delivered one.
    from: Vec<u32>,
    /// Whether `from` is sorted, so that sorted rows stay so.
    ascending: bool,
}

/// What is left to do to a sparse row whose columns were replaced by joined ones (see [`Join`](crate::collection::Join)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Joined {
    /// Entries of column `u32::MAX` are left out.
    pub drops: bool,
    /// Entries are sorted by column, for columns changed places.
    pub sorts: bool,
}

impl Joined {
    /// What either has left to do.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { drops: self.drops || other.drops, sorts: self.sorts || other.sorts }
    }
}

/// What values are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Nothing is computed: values stay as they are.
    None,
    /// Float32.
    Float32,
    /// Float64, where values are stored or delivered so.
    Float64,
}

/// What becomes of the rows of one element.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    steps: Vec<Step>,
    /// What is delivered: sparse or dense, and its number of columns.
    kind: ElementKind,
    /// Of the values as they are read.
    staged: DType,
    /// Of the values as they are delivered.
    dtype: DType,
}

impl ColumnMap {
    const ABSENT: u32 = u32::MAX;

    fn new(columns: &[u64], n_var: u64, at: &str) -> Result<Self> {
        let field = || format!("transform of {at}");
        if columns.is_empty() {
            return Err(Error::config(field(), "selects no column; expected at least one"));
        }
        let mut to: Vec<u32> = vec_with_room(n_var, at)?;
        to.resize(n_var as usize, Self::ABSENT);
        let mut from = Vec::with_capacity(columns.len());
        for (place, &column) in columns.iter().enumerate() {
            let slot = usize::try_from(column).ok().and_then(|c| to.get_mut(c));
            let slot = slot.ok_or_else(|| Error::config(field(), format!("column {column} does not exist; there are {n_var}")))?;
            if *slot != Self::ABSENT {
                return Err(Error::config(field(), format!("column {column} is selected twice; expected each once")));
            }
            *slot = place as u32;
            from.push(column as u32);
        }
        let ascending = from.is_sorted();
        Ok(Self { to, from, ascending })
    }

    /// Where a stored column comes to stand, if it is kept.
    pub fn delivered(&self, column: u32) -> Option<u32> {
        self.to.get(column as usize).copied().filter(|to| *to != Self::ABSENT)
    }

    /// Delivered column of each stored one; as int32 it is -1 where there is none.
    pub fn places(&self) -> &[u32] {
        &self.to
    }

    /// Stored column of each delivered one.
    pub fn stored(&self) -> &[u32] {
        &self.from
    }
}

impl Step {
    fn new(config: &StepConfig, n_var: u64, at: &str) -> Result<Self> {
        let positive = |name: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(value);
            }
            Err(Error::config(format!("transform of {at}"), format!("{name} is {value}; expected a number above 0")))
        };
        Ok(match config {
            StepConfig::NormalizeTotal { target_sum } => Self::NormalizeTotal { target_sum: positive("target_sum", *target_sum)? },
            StepConfig::Log1p { base } => {
                let base = base.map(|base| positive("base", base)).transpose()?;
                if base == Some(1.0) {
                    return Err(Error::config(format!("transform of {at}"), "base is 1, of which there is no logarithm"));
                }
                Self::Log1p { base }
            }
            StepConfig::Columns(columns) => Self::Columns(Arc::new(ColumnMap::new(columns, n_var, at)?)),
        })
    }

    /// Whether the sum of what it makes of two entries of one column is what it makes of their sum.
    pub(crate) fn is_linear(&self) -> bool {
        !matches!(self, Self::Log1p { .. })
    }
}

impl Transform {
    /// The transform of an element that is read as `kind` in the type `staged`; `None` where nothing is asked for.
    ///
    /// # Errors
    /// [`Config`](Error::Config) for steps that make no sense, [`Unsupported`](Error::Unsupported) for elements that they
    /// cannot be done to.
    pub fn new(config: &TransformConfig, kind: &ElementKind, staged: DType, at: &str) -> Result<Option<Self>> {
        let (mut n_var, sparse) = match kind {
            ElementKind::Csr { n_var } => (*n_var, true),
            ElementKind::Dense { tail } => (tail.first().copied().unwrap_or(0), false),
        };
        let dense = config.dense && sparse;
        if config.steps.is_empty() && !dense && config.dtype.as_deref().is_none_or(|dtype| dtype == staged.name()) {
            return Ok(None);
        }
        match kind {
            ElementKind::Dense { tail } if tail.len() != 1 => {
                return Err(Error::unsupported(
                    at,
                    format!("has rows of shape {tail:?}, and transforms are for matrices; leave it without one"),
                ));
            }
            _ if n_var > MAX_COLUMNS => {
                return Err(Error::unsupported(at, format!("has {n_var} columns; transforms are for at most {MAX_COLUMNS}")));
            }
            _ => {}
        }
        let mut steps = Vec::with_capacity(config.steps.len());
        for step in &config.steps {
            let step = Step::new(step, n_var, at)?;
            if let Step::Columns(map) = &step {
                n_var = map.from.len() as u64;
            }
            steps.push(step);
        }
        let computes = steps.iter().any(|step| !matches!(step, Step::Columns(_)));
        let dtype = match (config.dtype.as_deref(), computes) {
            (None, false) => staged,
            (None, true) if staged == DType::Float64 => DType::Float64,
            (None, true) => DType::Float32,
            (Some(name), _) => DType::COMPUTED.into_iter().find(|d| d.name() == name).ok_or_else(|| {
                let expected = DType::COMPUTED.map(DType::name).join(", ");
                Error::config(format!("transform of {at}"), format!("dtype is {name:?}; expected one of {expected}"))
            })?,
        };
        let kind = if dense || !sparse { ElementKind::Dense { tail: vec![n_var] } } else { ElementKind::Csr { n_var } };
        Ok(Some(Self { steps, kind, staged, dtype }))
    }

    /// Nothing, to elements whose rows are only [`Joined`].
    pub fn none(kind: &ElementKind, staged: DType) -> Self {
        Self { steps: Vec::new(), kind: kind.clone(), staged, dtype: staged }
    }

    /// Whether rows are delivered as they are read, but for what joining has left to do.
    pub fn is_none(&self) -> bool {
        self.steps.is_empty() && self.staged == self.dtype && matches!(self.kind, ElementKind::Csr { .. })
    }

    /// What is done, in this order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// What is delivered.
    pub fn kind(&self) -> &ElementKind {
        &self.kind
    }

    /// Type of the values as read.
    pub fn staged(&self) -> DType {
        self.staged
    }

    /// Type of the values as delivered.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What values are computed in on the way from the one type to the other.
    pub fn arithmetic(&self) -> Arithmetic {
        if self.staged == self.dtype && !self.computes() {
            Arithmetic::None
        } else if self.staged == DType::Float64 || self.dtype == DType::Float64 {
            Arithmetic::Float64
        } else {
            Arithmetic::Float32
        }
    }

    /// Columns of a delivered row.
    pub fn n_out(&self) -> usize {
        match &self.kind {
            ElementKind::Csr { n_var } => *n_var as usize,
            ElementKind::Dense { tail } => tail[0] as usize,
        }
    }

    /// Whether values are computed, not only moved.
    pub fn computes(&self) -> bool {
        self.steps.iter().any(|step| !matches!(step, Step::Columns(_)))
    }

    /// Whether entries may be dropped or moved to other columns.
    pub fn moves_columns(&self) -> bool {
        self.maps().next().is_some()
    }

    /// Whether column indices of sparse rows matter to what becomes of their values.
    pub fn needs_columns(&self) -> bool {
        self.moves_columns() || self.merges()
    }

    /// Whether entries of one column in a sparse row are added up: those of dense rows, and those that a step needs the sum of.
    pub fn merges(&self) -> bool {
        self.is_spread() || !self.is_linear()
    }

    /// Whether rows are delivered dense.
    fn is_spread(&self) -> bool {
        matches!(self.kind, ElementKind::Dense { .. })
    }

    /// Whether entries of one column may as well be added up after the steps.
    pub fn is_linear(&self) -> bool {
        self.steps.iter().all(Step::is_linear)
    }

    /// The steps that move columns.
    pub fn maps(&self) -> impl Iterator<Item = &ColumnMap> {
        self.steps.iter().filter_map(|step| if let Step::Columns(map) = step { Some(&**map) } else { None })
    }

    /// Where an entry of this stored column is delivered, if it is.
    fn delivered(&self, column: u32) -> Option<u32> {
        self.maps().try_fold(column, |column, map| map.delivered(column))
    }

    /// Whether rows may come out unsorted.
    fn unsorts(&self) -> bool {
        self.maps().any(|map| !map.ascending)
    }
}
