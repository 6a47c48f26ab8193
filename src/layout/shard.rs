//! The index of a Zarr v3 shard: one (offset, length) pair per inner chunk, little endian, both 2⁶⁴−1 for
//! an absent chunk, followed by an optional crc32c.
//!
//! Source: Zarr v3 specification, `sharding_indexed` codec, "Binary shard format".

use std::ops::Range;
use std::sync::Arc;

use super::address::Address;
use crate::base::error::{Error, Result};

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
    use crate::base::fuzz::Random;

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

    /// The slow twin's view of a shard: what its index says of each inner chunk.
    #[derive(Debug, PartialEq)]
    enum Entry {
        Fill,
        Stored(i128, i128),
        Refused,
    }

    /// Crc32c bit by bit (RFC 3720, appendix B.4: polynomial 0x1EDC6F41, reflected).
    fn slow_crc32c(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |sum, &byte| {
            (0..8).fold(sum ^ u32::from(byte), |s, _| if s & 1 == 1 { s >> 1 ^ 0x82F6_3B78 } else { s >> 1 })
        })
    }

    /// The number that these bytes are, the smallest digit first.
    fn number(bytes: &[u8]) -> i128 {
        bytes.iter().rev().fold(0, |n, &byte| n * 256 + i128::from(byte))
    }

    /// Where the index of a shard of `size` bytes lies, if it fits.
    fn twin_range(format: &ShardIndexFormat, size: u64) -> Option<(i128, i128)> {
        let (size, n) = (i128::from(size), 16 * i128::from(format.n_chunks) + if format.checksum { 4 } else { 0 });
        match format.location {
            _ if n > size => None,
            IndexLocation::Start => Some((0, n)),
            IndexLocation::End => Some((size - n, size)),
        }
    }

    /// What `bytes` say of the inner chunks of a shard of `size` bytes, if they are an index.
    fn twin_entries(format: &ShardIndexFormat, bytes: &[u8], size: u64) -> Option<Vec<Entry>> {
        let pairs = 16 * i128::from(format.n_chunks);
        if bytes.len() as i128 != pairs + if format.checksum { 4 } else { 0 } {
            return None;
        }
        let (pairs, sum) = bytes.split_at(pairs as usize);
        if format.checksum && number(sum) != i128::from(slow_crc32c(pairs)) {
            return None;
        }
        let absent = (1i128 << 64) - 1;
        let entry = |pair: &[u8]| match (number(&pair[..8]), number(&pair[8..])) {
            (offset, length) if offset == absent && length == absent => Entry::Fill,
            (offset, length) if offset + length <= i128::from(size) => Entry::Stored(offset, offset + length),
            _ => Entry::Refused,
        };
        Some(pairs.chunks(16).map(entry).collect())
    }

    /// Our reading is the twin's; answers whether the bytes are an index.
    fn check(format: &ShardIndexFormat, bytes: &[u8], size: u64) -> bool {
        let range = format.range(size).ok().map(|r| (i128::from(r.start), i128::from(r.end)));
        assert_eq!(range, twin_range(format, size), "{format:?}, {size} bytes");
        let shard = Shard { key: "c/0".into(), size };
        let ours = format.parse(bytes).ok().map(|index| {
            assert_eq!(index.bytes(), 16 * format.n_chunks);
            assert!(index.address(format.n_chunks, &shard).is_err() && index.address(u64::MAX, &shard).is_err());
            let entry = |inner| match index.address(inner, &shard) {
                Ok(Address::Fill) => Entry::Fill,
                Ok(Address::Stored(_, range)) => Entry::Stored(i128::from(range.start), i128::from(range.end)),
                Ok(Address::InShard(_)) => panic!("the index is at hand"),
                Err(_) => Entry::Refused,
            };
            (0..format.n_chunks).map(entry).collect::<Vec<_>>()
        });
        assert_eq!(ours, twin_entries(format, bytes, size), "{format:?}, {size} bytes, index {bytes:?}");
        ours.is_some()
    }

    /// An index as a writer makes it, of a shard of `size` bytes.
    fn valid(format: &ShardIndexFormat, size: u64, random: &mut Random) -> Vec<u8> {
        let pairs = (0..format.n_chunks).flat_map(|_| {
            let offset = random.next() % size.saturating_add(1).max(1);
            match random.below(4) {
                0 => [ABSENT; 2],
                1 => [offset, size - offset],
                _ => [offset, random.next() % (size - offset).max(1)],
            }
        });
        let mut out: Vec<u8> = pairs.flat_map(u64::to_le_bytes).collect();
        if format.checksum {
            out.extend(slow_crc32c(&out).to_le_bytes());
        }
        out
    }

    /// One valid index and what becomes of it; adds to (indexes read, indexes refused).
    fn fuzz_round(random: &mut Random, seen: &mut (u64, u64)) {
        let location = random.pick(&[IndexLocation::Start, IndexLocation::End]);
        let format = ShardIndexFormat { n_chunks: random.below(40) as u64, location, checksum: random.flip() };
        let size = match random.below(4) {
            0 => u64::MAX - random.next() % 100,
            1 => random.next(),
            _ => random.next() % 2000,
        };
        let whole = valid(&format, size, random);
        let entries = twin_entries(&format, &whole, size).expect("a valid index");
        assert!(entries.iter().all(|e| *e != Entry::Refused));
        let mut tell = |read: bool| if read { seen.0 += 1 } else { seen.1 += 1 };
        tell(check(&format, &whole, size));
        for _ in 0..50 {
            let (mut format, mut bytes, mut size) = (format, whole.clone(), size);
            match random.below(8) {
                // as many bytes as expected, or nearly
                0 => bytes.iter_mut().for_each(|b| *b = random.next() as u8),
                1 => bytes = (0..random.below(700)).map(|_| random.next() as u8).collect(),
                2 => bytes.truncate(random.below(bytes.len() + 1)),
                3 => bytes.extend((0..random.below(20)).map(|_| random.next() as u8)),
                // metadata that means another index, or one that nobody could hold
                4 => format.n_chunks = random.pick(&[0, format.n_chunks + 1, 1 << 60, (1 << 60) - 1, u64::MAX / 16, u64::MAX]),
                5 => size = random.pick(&[0, size / 2, size.saturating_sub(1), bytes.len() as u64, u64::MAX]),
                _ => (0..=random.below(4)).for_each(|_| random.damage(&mut bytes)),
            }
            if format.checksum && bytes.len() >= 4 && random.flip() {
                let pairs = bytes.len() - 4;
                let sum = slow_crc32c(&bytes[..pairs]);
                bytes[pairs..].copy_from_slice(&sum.to_le_bytes());
            }
            tell(check(&format, &bytes, size));
        }
    }

    #[test]
    fn indexes_are_read_as_by_the_slow_twin() {
        let mut seen = (0, 0);
        (0..200).for_each(|seed| fuzz_round(&mut Random::new(seed), &mut seen));
        assert!(seen.0 > 1000 && seen.1 > 1000, "both kinds occur: {seen:?}");
    }

    /// Runs until the time is up: `ANNBATCH_FUZZ_SECONDS=600 cargo test --release shard_fuzz -- --ignored --nocapture`.
    #[test]
    #[ignore = "a fuzz run; its length is asked for"]
    fn shard_fuzz() {
        let mut seen = (0, 0);
        crate::base::fuzz::run(|random| fuzz_round(random, &mut seen));
        println!("{} indexes read, {} refused, no finding", seen.0, seen.1);
    }
}
