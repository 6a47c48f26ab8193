//! How the rows of an epoch are chosen: the parameters of the samplers.

use serde::Deserialize;
use serde_json::{Map, Value};

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
