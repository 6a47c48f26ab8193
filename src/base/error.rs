//! The one error type of the crate.
//!
//! Every variant carries what a user needs to act: where (dataset, array, chunk, file, byte range),
//! what was found, what was expected, and the remedy where there is one. [`Error::kind`] is the stable
//! word that the op library puts in front of the message (`[annbatch:Corrupt] …`), from which Python
//! chooses its exception class.

use std::ops::Range;
use std::sync::Arc;

use crate::base::machine::physical_memory;

/// Result of fallible functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, where, and what to do about it.
///
/// Cheap to clone: a failed batch repeats its error to every consumer that asks for it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of the JSON configuration is unknown, missing, contradictory or out of range.
    #[error("configuration field `{field}`: {message}")]
    Config {
        /// Path of the field, e.g. `sampling.batch_size`.
        field: String,
        /// What was found and what was expected.
        message: String,
    },
    /// An argument of a call is out of range or of the wrong shape.
    #[error("argument `{name}`: {message}")]
    Argument {
        /// Name of the argument.
        name: &'static str,
        /// What was found and what was expected.
        message: String,
    },
    /// A file, array or group is not there.
    #[error("{at}: not found{hint}")]
    NotFound {
        /// The path, with the dataset it belongs to.
        at: String,
        /// `; remedy`, or empty.
        hint: String,
    },
    /// Well-formed, but outside what this crate reads.
    #[error("{at}: {message}")]
    Unsupported {
        /// Dataset and array.
        at: String,
        /// What was found, and the remedy.
        message: String,
    },
    /// The store contradicts itself or its format.
    #[error("{at}: {message}")]
    Corrupt {
        /// Dataset, array and, where known, chunk and byte range.
        at: String,
        /// Got and expected.
        message: String,
    },
    /// The operating system refused or shortened a read.
    #[error("{at}: {source}")]
    Io {
        /// Dataset, array, file and byte range.
        at: String,
        /// The system's error.
        source: Arc<std::io::Error>,
    },
    /// One batch does not fit the memory budget.
    #[error(
        "memory_budget of {budget} bytes is too small: batch {batch} alone needs {needed} bytes; \
         raise memory_budget to at least {needed} or lower batch_size"
    )]
    Budget {
        /// Bytes allowed.
        budget: u64,
        /// Bytes that the batch needs.
        needed: u64,
        /// Number of the batch within the epoch.
        batch: u64,
    },
    /// The state was closed, never opened here, cloned, or inherited over a fork.
    #[error("{message}")]
    Closed {
        /// Which of these, and the remedy.
        message: String,
    },
    /// A GPU, its driver or its compiler refused a call.
    #[error("GPU {device} {what}: {reason}; {remedy}")]
    Device {
        /// Number of the GPU.
        device: u32,
        /// What failed, and with which batch.
        what: String,
        /// The driver's reason.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// A bug of this crate (a caught panic).
    #[error("{message}; this is a bug in annbatch, please report it")]
    Internal {
        /// The panic's message.
        message: String,
    },
}

impl Error {
    /// The stable word for this class of error.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config { .. } => "InvalidConfig",
            Self::Argument { .. } => "InvalidArgument",
            Self::NotFound { .. } => "NotFound",
            Self::Unsupported { .. } => "Unsupported",
            Self::Corrupt { .. } => "Corrupt",
            Self::Io { .. } => "Io",
            Self::Budget { .. } => "Budget",
            Self::Closed { .. } => "Closed",
            Self::Device { .. } => "Device",
            Self::Internal { .. } => "Internal",
        }
    }

    /// An [`Error::Config`] for `field`.
    pub fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { field: field.into(), message: message.into() }
    }

    /// An [`Error::Argument`] for `name`.
    pub fn argument(name: &'static str, message: impl Into<String>) -> Self {
        Self::Argument { name, message: message.into() }
    }

    /// An [`Error::Corrupt`] at `at`.
    pub fn corrupt(at: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Corrupt { at: at.into(), message: message.into() }
    }

    /// An [`Error::Unsupported`] at `at`.
    pub fn unsupported(at: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Unsupported { at: at.into(), message: message.into() }
    }

    /// An [`Error::Closed`].
    pub fn closed(message: impl Into<String>) -> Self {
        Self::Closed { message: message.into() }
    }

    /// The error of a failed system call on `path`; absence becomes [`Error::NotFound`].
    pub fn io(path: impl std::fmt::Display, range: Option<&Range<u64>>, source: std::io::Error) -> Self {
        let at = match range {
            Some(r) => format!("file {path}, bytes {}..{}", r.start, r.end),
            None => format!("file {path}"),
        };
        if source.kind() == std::io::ErrorKind::NotFound {
            return Self::NotFound { at, hint: String::new() };
        }
        Self::Io { at, source: Arc::new(source) }
    }

    /// The same error with `place: ` in front of where it happened.
    #[must_use]
    pub fn within(self, place: &str) -> Self {
        let join = |at: String| format!("{place}: {at}");
        match self {
            Self::NotFound { at, hint } => Self::NotFound { at: join(at), hint },
            Self::Unsupported { at, message } => Self::Unsupported { at: join(at), message },
            Self::Corrupt { at, message } => Self::Corrupt { at: join(at), message },
            Self::Io { at, source } => Self::Io { at: join(at), source },
            Self::Device { device, what, reason, remedy } => {
                Self::Device { device, what: format!("{what} ({place})"), reason, remedy }
            }
            other => other,
        }
    }

    /// The error for a caught panic with this payload.
    pub fn from_panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let message = payload
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panic without a message".to_owned());
        Self::Internal { message }
    }
}

/// Runs `f`, turning a panic into [`Error::Internal`].
pub(crate) fn catch<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or_else(|p| Err(Error::from_panic(&*p)))
}

/// An empty vector with room for `n` items, or an error that names `what` when memory cannot be had. More than
/// the machine's physical memory is refused outright: the system would grant it and kill the process later.
pub(crate) fn vec_with_room<T>(n: u64, what: &str) -> Result<Vec<T>> {
    let mut v = Vec::new();
    usize::try_from(n)
        .ok()
        .filter(|n| n.saturating_mul(size_of::<T>()) as u64 <= physical_memory())
        .and_then(|n| v.try_reserve_exact(n).ok())
        .ok_or_else(|| Error::corrupt(what, format!("claims {n} items, more than this machine's memory holds")))?;
    Ok(v)
}
