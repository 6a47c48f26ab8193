//! The loaded kernels that widen on the GPU what crossed the bus in fewer bytes than it is delivered in.
//!
//! Column indices travel as uint16 where no column has a number above 65,535, and values as bytes where all of a batch
//! fit ([`narrow`](crate::narrow)); both are widened as they are copied into the consumer's tensors.

use std::sync::Arc;

use super::Device;
use super::driver::{Function, Module};
use super::kernels::{widen_name, widen_source};
use super::nvrtc::Nvrtc;
use crate::dtype::DType;
use crate::error::Result;

/// Types in which something may travel, and those in which it may be delivered.
const NARROW: [DType; 2] = [DType::UInt8, DType::UInt16];
const DELIVERED: [DType; 4] = [DType::Int32, DType::Int64, DType::Float32, DType::Float64];

/// The kernels, loaded into one device.
#[derive(Debug)]
pub struct Widening {
    device: Arc<Device>,
    module: Module,
    kernels: Vec<(DType, DType, Function)>,
}

/// Every pair of types.
fn pairs() -> impl Iterator<Item = (DType, DType)> {
    NARROW.into_iter().flat_map(|narrow| DELIVERED.map(|delivered| (narrow, delivered)))
}

impl Widening {
    /// Compiles the kernels, if this process has not yet, and loads them.
    pub fn new(device: &Arc<Device>, nvrtc: Option<&str>) -> Result<Arc<Self>> {
        let pairs: Vec<_> = pairs().collect();
        let entered = device.enter()?;
        let capability = entered.driver().capability();
        let image = Nvrtc::load(device.ordinal(), nvrtc)?.compile(device.ordinal(), &widen_source(&pairs), capability)?;
        drop(entered);
        Self::load(device, &image)
    }

    /// Loads compiled kernels.
    pub(crate) fn load(device: &Arc<Device>, image: &[u8]) -> Result<Arc<Self>> {
        let entered = device.enter()?;
        let module = entered.check("cannot load kernels", entered.driver().module_load(image))?;
        let kernel = |(from, to)| {
            let name = widen_name(from, to);
            // SAFETY: the module was just loaded.
            Ok((from, to, entered.check("lacks a kernel", unsafe { entered.driver().function(module, &name) })?))
        };
        match pairs().map(kernel).collect::<Result<Vec<_>>>() {
            Ok(kernels) => Ok(Arc::new(Self { device: Arc::clone(device), module, kernels })),
            Err(error) => {
                // SAFETY: no kernel of the module runs.
                let _ = unsafe { entered.driver().module_unload(module) };
                Err(error)
            }
        }
    }

    /// The kernel that delivers one type as another.
    pub(super) fn of(&self, from: DType, to: DType) -> Option<Function> {
        self.kernels.iter().find(|(f, t, _)| (*f, *t) == (from, to)).map(|(_, _, kernel)| *kernel)
    }
}

impl Drop for Widening {
    fn drop(&mut self) {
        if self.device.is_inherited() {
            return;
        }
        if let Ok(entered) = self.device.enter() {
            // SAFETY: no kernel of the module runs. Who holds this holds the staging blocks too and lets go of them first
            // (the order of the fields of `DeviceBatch` and `Target`), and the last to let go of those waits for their
            // readers, which come behind the kernels.
            let _ = unsafe { entered.driver().module_unload(self.module) };
        }
    }
}
