//! What was read of a batch → what is delivered of it, on the host or for a device.

pub(crate) mod narrow;
pub mod seal;
pub(crate) mod widened;
