//! Entries of sparse rows in the order of their columns.

/// Sorts the entries of rows by their columns, where they are not.
#[derive(Debug, Default)]
pub struct EntrySorter {
    /// Column and place of each entry, in one number.
    order: Vec<u64>,
    spare: Vec<u64>,
    moved: Vec<u8>,
}

impl EntrySorter {
    /// Sorts one row in place; entries of one column stay in the order in which they came. Column indices are unsigned
    /// numbers of `index_size` bytes, of which 32 bits count.
    pub fn sort(&mut self, indices: &mut [u8], index_size: usize, values: &mut [u8]) {
        match index_size {
            2 => self.sort_as::<2>(indices, values, |bytes| u16::from_ne_bytes(bytes).into()),
            4 => self.sort_as::<4>(indices, values, u32::from_ne_bytes),
            _ => self.sort_as::<8>(indices, values, |bytes| u64::from_ne_bytes(bytes) as u32),
        }
    }

    fn sort_as<const N: usize>(&mut self, indices: &mut [u8], values: &mut [u8], column: impl Fn([u8; N]) -> u32) {
        let columns = indices.as_chunks_mut::<N>().0;
        // all of them are looked at, without a branch: rows are nearly always sorted
        let pairs = columns.iter().zip(columns.iter().skip(1));
        if pairs.fold(true, |sorted, (a, b)| sorted & (column(*a) <= column(*b))) {
            return;
        }
        self.order.clear();
        self.order.extend((0..).zip(&*columns).map(|(at, bytes)| (u64::from(column(*bytes)) << 32) | at));
        let largest = columns.iter().map(|bytes| column(*bytes)).max().unwrap_or_default();
        sort_by_column(&mut self.order, &mut self.spare, largest as usize + 1);
        let size = values.len() / columns.len();
        for (size, bytes) in [(N, columns.as_flattened_mut()), (size, values)] {
            self.moved.clear();
            for &key in &self.order {
                let at = key as u32 as usize * size;
                self.moved.extend_from_slice(&bytes[at..at + size]);
            }
            bytes.copy_from_slice(&self.moved);
        }
    }
}

/// Sorts numbers by their upper halves, columns below `n_out`, byte by byte from the last: some 3 ns an entry, where comparing
/// takes 10. Each pass keeps the order in which equal ones came.
pub(super) fn sort_by_column(numbers: &mut Vec<u64>, spare: &mut Vec<u64>, n_out: usize) {
    spare.resize(numbers.len(), 0);
    let mut left = n_out.saturating_sub(1);
    for shift in (32..64).step_by(8) {
        let byte = |number: u64| (number >> shift) as usize & 255;
        let mut places = [0u32; 256];
        for &number in &*numbers {
            places[byte(number)] += 1;
        }
        let mut start = 0;
        for place in &mut places {
            start += std::mem::replace(place, start);
        }
        for &number in &*numbers {
            let place = &mut places[byte(number)];
            spare[*place as usize] = number;
            *place += 1;
        }
        std::mem::swap(numbers, spare);
        left >>= 8;
        if left == 0 {
            break;
        }
    }
}
