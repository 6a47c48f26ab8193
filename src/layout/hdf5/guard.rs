//! What libhdf5 reads of a file, looked at before libhdf5 does.
//!
//! libhdf5 takes some of what it reads on trust, and a damaged file can make it call itself without end, go round in
//! circles, or write past its buffers. Each of its reads of metadata is one structure or, of a long one, the rest. By its
//! first four bytes a structure says what it is; which of them libhdf5 looks for it says by the kind of memory that it reads,
//! and what has no such bytes (parts of arrays and heaps, rests) is of kinds in which none are looked for here. Those that are
//! dangerous are checked; one that is refused is a failed read to libhdf5. Structures that were read once are kept by libhdf5
//! and not read again, so what one says of others is held against all that follow:
//!
//! - nodes of indexes (`TREE`, and `BTHD`, `BTIN`: [`super::indexes`]): each has one parent, and a level below it. So libhdf5
//!   comes to an end in every index after as many steps as it has nodes;
//! - collections of texts (`GCOL`, [`super::heaps`]): their objects follow one another to the end;
//! - heaps of names and attributes (`FRHP`, `FHIB`): blocks have one place, and no more rows than there is room for;
//! - arrays of chunks (`FAHD`, `EAHD`, `EAIB`, `EASB`): elements have the size that they are decoded as;
//! - images of all that libhdf5 held when it closed a file (`MDCI`) are refused: it takes structures from there unseen.
//!
//! Links, the attributes of an object and the chunks of a dataset are looked up through openings of the file with guards of
//! their own, because libhdf5 takes what it holds of one index for another, of other records, where the file says so.

use std::ffi::c_int;
use std::sync::Mutex;

use super::indexes::{Context, Indexes};
use super::{headers, heaps};
use crate::base::error::{Error, Result};
use crate::store::{OpenObject, Store};

/// Most bytes of metadata in one piece, which libhdf5 allocates.
pub(super) const MAX_METADATA_BYTES: u64 = 256 << 20;

/// Kinds of memory, of `H5FD_mem_t`, whose structures are looked at. Of local heaps, and of parts of arrays and heaps that
/// count as such, none is.
mod memory {
    use std::ffi::c_int;

    pub(super) const SUPERBLOCK: c_int = 1;
    pub(super) const NODES: c_int = 2;
    /// libhdf5 reads collections of texts as raw data.
    pub(super) const RAW: c_int = 3;
    pub(super) const HEADERS: c_int = 6;
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Links, and what they lead to.
    Links,
    /// Attributes of one object.
    Attributes,
    /// One dataset and its index of chunks.
    Chunks,
}

/// One opening of a file.
#[derive(Debug)]
pub(super) struct Guard {
    file: Box<dyn OpenObject>,
    bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    purpose: Purpose,
    sizes: Option<Sizes>,
    /// Where the file begins for libhdf5: behind what users may put before it.
    base: u64,
    indexes: Indexes,
    /// Most children of a node of chunks in a tree of version 1.
    max_children: Option<usize>,
    dataset: Option<Chunked>,
    /// Place and bytes of the rest of a collection of texts whose beginning was read last: libhdf5 reads it next.
    rest: Option<(u64, usize)>,
    refusal: Option<String>,
}

/// Bytes of an address and of a length in the file, which its superblock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) address: usize,
    pub(super) length: usize,
}

/// The dataset whose chunks are listed next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunked {
    pub(super) n_dims: usize,
    pub(super) is_filtered: bool,
    /// Of a chunk before filters.
    pub(super) chunk_bytes: u64,
}

/// Bytes that are taken from the front, as numbers of little-endian order.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, n: usize) -> Checked<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or("the structure is cut short")?;
        self.0 = rest;
        Ok(taken)
    }

    /// A number of up to 32 bytes, as the largest one where it does not fit.
    pub(super) fn number(&mut self, n: usize) -> Checked<u64> {
        let bytes = self.take(n)?;
        // most have this many, and there are as many as texts
        if let Ok(bytes) = <[u8; 8]>::try_from(bytes) {
            return Ok(u64::from_le_bytes(bytes));
        }
        let (low, high) = bytes.split_at(n.min(8));
        let fits = high.iter().all(|&b| b == 0);
        Ok(if fits { low.iter().rev().fold(0, |number, &b| number << 8 | u64::from(b)) } else { u64::MAX })
    }

    /// As [`number`](Self::number), of at most 4 bytes.
    pub(super) fn small(&mut self, n: usize) -> Checked<usize> {
        self.number(n).map(|number| number as usize)
    }
}

/// What is wrong, without where.
#[derive(Debug)]
pub(super) struct Refusal {
    why: String,
    /// Whether no writer would write it; otherwise it is not read here, and `why` says what helps.
    is_damage: bool,
}

pub(super) type Checked<T> = std::result::Result<T, Refusal>;

impl<T: Into<String>> From<T> for Refusal {
    fn from(why: T) -> Self {
        Self { why: why.into(), is_damage: true }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.why, if self.is_damage { "; the file is damaged" } else { "" })
    }
}

impl Refusal {
    fn at(&self, byte: u64) -> String {
        format!("{} (at byte {byte}){}", self.why, if self.is_damage { "; the file is damaged" } else { "" })
    }
}

pub(super) fn damaged<T>(why: impl Into<String>) -> Checked<T> {
    Err(why.into().into())
}

pub(super) fn limit<T>(why: impl Into<String>) -> Checked<T> {
    Err(Refusal { why: why.into(), is_damage: false })
}

/// Where a structure lies, as addresses in the file say it, and the bytes behind it.
struct Place {
    address: u64,
    /// Of the file after `address`.
    left: u64,
}

impl Guard {
    pub(super) fn open(store: &dyn Store, bytes: u64, purpose: Purpose) -> Result<Self> {
        let file = store.open("")?;
        let indexes = Indexes::default();
        let state = State { purpose, sizes: None, base: 0, indexes, max_children: None, dataset: None, rest: None, refusal: None };
        Ok(Self { file, bytes, state: Mutex::new(state) })
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// The dataset whose chunks are listed next, and how many children a node of a tree of version 1 has in this file.
    pub(super) fn expect_chunks(&self, dataset: Chunked, max_children: usize) {
        let mut state = self.state();
        state.dataset = Some(dataset);
        state.max_children = Some(max_children);
    }

    /// What `ask` finds out from libhdf5; where something was kept from it, that is the error, whatever came of it. `at`
    /// names what is asked about.
    pub(super) fn explain<T>(&self, at: &str, ask: impl FnOnce() -> Result<T>) -> Result<T> {
        let answer = ask();
        match &self.state().refusal {
            Some(why) => Err(Error::corrupt(at, why)),
            None => answer,
        }
    }

    /// Checks the header of the dataset at `address` of the file as libhdf5 counts; `at` names it.
    pub(super) fn check_dataset(&self, address: u64, at: &str) -> Result<()> {
        let state = self.state();
        let (base, Some(sizes)) = (state.base, state.sizes) else { return Ok(()) };
        let checked = headers::dataset(address, sizes, |address, n| {
            let start = base.saturating_add(address);
            if start.saturating_add(n as u64) > self.bytes {
                return damaged(format!("an object header points to byte {start} of a file of {}", self.bytes));
            }
            self.some_bytes(start, n)
        });
        checked.map_err(|refusal| Error::corrupt(at, refusal.at(base.saturating_add(address))))
    }

    /// Sizes of numbers in the file, which are known once it is open.
    pub(super) fn sizes(&self) -> Option<Sizes> {
        self.state().sizes
    }

    /// The collection of texts at `address` of the file as libhdf5 counts, of which at most `max` bytes may be read.
    pub(super) fn collection(&self, address: u64, sizes: Sizes, max: u64) -> Checked<Vec<u8>> {
        let start = self.state().base.saturating_add(address);
        let left = self.bytes.saturating_sub(start);
        let header = 8 + sizes.length;
        if left < header as u64 {
            return damaged(format!("texts at byte {start} of a file of {}", self.bytes));
        }
        let header = self.some_bytes(start, header)?;
        if !header.starts_with(b"GCOL\x01") {
            return damaged(format!("no texts at byte {start}, where they should be"));
        }
        self.some_bytes(start, heaps::collection_bytes(&header, sizes, left, max.min(MAX_METADATA_BYTES))?)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Reads for libhdf5 what lies at `at`, of a kind of memory, of a file that begins at `base` for it and ends at `end`, and
    /// says whether libhdf5 may have it.
    pub(super) fn read(&self, memory: c_int, at: u64, into: &mut [u8], base: u64, end: u64) -> bool {
        // as in looking for the signature: libhdf5 says itself what that means
        if at.checked_add(into.len() as u64).is_none_or(|end| end > self.bytes) {
            return false;
        }
        let mut state = self.state();
        state.base = base;
        let done = self.read_at(at, into).and_then(|()| {
            let place = Place { address: at.saturating_sub(base), left: self.bytes.min(end).saturating_sub(at) };
            state.check(memory, into, &place, |n| self.some_bytes(at, n))
        });
        if let Err(why) = done {
            state.refusal.get_or_insert(why.at(at));
            return false;
        }
        true
    }

    pub(super) fn some_bytes(&self, at: u64, n: usize) -> Checked<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(n).or_else(|e| limit(e.to_string()))?;
        bytes.resize(n, 0);
        self.read_at(at, &mut bytes).map(|()| bytes)
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> Checked<()> {
        let n = into.len();
        self.file.read_at(at, into).or_else(|e| limit(format!("{n} bytes cannot be read: {e}")))
    }
}

impl State {
    fn check(&mut self, memory: c_int, bytes: &[u8], place: &Place, whole: impl FnOnce(usize) -> Checked<Vec<u8>>) -> Checked<()> {
        if bytes.len() as u64 > MAX_METADATA_BYTES {
            return damaged(format!("{} bytes of metadata in one piece", bytes.len()));
        }
        if self.rest.take() == Some((place.address, bytes.len())) && memory == memory::RAW {
            return Ok(());
        }
        let Some(kind) = bytes.first_chunk::<4>() else { return Ok(()) };
        if memory == memory::SUPERBLOCK && kind == b"\x89HDF" {
            self.superblock(bytes)?;
        }
        // libhdf5 reads nothing else before it knows them
        let Some(sizes) = self.sizes else { return Ok(()) };
        let context = Context {
            purpose: self.purpose,
            sizes,
            dataset: self.dataset,
            address: place.address,
            file_bytes: place.address.saturating_add(place.left),
        };
        match (memory, kind) {
            (memory::SUPERBLOCK, b"MDCI") => {
                let remedy = "write the file again without one, with h5repack";
                limit(format!("a metadata cache image, which cannot be checked; {remedy}"))
            }
            (memory::NODES, b"TREE") => self.indexes.node(bytes, &context, self.max_children),
            (memory::NODES, b"BTHD") => self.indexes.header(bytes, &context),
            (memory::NODES, b"BTIN") => self.indexes.internal(bytes, &context),
            (memory::NODES, b"BTLF") => self.indexes.leaf(bytes, &context),
            (memory::HEADERS, b"FRHP") => self.indexes.heap(bytes, &context),
            (memory::HEADERS, b"FHIB") => self.indexes.heap_rows(bytes, &context),
            (memory::HEADERS, b"FAHD") => self.indexes.fixed_array(bytes, &context),
            (memory::HEADERS, b"EAHD") => self.indexes.extensible_array(bytes, &context),
            (memory::HEADERS, b"EAIB") | (memory::NODES, b"EASB") => self.indexes.extensible_block(bytes, &context),
            (memory::RAW, b"GCOL") => {
                let n = heaps::collection_bytes(bytes, sizes, place.left, MAX_METADATA_BYTES)?;
                if n <= bytes.len() {
                    heaps::objects(&bytes[..n], sizes, |_, _| ())
                } else {
                    self.rest = Some((place.address + bytes.len() as u64, n - bytes.len()));
                    heaps::objects(&whole(n)?, sizes, |_, _| ())
                }
            }
            _ => Ok(()),
        }
        .map_err(|refusal| Refusal { why: format!("{}: {}", kind.escape_ascii(), refusal.why), ..refusal })
    }

    fn superblock(&mut self, bytes: &[u8]) -> Checked<()> {
        // the signature by itself is looked for first
        let (Some(&version), None) = (bytes.get(8), self.sizes) else { return Ok(()) };
        let mut sizes = Reader(bytes);
        sizes.take(if version < 2 { 13 } else { 9 })?;
        let sizes = Sizes { address: sizes.small(1)?, length: sizes.small(1)? };
        self.sizes = Some(sizes);
        Ok(())
    }
}
