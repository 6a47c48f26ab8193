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

use super::bytes::{Checked, Chunked, MAX_METADATA_BYTES, Purpose, Reader, Refusal, Sizes, damaged, limit};
use super::headers;
use super::heaps::{self, Heaps};
use super::indexes::{self, Indexes};
use super::places::{Context, Places};
use crate::base::error::{Error, Result};
use crate::base::lock::lock;
use crate::store::{OpenObject, Store};

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

/// One opening of a file.
#[derive(Debug)]
pub(super) struct Guard {
    file: Box<dyn OpenObject>,
    bytes: u64,
    state: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    purpose: Purpose,
    sizes: Option<Sizes>,
    /// Where the file begins for libhdf5: behind what users may put before it.
    base: u64,
    places: Places,
    indexes: Indexes,
    heaps: Heaps,
    /// Most children of a node of chunks in a tree of version 1.
    max_children: Option<usize>,
    dataset: Option<Chunked>,
    /// Place and bytes of the rest of a collection of texts whose beginning was read last: libhdf5 reads it next.
    rest: Option<(u64, usize)>,
    refusal: Option<String>,
}

/// Where a structure lies, as addresses in the file say it, and the bytes behind it.
struct Structure {
    address: u64,
    /// Of the file after `address`.
    left: u64,
}

impl Guard {
    pub(super) fn open(store: &dyn Store, bytes: u64, purpose: Purpose) -> Result<Self> {
        let file = store.open("")?;
        let state = Seen {
            purpose,
            sizes: None,
            base: 0,
            places: Places::default(),
            indexes: Indexes::default(),
            heaps: Heaps::default(),
            max_children: None,
            dataset: None,
            rest: None,
            refusal: None,
        };
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

    fn state(&self) -> std::sync::MutexGuard<'_, Seen> {
        lock(&self.state)
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
            let place = Structure { address: at.saturating_sub(base), left: self.bytes.min(end).saturating_sub(at) };
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
        self.file.read_at(at, into).or_else(|e| {
            // the file and the place are named by who asked
            let why = if let Error::Io { source, .. } = e { source.to_string() } else { e.to_string() };
            limit(format!("{n} bytes cannot be read: {why}"))
        })
    }
}

impl Seen {
    fn check(
        &mut self,
        memory: c_int,
        bytes: &[u8],
        place: &Structure,
        whole: impl FnOnce(usize) -> Checked<Vec<u8>>,
    ) -> Checked<()> {
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
            (memory::NODES, b"TREE") => indexes::node(bytes, &context, &mut self.places, self.max_children),
            (memory::NODES, b"BTHD") => self.indexes.header(bytes, &context, &mut self.places),
            (memory::NODES, b"BTIN") => self.indexes.internal(bytes, &context, &mut self.places),
            (memory::NODES, b"BTLF") => self.indexes.leaf(bytes, &context, &self.places),
            (memory::HEADERS, b"FRHP") => self.heaps.header(bytes, &context, &mut self.places),
            (memory::HEADERS, b"FHIB") => self.heaps.rows(bytes, &context, &mut self.places),
            (memory::HEADERS, b"FAHD") => indexes::fixed_array(bytes, &context, &mut self.places),
            (memory::HEADERS, b"EAHD") => self.indexes.extensible_array(bytes, &context, &mut self.places),
            (memory::HEADERS, b"EAIB") | (memory::NODES, b"EASB") => {
                self.indexes.extensible_block(bytes, &context, &mut self.places)
            }
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
