//! Which rows, in which order.
//!
//! A [`Sampling`] is parameters; an [`Order`] is one epoch of it over `n_obs` rows and gives preload windows by number.
//! Native order is a pure function of (epoch seed, n_obs, parameters): window `w` can be made without the ones before it, so
//! seeking costs no I/O, and DataLoader workers that share an epoch seed take disjoint windows. Nothing is held per row or per
//! chunk: the order of the chunks is computed place by place.
//!
//! A new sampler is a variant of [`Sampling`], a file here that implements [`Order`], and an arm of [`Sampling::order`].

mod chunks;
mod order;

use chunks::ChunkOrder;
pub use order::{LoadRequest, Order};

use crate::base::error::{Error, Result};
use crate::config::Sampling;

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
