//! What was read of a batch → what is delivered of it.
//!
//! ```text
//! layout ─allocate─▶ HostBatch ─(chunks are scattered)─▶ filled ─widen─▶ ─seal─▶ ─narrow─▶ delivered, or on its way to a device
//! ```
//!
//! `form` decides what is done to each element on the host, `on_device` what is left to a device. Values that are
//! scattered in a narrow type and do not fit it wait in `widened`. [`Seal`] transforms, sorts and drops entries, row by row.
//! `narrow` makes values small for the way over a bus.

mod allocate;
mod form;
pub(crate) mod narrow;
mod on_device;
mod seal;
pub(crate) mod widened;

pub(crate) use allocate::allocate;
pub(crate) use form::bytes_to_finish;
pub use on_device::OnDevice;
pub(crate) use seal::{ROWS_PER_TASK, Seal};
