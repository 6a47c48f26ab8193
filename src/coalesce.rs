//! Many small byte ranges → few larger reads. Pure; the reading is `fetch`'s.

use std::ops::Range;

/// How ranges of one object are joined. The store knows what is best for it: [`IoShape`](crate::store::IoShape).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoalesceOptions {
    /// Bytes nobody asked for that may be read to save a read; costs bandwidth and memory, saves latency.
    pub max_gap_bytes: u64,
    /// A read stops growing at this size; larger reads cost waiting (a chunk is decoded when its whole read
    /// has arrived), smaller ones cost calls.
    pub target_read_bytes: u64,
}

/// One byte range of one object, with the caller's number for it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    /// The object, by the caller's numbering.
    pub object: u32,
    /// First byte and one past the last.
    pub range: (u64, u64),
    /// What the caller knows the range by.
    pub tag: u32,
}

/// One read that serves one or more wanted ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoalescedRead {
    /// The object.
    pub object: u32,
    /// Bytes to read.
    pub range: Range<u64>,
    /// The wanted ranges inside, as a range of the sorted input.
    pub members: Range<usize>,
}

/// Sorts `wanted` and joins neighbours, those of an object as `options` says of it; every wanted range lies in exactly one read.
pub fn coalesce(wanted: &mut [Wanted], options: impl Fn(u32) -> CoalesceOptions) -> Vec<CoalescedRead> {
    wanted.sort_unstable();
    let mut reads: Vec<CoalescedRead> = Vec::new();
    for (i, w) in wanted.iter().enumerate() {
        let (start, end) = w.range;
        if let Some(last) = reads.last_mut()
            && last.object == w.object
            && let options = options(w.object)
            && start <= last.range.end.saturating_add(options.max_gap_bytes)
            // a range inside the read already costs nothing, whatever the size
            && (end <= last.range.end || end - last.range.start <= options.target_read_bytes)
        {
            last.range.end = last.range.end.max(end);
            last.members.end = i + 1;
            continue;
        }
        reads.push(CoalescedRead { object: w.object, range: start..end, members: i..i + 1 });
    }
    reads
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_range_lies_in_its_read_and_reads_are_no_larger_than_allowed(
            raw in prop::collection::vec((0u32..3, 0u64..10_000, 0u64..500), 0..60), gap in 0u64..300, target in 1u64..2_000,
        ) {
            let mut wanted: Vec<Wanted> = raw.iter().enumerate()
                .map(|(i, &(object, start, len))| Wanted { object, range: (start, start + len), tag: i as u32 }).collect();
            let options = CoalesceOptions { max_gap_bytes: gap, target_read_bytes: target };
            let reads = coalesce(&mut wanted, |_| options);
            let mut seen = 0;
            for read in &reads {
                prop_assert_eq!(read.members.start, seen);
                seen = read.members.end;
                let members = &wanted[read.members.clone()];
                for m in members {
                    prop_assert!(m.object == read.object && m.range.0 >= read.range.start && m.range.1 <= read.range.end);
                }
                let largest = members.iter().map(|m| m.range.1 - m.range.0).max().unwrap();
                prop_assert!(read.range.end - read.range.start <= target.max(largest));
                // bytes that nobody asked for: at most one gap between neighbours
                let mut covered = read.range.start;
                for m in members {
                    prop_assert!(m.range.0 <= covered + gap);
                    covered = covered.max(m.range.1);
                }
            }
            prop_assert_eq!(seen, wanted.len());
        }
    }

    #[test]
    fn neighbours_become_one_read() {
        let mut wanted: Vec<Wanted> = (0..4).map(|i| Wanted { object: 0, range: (i * 10, i * 10 + 10), tag: i as u32 }).collect();
        let reads = coalesce(&mut wanted, |_| CoalesceOptions { max_gap_bytes: 0, target_read_bytes: 100 });
        assert_eq!(reads, [CoalescedRead { object: 0, range: 0..40, members: 0..4 }]);
    }
}
