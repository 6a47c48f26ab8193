//! What all that look at the bytes of a file read with: numbers of its sizes, and what is wrong with them.

/// Most bytes of metadata in one piece, which libhdf5 allocates.
pub(super) const MAX_METADATA_BYTES: u64 = 256 << 20;

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
    pub(super) why: String,
    /// Whether no writer would write it; otherwise it is not read here, and `why` says what helps.
    pub(super) is_damage: bool,
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
    pub(super) fn at(&self, byte: u64) -> String {
        format!("{} (at byte {byte}){}", self.why, if self.is_damage { "; the file is damaged" } else { "" })
    }
}

pub(super) fn damaged<T>(why: impl Into<String>) -> Checked<T> {
    Err(why.into().into())
}

pub(super) fn limit<T>(why: impl Into<String>) -> Checked<T> {
    Err(Refusal { why: why.into(), is_damage: false })
}
