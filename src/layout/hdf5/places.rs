//! Which structures of a file lie where, as others say: each has one parent.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::bytes::{Checked, Chunked, Purpose, Sizes, damaged};

/// What others say lies at an address.
#[derive(Debug, Default)]
pub(super) struct Places(HashMap<u64, Expected>);

/// A structure that another one points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Expected {
    /// Address of that other one, and which of its pointers it is; none for a tree of version 1, to which object headers point.
    parent: Option<(u64, usize)>,
    part: IndexPart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IndexPart {
    /// Of a tree of version 1.
    Node { level: u8 },
    /// Of the tree of version 2 whose header lies at `tree`.
    Node2 { tree: u64, depth: usize, n_records: usize },
    /// Of the extensible array whose header lies at `array`; `number` among its secondary blocks.
    SecondaryBlock { array: u64, number: u32 },
    /// Of the fractal heap whose header lies at `heap`, with `n` rows of blocks.
    Rows { heap: u64, n: u32 },
    /// Points to nothing that matters here.
    Block,
}

/// What a guard knows when it checks an index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context {
    pub(super) purpose: Purpose,
    pub(super) sizes: Sizes,
    pub(super) dataset: Option<Chunked>,
    /// Where what is checked lies.
    pub(super) address: u64,
    pub(super) file_bytes: u64,
}

impl Context {
    /// Whether an address is none.
    pub(super) fn is_undefined(&self, address: u64) -> bool {
        address == u64::MAX >> (64 - 8 * self.sizes.address.min(8))
    }
}

impl Places {
    /// What lies at an address, if another structure says so.
    pub(super) fn part_at(&self, address: u64) -> Option<IndexPart> {
        self.0.get(&address).map(|expected| expected.part)
    }

    /// Notes that `context.address` points to a structure as its pointer `number`.
    pub(super) fn point(&mut self, context: &Context, number: usize, address: u64, part: IndexPart) -> Checked<()> {
        if address >= context.file_bytes {
            return damaged(format!("points to byte {address} of a file of {}", context.file_bytes));
        }
        let expected = Expected { parent: Some((context.address, number)), part };
        match self.0.entry(address) {
            Entry::Occupied(known) if *known.get() != expected => {
                damaged(format!("points to byte {address}, to which another one points"))
            }
            entry => {
                entry.or_insert(expected);
                Ok(())
            }
        }
    }

    /// What lies at an address; `part` where no other structure says, as of the root of a tree of version 1.
    pub(super) fn part_or(&mut self, address: u64, part: IndexPart) -> IndexPart {
        self.0.entry(address).or_insert(Expected { parent: None, part }).part
    }
}
