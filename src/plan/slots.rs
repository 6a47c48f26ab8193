//! Slots: where each row goes.

/// One delivered row: where it comes from and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowSlot {
    /// Dataset.
    pub dataset: u32,
    /// Row within the dataset.
    pub row: u64,
    /// Batch within the plan.
    pub batch: u32,
    /// Row within the batch.
    pub position: u32,
}

impl RowSlot {
    /// The slot's number of rows before it in its batch.
    pub fn position(&self) -> usize {
        self.position as usize
    }
}
