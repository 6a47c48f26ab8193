//! What property tests and fuzz runs of several modules share: how many cases, reproducible random numbers, and rounds until
//! the time is up.

use std::time::{Duration, Instant, SystemTime};

use proptest::prelude::ProptestConfig;

use crate::base::random::mix;

/// So many cases of a property, `ANNBATCH_EXAMPLES` times as many where that is set (`make test-long`).
pub(crate) fn cases(n: u32) -> ProptestConfig {
    ProptestConfig::with_cases(n.saturating_mul(number("ANNBATCH_EXAMPLES").map_or(1, |times| times as u32)))
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Random numbers that a seed decides.
#[derive(Debug)]
pub(crate) struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.drawn += 1;
        mix(self.seed, self.drawn)
    }

    /// A number below `n`, or 0 where there is none; the slight bias does not matter here.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    pub(crate) fn flip(&mut self) -> bool {
        self.below(2) == 0
    }

    /// Overwrites a few bytes, flips bits or copies a part over another, as decoders find hard.
    pub(crate) fn damage(&mut self, bytes: &mut [u8]) {
        if bytes.is_empty() {
            return;
        }
        let at = self.below(bytes.len());
        match self.below(4) {
            0 => bytes[at] = self.next() as u8,
            1 => bytes[at] ^= 1 << self.below(8),
            // lengths that continue, numbers near their end
            2 => bytes[at] = 0xff,
            _ => {
                let from = self.below(bytes.len());
                let n = self.below(40).min(bytes.len() - at).min(bytes.len() - from);
                bytes.copy_within(from..from + n, at);
            }
        }
    }
}

/// Runs rounds for `ANNBATCH_FUZZ_SECONDS`, or a minute. A round that panics says which it was; with that number as
/// `ANNBATCH_FUZZ_SEED` it is the first one.
pub(crate) fn run(mut round: impl FnMut(&mut Random)) {
    let until = Instant::now() + Duration::from_secs(number("ANNBATCH_FUZZ_SECONDS").unwrap_or(60));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let mut running = Running(number("ANNBATCH_FUZZ_SEED").unwrap_or(now));
    while Instant::now() < until {
        round(&mut Random::new(running.0));
        running.0 = running.0.wrapping_add(1);
    }
}

/// The round that is under way.
struct Running(u64);

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("again: ANNBATCH_FUZZ_SEED={}", self.0);
        }
    }
}
