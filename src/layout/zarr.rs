//! Opening Zarr v2 and v3 arrays: metadata through the `zarrs` crate, objects through our store.
//!
//! `zarrs` parses the metadata and builds the codec chain, so every codec it knows is read. What is decided
//! here: which chunk grid the planner sees (the inner chunks of plain `sharding_indexed`, the outer chunks
//! of anything more elaborate) and whether a chunk can take the direct decoding path.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use serde_json::Value;
use zarrs::array::codec::api::CodecMetadataOptions;
use zarrs::array::{Array, ArrayMetadata, CodecChain};
use zarrs::metadata::v3::MetadataV3;
use zarrs::metadata_ext::codec::sharding::{ShardingCodecConfiguration, ShardingIndexLocation};
use zarrs::plugin::ExtensionName;
use zarrs::storage::store::MemoryStore as NoStorage;

use super::{
    Addressing, ChunkedArray, IndexCache, IndexLocation, Outlines, Shard, ShardIndexFormat, Shards, check_sizes, grid_of, ravel,
};
use crate::base::error::{Error, Result, catch};
use crate::base::fork;
use crate::decode::ChunkCodec;
use crate::schema::DType;
use crate::store::{Entry, Store};

/// A node of a Zarr hierarchy: its metadata document and its attributes.
#[derive(Debug)]
pub enum Node {
    /// An array; the document is its `zarr.json` or `.zarray`.
    Array {
        /// Metadata as JSON.
        metadata: Value,
        /// User attributes.
        attributes: Value,
    },
    /// A group.
    Group {
        /// User attributes.
        attributes: Value,
    },
}

impl Node {
    /// The node's user attributes.
    pub fn attributes(&self) -> &Value {
        match self {
            Self::Array { attributes, .. } | Self::Group { attributes } => attributes,
        }
    }
}

fn read_json(store: &dyn Store, key: &str) -> Result<Option<Value>> {
    let Some(bytes) = store.get(key)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| Error::corrupt(store.display(key), format!("the metadata is not valid JSON: {e}")))
}

/// Reads the metadata of the node that is the root of `store`; v3 is looked for first.
pub fn read_node(store: &dyn Store, at: &str) -> Result<Node> {
    if let Some(doc) = read_json(store, "zarr.json")? {
        let attributes = doc.get("attributes").cloned().unwrap_or(Value::Null);
        return match doc.get("node_type").and_then(Value::as_str) {
            Some("array") => Ok(Node::Array { metadata: doc, attributes }),
            Some("group") => Ok(Node::Group { attributes }),
            other => {
                Err(Error::corrupt(store.display("zarr.json"), format!("node_type is {other:?}; expected \"array\" or \"group\"")))
            }
        };
    }
    let attributes = || Ok::<_, Error>(read_json(store, ".zattrs")?.unwrap_or(Value::Null));
    if let Some(metadata) = read_json(store, ".zarray")? {
        return Ok(Node::Array { metadata, attributes: attributes()? });
    }
    if store.get(".zgroup")?.is_some() {
        return Ok(Node::Group { attributes: attributes()? });
    }
    Err(Error::NotFound {
        at: format!("{at} ({})", store.display("")),
        hint: "; expected a Zarr array or group there (zarr.json, .zarray or .zgroup)".into(),
    })
}

/// Opens the array that is the root of `store`; `at` names dataset and array in errors, `indexes` keeps shard indexes.
pub fn open_array(store: &Arc<dyn Store>, at: &str, indexes: &Arc<IndexCache>) -> Result<ChunkedArray> {
    match read_node(&**store, at)? {
        Node::Array { metadata, .. } => open_array_with(store, at, metadata, indexes),
        Node::Group { .. } => Err(Error::corrupt(at, "is a group; expected an array")),
    }
}

/// Opens an array whose metadata document has been read already.
pub fn open_array_with(store: &Arc<dyn Store>, at: &str, document: Value, indexes: &Arc<IndexCache>) -> Result<ChunkedArray> {
    // zarrs reports some malformed metadata by panicking; hostile input must stay an error
    catch(|| build(store, at, document, indexes)).map_err(|e| match e {
        Error::Internal { message } => Error::corrupt(at, format!("malformed metadata: {message}")),
        other => other,
    })
}

fn build(store: &Arc<dyn Store>, at: &str, document: Value, indexes: &Arc<IndexCache>) -> Result<ChunkedArray> {
    // zarrs makes tables of names when it first needs them
    let Described { array, dtype, object_shape, sharding, codec } = fork::uninterrupted(|| Described::by(document, at))?;
    let shape = array.shape().to_vec();
    let object_grid = grid_of(&shape, &object_shape);
    let objects = list_objects(&**store, &array, &object_grid, at)?;
    let (chunk_shape, addressing) = match sharding {
        Some(PlainSharding { inner, format, .. }) => {
            let shards = Shards {
                per_shard: object_shape.iter().zip(&inner).map(|(o, i)| o / i).collect(),
                grid: object_grid,
                stored: objects.into_iter().map(|(n, (key, size))| (n, Shard { key, size })).collect(),
                format,
                indexes: Arc::clone(indexes),
                array: indexes.register(),
            };
            (inner, Addressing::Shards(shards))
        }
        None => (object_shape, Addressing::Objects(objects)),
    };
    Ok(ChunkedArray {
        at: at.to_owned(),
        dtype,
        grid: grid_of(&shape, &chunk_shape),
        shape,
        chunk_shape,
        fill: array.fill_value().as_ne_bytes().to_vec(),
        codec,
        store: Arc::clone(store),
        addressing,
        outlines: Outlines::within(&indexes.outlines),
    })
}

/// What an array's metadata document says.
struct Described {
    array: Array<NoStorage>,
    dtype: DType,
    /// Rows, columns, … of what an object holds: a chunk, or a shard of them.
    object_shape: Vec<u64>,
    sharding: Option<PlainSharding>,
    codec: ChunkCodec,
}

impl Described {
    fn by(document: Value, at: &str) -> Result<Self> {
        let array = parse(at, document)?;
        let dtype = stored_dtype(&array, at)?;
        let object_shape = regular_chunk_shape(&array, at)?;
        check_sizes(at, array.shape(), &object_shape, dtype)?;
        check_keys(&array, at)?;
        let (data_type, fill) = (array.data_type(), array.fill_value());
        if fill.size() != dtype.size() {
            return Err(Error::corrupt(at, format!("the fill value has {} bytes; expected {}", fill.size(), dtype.size())));
        }
        let metadatas = array.codecs().create_metadatas(&CodecMetadataOptions::default());
        let sharding = PlainSharding::from_metadata(&metadatas, &object_shape);
        let codec = match &sharding {
            Some(PlainSharding { inner, codecs, .. }) => {
                check_sizes(at, array.shape(), inner, dtype)?;
                let chain = CodecChain::from_metadata(codecs).map_err(|e| Error::unsupported(at, e.to_string()))?;
                ChunkCodec::new(Arc::new(chain), codecs, inner, data_type, fill, dtype)
            }
            None => ChunkCodec::new(array.codecs(), &metadatas, &object_shape, data_type, fill, dtype),
        };
        let codec = codec.map_err(|e| e.within(at))?;
        Ok(Self { array, dtype, object_shape, sharding, codec })
    }
}

fn parse(at: &str, document: Value) -> Result<Array<NoStorage>> {
    let fail = |e: &dyn std::fmt::Display| Error::corrupt(at, format!("malformed metadata: {e}"));
    let metadata = match document.get("zarr_format").and_then(Value::as_u64) {
        Some(3) => ArrayMetadata::V3(serde_json::from_value(document).map_err(|e| fail(&e))?),
        Some(2) => ArrayMetadata::V2(serde_json::from_value(document).map_err(|e| fail(&e))?),
        other => return Err(Error::corrupt(at, format!("zarr_format is {other:?}; expected 2 or 3"))),
    };
    Array::new_with_metadata(Arc::new(NoStorage::new()), "/", metadata).map_err(|e| {
        let e = e.to_string();
        if cfg!(not(feature = "zfp")) && e.contains("zfp") {
            let remedy = "install libclang (pip install libclang) and build it again, or rewrite the array with another codec";
            return Error::unsupported(at, format!("{e}: this annbatch was built without zfp; {remedy}"));
        }
        Error::unsupported(at, format!("{e}; rewrite the array with codecs that the zarrs crate reads (Blosc, zstd, gzip, …)"))
    })
}

fn stored_dtype(array: &Array<NoStorage>, at: &str) -> Result<DType> {
    let name = array.data_type().name_v3().map_or_else(String::new, std::borrow::Cow::into_owned);
    DType::from_name(&name)
        .ok_or_else(|| Error::unsupported(at, format!("data type {name:?}; expected bool, an integer or a float of up to 64 bits; convert the array to one of these, e.g. with numpy's astype, and write it again")))
}

fn regular_chunk_shape(array: &Array<NoStorage>, at: &str) -> Result<Vec<u64>> {
    let origin = vec![0; array.dimensionality()];
    let shape: Vec<u64> = array
        .chunk_shape(&origin)
        .map_err(|e| Error::corrupt(at, format!("malformed chunk grid: {e}")))?
        .into_iter()
        .map(NonZeroU64::get)
        .collect();
    if array.chunk_grid_shape() == grid_of(array.shape(), &shape) && array.metadata_is_regular() {
        Ok(shape)
    } else {
        Err(Error::unsupported(at, "chunks of varying size; rewrite it with a regular chunk grid"))
    }
}

/// Refuses chunk keys that [`chunk_coordinates`] cannot take apart: unseen chunks would pass for fill values.
fn check_keys(array: &Array<NoStorage>, at: &str) -> Result<()> {
    match array.metadata() {
        ArrayMetadata::V3(v3) if !matches!(v3.chunk_key_encoding.name(), "default" | "v2") => Err(Error::unsupported(
            at,
            format!("chunk_key_encoding {:?}; rewrite it with \"default\" or \"v2\"", v3.chunk_key_encoding.name()),
        )),
        _ => Ok(()),
    }
}

/// Lists the array's chunk objects: row-major number in the outer grid → (key, bytes).
fn list_objects(store: &dyn Store, array: &Array<NoStorage>, grid: &[u64], at: &str) -> Result<HashMap<u64, (Arc<str>, u64)>> {
    let mut objects = HashMap::new();
    for Entry { key, size } in store.list("", grid.len() + 1, &may_be_of_chunk).map_err(|e| e.within(at))? {
        let Some(coordinates) = chunk_coordinates(&key, grid.len()) else { continue };
        if coordinates.iter().zip(grid).any(|(c, g)| c >= g) || array.chunk_key(&coordinates).as_str() != key {
            continue;
        }
        let number = ravel(coordinates.iter().copied(), grid);
        let size = size.ok_or_else(|| {
            Error::corrupt(
                format!("{at}, chunk {coordinates:?}"),
                format!(
                    "{} is a directory (or a pipe, a device, or a link that leads nowhere); expected a regular file",
                    store.display(&key)
                ),
            )
        })?;
        objects.insert(number, (Arc::from(key), size));
    }
    Ok(objects)
}

/// Whether `name` may be a part of a chunk's key, such as `c`, `12` or `0.1`: other directories are not looked into.
fn may_be_of_chunk(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'c' | b'.'))
}

/// Chunk coordinates in a key such as `c/1/2`, `c.1.2`, `1.2` or `1/2`.
fn chunk_coordinates(key: &str, rank: usize) -> Option<Vec<u64>> {
    let parts: Vec<&str> = key.split(['/', '.']).collect();
    let parts = if parts.first() == Some(&"c") { &parts[1..] } else { &parts[..] };
    if parts.len() != rank {
        return None;
    }
    parts.iter().map(|p| p.parse().ok()).collect()
}

/// `sharding_indexed` in the only form that writers produce: nothing before or after it, an index of
/// little-endian pairs with or without crc32c, inner chunks that divide the shard.
struct PlainSharding {
    inner: Vec<u64>,
    codecs: Vec<MetadataV3>,
    format: ShardIndexFormat,
}

impl PlainSharding {
    fn from_metadata(codecs: &[MetadataV3], outer: &[u64]) -> Option<Self> {
        let [only] = codecs else { return None };
        if only.name() != "sharding_indexed" {
            return None;
        }
        let ShardingCodecConfiguration::V1(config) = only.to_typed_configuration().ok()? else { return None };
        let little = |m: &MetadataV3| {
            let endian = m.configuration().and_then(|c| c.get("endian").and_then(Value::as_str).map(str::to_owned));
            m.name() == "bytes" && endian.as_deref() == Some("little")
        };
        let checksum = match config.index_codecs.as_slice() {
            [bytes] if little(bytes) => false,
            [bytes, sum] if little(bytes) && sum.name() == "crc32c" => true,
            _ => return None,
        };
        if config.codecs.iter().any(|c| c.name() == "sharding_indexed") {
            return None;
        }
        let inner: Vec<u64> = config.chunk_shape.iter().map(|d| d.get()).collect();
        let divides = inner.len() == outer.len() && outer.iter().zip(&inner).all(|(o, i)| o % i == 0);
        let n_chunks = outer.iter().zip(&inner).try_fold(1u64, |acc, (o, i)| acc.checked_mul(o / i))?;
        let location = match config.index_location {
            ShardingIndexLocation::Start => IndexLocation::Start,
            ShardingIndexLocation::End => IndexLocation::End,
        };
        divides.then_some(Self { inner, codecs: config.codecs, format: ShardIndexFormat { n_chunks, location, checksum } })
    }
}

/// `Array` gives no direct answer to "is the grid regular?"; its metadata does.
trait MetadataIsRegular {
    fn metadata_is_regular(&self) -> bool;
}

impl MetadataIsRegular for Array<NoStorage> {
    fn metadata_is_regular(&self) -> bool {
        match self.metadata() {
            ArrayMetadata::V2(_) => true,
            ArrayMetadata::V3(v3) => v3.chunk_grid.name() == "regular",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_keys_of_both_formats() {
        assert_eq!(chunk_coordinates("c/1/2", 2), Some(vec![1, 2]));
        assert_eq!(chunk_coordinates("c.1.2", 2), Some(vec![1, 2]));
        assert_eq!(chunk_coordinates("1.2", 2), Some(vec![1, 2]));
        assert_eq!(chunk_coordinates("7", 1), Some(vec![7]));
        assert_eq!(chunk_coordinates("c/1", 2), None);
        assert_eq!(chunk_coordinates("zarr.json", 2), None);
    }
}
