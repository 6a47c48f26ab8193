//! What a device finishes, and how narrow the values of its batches have been.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::form::Form;
use super::narrow::{TYPES, can_be_narrow, fits_columns, narrowed};
use crate::arena::Pool;
use crate::base::error::Result;
use crate::batch::{HostBatch, Tensor};
use crate::collection::{Collection, Element};
use crate::schema::{DType, ElementKind};
use crate::transform::{Joined, Transform};

/// Batches of uint16 after which one is looked at anew: it may fit uint8.
const LOOK_AGAIN: u32 = 16;

/// The type that the values of an element have fitted of late. Those of the next batch are scattered as that one at once,
/// and checked on the way: copying them again once all are there takes a sixth of the time of decoding them.
#[derive(Debug, Default)]
pub(crate) struct Habit {
    /// Bytes of the type; 0 for none.
    size: AtomicUsize,
    batches: AtomicU32,
}

impl Habit {
    /// The type to scatter the next batch's values as; `None` for the one that they are staged in.
    pub(crate) fn next(&self) -> Option<DType> {
        let number = self.batches.fetch_add(1, Ordering::Relaxed);
        let size = self.size.load(Ordering::Relaxed);
        TYPES.into_iter().find(|to| to.size() == size).filter(|to| *to == TYPES[0] || !number.is_multiple_of(LOOK_AGAIN))
    }

    /// Takes in what the values of a batch became.
    pub(crate) fn learn(&self, values: &Tensor) {
        if values.lease.is_empty() {
            return;
        }
        self.size.store(if TYPES.contains(&values.dtype) { values.dtype.size() } else { 0 }, Ordering::Relaxed);
    }
}

/// What a GPU does to batches once they are there, so that it is not done before.
#[derive(Debug)]
pub struct OnDevice {
    /// Per element whether its rows are transformed there. What is not may still be widened there: column indices and
    /// values may come narrower than they are delivered.
    transforms: Vec<bool>,
    /// Per element how narrow its values were.
    habits: Vec<Habit>,
}

impl OnDevice {
    /// Transforms of these elements.
    pub fn new(transforms: Vec<bool>) -> Self {
        let habits = transforms.iter().map(|_| Habit::default()).collect();
        Self { transforms, habits }
    }

    /// How narrow the values of element number `element` were.
    pub(crate) fn habit(&self, element: usize) -> &Habit {
        &self.habits[element]
    }

    /// Whether the rows of element number `element` are transformed there.
    pub fn transforms(&self, element: usize) -> bool {
        self.transforms[element]
    }

    /// Whether column indices of element number `number` are uint16: all of them have such a number, and nobody here looks at
    /// them before they are there.
    pub(crate) fn narrows_columns(&self, number: usize, element: &Element) -> bool {
        let ElementKind::Csr { n_var } = element.kind else { return false };
        let joined = element.unfinished != Joined::default();
        let looked_at = joined || element.transform.as_ref().is_some_and(Transform::needs_columns);
        fits_columns(n_var) && (self.transforms(number) || !looked_at)
    }

    /// The type to scatter the values of the next batch of element number `number` as, where nobody here looks at them and it
    /// is not the one they are staged in. Sparse rows alone: what narrow columns save is as much as a wide copy needs
    /// beside, and few pieces make a row.
    pub(crate) fn narrow_type(&self, number: usize, element: &Element) -> Option<DType> {
        let stays = matches!(Form::of(element, self.transforms(number)), None | Some(Form::Sorted(_)));
        let may_be = stays && self.narrows_columns(number, element) && can_be_narrow(element.dtype);
        if may_be { self.habit(number).next() } else { None }
    }

    /// Whether the values of a filled batch of element number `number` are looked at for something narrower: what was computed
    /// here is hardly ever whole.
    pub(crate) fn looks_at_values(&self, number: usize, element: &Element) -> bool {
        self.transforms(number) || !element.transform.as_ref().is_some_and(Transform::computes)
    }

    /// Bytes of a narrow copy of an element's `n_values` values, where it is not narrow columns that save them.
    pub(crate) fn copied_bytes(&self, number: usize, element: &Element, n_values: usize) -> u64 {
        let is_copied = self.looks_at_values(number, element) && can_be_narrow(element.dtype);
        if is_copied && !self.narrows_columns(number, element) { Pool::batch_footprint(n_values.saturating_mul(2)) } else { 0 }
    }

    /// Values in as few bytes as hold them, for the way to the device, which widens them again.
    ///
    /// # Safety
    /// All of the batch has been written, and nobody writes to it.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) unsafe fn narrow_values(&self, batch: &mut HostBatch, collection: &Collection, pool: &Arc<Pool>) -> Result<()> {
        for (number, (element, known)) in batch.elements.iter_mut().zip(collection.elements()).enumerate() {
            if !self.looks_at_values(number, known) {
                continue;
            }
            let values = element.values_mut();
            // SAFETY: the caller's promise.
            if let Some(narrow) = unsafe { narrowed(values, pool)? } {
                *values = narrow;
            }
            self.habit(number).learn(values);
        }
        Ok(())
    }
}
