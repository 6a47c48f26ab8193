//! Many datasets as one observation axis.
//!
//! Opening decides everything that later stages take for granted: every array's metadata is checked, row
//! pointers are in memory and monotone, dtypes are promoted over the datasets, n_var agrees. A global row
//! is an offset into the concatenation of the datasets in the order given.

mod encoding;
mod h5ad;
mod join;
mod open;
mod source;

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

pub use crate::schema::ElementKind;
pub use h5ad::read_texts;
pub use join::{Join, Joins};
pub use source::{ArraySource, Buffer, CsrSource, MemoryArray, Source};

use crate::arena::{BlockSource, Pools};
use crate::base::error::{Error, Result};
use crate::base::lock::lock;
use crate::runtime::Runtime;
use crate::schema::DType;
use crate::store::Store;
use crate::transform::{Joined, Transform};

/// What gives the store of a place.
pub type Stores<'a> = &'a (dyn Fn(&str) -> Result<Arc<dyn Store>> + Sync);

/// One element over all datasets.
#[derive(Debug)]
pub struct Element {
    /// Path within a dataset, e.g. `layers/counts`.
    pub name: String,
    /// Axis of observations that its rows lie on, below [`Collection::n_axes`].
    pub axis: u32,
    /// Sparse or dense, as read; of datasets whose columns are joined, with all of these. Rows of an element that is sparse in some
    /// datasets and dense in others are read as sparse ones.
    pub kind: ElementKind,
    /// Type that values are read in.
    pub dtype: DType,
    /// What happens to rows that were read, if anything.
    pub transform: Option<Transform>,
    /// One per dataset.
    pub sources: Vec<Source>,
    /// One per dataset, `None` where columns keep their places; empty where they do in all of them.
    pub joins: Joins,
    /// What joining leaves to do to rows of some dataset, where they are sparse.
    pub unfinished: Joined,
}

/// Name and place of one dataset.
#[derive(Debug, Clone)]
pub struct DatasetInfo {
    /// As messages name it.
    pub name: String,
    /// Its directory or file, where it has one.
    pub path: Option<String>,
}

/// Opened datasets, immutable and shared by every stream over them.
#[derive(Debug)]
pub struct Collection {
    elements: Vec<Element>,
    datasets: Vec<DatasetInfo>,
    /// First global row of each dataset, then the total.
    offsets: Vec<u64>,
    runtime: Arc<Runtime>,
    /// Of the streams over this collection; those of the last budget asked for are kept.
    pools: Mutex<Option<Pools>>,
}

impl Element {
    /// Columns of a row as it is read: those of the first dimension behind the observations.
    pub(crate) fn n_var(&self) -> u64 {
        match &self.kind {
            ElementKind::Csr { n_var } => *n_var,
            ElementKind::Dense { tail } => tail.first().copied().unwrap_or(0),
        }
    }

    /// Whether batches carry 64-bit indices whatever their number of entries.
    pub fn wide_columns(&self) -> bool {
        matches!(self.kind, ElementKind::Csr { n_var } if n_var > i32::MAX as u64)
    }

    /// Where the columns of a dataset come to stand, unless they keep their places.
    pub fn join(&self, dataset: u32) -> Option<&Join> {
        self.joins.get(dataset as usize)?.as_deref()
    }

    /// What is left to do to sparse rows of a dataset whose columns were replaced by joined ones.
    pub fn joined(&self, dataset: u32) -> Joined {
        self.join(dataset).map(Join::joined).unwrap_or_default()
    }

    /// Whether entries of one column of a row are added up before it is delivered.
    pub(crate) fn merges(&self) -> bool {
        matches!(self.kind, ElementKind::Csr { .. }) && self.transform.as_ref().is_some_and(Transform::merges)
    }

    /// Sparse or dense, as delivered.
    pub fn delivered_kind(&self) -> &ElementKind {
        self.transform.as_ref().map_or(&self.kind, Transform::kind)
    }

    /// Type of the values as delivered.
    pub fn delivered_dtype(&self) -> DType {
        self.transform.as_ref().map_or(self.dtype, Transform::dtype)
    }

    /// Bytes of one dense row as it is read.
    pub fn dense_row_bytes(&self) -> usize {
        match &self.kind {
            ElementKind::Dense { tail } => tail.iter().product::<u64>() as usize * self.dtype.size(),
            ElementKind::Csr { .. } => 0,
        }
    }

    fn describe(&self) -> Value {
        let stored: Vec<&str> = self.sources.iter().map(|s| s.dtype().name()).collect();
        let mut out = json!({"name": self.name, "dtype": self.delivered_dtype().name(), "stored_dtypes": stored});
        match self.delivered_kind() {
            ElementKind::Csr { n_var } => {
                out["kind"] = "csr".into();
                out["n_var"] = (*n_var).into();
            }
            ElementKind::Dense { tail } => {
                out["kind"] = "dense".into();
                out["tail"] = json!(tail);
            }
        }
        if !self.joins.is_empty() {
            let stored = self.joins.iter().map(|join| join.as_ref().map_or(self.n_var(), |join| join.columns().len() as u64));
            out["stored_n_var"] = stored.collect();
        }
        if let ElementKind::Csr { .. } = &self.kind {
            out["nnz"] = self.sources.iter().map(Source::nnz).sum::<u64>().into();
        }
        out
    }

    fn layout(&self) -> Value {
        let dtype = self.delivered_dtype().name();
        match self.delivered_kind() {
            ElementKind::Csr { .. } => json!({"name": self.name, "kind": "csr", "dtype": dtype,
                "index_dtype": if self.wide_columns() { "int64" } else { "int32" }}),
            ElementKind::Dense { tail } => {
                json!({"name": self.name, "kind": "dense", "dtype": dtype, "tail": tail})
            }
        }
    }
}

impl Collection {
    /// Elements of every batch, in order.
    pub fn elements(&self) -> &[Element] {
        &self.elements
    }

    /// The datasets in the order of their rows.
    pub fn datasets(&self) -> &[DatasetInfo] {
        &self.datasets
    }

    /// Axes of observations. There is one: all elements have the same rows.
    pub fn n_axes(&self) -> u32 {
        1
    }

    /// Number of rows over all datasets.
    pub fn n_obs(&self) -> u64 {
        *self.offsets.last().expect("offsets end with the total")
    }

    /// The threads that serve this collection.
    pub fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
    }

    /// Memory for a stream with these budgets to this GPU, shared with the streams before it and beside it; `blocks` is
    /// asked where there is none yet.
    pub(crate) fn pools(
        &self,
        budget_bytes: u64,
        fetch_bytes: u64,
        device: Option<u32>,
        blocks: impl FnOnce() -> Arc<dyn BlockSource>,
    ) -> Pools {
        let mut pools = lock(&self.pools);
        match &*pools {
            Some(same) if same.are_for(budget_bytes, fetch_bytes, device) => same.clone(),
            _ => pools.insert(Pools::new(budget_bytes, fetch_bytes, device, blocks())).clone(),
        }
    }

    /// Dataset and local row of a global row below `n_obs`.
    pub fn split_row(&self, row: u64) -> (u32, u64) {
        let dataset = self.offsets.partition_point(|&o| o <= row) - 1;
        (dataset as u32, row - self.offsets[dataset])
    }

    /// What the batches look like, as JSON: equal for collections whose compiled graphs are equal.
    pub fn layout_json(&self) -> String {
        Value::Array(self.elements.iter().map(Element::layout).collect()).to_string()
    }

    /// Datasets, elements, sizes and types, as JSON.
    pub fn describe(&self) -> Value {
        let datasets: Vec<Value> = self
            .datasets
            .iter()
            .zip(self.offsets.windows(2))
            .map(|(d, o)| json!({"name": d.name, "path": d.path, "n_obs": o[1] - o[0], "offset": o[0]}))
            .collect();
        json!({
            "n_obs": self.n_obs(),
            "datasets": datasets,
            "elements": self.elements.iter().map(Element::describe).collect::<Vec<_>>(),
            "threads": self.runtime.n_threads(),
            "io_depth": self.runtime.io_depth(),
        })
    }

    /// File, local row and chunks of each row, as JSON.
    pub fn locate(&self, rows: &[i64]) -> Result<Value> {
        rows.iter()
            .map(|&row| {
                let global = self.check_row(row)?;
                let (dataset, local) = self.split_row(global);
                let info = &self.datasets[dataset as usize];
                let chunks: serde_json::Map<String, Value> =
                    self.elements.iter().map(|e| (e.name.clone(), e.sources[dataset as usize].chunks_of_row(local))).collect();
                Ok(json!({"row": row, "dataset": info.name, "path": info.path, "local_row": local, "chunks": chunks}))
            })
            .collect()
    }

    /// `row` as an offset, if it is one.
    pub fn check_row(&self, row: i64) -> Result<u64> {
        u64::try_from(row)
            .ok()
            .filter(|r| *r < self.n_obs())
            .ok_or_else(|| Error::argument("rows", format!("row {row} is out of range; expected 0 <= row < {}", self.n_obs())))
    }
}
