//! Texts of variable length: a dataset says for each where it lies in collections, which are read here as a whole.
//!
//! libhdf5 looks up text by text, and allocates each. Names of the format are those of the HDF5 File Format Specification,
//! version 3.0, section III.E ("Disk Format: Level 1E - Global Heap").

use std::collections::HashMap;
use std::ops::Range;

use super::bytes::{Checked, Refusal, Sizes, damaged, limit};
use super::dataset::{ElementClass, PLACE_WORDS};
use super::guard::Guard;
use super::{File, heaps};
use crate::base::error::{Error, Result, vec_with_room};
use crate::decode::Scratch;
use crate::layout::Address;

const PLACE_BYTES: usize = PLACE_WORDS as usize * 8;
/// Bytes of collections that may be held for each text that was found in them, beside its own and those of all others: with
/// its header, and up to a whole number of words, it takes less.
const BYTES_PER_TEXT: u64 = 32;
/// Bytes of collections that may be held without any text.
const FREE_BYTES: u64 = 64 << 20;

/// Collections that were read.
struct Collections<'a> {
    guard: &'a Guard,
    sizes: Sizes,
    /// By their address.
    numbers: HashMap<u64, usize>,
    read: Vec<TextCollection>,
    /// Address and number of the one that was looked into last.
    last: Option<(u64, usize)>,
    /// Of the file that no collection has taken: none overlaps another.
    bytes_left: u64,
    /// Of the file that no text has taken: each is one object.
    text_bytes_left: u64,
    /// Those of which `read` may be, by the texts found so far: they may lie among much longer ones of another dataset.
    allowed: u64,
}

struct TextCollection {
    bytes: Vec<u8>,
    /// Where its objects lie, by their numbers.
    objects: Vec<Option<Range<u32>>>,
}

impl Collections<'_> {
    /// The object of so many bytes with this number in the collection at `address`.
    fn object(&mut self, length: u32, address: u64, number: u32) -> Checked<&[u8]> {
        let place = match self.last {
            Some((last, place)) if last == address => place,
            _ => match self.numbers.get(&address) {
                Some(&place) => place,
                None => self.read(address)?,
            },
        };
        self.last = Some((address, place));
        let TextCollection { bytes, objects } = &self.read[place];
        let object = objects.get(number as usize).and_then(Option::as_ref);
        let object = object.ok_or_else(|| format!("there is no text {number} in the collection at {address}"))?;
        if object.end - object.start != length {
            return damaged(format!("a text of {length} bytes is {} where it lies", object.end - object.start));
        }
        self.text_bytes_left = self.text_bytes_left.checked_sub(length.into()).ok_or("texts that are longer than the file")?;
        self.allowed = self.allowed.saturating_add(BYTES_PER_TEXT + u64::from(length));
        Ok(&bytes[object.start as usize..object.end as usize])
    }

    fn read(&mut self, address: u64) -> Checked<usize> {
        let bytes = self.guard.collection(address, self.sizes, self.bytes_left)?;
        self.bytes_left -= bytes.len() as u64;
        self.allowed = match self.allowed.checked_sub(bytes.len() as u64) {
            Some(left) => left,
            None => return limit("the texts lie far apart"),
        };
        let (mut objects, first) = (Vec::new(), bytes.as_ptr().addr());
        heaps::objects(&bytes, self.sizes, |number, object| {
            if objects.len() <= number {
                objects.resize(number + 1, None);
            }
            // a collection has at most `MAX_METADATA_BYTES`
            let start = (object.as_ptr().addr() - first) as u32;
            objects[number] = Some(start..start + object.len() as u32);
        })?;
        self.read.push(TextCollection { bytes, objects });
        self.numbers.insert(address, self.read.len() - 1);
        Ok(self.read.len() - 1)
    }
}

impl File {
    /// The texts of the dataset at `path`, which has one dimension, each with a zero byte behind it; `at` names the dataset in
    /// errors.
    ///
    /// # Errors
    /// [`Unsupported`](Error::Unsupported) for elements of another type, texts that lie elsewhere than in collections, more of
    /// them than the file has bytes, and a zero byte within one, where libhdf5 would end it; [`Corrupt`](Error::Corrupt) for
    /// places where no text is, for texts that are longer than the file, and for short ones far apart among long ones.
    pub fn texts(&self, path: &str, at: &str) -> Result<Vec<u8>> {
        let array = self.listed(path, ElementClass::Texts, at)?;
        array.check_claim()?;
        let corrupt = |refusal: Refusal| Error::corrupt(&array.at, refusal.to_string());
        let sizes = self.guard.sizes().filter(|sizes| sizes.address == 8);
        let sizes = sizes.ok_or_else(|| Error::unsupported(&array.at, "has addresses of other than 8 bytes"))?;
        let mut collections = Collections {
            guard: &self.guard,
            sizes,
            numbers: HashMap::new(),
            read: Vec::new(),
            last: None,
            bytes_left: self.bytes,
            text_bytes_left: self.bytes,
            allowed: FREE_BYTES,
        };
        let n = array.shape[0] / PLACE_WORDS;
        // most were never written
        if n > self.bytes {
            return Err(Error::unsupported(&array.at, format!("has {n} texts in a file of {} bytes", self.bytes)));
        }
        let (mut texts, mut scratch) = (vec_with_room(n, &array.at)?, Scratch::default());
        let per_chunk = array.chunk_shape[0] / PLACE_WORDS;
        for chunk in 0..array.grid()[0] {
            let n = per_chunk.min(n - chunk * per_chunk) as usize;
            let Address::Stored(_, range) = array.address(chunk)? else {
                // never written
                make_room(&mut texts, n, &array.at)?;
                texts.resize(texts.len() + n, 0);
                continue;
            };
            let encoded = self.guard.some_bytes(range.start, (range.end - range.start) as usize);
            let encoded = encoded.map_err(corrupt)?;
            let decoded = array.decode(chunk, &encoded, &mut scratch)?;
            let places = decoded.elements()?;
            for place in places.chunks_exact(PLACE_BYTES).take(n) {
                let text = text(&mut collections, place).map_err(corrupt)?;
                make_room(&mut texts, text.len() + 1, &array.at)?;
                texts.extend_from_slice(text);
                texts.push(0);
            }
        }
        if texts.iter().map(|&b| u64::from(b == 0)).sum::<u64>() != n {
            return Err(Error::unsupported(&array.at, "has a text with a zero byte in it"));
        }
        Ok(texts)
    }
}

fn make_room(texts: &mut Vec<u8>, n: usize, at: &str) -> Result<()> {
    let held = texts.len();
    let message = || format!("has more than {held} bytes of texts, for which there is no memory");
    texts.try_reserve(n).map_err(|_| Error::corrupt(at, message()))
}

/// The text at a place.
fn text<'a>(collections: &'a mut Collections, place: &[u8]) -> Checked<&'a [u8]> {
    let (length, rest) = place.split_first_chunk().ok_or("a place cut short")?;
    let (address, rest) = rest.split_first_chunk().ok_or("a place cut short")?;
    let number = rest.first_chunk().ok_or("a place cut short")?;
    let (length, address, number) = (u32::from_le_bytes(*length), u64::from_le_bytes(*address), u32::from_le_bytes(*number));
    if length == 0 {
        return Ok(&[]);
    }
    collections.object(length, address, number)
}
