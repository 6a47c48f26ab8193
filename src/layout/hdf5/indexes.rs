//! Checks of the nodes and blocks of libhdf5's indexes, as it reads them: each has one parent and one place below it, and
//! holds as much as there is room for where libhdf5 decodes it.
//!
//! Names are those of the HDF5 File Format Specification, version 3.0, sections III.A to III.D and VII.

use std::collections::HashMap;

use super::bytes::{Checked, Chunked, Purpose, Reader, Sizes, damaged, limit};
use super::places::{Context, IndexPart, Places};

/// Deepest tree of version 2: a node has at least three children, and an address 64 bits.
const MAX_DEPTH: usize = 40;
/// Most bytes of its nodes, which are all of one size; libhdf5 makes them of 512 and 2,048.
const MAX_NODE_BYTES: usize = 1 << 20;
/// Elements of a sparse array of chunks that libhdf5 may look through beyond those that a file of its length can hold: some
/// seconds.
const MAX_EMPTY_ELEMENTS: u64 = 1 << 28;

/// What has been read of the indexes of one file.
#[derive(Debug, Default)]
pub(super) struct Indexes {
    trees: HashMap<u64, Tree>,
    arrays: HashMap<u64, Array>,
}

/// A tree of version 2.
#[derive(Debug, Clone)]
struct Tree {
    record_bytes: usize,
    /// By depth, from the leaves up.
    nodes: Vec<Nodes>,
}

#[derive(Debug, Clone, Copy)]
struct Nodes {
    max_records: usize,
    /// Most records of a node and all below it.
    cumulative: u64,
}

/// An extensible array.
#[derive(Debug, Clone, Copy)]
struct Array {
    n_blocks: usize,
    n_secondary: usize,
    /// Number of the first secondary block that the index block points to.
    first_secondary: u32,
}

/// Bytes that numbers up to `limit` take.
fn bytes_up_to(limit: u64) -> usize {
    limit.max(1).ilog2() as usize / 8 + 1
}

/// Bytes that the size of a filtered chunk may take: as many as the size before filters needs and one more, or those of
/// any length in the file.
fn is_chunk_size_bytes(context: &Context, dataset: Chunked, n: usize) -> bool {
    n == bytes_up_to(dataset.chunk_bytes).saturating_add(1).min(8) || n == context.sizes.length
}

/// Whether a record or an element of a chunk takes so many bytes, beside `more` of its place.
fn is_chunk(context: &Context, n: usize, more: usize, filtered: bool) -> bool {
    let Some(dataset) = context.dataset else { return false };
    filtered == dataset.is_filtered
        && n.checked_sub(context.sizes.address + more).is_some_and(|n| {
            if filtered { n.checked_sub(4).is_some_and(|n| is_chunk_size_bytes(context, dataset, n)) } else { n == 0 }
        })
}

/// Whether records of a tree of version 2 are as long as libhdf5 decodes them.
fn is_record(context: &Context, kind: usize, n: usize) -> bool {
    match (context.purpose, kind) {
        // of names; their other indexes, and those of huge objects and of shared messages, are not needed
        (Purpose::Links, 5) => n == 11,
        (Purpose::Attributes, 8) => n == 17,
        (Purpose::Chunks, 10 | 11) => is_chunk(context, n, context.dataset.map_or(0, |d| 8 * d.n_dims), kind == 11),
        _ => false,
    }
}

impl Indexes {
    /// Checks the header of a tree of version 2.
    pub(super) fn header(&mut self, bytes: &[u8], context: &Context, places: &mut Places) -> Checked<()> {
        let address = context.sizes.address;
        let mut header = Reader(bytes);
        header.take(5)?;
        let (kind, node_bytes, record_bytes, depth) = (header.small(1)?, header.small(4)?, header.small(2)?, header.small(2)?);
        header.take(2)?;
        let (root, n_records) = (header.number(address)?, header.small(2)?);
        if !is_record(context, kind, record_bytes) {
            return damaged(format!("records of {record_bytes} bytes and kind {kind}, where none of them are looked for"));
        }
        if depth > MAX_DEPTH || node_bytes > MAX_NODE_BYTES {
            return damaged(format!("a depth of {depth} and nodes of {node_bytes} bytes"));
        }
        let max_records = node_bytes.saturating_sub(10) / record_bytes;
        let mut nodes = vec![Nodes { max_records, cumulative: max_records as u64 }];
        for _ in 0..depth {
            let below = nodes[nodes.len() - 1];
            let pointer =
                address + bytes_up_to(max_records as u64) + if nodes.len() > 1 { bytes_up_to(below.cumulative) } else { 0 };
            let max_records = node_bytes.saturating_sub(10 + pointer) / (record_bytes + pointer);
            let cumulative = (max_records as u64 + 1).checked_mul(below.cumulative).and_then(|n| n.checked_add(max_records as u64));
            let cumulative = cumulative.ok_or_else(|| format!("a depth of {depth}"))?;
            nodes.push(Nodes { max_records, cumulative });
        }
        if nodes.iter().any(|n| n.max_records == 0 || n.max_records > usize::from(u16::MAX)) {
            return damaged(format!("nodes of {node_bytes} bytes with records of {record_bytes}"));
        }
        self.trees.insert(context.address, Tree { record_bytes, nodes });
        if context.is_undefined(root) {
            Ok(())
        } else {
            places.point(context, 0, root, self.node2(context.address, depth, n_records)?)
        }
    }

    /// A node of a tree of version 2, once it holds no more records than there is room for.
    fn node2(&self, tree: u64, depth: usize, n_records: usize) -> Checked<IndexPart> {
        let max = self.trees[&tree].nodes[depth].max_records;
        if n_records > max {
            return damaged(format!("points to a node of {n_records} records, which holds {max}"));
        }
        Ok(IndexPart::Node2 { tree, depth, n_records })
    }

    /// Checks a node of a tree of version 2 that is no leaf.
    pub(super) fn internal(&mut self, bytes: &[u8], context: &Context, places: &mut Places) -> Checked<()> {
        let Some(IndexPart::Node2 { tree, depth: depth @ 1.., n_records }) = places.part_at(context.address) else {
            return damaged("a node, where none is looked for");
        };
        let Tree { record_bytes, nodes } = &self.trees[&tree];
        let n_bytes = bytes_up_to(nodes[0].max_records as u64);
        let all_bytes = if depth > 1 { bytes_up_to(nodes[depth - 1].cumulative) } else { 0 };
        let mut node = Reader(bytes);
        node.take(6)?;
        check_records(node.take(n_records * record_bytes)?, *record_bytes, context)?;
        for number in 0..=n_records {
            let (child, n) = (node.number(context.sizes.address)?, node.small(n_bytes)?);
            node.take(all_bytes)?;
            places.point(context, number, child, self.node2(tree, depth - 1, n)?)?;
        }
        Ok(())
    }

    /// Checks a leaf of a tree of version 2.
    pub(super) fn leaf(&self, bytes: &[u8], context: &Context, places: &Places) -> Checked<()> {
        let Some(IndexPart::Node2 { tree, depth: 0, n_records }) = places.part_at(context.address) else {
            return damaged("a node, where none is looked for");
        };
        let record_bytes = self.trees[&tree].record_bytes;
        let mut node = Reader(bytes);
        node.take(6)?;
        check_records(node.take(n_records * record_bytes)?, record_bytes, context)
    }

    /// Checks the header of an extensible array.
    pub(super) fn extensible_array(&mut self, bytes: &[u8], context: &Context, places: &mut Places) -> Checked<()> {
        let mut header = Reader(bytes);
        header.take(5)?;
        let (kind, element_bytes, bits) = (header.small(1)?, header.small(1)?, header.small(1)?);
        let (in_index, per_block, pointers, page_bits) = (header.small(1)?, header.small(1)?, header.small(1)?, header.small(1)?);
        header.take(4 * context.sizes.length)?;
        let n = header.number(context.sizes.length)?;
        header.take(context.sizes.length)?;
        let index = header.number(context.sizes.address)?;
        check_elements(context, kind, element_bytes, page_bits)?;
        let (blocks, direct) = (per_block.checked_ilog2().unwrap_or(0) as usize, pointers.checked_ilog2().unwrap_or(0));
        let n_levels = (1 + bits).saturating_sub(blocks);
        let is_possible = per_block.is_power_of_two()
            && pointers.is_power_of_two()
            && bits <= 64
            && n_levels >= 2 * direct as usize
            && (1usize << page_bits) >= per_block;
        // the level of the last element must be one of them
        let last_level = (n.saturating_sub(in_index as u64 + 1) / per_block.max(1) as u64).saturating_add(1).ilog2() as usize;
        if !is_possible || (n > in_index as u64 && last_level >= n_levels) {
            return damaged(format!("{n} elements in an array of 2^{bits}, {per_block} to a block"));
        }
        if n > MAX_EMPTY_ELEMENTS.saturating_add(context.file_bytes) {
            let remedy = "write the dataset again in larger chunks";
            return limit(format!("{n} elements, most of them of no chunk, in a file of {} bytes; {remedy}", context.file_bytes));
        }
        let first_secondary = 2 * direct;
        let array = Array { n_blocks: 2 * (pointers - 1), n_secondary: n_levels - first_secondary as usize, first_secondary };
        self.arrays.insert(context.address, array);
        if context.is_undefined(index) {
            return Ok(());
        }
        places.point(context, 0, index, IndexPart::SecondaryBlock { array: context.address, number: u32::MAX })
    }

    /// Checks a block of an extensible array that points to others: they are the last that it says.
    pub(super) fn extensible_block(&mut self, bytes: &[u8], context: &Context, places: &mut Places) -> Checked<()> {
        let Some(IndexPart::SecondaryBlock { array, number }) = places.part_at(context.address) else {
            return damaged("a block, where none is looked for");
        };
        let Array { n_blocks, n_secondary, first_secondary } = self.arrays[&array];
        let is_index = number == u32::MAX;
        let (n_blocks, n_secondary) = if is_index { (n_blocks, n_secondary) } else { (1usize << (number / 2), 0) };
        let n_pointers = n_blocks + n_secondary;
        let start = n_pointers.checked_mul(context.sizes.address).and_then(|n| bytes.len().checked_sub(n + 4));
        let mut pointers = Reader(&bytes[start.ok_or("the structure is cut short")?..]);
        for pointer in 0..n_pointers {
            let address = pointers.number(context.sizes.address)?;
            let part = match pointer.checked_sub(n_blocks) {
                Some(secondary) => IndexPart::SecondaryBlock { array, number: first_secondary + secondary as u32 },
                None => IndexPart::Block,
            };
            if !context.is_undefined(address) {
                places.point(context, pointer, address, part)?;
            }
        }
        Ok(())
    }
}

/// Checks a node of a tree of version 1, with at most `max_children`; `None` if that is not known.
pub(super) fn node(bytes: &[u8], context: &Context, places: &mut Places, max_children: Option<usize>) -> Checked<()> {
    let Sizes { address, length } = context.sizes;
    let mut node = Reader(bytes);
    node.take(4)?;
    let (kind, level, n) = (node.small(1)?, node.small(1)? as u8, node.small(2)?);
    let header = 8 + 2 * address;
    node.take(2 * address)?;
    let key = match (context.purpose, kind, max_children) {
        (Purpose::Links, 0, _) => length,
        (Purpose::Chunks, 1, Some(max)) => {
            let keys = bytes.len().checked_sub(header + max * address).ok_or("is cut short")?;
            keys / (max + 1)
        }
        _ => return damaged(format!("a node of kind {kind}, where none of that kind is looked for")),
    };
    let part = IndexPart::Node { level };
    if places.part_or(context.address, part) != part {
        return damaged(format!("is of level {level}, where its parent has another one"));
    }
    for number in 0..n {
        node.take(key)?;
        let child = node.number(address)?;
        if level > 0 {
            places.point(context, number, child, IndexPart::Node { level: level - 1 })?;
        }
    }
    Ok(())
}

/// Checks the header of a fixed array.
pub(super) fn fixed_array(bytes: &[u8], context: &Context, places: &mut Places) -> Checked<()> {
    let mut header = Reader(bytes);
    header.take(5)?;
    let (kind, element_bytes, page_bits) = (header.small(1)?, header.small(1)?, header.small(1)?);
    let n = header.number(context.sizes.length)?;
    let block = header.number(context.sizes.address)?;
    check_elements(context, kind, element_bytes, page_bits)?;
    // there is room for all
    if n == 0 || n.saturating_mul(element_bytes as u64) > context.file_bytes {
        return damaged(format!("{n} elements, in a file of {} bytes", context.file_bytes));
    }
    if context.is_undefined(block) { Ok(()) } else { places.point(context, 0, block, IndexPart::Block) }
}

/// Refuses attributes that lie in a heap of messages which objects share: libhdf5 takes it that there is one.
fn check_records(records: &[u8], record_bytes: usize, context: &Context) -> Checked<()> {
    let is_shared = |record: &[u8]| record[8] & 2 != 0;
    if context.purpose == Purpose::Attributes && records.chunks_exact(record_bytes).any(is_shared) {
        return limit("an attribute that objects share; write the file again without shared messages");
    }
    Ok(())
}

/// Checks what is said of the elements of an array of chunks.
fn check_elements(context: &Context, kind: usize, n: usize, page_bits: usize) -> Checked<()> {
    if context.purpose == Purpose::Chunks && kind < 2 && is_chunk(context, n, 0, kind == 1) && page_bits < 32 {
        Ok(())
    } else {
        damaged(format!("elements of {n} bytes and kind {kind}, 2^{page_bits} to a page, where none of them are looked for"))
    }
}
