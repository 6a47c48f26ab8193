//! Which rows, in which order.
//!
//! A [`Sampling`] is parameters; an [`Order`] is one epoch of it over `n_obs` rows and gives preload windows by number.
//! Native order is a pure function of (epoch seed, n_obs, parameters): window `w` can be made without the ones before it, so
//! seeking costs no I/O, and DataLoader workers that share an epoch seed take disjoint windows. Nothing is held per row or per
//! chunk: the order of the chunks is computed place by place.
//!
//! A new sampler is a variant of [`Sampling`], a file here that implements [`Order`], and an arm of [`Sampling::order`].

mod chunks;

use chunks::ChunkOrder;

use crate::base::error::{Error, Result};
use crate::config::Sampling;

/// The rows of one preload window and how they are split into batches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadRequest {
    /// Global rows, in the order requested.
    pub rows: Vec<u64>,
    /// Positions in `rows`, batch after batch.
    pub positions: Vec<u32>,
    /// Length of each batch's part of `positions`.
    pub sizes: Vec<u32>,
}

/// One epoch: a pure function from the numbers of windows to their rows.
///
/// Windows hold whole batches, and all but the last as many, so that the window of a batch is known without the ones before it.
pub trait Order: Send + Sync + std::fmt::Debug {
    /// Number of windows.
    fn n_windows(&self) -> u64;

    /// Batches of every window but the last; at least 1.
    fn batches_per_window(&self) -> u64;

    /// Batches of all windows.
    fn n_batches(&self) -> u64;

    /// Window number `number` of [`n_windows`](Order::n_windows).
    ///
    /// # Errors
    /// When memory does not hold its row numbers.
    fn window(&self, number: u64) -> Result<LoadRequest>;

    /// The window that begins with batch number `batch` or holds it, and how many batches of the window come before it.
    fn locate(&self, batch: u64) -> (u64, u64) {
        (batch / self.batches_per_window(), batch % self.batches_per_window())
    }
}

impl Sampling {
    /// Batches of an epoch over `n_obs` rows, or `None` for submitted requests; checks every parameter.
    pub fn n_batches(&self, n_obs: u64) -> Result<Option<u64>> {
        Ok(self.order(n_obs, 0)?.map(|order| order.n_batches()))
    }

    /// One epoch over `n_obs` rows, or `None` for submitted requests.
    pub fn order(&self, n_obs: u64, epoch_seed: u64) -> Result<Option<Box<dyn Order>>> {
        let chunks = |parameters, shuffle| ChunkOrder::new(parameters, shuffle, n_obs, epoch_seed);
        let order = match self {
            Self::Submitted {} => return Ok(None),
            Self::Sequential(parameters) if parameters.replacement => {
                return Err(Error::config(
                    "sampling.replacement",
                    "is true; sequential sampling visits rows in order, use kind \"random\"",
                ));
            }
            Self::Sequential(parameters) => chunks(parameters, false)?,
            Self::Random(parameters) => chunks(parameters, true)?,
        };
        Ok(Some(Box::new(order)))
    }
}
