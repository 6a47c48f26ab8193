//! Values that did not fit the narrow type in which their batch is scattered, and the others beside them once all are there.

use std::ops::Range;

use crate::arena::Lease;
use crate::base::error::{Error, Result};
use crate::batch::HostBatch;
use crate::decode::scatter::{Stored, copy_values, publish};
use crate::schema::DType;

/// Values of an element of one batch in the type that they are staged in.
#[derive(Debug)]
pub(crate) struct Widened {
    element: usize,
    values: Lease,
    /// Which of them are here; the others lie where they were to be.
    here: Vec<Range<usize>>,
}

impl Widened {
    /// Room for all values of element number `element`.
    pub(crate) fn new(element: usize, values: Lease) -> Self {
        Self { element, values, here: Vec::new() }
    }

    /// The number of the element.
    pub(crate) fn element(&self) -> usize {
        self.element
    }

    /// Where the values begin, of which the caller is about to write `some`.
    pub(crate) fn add(&mut self, some: Range<usize>) -> Result<*mut u8> {
        let out_of_memory = |_| Error::Internal { message: "no memory to list values that do not fit".into() };
        self.here.try_reserve(1).map_err(out_of_memory)?;
        self.here.push(some);
        Ok(self.values.base())
    }

    /// Puts these in the place of the narrow values of `filled`, of which every one was written there or here.
    pub(crate) fn complete(mut self, filled: &mut HostBatch, staged: DType) -> Result<()> {
        let narrow = filled.elements[self.element].values_mut();
        let no_copy = || Error::Internal { message: format!("no copy from {} to {staged}", narrow.dtype) };
        let copy = copy_values(narrow.dtype, staged).ok_or_else(no_copy)?;
        let size = narrow.dtype.size();
        let n = narrow.lease.len() / size;
        self.here.sort_unstable_by_key(|range| range.start);
        // SAFETY: all of the batch's tasks are done.
        let bytes = unsafe { narrow.lease.as_slice() };
        let mut done = 0;
        for range in self.here.into_iter().chain(std::iter::once(n..n)) {
            let from = Stored::Items(&bytes[done * size..range.start * size]);
            // SAFETY: both leases have `n` elements.
            unsafe { copy.run(from, self.values.base().add(done * staged.size()), range.start - done) };
            done = range.end;
        }
        publish();
        (narrow.lease, narrow.dtype) = (self.values, staged);
        Ok(())
    }
}
