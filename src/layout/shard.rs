//! The index of a Zarr v3 shard: one (offset, length) pair per inner chunk, little endian, both 2⁶⁴−1 for
//! an absent chunk, followed by an optional crc32c.
//!
//! Source: Zarr v3 specification, `sharding_indexed` codec, "Binary shard format".

use std::ops::Range;
use std::sync::Arc;

use super::Address;
use crate::error::{Error, Result};

/// Whether the index is the first or the last part of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexLocation {
    /// `index_location: start`
    Start,
    /// `index_location: end`, the default.
    End,
}

/// Shape of the indexes of one array's shards.
#[derive(Debug, Clone, Copy)]
pub struct ShardIndexFormat {
    /// Inner chunks per shard.
    pub n_chunks: u64,
    /// Where the index lies.
    pub location: IndexLocation,
    /// Whether a crc32c follows the pairs.
    pub checksum: bool,
}

/// One shard object.
#[derive(Debug)]
pub struct Shard {
    /// Object key.
    pub key: Arc<str>,
    /// Bytes, as listed at open.
    pub size: u64,
}

/// The index of one shard: (offset, length) of every inner chunk.
#[derive(Debug)]
pub struct ShardIndex(Box<[(u64, u64)]>);

const ABSENT: u64 = u64::MAX;

impl ShardIndexFormat {
    /// Bytes of the index.
    fn bytes(&self) -> Option<u64> {
        self.n_chunks.checked_mul(16)?.checked_add(if self.checksum { 4 } else { 0 })
    }

    /// Where the index of a shard of `size` bytes lies.
    pub(super) fn range(&self, size: u64) -> Result<Range<u64>> {
        match self.bytes() {
            Some(n) if n <= size => Ok(match self.location {
                IndexLocation::Start => 0..n,
                IndexLocation::End => size - n..size,
            }),
            _ => Err(Error::corrupt(
                "shard index",
                format!("the shard has {size} bytes, too few for an index of {} chunks; it is truncated or empty", self.n_chunks),
            )),
        }
    }

    /// The pairs in `bytes`, after checking length and checksum.
    pub fn parse(&self, bytes: &[u8]) -> Result<ShardIndex> {
        let fail = |message: String| Error::corrupt("shard index", message);
        if Some(bytes.len() as u64) != self.bytes() {
            return Err(fail(format!("{} bytes; expected {:?}", bytes.len(), self.bytes())));
        }
        let pairs = if self.checksum {
            let (pairs, sum) = bytes.split_at(bytes.len() - 4);
            let stored = u32::from_le_bytes(sum.try_into().expect("four bytes"));
            let computed = crc32c::crc32c(pairs);
            if stored != computed {
                return Err(fail(format!(
                    "wrong checksum: crc32c is {computed:#010x}, expected {stored:#010x}; the shard is damaged"
                )));
            }
            pairs
        } else {
            bytes
        };
        let word = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("eight bytes"));
        Ok(ShardIndex(pairs.chunks_exact(16).map(|p| (word(&p[..8]), word(&p[8..]))).collect()))
    }
}

impl ShardIndex {
    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> u64 {
        size_of_val(&*self.0) as u64
    }

    /// Where inner chunk `inner` of the shard that this is the index of lies.
    pub(super) fn address(&self, inner: u64, shard: &Shard) -> Result<Address> {
        let (offset, length) = *self
            .0
            .get(inner as usize)
            .ok_or_else(|| Error::Internal { message: format!("inner chunk {inner} of {}", self.0.len()) })?;
        if (offset, length) == (ABSENT, ABSENT) {
            return Ok(Address::Fill);
        }
        match offset.checked_add(length) {
            Some(end) if end <= shard.size => Ok(Address::Stored(Arc::clone(&shard.key), offset..end)),
            _ => Err(Error::corrupt(
                format!("shard {}", shard.key),
                format!("its index says {length} bytes at {offset}, but the shard has {} bytes; the index is damaged", shard.size),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(n: u64) -> ShardIndexFormat {
        ShardIndexFormat { n_chunks: n, location: IndexLocation::End, checksum: true }
    }

    fn encode(pairs: &[(u64, u64)]) -> Vec<u8> {
        let mut out: Vec<u8> = pairs.iter().flat_map(|(o, l)| [o.to_le_bytes(), l.to_le_bytes()].concat()).collect();
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        out
    }

    #[test]
    fn addresses_absent_stored_and_impossible_chunks() {
        let shard = Shard { key: "c/0".into(), size: 1000 };
        let index = format(4).parse(&encode(&[(0, 10), (ABSENT, ABSENT), (990, 11), (u64::MAX - 3, 20)])).unwrap();
        assert_eq!(index.address(0, &shard).unwrap(), Address::Stored("c/0".into(), 0..10));
        assert_eq!(index.address(1, &shard).unwrap(), Address::Fill);
        for inner in [2, 3] {
            assert!(index.address(inner, &shard).unwrap_err().to_string().contains("1000 bytes"));
        }
        assert!(index.address(4, &shard).is_err());
    }

    #[test]
    fn refuses_short_shards_and_wrong_checksums() {
        assert!(format(100).range(1603).is_err());
        assert_eq!(format(100).range(1604).unwrap(), 0..1604);
        assert!(format(u64::MAX / 2).range(u64::MAX).is_err());
        let mut bytes = encode(&[(0, 1)]);
        bytes[3] ^= 1;
        assert!(format(1).parse(&bytes).unwrap_err().to_string().contains("checksum"));
        assert!(format(2).parse(&bytes).is_err());
    }
}
