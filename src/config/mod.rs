//! The JSON that `torch.ops.annbatch.open` and `stream` take, validated field by field.
//!
//! ```json
//! {"elements": [{"name": "X", "dtype": "torch",
//!                "transform": {"steps": [{"normalize_total": {"target_sum": 1e4}}, {"log1p": {}}, {"columns": [5, 0]}],
//!                              "dense": true, "dtype": "bfloat16"}}],
//!  "datasets": [{"path": "/data/coll.zarr/dataset_0", "name": "label",
//!                "sources": {"X": {"path": "/elsewhere/X"}}, "columns": {}}],
//!  "threads": null, "io_depth": null, "direct_io": false, "shard_index_memory": "256MiB",
//!  "sampling": {"kind": "random", "chunk_size": 512, "preload_nchunks": 32, "batch_size": 4096,
//!               "drop_last": false, "mask": [0, 1000], "replacement": false, "num_samples": null,
//!               "part": [0, 1]},
//!  "seed": 0, "memory_budget": "2GB", "batches_ahead": null, "auto_restart": false,
//!  "device": null, "nvrtc": null}
//! ```
//!
//! A source is a path, or tensors handed in beside the JSON by their number:
//! `{"csr": {"indptr": 0, "indices": 1, "data": 2, "shape": [n_obs, n_var]}}` or `{"dense": {"data": 3}}`. The path of a
//! dataset may be that of an .h5ad file; an element of another one is `{"hdf5": {"file": "/data/a.h5ad", "path": "X"}}`.
//!
//! Datasets whose columns differ are joined: the element says how many columns there are in all (`"n_var": 30000`), and a
//! dataset, by the number of a tensor, where each of its own comes to stand (`"columns": {"X": 4}`).
//! Unknown fields are refused by name.

use std::collections::BTreeMap;

mod sampling;

use serde::Deserialize;

pub use sampling::{ChunkParameters, Sampling};

use crate::base::error::{Error, Result};

/// What to open, and how to stream it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenConfig {
    /// The elements of every batch, in order.
    pub elements: Vec<ElementConfig>,
    /// The datasets, concatenated along the observations.
    pub datasets: Vec<DatasetConfig>,
    /// Decoding threads; by default the CPUs this process may use, shared among its sister processes.
    #[serde(default)]
    pub threads: Option<usize>,
    /// Reads in flight at once.
    #[serde(default)]
    pub io_depth: Option<usize>,
    /// Read past the page cache: for data many times larger than memory. Each read is widened to whole blocks. Costs
    /// what the cache would have given where the data fit into it.
    #[serde(default)]
    pub direct_io: bool,
    /// Bytes of shard indexes kept between reads, 256 MiB by default; others are read again when they are needed.
    #[serde(default)]
    pub shard_index_memory: Option<ByteSize>,
    #[serde(default)]
    sampling: Option<Sampling>,
    #[serde(default)]
    seed: i64,
    #[serde(default)]
    memory_budget: Option<ByteSize>,
    #[serde(default)]
    batches_ahead: Option<u64>,
    #[serde(default)]
    auto_restart: bool,
    #[serde(default)]
    device: Option<u32>,
    #[serde(default)]
    nvrtc: Option<String>,
}

/// One element of the observations: `X`, `layers/…`, `obsm/…`, `raw/X`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ElementConfig {
    /// Path within each dataset.
    pub name: String,
    /// Type that values are read in: `torch`, `native` or a type's name. Also that of delivery, unless the transform says
    /// otherwise.
    #[serde(default)]
    pub dtype: Option<String>,
    /// Number of joined columns; needed where a dataset has [`columns`](DatasetConfig::columns).
    #[serde(default)]
    pub n_var: Option<u64>,
    /// What is done to its rows before they are delivered.
    #[serde(default)]
    pub transform: TransformConfig,
}

/// What is done to rows before they are delivered; see [`crate::transform::Transform`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformConfig {
    /// One after the other.
    #[serde(default)]
    pub steps: Vec<StepConfig>,
    /// Deliver sparse rows as dense ones.
    #[serde(default)]
    pub dense: bool,
    /// Delivered type: `float32`, `bfloat16`, `float16` or `float64`.
    #[serde(default)]
    pub dtype: Option<String>,
}

/// One step; see [`crate::transform::Step`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StepConfig {
    /// Make every row add up to the same.
    NormalizeTotal {
        /// To this.
        target_sum: f64,
    },
    /// Logarithm of one more.
    Log1p {
        /// Of this base, by default e.
        #[serde(default)]
        base: Option<f64>,
    },
    /// Keep these columns, in this order.
    Columns(Vec<u64>),
}

/// One AnnData store.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetConfig {
    /// Directory of the AnnData group, or HDF5 file; needed unless every element has a source of its own.
    #[serde(default)]
    pub path: Option<String>,
    /// Label in messages; the path by default.
    #[serde(default)]
    pub name: Option<String>,
    /// Elements that lie elsewhere.
    #[serde(default)]
    pub sources: BTreeMap<String, SourceConfig>,
    /// Numbers of tensors, int32 or int64 `[n_var of the dataset]`, by element: the joined column of each stored one, or -1
    /// where it is dropped. Elements that are not named keep their columns.
    #[serde(default)]
    pub columns: BTreeMap<String, usize>,
}

/// Where one element of one dataset lies.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum SourceConfig {
    /// Directory of an array or of a `csr_matrix` group.
    Path(String),
    /// A dataset or a CSR group in an HDF5 file.
    Hdf5(Hdf5Place),
    /// CSR in memory.
    Csr(CsrBuffers),
    /// Dense in memory.
    Dense(DenseBuffer),
}

/// A place in an HDF5 file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hdf5Place {
    /// The file.
    pub file: String,
    /// Where in it, e.g. `layers/counts`.
    pub path: String,
}

/// Numbers of the tensors that make up a CSR matrix.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CsrBuffers {
    /// Row pointers, any integer type, `[n_obs + 1]`.
    pub indptr: usize,
    /// Column indices, any integer type, `[nnz]`.
    pub indices: usize,
    /// Values, `[nnz]`.
    pub data: usize,
    /// `[n_obs, n_var]`
    pub shape: [u64; 2],
}

/// Number of the tensor that is a dense element.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenseBuffer {
    /// Values, `[n_obs, …]`.
    pub data: usize,
}

/// How to stream an opened collection.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConfig {
    /// Which rows in which order; `None` for a state that only holds the collection open.
    #[serde(default)]
    pub sampling: Option<Sampling>,
    /// Where the epoch seeds of `auto_restart` come from.
    #[serde(default)]
    pub seed: i64,
    /// Bytes of batches that may be filled or waiting and not yet delivered. Encoded bytes come on top: at most half as
    /// many where a budget is asked for, and at most 64 MiB and two for each decoding thread.
    #[serde(default)]
    pub memory_budget: Option<ByteSize>,
    /// Decode further windows only while at most this many batches wait; unlimited by default.
    #[serde(default)]
    pub batches_ahead: Option<u64>,
    /// Begin the next epoch by itself after the end of one was delivered.
    #[serde(default)]
    pub auto_restart: bool,
    /// Number of the GPU whose memory the batches are delivered in, as CUDA counts those it sees; host memory by default.
    #[serde(default)]
    pub device: Option<u32>,
    /// Path of `libnvrtc`, which compiles kernels; by default the one that the process has loaded or the system finds.
    #[serde(default)]
    pub nvrtc: Option<String>,
}

/// A number of bytes, or a text such as `"2GB"` (decimal) or `"512MiB"` (binary).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "ByteSizeText")]
pub struct ByteSize(pub u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum ByteSizeText {
    Number(u64),
    Text(String),
}

impl TryFrom<ByteSizeText> for ByteSize {
    type Error = String;

    fn try_from(text: ByteSizeText) -> std::result::Result<Self, String> {
        let text = match text {
            ByteSizeText::Number(n) => return Ok(Self(n)),
            ByteSizeText::Text(text) => text,
        };
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "kib" => 1024.0,
            "mib" => 1024.0 * 1024.0,
            "gib" => 1024.0 * 1024.0 * 1024.0,
            _ => return Err(format!("cannot read {text:?} as a number of bytes; write e.g. 2000000000, \"2GB\" or \"512MiB\"")),
        };
        let number: f64 = number.trim().parse().map_err(|_| format!("cannot read {text:?} as a number of bytes"))?;
        Ok(Self((number * factor) as u64))
    }
}

impl OpenConfig {
    /// Parses and checks the configuration of `open`.
    pub fn parse(json: &str) -> Result<Self> {
        let config: Self = parse(json)?;
        if config.elements.is_empty() {
            return Err(Error::config("elements", "is empty; name at least one element, e.g. [{\"name\": \"X\"}]"));
        }
        if config.datasets.is_empty() {
            return Err(Error::config("datasets", "is empty; give at least one dataset"));
        }
        for (i, element) in config.elements.iter().enumerate() {
            if config.elements[..i].iter().any(|e| e.name == element.name) {
                return Err(Error::config("elements", format!("{:?} is named twice", element.name)));
            }
        }
        for (i, dataset) in config.datasets.iter().enumerate() {
            let unknown = |name: &&String| config.elements.iter().all(|e| e.name != **name);
            for (field, name) in
                [("sources", dataset.sources.keys().find(unknown)), ("columns", dataset.columns.keys().find(unknown))]
            {
                if let Some(name) = name {
                    return Err(Error::config(format!("datasets[{i}].{field}"), format!("{name:?} is not one of the elements")));
                }
            }
        }
        at_least_one("threads", config.threads)?;
        at_least_one("io_depth", config.io_depth)?;
        config.stream().check()?;
        Ok(config)
    }

    /// The streaming half.
    pub fn stream(&self) -> StreamConfig {
        StreamConfig {
            sampling: self.sampling.clone(),
            seed: self.seed,
            memory_budget: self.memory_budget,
            batches_ahead: self.batches_ahead,
            auto_restart: self.auto_restart,
            device: self.device,
            nvrtc: self.nvrtc.clone(),
        }
    }
}

impl StreamConfig {
    /// Parses and checks the configuration of `stream`.
    pub fn parse(json: &str) -> Result<Self> {
        let config: Self = parse(json)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        if self.auto_restart && matches!(self.sampling, None | Some(Sampling::Submitted {})) {
            return Err(Error::config(
                "auto_restart",
                "needs native sampling (\"random\" or \"sequential\"); submitted epochs end when their requests do",
            ));
        }
        if self.memory_budget == Some(ByteSize(0)) {
            return Err(Error::config("memory_budget", "is 0; expected a number of bytes"));
        }
        Ok(())
    }
}

fn at_least_one(field: &str, value: Option<usize>) -> Result<()> {
    match value {
        Some(0) => Err(Error::config(field, "is 0; expected at least 1")),
        Some(n) if n > 4096 => Err(Error::config(field, format!("is {n}; expected at most 4096"))),
        _ => Ok(()),
    }
}

fn parse<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T> {
    let mut text = serde_json::Deserializer::from_str(json);
    let value = serde_path_to_error::deserialize(&mut text).map_err(|e| {
        let path = e.path().to_string();
        Error::config(if path == "." { "config" } else { &path }, e.into_inner().to_string())
    })?;
    text.end().map_err(|e| Error::config("config", e.to_string()))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let size = |text: &str| serde_json::from_str::<ByteSize>(text).map(|b| b.0);
        assert_eq!(size("12").unwrap(), 12);
        assert_eq!(size("\"2GB\"").unwrap(), 2_000_000_000);
        assert_eq!(size("\"1.5 MiB\"").unwrap(), 1_572_864);
        assert!(size("\"lots\"").is_err());
        assert!(size("-1").is_err());
    }

    #[test]
    fn contradictions_are_named() {
        let error = |json: &str| OpenConfig::parse(json).unwrap_err().to_string();
        assert!(error(r#"{"elements":[{"name":"X"}],"datasets":[{"path":"a"}],"colour":1}"#).contains("colour"));
        assert!(error(r#"{"elements":[],"datasets":[{"path":"a"}]}"#).contains("elements"));
        assert!(error(r#"{"elements":[{"name":"X"},{"name":"X"}],"datasets":[{"path":"a"}]}"#).contains("twice"));
        assert!(error(r#"{"elements":[{"name":"X"}],"datasets":[{"sources":{"Y":{"path":"a"}}}]}"#).contains("\"Y\""));
        let error_of_columns = error(r#"{"elements":[{"name":"X"}],"datasets":[{"path":"a","columns":{"Y":0}}]}"#);
        assert!(error_of_columns.contains("`datasets[0].columns`: \"Y\""), "{error_of_columns}");
        assert!(error(r#"{"elements":[{"name":"X"}],"datasets":[{"path":"a"}],"threads":0}"#).contains("threads"));
        for (field, value) in [("memory_budget", "-1"), ("memory_budget", "\"2 gigs\""), ("batches_ahead", "-1"), ("seed", "\"a\"")]
        {
            let json = format!(r#"{{"elements":[{{"name":"X"}}],"datasets":[{{"path":"a"}}],"{field}":{value}}}"#);
            assert!(error(&json).contains(&format!("`{field}`")), "{}", error(&json));
        }
        assert!(error(r#"{"elements":[{"name":"X"}],"datasets":[{"path":"a"}],"auto_restart":true}"#).contains("auto_restart"));
        assert!(
            error(r#"{"elements":[{"name":"X"}],"datasets":[{"path":"a"}],"sampling":{"kind":"random","batchsize":3}}"#)
                .contains("batchsize")
        );
    }
}
