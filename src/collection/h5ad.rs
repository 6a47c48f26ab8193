//! The HDF5 files of one dataset, each opened once however many of its elements are wanted.

use super::Stores;
use crate::base::error::Result;
use crate::store::{self, OpenFiles};

/// Texts of variable length, UTF-8 or ASCII, that the dataset at `path` of the HDF5 file `file` has in one dimension, each with
/// a zero byte behind it.
///
/// # Errors
/// As [`File::open`](crate::layout::hdf5::File::open) and [`File::texts`](crate::layout::hdf5::File::texts).
pub fn read_texts(file: &str, path: &str) -> Result<Vec<u8>> {
    let opened = File::open(store::at(file, &OpenFiles::for_this_process(), false)?, path)?;
    let texts = opened.texts(path, path)?;
    opened.close()?;
    Ok(texts)
}

/// Files that were opened, to be closed when all that is wanted was listed.
pub(super) struct Files<'a> {
    stores: Stores<'a>,
    opened: Vec<(String, File)>,
}

impl<'a> Files<'a> {
    pub(super) fn new(stores: Stores<'a>) -> Self {
        Self { stores, opened: Vec::new() }
    }

    /// The file at `path`; `at` names the element in errors.
    pub(super) fn get(&mut self, path: &str, at: &str) -> Result<&File> {
        let place = match self.opened.iter().position(|(opened, _)| opened == path) {
            Some(place) => place,
            None => {
                self.opened.push((path.to_owned(), File::open((self.stores)(path).map_err(|e| e.within(at))?, at)?));
                self.opened.len() - 1
            }
        };
        Ok(&self.opened[place].1)
    }

    /// Closes all.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io) if one was replaced meanwhile.
    pub(super) fn close(self) -> Result<()> {
        self.opened.into_iter().try_for_each(|(_, file)| file.close())
    }
}

#[cfg(feature = "hdf5")]
pub(super) use crate::layout::hdf5::File;

#[cfg(feature = "hdf5")]
impl File {
    /// Where an element lies in an .h5ad file: anndata before 0.7 wrote `raw.X` and so on beside `X`.
    pub(super) fn path_of<'a>(&self, path: &'a str) -> &'a str {
        if path == "raw/X" && !self.has("raw") && self.has("raw.X") { "raw.X" } else { path }
    }
}

#[cfg(not(feature = "hdf5"))]
pub(super) use without::File;

#[cfg(not(feature = "hdf5"))]
mod without {
    use std::sync::Arc;

    use serde_json::Value;

    use crate::base::error::{Error, Result};
    use crate::layout::ChunkedArray;
    use crate::store::Store;

    /// What cannot be opened by this build.
    pub(in super::super) enum File {}

    pub(in super::super) struct Hdf5Node {
        pub(in super::super) is_group: bool,
        pub(in super::super) attributes: Value,
    }

    impl File {
        #[expect(clippy::needless_pass_by_value, reason = "as the one that can")]
        pub(super) fn open(store: Arc<dyn Store>, at: &str) -> Result<Self> {
            let path = store.display("");
            let message =
                format!("lies in {path}, and this annbatch was built without HDF5; build it with the cargo feature `hdf5`");
            Err(Error::unsupported(at, message))
        }

        pub(in super::super) fn path_of<'a>(&self, _: &'a str) -> &'a str {
            match *self {}
        }

        pub(in super::super) fn node(&self, _: &str, _: &[&str], _: &str) -> Result<Hdf5Node> {
            match *self {}
        }

        pub(in super::super) fn array(&self, _: &str, _: &str) -> Result<ChunkedArray> {
            match *self {}
        }

        pub(super) fn texts(&self, _: &str, _: &str) -> Result<Vec<u8>> {
            match *self {}
        }

        pub(super) fn close(self) -> Result<()> {
            match self {}
        }
    }
}
