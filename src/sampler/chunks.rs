//! Chunks of contiguous rows, in random order or one after the other.

use std::ops::Range;

use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use super::order::{LoadRequest, Order};
use crate::base::error::{Error, Result, vec_with_room};
use crate::base::random::Permutation;
use crate::config::ChunkParameters;

/// One epoch: a pure function from window numbers to rows, whose size does not depend on the number of rows.
#[derive(Debug)]
pub(super) struct ChunkOrder {
    parameters: ChunkParameters,
    shuffle: bool,
    epoch_seed: u64,
    start: u64,
    stop: u64,
    num_samples: u64,
    n_chunks: u64,
    /// Order of the chunks; `None` where it is the identity or chunks are drawn with replacement.
    order: Option<Permutation>,
    /// The chunk that comes last in the order.
    last: u64,
}

/// Streams of one epoch's generator: the chunk order, and one per window.
const ORDER_STREAM: u64 = 0;

impl ChunkOrder {
    pub(super) fn new(parameters: &ChunkParameters, shuffle: bool, n_obs: u64, epoch_seed: u64) -> Result<Self> {
        let (start, stop, num_samples) = parameters.validate(n_obs)?;
        let span = if parameters.replacement { num_samples } else { stop - start };
        let n_chunks = span.div_ceil(parameters.chunk_size);
        let mut epoch = Self {
            parameters: parameters.clone(),
            shuffle,
            epoch_seed,
            start,
            stop,
            num_samples,
            n_chunks,
            order: None,
            last: n_chunks - 1,
        };
        if shuffle && !parameters.replacement {
            let order = Permutation::new(n_chunks, &mut epoch.generator(ORDER_STREAM));
            epoch.last = order.at(n_chunks - 1);
            epoch.order = Some(order);
        }
        Ok(epoch)
    }

    fn generator(&self, stream: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.epoch_seed);
        rng.set_stream(stream);
        rng
    }

    fn window_rows(&self) -> u64 {
        self.parameters.chunk_size * self.parameters.preload_nchunks
    }

    fn part(&self) -> (u64, u64) {
        self.parameters.part.map_or((0, 1), |[i, k]| (i, k))
    }

    /// Windows of all parts.
    fn n_windows_of_all(&self) -> u64 {
        self.num_samples.div_ceil(self.window_rows())
    }

    /// Rows of the chunks that stand at `places` in the order.
    fn chunks_at(&self, places: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let size = self.parameters.chunk_size;
        let in_order = if self.order.is_none() { places.clone() } else { 0..0 };
        let shuffled = self.order.iter().flat_map(move |order| order.over(places.clone()));
        // The incomplete chunk always comes last, so that every window but the last is full: the chunk that
        // the order puts last is the short one, and those behind it in the file move up.
        let missing = self.n_chunks * size - (self.stop - self.start);
        in_order.chain(shuffled).map(move |chunk| {
            let begin = self.start + chunk * size - if chunk > self.last { missing } else { 0 };
            (begin, begin + size - if chunk == self.last { missing } else { 0 })
        })
    }
}

impl Order for ChunkOrder {
    fn n_windows(&self) -> u64 {
        let (i, k) = self.part();
        self.n_windows_of_all().saturating_sub(i).div_ceil(k)
    }

    fn batches_per_window(&self) -> u64 {
        self.window_rows() / self.parameters.batch_size
    }

    fn n_batches(&self) -> u64 {
        let (i, k) = self.part();
        let own = self.n_windows();
        if own == 0 {
            return 0;
        }
        let last = i + (own - 1) * k;
        if last + 1 < self.n_windows_of_all() {
            return own * self.batches_per_window();
        }
        let rest = self.num_samples - last * self.window_rows();
        let batches =
            if self.parameters.drop_last { rest / self.parameters.batch_size } else { rest.div_ceil(self.parameters.batch_size) };
        (own - 1) * self.batches_per_window() + batches
    }

    fn window(&self, own: u64) -> Result<LoadRequest> {
        if own >= self.n_windows() {
            return Err(Error::Internal { message: format!("window {own} of {}", self.n_windows()) });
        }
        let (i, k) = self.part();
        let number = i + own * k;
        let first_row = number * self.window_rows();
        let n_rows = self.window_rows().min(self.num_samples - first_row);
        let mut rng = self.generator(number + 1);
        let mut rows = vec_with_room(n_rows, "a preload window")?;
        let mut positions: Vec<u32> = vec_with_room(n_rows, "a preload window")?;
        if self.parameters.replacement {
            while (rows.len() as u64) < n_rows {
                let size = self.parameters.chunk_size.min(n_rows - rows.len() as u64);
                let begin = rng.random_range(self.start..=self.stop - size);
                rows.extend(begin..begin + size);
            }
        } else {
            let first = number * self.parameters.preload_nchunks;
            let end = first + n_rows.div_ceil(self.parameters.chunk_size);
            for (begin, end) in self.chunks_at(first..end.min(self.n_chunks)) {
                let room = n_rows - rows.len() as u64;
                rows.extend(begin..end.min(begin + room));
            }
        }
        positions.extend(0..n_rows as u32);
        if self.shuffle {
            positions.shuffle(&mut rng);
        }
        let batch = self.parameters.batch_size;
        let mut sizes = vec![batch as u32; (n_rows / batch) as usize];
        let rest = n_rows % batch;
        if rest > 0 && self.parameters.drop_last {
            positions.truncate((n_rows - rest) as usize);
        } else if rest > 0 {
            sizes.push(rest as u32);
        }
        Ok(LoadRequest { rows, positions, sizes })
    }
}

impl ChunkParameters {
    /// The rows to draw from and how many to draw, after checking every parameter against `n_obs`.
    fn validate(&self, n_obs: u64) -> Result<(u64, u64, u64)> {
        let fail = |field: &str, message: String| Err(Error::config(format!("sampling.{field}"), message));
        for (field, value) in
            [("chunk_size", self.chunk_size), ("preload_nchunks", self.preload_nchunks), ("batch_size", self.batch_size)]
        {
            if value == 0 {
                return fail(field, "is 0; expected at least 1".into());
            }
        }
        let Some(window) = self.chunk_size.checked_mul(self.preload_nchunks).filter(|w| *w < 1 << 62) else {
            return fail(
                "preload_nchunks",
                format!("chunk_size {} times preload_nchunks {} overflows", self.chunk_size, self.preload_nchunks),
            );
        };
        if !window.is_multiple_of(self.batch_size) {
            return fail("batch_size", format!("is {}; it must divide chunk_size * preload_nchunks = {window}", self.batch_size));
        }
        let [start, stop] = self.mask.unwrap_or([0, n_obs]);
        if start >= stop || stop > n_obs {
            return fail("mask", format!("is [{start}, {stop}); expected a non-empty range within the {n_obs} rows"));
        }
        let num_samples = self.num_samples.unwrap_or(stop - start);
        if num_samples == 0 || num_samples >= 1 << 62 {
            return fail("num_samples", format!("is {num_samples}; expected at least 1 and less than 2^62"));
        }
        if num_samples > stop - start && !self.replacement {
            return fail(
                "num_samples",
                format!("is {num_samples}, more than the {} rows; expected fewer, or replacement", stop - start),
            );
        }
        if self.replacement && stop - start < self.chunk_size && num_samples > stop - start {
            return fail("chunk_size", format!("is {}, more than the {} rows to draw from", self.chunk_size, stop - start));
        }
        if window.min(num_samples) > u64::from(u32::MAX) {
            return fail("preload_nchunks", format!("makes windows of {} rows; expected fewer than 2^32", window.min(num_samples)));
        }
        if let Some([i, k]) = self.part
            && i >= k
        {
            return fail("part", format!("is [{i}, {k}]; expected [i, k] with i < k"));
        }
        Ok((start, stop, num_samples))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sampling;
    use proptest::prelude::*;

    /// A window that could take 2^40 chunks and gets sixteen rows: whoever drew all of them would not come back.
    #[test]
    fn a_window_draws_only_the_chunks_that_it_delivers() {
        let json = r#"{"kind":"random","chunk_size":1,"preload_nchunks":1099511627776,"batch_size":8,"num_samples":16}"#;
        let windows = all(&*order(json, 1 << 41, 3).unwrap());
        assert_eq!(windows.iter().map(|w| w.sizes.as_slice()).collect::<Vec<_>>(), [[8, 8]]);
        let rows: std::collections::BTreeSet<u64> = delivered(&windows).into_iter().collect();
        assert!(rows.len() == 16 && rows.iter().all(|r| *r < 1 << 41));
    }

    fn order(json: &str, n_obs: u64, seed: u64) -> Result<Box<dyn Order>> {
        let sampling: Sampling = serde_json::from_str(json).unwrap();
        Ok(sampling.order(n_obs, seed)?.unwrap())
    }

    fn all(order: &dyn Order) -> Vec<LoadRequest> {
        (0..order.n_windows()).map(|w| order.window(w).unwrap()).collect()
    }

    fn delivered(windows: &[LoadRequest]) -> Vec<u64> {
        windows.iter().flat_map(|w| w.positions.iter().map(|&p| w.rows[p as usize])).collect()
    }

    proptest! {
        #[test]
        fn every_row_once_over_all_parts(
            n_obs in 1u64..500, chunk in 1u64..40, preload in 1u64..6, divisor in 1u64..5, seed: u64, parts in 1u64..4,
            low in 0u64..50, random: bool,
        ) {
            let window = chunk * preload;
            let batch = if window.is_multiple_of(divisor) { window / divisor } else { window };
            let low = low.min(n_obs - 1);
            let kind = if random { "random" } else { "sequential" };
            let mut rows = Vec::new();
            for part in 0..parts {
                let json = format!(r#"{{"kind":"{kind}","chunk_size":{chunk},"preload_nchunks":{preload},"batch_size":{batch},
                    "mask":[{low},{n_obs}],"part":[{part},{parts}]}}"#);
                let order = order(&json, n_obs, seed).unwrap();
                let windows = all(&*order);
                prop_assert_eq!(windows.iter().map(|w| w.sizes.len() as u64).sum::<u64>(), order.n_batches());
                prop_assert!(windows.iter().rev().skip(1).all(|w| w.rows.len() as u64 == window));
                rows.extend(delivered(&windows));
            }
            if !random && parts == 1 {
                prop_assert_eq!(&rows, &(low..n_obs).collect::<Vec<_>>());
            }
            rows.sort_unstable();
            prop_assert_eq!(rows, (low..n_obs).collect::<Vec<_>>());
        }

        #[test]
        fn replacement_draws_exactly_num_samples(n_obs in 5u64..200, chunk in 1u64..6, samples in 1u64..700, seed: u64, drop_last: bool) {
            let json = format!(r#"{{"kind":"random","chunk_size":{chunk},"preload_nchunks":4,"batch_size":4,"replacement":true,
                "num_samples":{samples},"drop_last":{drop_last}}}"#);
            let order = order(&json, n_obs, seed).unwrap();
            let rows = delivered(&all(&*order));
            let expected = if drop_last { samples / 4 * 4 } else { samples };
            prop_assert_eq!(rows.len() as u64, expected);
            prop_assert!(rows.iter().all(|r| *r < n_obs));
        }
    }

    /// 2^40 rows one by one: an epoch starts at once, anywhere, and holds nothing per row.
    #[test]
    fn an_epoch_of_any_length_begins_at_once() {
        let n_obs = 1u64 << 40;
        let order = order(r#"{"kind":"random","chunk_size":1,"preload_nchunks":4096,"batch_size":4096}"#, n_obs, 3).unwrap();
        assert_eq!(order.n_batches(), n_obs / 4096);
        let rows = |window| order.window(window).unwrap().rows;
        let (first, last) = (rows(0), rows(n_obs / 4096 - 1));
        assert_ne!(first, last);
        for rows in [first, last] {
            let mean = rows.iter().map(|&r| r as f64).sum::<f64>() / 4096.0 / n_obs as f64;
            assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12.0f64 / 4096.0).sqrt(), "the mean is at {mean}");
        }
    }

    #[test]
    fn order_depends_on_the_seed_alone() {
        let json = r#"{"kind":"random","chunk_size":7,"preload_nchunks":4,"batch_size":14}"#;
        let rows = |seed| delivered(&all(&*order(json, 1000, seed).unwrap()));
        assert_eq!(rows(1), rows(1));
        assert_ne!(rows(1), rows(2));
    }

    #[test]
    fn impossible_parameters_are_named() {
        let error = |json: &str| order(json, 100, 0).unwrap_err().to_string();
        assert!(error(r#"{"kind":"random","chunk_size":0,"preload_nchunks":4,"batch_size":1}"#).contains("chunk_size"));
        assert!(error(r#"{"kind":"random","chunk_size":3,"preload_nchunks":4,"batch_size":5}"#).contains("batch_size"));
        assert!(
            error(r#"{"kind":"random","chunk_size":4611686018427387904,"preload_nchunks":8,"batch_size":1}"#).contains("overflows")
        );
        assert!(error(r#"{"kind":"random","chunk_size":1,"preload_nchunks":4,"batch_size":1,"mask":[5,101]}"#).contains("mask"));
        assert!(
            error(r#"{"kind":"random","chunk_size":1,"preload_nchunks":4,"batch_size":1,"num_samples":101}"#)
                .contains("num_samples")
        );
        assert!(error(r#"{"kind":"random","chunk_size":1,"preload_nchunks":4,"batch_size":1,"part":[2,2]}"#).contains("part"));
    }
}
