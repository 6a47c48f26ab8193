//! What every other room stands on: errors, survival of a fork, locks, the machine, counters, profiler ranges, random numbers.

pub(crate) mod error;
pub(crate) mod fork;
#[cfg(test)]
pub(crate) mod fuzz;
pub(crate) mod lock;
pub(crate) mod machine;
pub(crate) mod nvtx;
pub(crate) mod random;
pub mod stats;
