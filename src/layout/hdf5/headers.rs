//! Checks of the object headers of datasets, before libhdf5 opens them: it divides by the dimensions of chunks without looking
//! whether there is one for each of the dataset's.
//!
//! Names are those of the HDF5 File Format Specification, version 3.0, sections IV.A.1 and IV.A.2.

use std::collections::HashSet;

use super::bytes::{Checked, MAX_METADATA_BYTES, Reader, Sizes, damaged, limit};

/// Types of messages.
const DATASPACE: usize = 0x1;
const LAYOUT: usize = 0x8;
const CONTINUATION: usize = 0x10;
/// Flag of a message that lies elsewhere.
const SHARED: usize = 0x2;
/// Class of a layout in chunks.
const CHUNKED: usize = 2;
/// Most blocks of a header; libhdf5 makes a few, large ones.
const MAX_BLOCKS: usize = 1 << 16;

/// How messages are written.
#[derive(Debug, Clone, Copy)]
enum MessageFormat {
    /// Of version 1.
    Old,
    /// Of version 2, and whether messages are numbered.
    New { numbered: bool },
}

/// Checks the header at `address`; `read` gives bytes of the file.
pub(super) fn dataset(address: u64, sizes: Sizes, read: impl Fn(u64, usize) -> Checked<Vec<u8>>) -> Checked<()> {
    let (format, first, n) = first_block(address, &read)?;
    let (mut blocks, mut seen) = (vec![(first, n)], HashSet::from([first]));
    let (mut n_dims, mut chunk) = (None, None);
    while let Some((at, n)) = blocks.pop() {
        if n > MAX_METADATA_BYTES || seen.len() > MAX_BLOCKS {
            let remedy = "write the file again with fewer attributes";
            return limit(format!("an object header with a part of {n} bytes, {} parts; {remedy}", seen.len()));
        }
        let block = read(at, n as usize)?;
        let messages = match format {
            // a checksum comes behind them
            MessageFormat::New { .. } if at != first => {
                block.strip_prefix(b"OCHK").and_then(|rest| rest.split_last_chunk::<4>()).map(|(all, _)| all)
            }
            _ => Some(&block[..]),
        };
        let mut messages = Reader(messages.ok_or("a part of an object header without its signature")?);
        while let Some((kind, flags, body)) = message(&mut messages, format)? {
            let mut body = Reader(body);
            if flags & SHARED != 0 && matches!(kind, DATASPACE | LAYOUT | CONTINUATION) {
                return limit("a dataset that shares messages with others; write the file again without shared messages");
            }
            match kind {
                DATASPACE => {
                    body.take(1)?;
                    once(&mut n_dims, body.small(1)?)?;
                }
                LAYOUT => once(&mut chunk, layout(body, sizes)?)?,
                CONTINUATION => {
                    let (part, n) = (body.number(sizes.address)?, body.number(sizes.length)?);
                    if !seen.insert(part) {
                        return damaged(format!("an object header points to byte {part} twice"));
                    }
                    blocks.push((part, n));
                }
                _ => {}
            }
        }
    }
    match (n_dims, chunk) {
        (Some(n), Some(Some(chunk))) if chunk.len() != n + 1 || chunk.contains(&0) => {
            damaged(format!("chunks of shape {chunk:?}, with the bytes of an element, in a dataset of {n} dimensions"))
        }
        _ => Ok(()),
    }
}

fn once<T>(known: &mut Option<T>, said: T) -> Checked<()> {
    match known.replace(said) {
        None => Ok(()),
        Some(_) => damaged("an object header says twice what the dataset is"),
    }
}

/// Where the messages of a header begin, and their bytes.
fn first_block(address: u64, read: &impl Fn(u64, usize) -> Checked<Vec<u8>>) -> Checked<(MessageFormat, u64, u64)> {
    let behind = |n: usize| address.checked_add(n as u64).ok_or("an object header beyond the end");
    let prefix = read(address, 12)?;
    let mut prefix = Reader(&prefix);
    if prefix.0.starts_with(b"OHDR") {
        prefix.take(5)?;
        let flags = prefix.small(1)?;
        let start = 6 + if flags & 0x20 != 0 { 16 } else { 0 } + if flags & 0x10 != 0 { 4 } else { 0 };
        let bytes = 1 << (flags & 3);
        let n = read(behind(start)?, bytes)?;
        return Ok((MessageFormat::New { numbered: flags & 4 != 0 }, behind(start + bytes)?, Reader(&n).number(bytes)?));
    }
    let version = prefix.small(1)?;
    if version != 1 {
        return damaged(format!("an object header of version {version}"));
    }
    prefix.take(7)?;
    Ok((MessageFormat::Old, behind(16)?, prefix.number(4)?))
}

/// The type, the flags and the body of the next message; `None` at the end of a part.
fn message<'a>(messages: &mut Reader<'a>, format: MessageFormat) -> Checked<Option<(usize, usize, &'a [u8])>> {
    // of types and numbers of both versions
    let (type_bytes, rest) = match format {
        MessageFormat::Old => (2, 3),
        MessageFormat::New { numbered } => (1, if numbered { 2 } else { 0 }),
    };
    if messages.0.len() < type_bytes + 3 + rest {
        return Ok(None);
    }
    let (kind, n, flags) = (messages.small(type_bytes)?, messages.small(2)?, messages.small(1)?);
    messages.take(rest)?;
    Ok(Some((kind, flags, messages.take(n)?)))
}

/// The dimensions of a chunk, the last of which is that of an element; `None` for other layouts.
fn layout(mut body: Reader<'_>, sizes: Sizes) -> Checked<Option<Vec<u64>>> {
    let version = body.small(1)?;
    let mut n_dims = if version < 3 { body.small(1)? } else { 0 };
    if body.small(1)? != CHUNKED {
        return Ok(None);
    }
    let mut dim_bytes = 4;
    match version {
        1 | 2 => drop(body.take(5 + sizes.address)?),
        3 => {
            n_dims = body.small(1)?;
            body.take(sizes.address)?;
        }
        _ => {
            body.take(1)?;
            (n_dims, dim_bytes) = (body.small(1)?, body.small(1)?);
        }
    }
    (0..n_dims).map(|_| body.number(dim_bytes)).collect::<Checked<_>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type, flags and body.
    type Message<'a> = (u8, u8, &'a [u8]);

    const SIZES: Sizes = Sizes { address: 8, length: 8 };
    const TWO_DIMS: &[u8] = &[1, 2, 0, 0, 0, 0, 0, 0];
    /// Of version 4, two chunk dimensions of 4 and 9 and that of an element.
    const CHUNKS: &[u8] = &[4, 2, 0, 3, 1, 4, 9, 8];

    /// A header of version 1 or 2 with the messages of `parts`, each of which but the last points to the next.
    fn header(new: bool, parts: &[&[Message<'_>]]) -> Vec<u8> {
        let message = |kind: u8, flags: u8, body: &[u8]| {
            let n = body.len() as u8;
            let head = if new { vec![kind, n, 0, flags] } else { vec![kind, 0, n, 0, flags, 0, 0, 0] };
            [&head, body].concat()
        };
        let mut bodies: Vec<Vec<u8>> =
            parts.iter().map(|part| part.iter().flat_map(|&(kind, flags, body)| message(kind, flags, body)).collect()).collect();
        let pointer = if new { 20 } else { 24 };
        let around = if new { 8 } else { 0 };
        let first = if new { 7 } else { 16 };
        let n = parts.len();
        let mut at = first + bodies[0].len() + if n > 1 { pointer } else { 0 } + around / 2;
        for i in 1..n {
            let len = bodies[i].len() + if i + 1 < n { pointer } else { 0 } + around;
            let to = [(at as u64).to_le_bytes(), (len as u64).to_le_bytes()].concat();
            bodies[i - 1].extend(message(CONTINUATION as u8, 0, &to));
            at += len;
        }
        let mut file = if new { b"OHDR\x02\0".to_vec() } else { vec![1, 0, 9, 0, 1, 0, 0, 0] };
        file.extend(if new { vec![bodies[0].len() as u8] } else { (bodies[0].len() as u64).to_le_bytes().to_vec() });
        for (i, body) in bodies.iter().enumerate() {
            file.extend(if new && i > 0 { &b"OCHK"[..] } else { b"" });
            file.extend(body);
            file.extend(if new { &[0; 4][..] } else { &[] });
        }
        file
    }

    fn checked(file: &[u8]) -> Checked<()> {
        dataset(0, SIZES, |at, n| {
            let part = usize::try_from(at).ok().and_then(|at| file.get(at..at.checked_add(n)?));
            part.map(<[u8]>::to_vec).ok_or_else(|| "beyond the end".into())
        })
    }

    fn refused(file: &[u8]) -> String {
        format!("{:?}", checked(file).unwrap_err())
    }

    #[test]
    fn chunks_have_the_dimensions_of_their_dataset() {
        for new in [false, true] {
            let layouts: [&[u8]; 3] = [
                CHUNKS,
                &[3, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0],
                &[1, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0],
            ];
            for layout in layouts {
                let (space, layout) = ((1, 0, TWO_DIMS), (8, 0, layout));
                for parts in [&[&[space, layout][..]][..], &[&[layout], &[], &[space]]] {
                    assert!(checked(&header(new, parts)).is_ok(), "{new} {parts:?}");
                    let mut fewer = header(new, parts);
                    let at = fewer.windows(8).position(|w| w == TWO_DIMS).unwrap();
                    fewer[at + 1] = 1;
                    assert!(refused(&fewer).contains("chunks of shape [4, 9, 8], with the bytes of an element, in a dataset of 1"));
                }
            }
            let others: [&[u8]; 3] = [&[3, 1, 0, 0], &[4, 0, 0, 0], &[3, 0, 0, 0]];
            for layout in others {
                checked(&header(new, &[&[(1, 0, TWO_DIMS), (8, 0, layout)]])).unwrap();
            }
        }
    }

    #[test]
    fn headers_that_contradict_themselves() {
        for new in [false, true] {
            let (space, layout): (Message<'_>, Message<'_>) = ((1, 0, TWO_DIMS), (8, 0, CHUNKS));
            assert!(refused(&header(new, &[&[space, layout, space]])).contains("twice"));
            assert!(refused(&header(new, &[&[space, (8, 0, &[4, 2, 0, 3, 1, 4, 0, 8])]])).contains("[4, 0, 8]"));
            assert!(refused(&header(new, &[&[(1, 2, TWO_DIMS), layout]])).contains("shared messages"));
            let mut file = header(new, &[&[space], &[layout], &[]]);
            let pointers = file.windows(if new { 4 } else { 8 }).enumerate();
            let pointer: &[u8] = if new { &[16, 16, 0, 0] } else { &[16, 0, 16, 0, 0, 0, 0, 0] };
            let at: Vec<usize> = pointers.filter(|(_, w)| *w == pointer).map(|(at, w)| at + w.len()).collect();
            assert_eq!(at.len(), 2);
            file.copy_within(at[0]..at[0] + 16, at[1]);
            assert!(refused(&file).contains("twice"));
            let file = header(new, &[&[space], &[layout]]);
            (0..file.len() - 4).for_each(|n| assert!(checked(&file[..n]).is_err(), "{new} {n}"));
        }
    }
}
