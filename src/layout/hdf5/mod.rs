//! HDF5 files: libhdf5 says once, at open, where the bytes of every dataset lie. Reading and decoding them is ours.
//!
//! ```text
//! path ─▶ File::open ─▶ node(…), array(…) ─▶ ChunkedArray { chunk → (offset in the file, bytes, filters) }
//!              └──────────── libhdf5, behind its one lock ───────────┘        read without it
//!                              └─▶ driver ─▶ guard ─▶ file
//! ```
//!
//! libhdf5 reads through a [`driver`] of ours, whose [`guard`] keeps from it what would crash it.
//!
//! A [`File`] holds libhdf5's file until it is [closed](File::close), which also makes sure that the file is still the
//! one that was opened. Arrays keep only the store they are read through. Links that lead to other files, and data that
//! lies in them, are refused: what is remembered are offsets in one file.

mod bytes;
mod dataset;
mod driver;
mod guard;
mod headers;
mod heaps;
mod indexes;
mod places;
mod raw;
mod texts;
mod using;

use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard};

use hdf5_metno::types::{TypeDescriptor, VarLenAscii, VarLenUnicode};
use hdf5_metno::{Dataset, Location};
use serde_json::Value;

use self::bytes::{Chunked, Purpose};
use self::dataset::ElementClass;
use self::driver::Access;
use self::guard::Guard;
use self::raw::{Link, Object, failed};
use self::using::Using;
use super::ChunkedArray;
use crate::base::error::{Error, Result};
use crate::base::lock::lock;
use crate::store::Store;

/// An HDF5 file whose datasets are being listed.
#[derive(Debug)]
pub struct File {
    // before the last field: dropping it calls libhdf5
    opened: hdf5_metno::File,
    access: Access,
    guard: Arc<Guard>,
    /// As libhdf5 tells files apart.
    number: u64,
    /// Most children of a node of a tree of chunks of version 1.
    max_children: usize,
    store: Arc<dyn Store>,
    path: String,
    bytes: u64,
    _using: Using,
}

/// A node of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hdf5Node {
    /// Whether it is a group and no dataset.
    pub is_group: bool,
    /// Those of the attributes asked for that it has: texts and lists of whole numbers.
    pub attributes: Value,
}

/// Held while a file is opened, listed or closed: libhdf5 has a lock of its own, for each call of its, and two threads that list
/// files would hand it to and fro.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    lock(&ONE_AT_A_TIME)
}

impl File {
    /// Opens the file that `store` is, without locking it; `at` names it in errors.
    ///
    /// # Errors
    /// [`Corrupt`](Error::Corrupt) for what is no HDF5 file, or is truncated, or being written.
    pub fn open(store: Arc<dyn Store>, at: &str) -> Result<Self> {
        let path = store.display("");
        // given back after the lock: a child of a fork that finds nobody here must not find that held
        let _using = Using::begin().map_err(|e| e.within(at))?;
        let _alone = alone();
        let bytes = store.pin().map_err(|e| e.within(at))?;
        let guard = Arc::new(Guard::open(&*store, bytes, Purpose::Links).map_err(|e| e.within(at))?);
        let named = format!("{at} ({path})");
        guard.explain(&named, || {
            let access = Access::new().map_err(|e| failed(at, &e))?;
            let opened = access.open(&path, &guard).map_err(|e| unopened(&e.to_string(), &named))?;
            let number = Object::at(&opened, "/").map_err(|e| failed(&named, &e))?.file;
            let max_children = raw::max_children(&opened).map_err(|e| failed(&named, &e))?;
            let guard = Arc::clone(&guard);
            let using = Using::begin()?;
            Ok(Self { opened, access, guard, number, max_children, store, path, bytes, _using: using })
        })
    }

    /// Whether there is anything at `path`.
    pub fn has(&self, path: &str) -> bool {
        let parts: Vec<&str> = parts(path).collect();
        // each group on the way must be there before libhdf5 can be asked about what is in it
        (1..=parts.len()).all(|n| self.opened.link_exists(&parts[..n].join("/")))
    }

    /// What is at `path`, with those of `attributes` that it has.
    ///
    /// # Errors
    /// [`NotFound`](Error::NotFound), and [`Unsupported`](Error::Unsupported) for what lies in another file.
    pub fn node(&self, path: &str, attributes: &[&str], at: &str) -> Result<Hdf5Node> {
        let _alone = alone();
        let named = format!("{at} ({})", self.path);
        let object = self.guard.explain(&named, || self.find(path, at))?;
        let guard = Arc::new(Guard::open(&*self.store, self.bytes, Purpose::Attributes)?);
        guard.explain(&named, || {
            let fail = |e: hdf5_metno::Error| failed(&named, &e);
            let opened = self.access.open(&self.path, &guard).map_err(fail)?;
            let location = object.open(&opened).map_err(fail)?;
            let mut found = serde_json::Map::new();
            for &name in attributes {
                if let Some(value) = attribute(&location, name).map_err(|e| failed(&format!("{named}, attribute {name:?}"), &e))? {
                    found.insert(name.to_owned(), value);
                }
            }
            Ok(Hdf5Node { is_group: object.kind == Object::GROUP, attributes: Value::Object(found) })
        })
    }

    /// The dataset at `path`, with all of its chunks listed; `at` names it in errors.
    pub fn array(&self, path: &str, at: &str) -> Result<ChunkedArray> {
        self.listed(path, ElementClass::Numbers, at)
    }

    fn listed(&self, path: &str, elements: ElementClass, at: &str) -> Result<ChunkedArray> {
        let _alone = alone();
        let named = format!("{at} ({})", self.path);
        let fail = |e: hdf5_metno::Error| failed(&named, &e);
        let list = |dataset: &Dataset, expect: &dyn Fn(Chunked)| {
            dataset::array(dataset, elements, &self.store, self.bytes, &named, expect)
        };
        let (object, dataset) = self.guard.explain(&named, || {
            let object = self.find(path, at)?;
            if object.kind == Object::GROUP {
                return Err(Error::corrupt(&named, "is a group; expected a dataset"));
            }
            let dataset = raw::into_dataset(object.open(&self.opened).map_err(fail)?).map_err(fail)?;
            Ok((object, dataset))
        })?;
        if !dataset.is_chunked() {
            return self.guard.explain(&named, || list(&dataset, &|_| ()));
        }
        let guard = Arc::new(Guard::open(&*self.store, self.bytes, Purpose::Chunks)?);
        guard.explain(&named, || {
            let opened = self.access.open(&self.path, &guard).map_err(fail)?;
            let dataset = raw::into_dataset(object.open(&opened).map_err(fail)?).map_err(fail)?;
            list(&dataset, &|chunked| guard.expect_chunks(chunked, self.max_children))
        })
    }

    /// The group or dataset at `path`, which is of this file and can be opened.
    fn find(&self, path: &str, at: &str) -> Result<Object> {
        let last = self.link_at(path, at)?;
        let missing = |e| {
            // the driver opens no other file
            if driver::asked_for_another() {
                return self.external(path, at);
            }
            if last == Some(Link::Hard) {
                return failed(&format!("{at} ({})", self.path), &e);
            }
            Error::NotFound { at: format!("{at} ({path:?} in {})", self.path), hint: String::new() }
        };
        driver::asked_for_another();
        let object = Object::at(&self.opened, path).map_err(missing)?;
        if object.file != self.number {
            return Err(self.external(path, at));
        }
        match object.kind {
            Object::GROUP => Ok(object),
            Object::DATASET => {
                self.guard.check_dataset(object.address(), &format!("{at} ({})", self.path))?;
                Ok(object)
            }
            _ => Err(Error::unsupported(at, "is neither a group nor a dataset")),
        }
    }

    /// Lets go of the file in libhdf5.
    ///
    /// # Errors
    /// [`Io`](Error::Io) if it was replaced or changed meanwhile: what was listed may then belong to neither.
    pub fn close(self) -> Result<()> {
        let _alone = alone();
        self.opened.close().map_err(|e| failed(&self.path, &e))?;
        self.store.pin().map(|_| ())
    }

    /// The kind of the link at `path`, of which no part leads to another file; `None` if there is none.
    fn link_at(&self, path: &str, at: &str) -> Result<Option<Link>> {
        let parts: Vec<&str> = parts(path).collect();
        let mut last = None;
        for n in 1..=parts.len() {
            last = raw::link(&self.opened, &parts[..n].join("/"));
            match last {
                Some(Link::Other) => return Err(self.external(path, at)),
                Some(_) => {}
                None => break,
            }
        }
        Ok(last)
    }

    fn external(&self, path: &str, at: &str) -> Error {
        let message = format!("{path:?} is a link out of {}; copy what it points to into one file, or name that file", self.path);
        Error::unsupported(at, message)
    }
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

fn text(bytes: &[u8]) -> Value {
    String::from_utf8_lossy(bytes).into()
}

/// A text, or a list of whole numbers; null for anything else, and nothing where there is none.
fn attribute(location: &Location, name: &str) -> hdf5_metno::Result<Option<Value>> {
    let c_name = CString::new(name).map_err(|e| e.to_string())?;
    if !raw::has_attribute(location, &c_name)? {
        return Ok(None);
    }
    let attribute = location.attr(name)?;
    let dtype = attribute.dtype()?;
    if !raw::is_text_or_integer(&dtype) {
        return Ok(Some(Value::Null));
    }
    // R writes one text as a list of one
    let is_single = !attribute.space()?.is_null() && attribute.size() == 1;
    Ok(Some(match dtype.to_descriptor()? {
        // libhdf5 reads nothing of an empty one, and its Rust interface would take that for a text
        TypeDescriptor::VarLenUnicode | TypeDescriptor::VarLenAscii if !is_single => Value::Null,
        // `as_str` would trust that the file holds UTF-8
        TypeDescriptor::VarLenUnicode => text(attribute.read_raw::<VarLenUnicode>()?[0].as_bytes()),
        TypeDescriptor::VarLenAscii => text(attribute.read_raw::<VarLenAscii>()?[0].as_bytes()),
        TypeDescriptor::FixedAscii(n) | TypeDescriptor::FixedUnicode(n) if n <= raw::MAX_TEXT_BYTES => {
            raw::fixed_text(&attribute)?.into()
        }
        TypeDescriptor::Integer(_) | TypeDescriptor::Unsigned(_) if attribute.size() <= 64 => attribute.read_raw::<i64>()?.into(),
        _ => Value::Null,
    }))
}

/// Why libhdf5 did not open a file.
fn unopened(why: &str, at: &str) -> Error {
    if why.contains("file signature not found") {
        return Error::corrupt(at, "is no HDF5 file; expected an .h5ad file, or the directory of a Zarr group, written by anndata");
    }
    if why.contains("truncated file") {
        return Error::corrupt(at, format!("is shorter than it should be ({why}); copy it again, or wait until it is written"));
    }
    if why.contains("already open for write") {
        return Error::corrupt(
            at,
            "is being written, or its writer did not close it; close it there, or clear the mark with `h5clear --status`",
        );
    }
    Error::corrupt(at, format!("cannot be opened: {why}"))
}
