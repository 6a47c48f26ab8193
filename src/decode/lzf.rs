//! LZF as h5py's filter 32000 writes it: one stream per chunk, without a header.
//!
//! ```text
//! 000LLLLL                      L + 1 literals follow
//! LLLddddd dddddddd             L + 2 bytes (1 <= L <= 6) from d + 1 bytes back, d most significant bits first
//! 111ddddd LLLLLLLL dddddddd    L + 9 bytes from d + 1 bytes back
//! ```
//!
//! Source: LibLZF 3.6, `lzf_d.c` and the comments of `lzf_c.c`. Copies are made in fixed pieces that may write further than
//! they should, as far as there is room: what comes next overwrites that.

/// Bytes that three encoded ones can stand for at most.
pub(super) const MAX_INFLATION: usize = 88;

/// Bytes copied at once.
const WIDE: usize = 32;
const HALF: usize = 16;

/// Decodes `src` into `out`; answers how many bytes that gave.
///
/// # Errors
/// What is wrong with the stream.
pub(super) fn decode(src: &[u8], out: &mut [u8]) -> Result<usize, &'static str> {
    let (mut at, mut done) = (0, 0);
    while let Some(&control) = src.get(at) {
        at += 1;
        if control < 32 {
            let n = usize::from(control) + 1;
            literals(src, at, out, done, n)?;
            at += n;
            done += n;
            continue;
        }
        let mut n = usize::from(control >> 5) + 2;
        if n == 9 {
            n += usize::from(*src.get(at).ok_or(TRUNCATED)?);
            at += 1;
        }
        let low = *src.get(at).ok_or(TRUNCATED)?;
        at += 1;
        let back = (usize::from(control & 31) << 8 | usize::from(low)) + 1;
        if back > done {
            return Err("it refers to bytes before its beginning");
        }
        if n > out.len() - done {
            return Err(TOO_LONG);
        }
        repeat(out, done, back, n);
        done += n;
    }
    Ok(done)
}

const TRUNCATED: &str = "it is truncated";
const TOO_LONG: &str = "it holds more than was expected";

#[inline]
fn literals(src: &[u8], at: usize, out: &mut [u8], done: usize, n: usize) -> Result<(), &'static str> {
    if let (Some(from), Some(to)) = (src.get(at..at + WIDE), out.get_mut(done..done + WIDE)) {
        to.copy_from_slice(from);
        return Ok(());
    }
    let from = src.get(at..at + n).ok_or(TRUNCATED)?;
    out.get_mut(done..done + n).ok_or(TOO_LONG)?.copy_from_slice(from);
    Ok(())
}

/// Appends `n` bytes at `done` that repeat those `back` before; both ends were checked.
#[inline]
fn repeat(out: &mut [u8], done: usize, back: usize, n: usize) {
    if back >= HALF && out.len() - done >= n + HALF {
        for step in (0..n).step_by(HALF) {
            let piece: [u8; HALF] = out[done - back + step..][..HALF].try_into().expect("as long as asked for");
            out[done + step..][..HALF].copy_from_slice(&piece);
        }
    } else if back == 1 {
        let byte = out[done - 1];
        out[done..done + n].fill(byte);
    } else if back >= n {
        out.copy_within(done - back..done - back + n, done);
    } else {
        for i in done..done + n {
            out[i] = out[i - back];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The slow twin: byte by byte, into memory that grows.
    fn twin(src: &[u8], limit: usize) -> Option<Vec<u8>> {
        let mut out: Vec<u8> = Vec::new();
        let mut bytes = src.iter().map(|&b| usize::from(b));
        while let Some(control) = bytes.next() {
            if control < 32 {
                for _ in 0..=control {
                    out.push(bytes.next()? as u8);
                }
            } else {
                let n = match control >> 5 {
                    7 => bytes.next()? + 9,
                    short => short + 2,
                };
                let back = ((control & 31) << 8) + bytes.next()? + 1;
                for _ in 0..n {
                    out.push(*out.get(out.len().checked_sub(back)?)?);
                }
            }
        }
        (out.len() <= limit).then_some(out)
    }

    fn check(src: &[u8], room: usize) {
        // without spare room behind it, where memory checkers would not see what is read too far
        let src = &*Box::<[u8]>::from(src);
        let mut out = vec![0xaa; room].into_boxed_slice();
        let got = decode(src, &mut out).ok().map(|n| out[..n].to_vec());
        assert_eq!(got, twin(src, room));
    }

    /// One instruction: literals, or a match, of any length and distance.
    fn instruction() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 1..=32).prop_map(|bytes| [&[bytes.len() as u8 - 1][..], &bytes].concat()),
            (1u8..7, prop_oneof![0u16..40, 0u16..8192]).prop_map(|(n, d)| vec![n << 5 | (d >> 8) as u8, d as u8]),
            (any::<u8>(), prop_oneof![0u16..40, 0u16..8192]).prop_map(|(n, d)| vec![7 << 5 | (d >> 8) as u8, n, d as u8]),
        ]
    }

    proptest! {
        #![proptest_config(crate::base::fuzz::cases(2000))]
        #[test]
        fn streams_decode_as_the_slow_twin_says(
            parts in prop::collection::vec(instruction(), 0..40), cut in 0usize..3, more in 0usize..80, less in 0usize..3,
        ) {
            let mut stream = [&[31][..], &[7; 32], &parts.concat()].concat();
            stream.truncate(stream.len() - cut);
            let n = twin(&stream, usize::MAX).map_or(100, |out| out.len());
            check(&stream, n);
            check(&stream, n + more);
            check(&stream, n.saturating_sub(less));
        }

        #[test]
        fn any_bytes_decode_as_the_slow_twin_says(bytes in prop::collection::vec(any::<u8>(), 0..300), room in 0usize..3000) {
            check(&bytes, room);
        }
    }
}
