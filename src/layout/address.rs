//! Where the bytes of one chunk lie.

use std::ops::Range;
use std::sync::Arc;

/// Where the encoded bytes of a chunk are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Nowhere: every element has the fill value.
    Fill,
    /// In these bytes of this object.
    Stored(Arc<str>, Range<u64>),
    /// In this shard, whose index is not at hand.
    InShard(u64),
}
