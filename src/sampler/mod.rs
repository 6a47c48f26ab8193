//! Which rows, in which order.
//!
//! A [`Sampling`] is parameters; [`Pass`] is one epoch of it over `n_obs` rows and gives preload windows by
//! number. Native order is a pure function of (epoch seed, n_obs, parameters): window `w` can be made
//! without the ones before it, so seeking costs no I/O, and DataLoader workers that share an epoch seed take
//! disjoint windows. Nothing is held per row or per chunk: the order of the chunks is computed place by place.

mod chunks;

use serde::Deserialize;
use serde_json::{Map, Value};

pub use chunks::{LoadRequest, Pass};

use crate::base::error::{Error, Result};

/// How the rows of an epoch are chosen.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "serde_json::Map<String, Value>")]
pub enum Sampling {
    /// Chunks of rows in random order, rows shuffled within each preload window.
    Random(ChunkParameters),
    /// All rows in order.
    Sequential(ChunkParameters),
    /// Requests come from outside, one window at a time.
    Submitted {},
}

/// Parameters of the native samplers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkParameters {
    /// Contiguous rows per read request.
    pub chunk_size: u64,
    /// Chunks per preload window.
    pub preload_nchunks: u64,
    /// Rows per batch.
    pub batch_size: u64,
    /// Whether to leave out a last batch of fewer rows.
    #[serde(default)]
    pub drop_last: bool,
    /// Rows `[start, stop)` to draw from; all by default.
    #[serde(default)]
    pub mask: Option<[u64; 2]>,
    /// `[i, k]`: of the windows of the pass, those whose number is `i` modulo `k`.
    #[serde(default)]
    pub part: Option<[u64; 2]>,
    /// Draw chunks independently, so that rows may repeat; random sampling only.
    #[serde(default)]
    pub replacement: bool,
    /// Rows per epoch; the size of the mask by default.
    #[serde(default)]
    pub num_samples: Option<u64>,
}

impl TryFrom<Map<String, Value>> for Sampling {
    type Error = String;

    /// By hand, because serde's tagged enums lose the path of the field that is wrong.
    fn try_from(mut fields: Map<String, Value>) -> std::result::Result<Self, String> {
        fn parameters<T: serde::de::DeserializeOwned>(fields: Map<String, Value>) -> std::result::Result<T, String> {
            serde_path_to_error::deserialize(Value::Object(fields)).map_err(|e| e.to_string())
        }
        let kind = fields.remove("kind");
        match kind.as_ref().and_then(Value::as_str) {
            Some("random") => parameters(fields).map(Self::Random),
            Some("sequential") => parameters(fields).map(Self::Sequential),
            Some("submitted") => match fields.keys().next() {
                None => Ok(Self::Submitted {}),
                Some(field) => Err(format!("unknown field `{field}`: submitted sampling has no parameters")),
            },
            _ => Err(format!("kind is {kind:?}; expected \"random\", \"sequential\" or \"submitted\"")),
        }
    }
}

impl Sampling {
    /// Batches of an epoch over `n_obs` rows, or `None` for submitted requests; checks every parameter.
    pub fn n_batches(&self, n_obs: u64) -> Result<Option<u64>> {
        Ok(self.pass(n_obs, 0)?.map(|pass| pass.n_batches()))
    }

    /// One epoch over `n_obs` rows, or `None` for submitted requests.
    pub fn pass(&self, n_obs: u64, epoch_seed: u64) -> Result<Option<Pass>> {
        match self {
            Self::Submitted {} => Ok(None),
            Self::Sequential(parameters) if parameters.replacement => {
                Err(Error::config("sampling.replacement", "is true; sequential sampling visits rows in order, use kind \"random\""))
            }
            Self::Sequential(parameters) => Pass::new(parameters, false, n_obs, epoch_seed).map(Some),
            Self::Random(parameters) => Pass::new(parameters, true, n_obs, epoch_seed).map(Some),
        }
    }
}

impl ChunkParameters {
    /// The rows to draw from and how many to draw, after checking every parameter against `n_obs`.
    fn validate(&self, n_obs: u64) -> Result<(u64, u64, u64)> {
        let fail = |field: &str, message: String| Err(Error::config(format!("sampling.{field}"), message));
        for (field, value) in
            [("chunk_size", self.chunk_size), ("preload_nchunks", self.preload_nchunks), ("batch_size", self.batch_size)]
        {
            if value == 0 {
                return fail(field, "is 0; expected at least 1".into());
            }
        }
        let Some(window) = self.chunk_size.checked_mul(self.preload_nchunks).filter(|w| *w < 1 << 62) else {
            return fail(
                "preload_nchunks",
                format!("chunk_size {} times preload_nchunks {} overflows", self.chunk_size, self.preload_nchunks),
            );
        };
        if !window.is_multiple_of(self.batch_size) {
            return fail("batch_size", format!("is {}; it must divide chunk_size * preload_nchunks = {window}", self.batch_size));
        }
        let [start, stop] = self.mask.unwrap_or([0, n_obs]);
        if start >= stop || stop > n_obs {
            return fail("mask", format!("is [{start}, {stop}); expected a non-empty range within the {n_obs} rows"));
        }
        let num_samples = self.num_samples.unwrap_or(stop - start);
        if num_samples == 0 || num_samples >= 1 << 62 {
            return fail("num_samples", format!("is {num_samples}; expected at least 1 and less than 2^62"));
        }
        if num_samples > stop - start && !self.replacement {
            return fail(
                "num_samples",
                format!("is {num_samples}, more than the {} rows; expected fewer, or replacement", stop - start),
            );
        }
        if self.replacement && stop - start < self.chunk_size && num_samples > stop - start {
            return fail("chunk_size", format!("is {}, more than the {} rows to draw from", self.chunk_size, stop - start));
        }
        if window.min(num_samples) > u64::from(u32::MAX) {
            return fail("preload_nchunks", format!("makes windows of {} rows; expected fewer than 2^32", window.min(num_samples)));
        }
        if let Some([i, k]) = self.part
            && i >= k
        {
            return fail("part", format!("is [{i}, {k}]; expected [i, k] with i < k"));
        }
        Ok((start, stop, num_samples))
    }
}
