//! Checks of the heaps that libhdf5 keeps texts, names and attributes in, as it reads them.

use std::collections::HashMap;

use super::bytes::{Checked, Purpose, Reader, Sizes, damaged};
use super::places::{Context, IndexPart, Places};

/// Least bytes of a collection of texts.
const MIN_COLLECTION_BYTES: u64 = 4096;
/// Most bytes of a block of a fractal heap that holds objects; libhdf5 makes them of up to 64 KiB.
const MAX_BLOCK_BITS: u32 = 20;
/// Most bytes of an object in it, which libhdf5 makes of up to 4,096: as many as a message in an object's header may have.
const MAX_OBJECT_BYTES: u64 = 1 << 16;

/// A fractal heap: rows of `width` blocks, the first two of the smallest size and each other one of twice the size of the one
/// before.
#[derive(Debug, Clone, Copy)]
struct Heap {
    width_bits: u32,
    /// Rows of blocks that hold objects; blocks of the others hold rows.
    n_direct: u32,
    offset_bytes: usize,
}

/// The fractal heaps of one file whose headers have been read, by their addresses.
#[derive(Debug, Default)]
pub(super) struct Heaps(HashMap<u64, Heap>);

/// Bytes of a collection of texts, of which `bytes` are the first and `left` what is left of the file.
pub(super) fn collection_bytes(bytes: &[u8], sizes: Sizes, left: u64, max: u64) -> Checked<usize> {
    let mut header = Reader(bytes);
    header.take(8)?;
    let n = header.number(sizes.length)?;
    if (MIN_COLLECTION_BYTES..=max.min(left)).contains(&n) {
        Ok(n as usize)
    } else {
        damaged(format!("{n} bytes of texts, where {left} are left of the file"))
    }
}

/// Calls `found(number, bytes)` for each object of a collection of texts: they follow one another to its end.
pub(super) fn objects<'a>(bytes: &'a [u8], sizes: Sizes, mut found: impl FnMut(usize, &'a [u8])) -> Checked<()> {
    // that of the collection and that of an object
    let header = (8 + sizes.length).next_multiple_of(8);
    let mut at = header;
    // what is left at the end may be too little for another one
    while bytes.len() - at >= header {
        let mut object = Reader(&bytes[at..]);
        let index = object.small(2)?;
        object.take(6)?;
        let n = object.number(sizes.length)?;
        // number 0 is what is free, with its header
        let padded = || n.checked_next_multiple_of(8)?.checked_add(header as u64);
        let step = if index == 0 { Some(n) } else { padded() };
        let step = step.filter(|step| (header as u64..=(bytes.len() - at) as u64).contains(step));
        let step = step.ok_or_else(|| format!("a text of {n} bytes at {at} of {}", bytes.len()))? as usize;
        if index != 0 {
            found(index, &bytes[at + header..][..n as usize]);
        }
        at += step;
    }
    Ok(())
}

impl Heaps {
    /// Checks the header of a fractal heap.
    pub(super) fn header(&mut self, bytes: &[u8], context: &Context, places: &mut Places) -> Checked<()> {
        let Sizes { address, length } = context.sizes;
        let mut header = Reader(bytes);
        header.take(5)?;
        let (id_bytes, filter_bytes) = (header.small(2)?, header.small(2)?);
        header.take(1)?;
        let max_object = header.number(4)?;
        header.take(2 * address + 10 * length)?;
        let (width, smallest, largest) = (header.number(2)?, header.number(length)?, header.number(length)?);
        let (bits, _, root, n_rows) = (header.small(2)?, header.take(2)?, header.number(address)?, header.small(2)?);
        let power = |n: u64| n.is_power_of_two().then(|| n.trailing_zeros());
        let shape = (|| {
            let (width_bits, start, direct) = (power(width)?, power(smallest)?, power(largest)?);
            let max_rows = (bits as u32).checked_sub(start + width_bits)? + 1;
            let n_direct = direct.checked_sub(start)? + 2;
            let offset_bytes = bits.div_ceil(8);
            let length_bytes = (direct as usize).div_ceil(8).min(max_object.checked_ilog2()? as usize / 8 + 1);
            let fits = direct <= MAX_BLOCK_BITS
                && bits <= 64
                && max_object <= largest.min(MAX_OBJECT_BYTES)
                && n_direct <= max_rows
                && n_rows <= max_rows as usize
                && 1 + offset_bytes + length_bytes <= id_bytes;
            let wanted = match context.purpose {
                Purpose::Links => id_bytes == 7,
                _ => id_bytes == 8,
            };
            (fits && wanted && filter_bytes == 0).then_some(Heap { width_bits, n_direct, offset_bytes })
        })();
        let heap = shape.ok_or_else(|| format!("{n_rows} rows of {width} blocks of {smallest} to {largest} bytes, of 2^{bits}"))?;
        self.0.insert(context.address, heap);
        if context.is_undefined(root) {
            return Ok(());
        }
        places.point(
            context,
            0,
            root,
            if n_rows == 0 { IndexPart::Block } else { IndexPart::Rows { heap: context.address, n: n_rows as u32 } },
        )
    }

    /// Checks a block of a fractal heap that holds rows of blocks.
    pub(super) fn rows(&self, bytes: &[u8], context: &Context, places: &mut Places) -> Checked<()> {
        let Some(IndexPart::Rows { heap, n }) = places.part_at(context.address) else {
            return damaged("a block, where none is looked for");
        };
        let Heap { width_bits, n_direct, offset_bytes } = self.0[&heap];
        let mut block = Reader(bytes);
        block.take(5 + context.sizes.address + offset_bytes)?;
        for row in 0..n {
            for number in 0..1usize << width_bits {
                let address = block.number(context.sizes.address)?;
                // as many as fill a block of this row
                let part = match row.checked_sub(n_direct) {
                    Some(_) => IndexPart::Rows { heap, n: row.checked_sub(width_bits).ok_or("rows of less than a block")? },
                    None => IndexPart::Block,
                };
                if !context.is_undefined(address) {
                    places.point(context, (row as usize) << width_bits | number, address, part)?;
                }
            }
        }
        Ok(())
    }
}
