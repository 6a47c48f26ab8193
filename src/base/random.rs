//! A shuffled order of `0..n` that is computed, not stored: O(1) memory and time however large `n` is.
//!
//! A generalized Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002,
//! section 5) over the grid of `columns · rows` cells that is the smallest near-square one to hold `n`: a number is
//! a pair, and every round adds a keyed function of one half to the other, modulo that half's range, which can be
//! undone whatever the function is. So each round is a bijection of the grid. Numbers that land behind `n` are sent
//! through again until they do not ("cycle walking", ibid., section 3), which leaves a bijection of `0..n`. The grid
//! has fewer than √n + 1 cells too many, so hardly any number walks twice.
//!
//! The round function is `SplitMix64`: round `r` adds the number at place `x` of the sequence that its key begins.

use std::ops::Range;

use rand::RngExt;
use rand::rngs::ChaCha8Rng;

/// Passes over both halves. Small orders need them all: over 10^6 seeds the numbers at two places of `n = 5` and 6 still
/// show a bias after 8 (chi-square 7 deviations above its mean) and none after 12; from `n = 16` on 6 are enough.
const ROUNDS: usize = 12;

/// One order of `0..n`, a pure function of `n` and the keys.
#[derive(Debug, Clone)]
pub(crate) struct Permutation {
    n: u64,
    columns: u64,
    rows: u64,
    keys: [[u64; 2]; ROUNDS],
}

impl Permutation {
    /// The order of `0..n` (fewer than 2^63) that the next numbers of `rng` choose.
    pub(crate) fn new(n: u64, rng: &mut ChaCha8Rng) -> Self {
        let mut columns = n.isqrt().max(1);
        if columns * columns < n {
            columns += 1;
        }
        let rows = n.div_ceil(columns).max(1);
        Self { n, columns, rows, keys: std::array::from_fn(|_| [rng.random(), rng.random()]) }
    }

    /// The number at `place`, below `n` as that is.
    pub(crate) fn at(&self, place: u64) -> u64 {
        debug_assert!(place < self.n, "place {place} of {}", self.n);
        let [x] = self.once([place]);
        if x < self.n { x } else { self.walk(x) }
    }

    /// The numbers at `places`, in order. Several at a time: each round waits for the one before.
    pub(crate) fn over(&self, places: Range<u64>) -> impl Iterator<Item = u64> {
        const LANES: usize = 8;
        debug_assert!(places.end <= self.n, "places {places:?} of {}", self.n);
        let end = places.end;
        places
            .step_by(LANES)
            .flat_map(move |first| {
                // those behind the end are computed and not looked at
                let several = self.once(std::array::from_fn::<u64, LANES, _>(|i| (first + i as u64).min(end - 1)));
                several.into_iter().take((end - first).min(LANES as u64) as usize)
            })
            .map(|x| if x < self.n { x } else { self.walk(x) })
    }

    #[cold]
    fn walk(&self, mut x: u64) -> u64 {
        while x >= self.n {
            [x] = self.once([x]);
        }
        x
    }

    /// A bijection of the whole grid, at each of some places.
    fn once<const LANES: usize>(&self, places: [u64; LANES]) -> [u64; LANES] {
        let mut rows = places.map(|x| x / self.columns);
        let mut columns = places.map(|x| x % self.columns);
        for [down, across] in self.keys {
            for (row, column) in rows.iter_mut().zip(&mut columns) {
                *row = wrapped(*row + below(self.rows, mix(down, *column)), self.rows);
                *column = wrapped(*column + below(self.columns, mix(across, *row)), self.columns);
            }
        }
        std::array::from_fn(|i| rows[i] * self.columns + columns[i])
    }
}

/// A number below `n` from 64 random bits (Lemire, "Fast Random Integer Generation in an Interval", 2019, without the
/// rejection: its bias is n / 2^64).
fn below(n: u64, bits: u64) -> u64 {
    ((u128::from(bits) * u128::from(n)) >> 64) as u64
}

/// `sum` modulo `n`, where `sum < 2n`.
fn wrapped(sum: u64, n: u64) -> u64 {
    if sum >= n { sum - n } else { sum }
}

/// The `n`-th number of the sequence that a seed begins (`SplitMix64`: Steele, Lea and Flood, "Fast Splittable
/// Pseudorandom Number Generators", OOPSLA 2014).
pub(crate) fn mix(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;

    fn order(n: u64, seed: u64) -> Permutation {
        Permutation::new(n, &mut ChaCha8Rng::seed_from_u64(seed))
    }

    fn assert_bijection(n: u64, seed: u64) {
        let order = order(n, seed);
        let mut seen = vec![false; n as usize];
        for place in 0..n {
            let x = order.at(place);
            assert!(x < n && !std::mem::replace(&mut seen[x as usize], true), "n = {n}, seed {seed}: {x} at {place}");
        }
        for (first, end) in [(0, n), (n / 3, n - n / 5), (n / 2, n / 2)] {
            assert!(order.over(first..end).eq((first..end).map(|place| order.at(place))), "n = {n}, seed {seed}");
        }
    }

    #[test]
    fn every_number_once() {
        for n in (1..=70).chain([97, 101, 127, 128, 129, 251, 256, 1009, 1024, 4095, 4096, 4097, 65_537]) {
            for seed in 0..5 {
                assert_bijection(n, seed);
            }
        }
        assert_bijection(1_000_000, 7);
    }

    proptest! {
        #[test]
        fn every_number_once_for_any_n(n in 1u64..5000, seed: u64) {
            assert_bijection(n, seed);
        }

        /// Where listing is out of question: numbers stay below `n`, and neighbours do not collide.
        #[test]
        fn large_orders_stay_in_range(n in 1u64 << 40..1 << 63, seed: u64, first: u64) {
            let order = order(n, seed);
            let first = first % (n - 100);
            let some: std::collections::HashSet<u64> = (first..first + 100).map(|place| order.at(place)).collect();
            prop_assert_eq!(some.len(), 100);
            prop_assert!(some.iter().all(|x| *x < n));
        }
    }

    /// Pearson's chi-square test against equal counts.
    fn assert_fair(counts: &[u32], what: &str) {
        let expected = counts.iter().map(|&c| f64::from(c)).sum::<f64>() / counts.len() as f64;
        let chi: f64 = counts.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
        let degrees = (counts.len() - 1) as f64;
        // mean and five deviations, and some more: of few degrees the tail is longer than a normal one's
        let limit = degrees + 5.0 * (2.0 * degrees).sqrt() + 10.0;
        assert!(chi < limit, "{what}: chi-square {chi:.1} of {degrees} degrees, expected below {limit:.1}");
    }

    const SEEDS: u64 = 20_000;

    #[test]
    fn every_place_gets_every_number_as_often() {
        for n in [2u64, 3, 4, 5, 6, 7, 8, 16, 17] {
            let mut counts = vec![vec![0u32; n as usize]; n as usize];
            for seed in 0..SEEDS {
                let order = order(n, seed);
                (0..n).for_each(|place| counts[place as usize][order.at(place) as usize] += 1);
            }
            for (place, counts) in counts.iter().enumerate() {
                assert_fair(counts, &format!("n = {n}, place {place}"));
            }
        }
    }

    /// Numbers at two places: next to each other, and the first and last (which window and which chunk is short).
    #[test]
    fn every_pair_of_places_gets_every_pair_of_numbers_as_often() {
        for n in [3u64, 4, 5, 6, 7, 8, 9, 16] {
            for (one, two) in [(0, 1), (n / 2, n / 2 + 1), (0, n - 1)] {
                let mut counts = vec![0u32; (n * n) as usize];
                for seed in 0..SEEDS {
                    let order = order(n, seed);
                    counts[(order.at(one) * n + order.at(two)) as usize] += 1;
                }
                let apart: Vec<u32> = (0..n * n).filter(|i| i / n != i % n).map(|i| counts[i as usize]).collect();
                assert_eq!(apart.len() as u64, n * (n - 1));
                assert_fair(&apart, &format!("n = {n}, places {one} and {two}"));
            }
        }
    }

    /// Within one order: steps between neighbours fall evenly, as those of a shuffled list do.
    #[test]
    fn neighbours_are_unrelated() {
        let (n, bins) = (1_000_003u64, 64u64);
        let order = order(n, 11);
        let mut counts = vec![0u32; bins as usize];
        let mut previous = order.at(0);
        for place in 1..200_000 {
            let x = order.at(place);
            counts[((x + n - previous) % n * bins / n) as usize] += 1;
            previous = x;
        }
        assert_fair(&counts, "steps");
    }
}
