//! What a sampler is: one epoch, window by window.

use crate::base::error::Result;

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
