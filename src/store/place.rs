//! Which store reads what lies at a place.

use std::sync::Arc;

use super::{LocalStore, OpenFiles, Store};
use crate::base::error::{Error, Result};

/// The store of what lies at `place`: a directory, or one file (whose key is empty). `direct` asks for reads past the page cache.
///
/// # Errors
/// [`Unsupported`](Error::Unsupported) for URLs: local stores are read.
pub fn at(place: &str, files: &Arc<OpenFiles>, direct: bool) -> Result<Arc<dyn Store>> {
    let is_scheme = |scheme: &str| scheme.len() > 1 && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    if place.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme)) {
        let message = "is a URL, and local stores are read; copy it to a file system, or mount it there";
        return Err(Error::unsupported(format!("{place:?}"), message));
    }
    let mut store = LocalStore::new(place, Arc::clone(files));
    if direct {
        store.set_direct();
    }
    Ok(Arc::new(store))
}
