//! Elements as chunks store them: one behind the other, or byte plane by byte plane.

/// Largest element, in bytes.
pub(super) const MAX_ITEM: usize = 8;

/// Byte `j` of every element in plane `j`; planes beyond the element's size are empty.
pub(super) type Planes<'a> = [&'a [u8]; MAX_ITEM];

/// Where a run of stored elements lies.
#[derive(Debug, Clone, Copy)]
pub enum Stored<'a> {
    /// One behind the other, in any alignment.
    Items(&'a [u8]),
    /// Plane by plane.
    Planes(Planes<'a>),
}

/// From the other byte order to this machine's.
pub(super) fn swap_bytes(elements: &mut [u8], item_size: usize) {
    elements.chunks_exact_mut(item_size).for_each(<[u8]>::reverse);
}

/// Puts items of `size` bytes together from their planes.
#[cfg(feature = "hdf5")]
pub(super) fn unshuffle(src: &[u8], size: usize, out: &mut [u8]) {
    fn of<const N: usize>(src: &[u8], out: &mut [u8]) {
        let n = src.len() / N;
        let planes: [&[u8]; N] = std::array::from_fn(|j| &src[j * n..][..n]);
        let (items, rest) = out.as_chunks_mut::<N>();
        for (i, item) in items.iter_mut().enumerate() {
            *item = std::array::from_fn(|j| planes[j][i]);
        }
        rest.copy_from_slice(&src[n * N..]);
    }
    match size {
        2 => of::<2>(src, out),
        4 => of::<4>(src, out),
        8 => of::<8>(src, out),
        _ => {
            let n = src.len() / size;
            for (i, item) in out.chunks_exact_mut(size).enumerate() {
                item.iter_mut().enumerate().for_each(|(j, byte)| *byte = src[j * n + i]);
            }
            out[n * size..].copy_from_slice(&src[n * size..]);
        }
    }
}
