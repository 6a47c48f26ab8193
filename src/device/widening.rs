//! The loaded kernels that widen column indices on the GPU.
//!
//! Column indices are most of what goes over the bus besides the values; where no column has a number above 65,535 they
//! travel as uint16 and are widened as they are copied into the consumer's tensors.

use std::sync::Arc;

use super::Device;
use super::driver::{Function, Module};
use super::kernels::{Number, widen_name, widen_source};
use super::nvrtc::Nvrtc;
use crate::dtype::DType;
use crate::error::Result;

/// uint16 to int32 and to int64, loaded into one device.
#[derive(Debug)]
pub struct Widening {
    device: Arc<Device>,
    module: Module,
    to_int32: Function,
    to_int64: Function,
}

impl Widening {
    /// Compiles the kernels, if this process has not yet, and loads them.
    pub fn new(device: &Arc<Device>, nvrtc: Option<&str>) -> Result<Arc<Self>> {
        let pairs = [DType::Int32, DType::Int64].map(|delivered| (Number::Of(DType::UInt16), Number::Of(delivered)));
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
        let function = |delivered| {
            let name = widen_name(Number::Of(DType::UInt16), Number::Of(delivered));
            // SAFETY: the module was just loaded.
            entered.check("lacks a kernel", unsafe { entered.driver().function(module, &name) })
        };
        match (function(DType::Int32), function(DType::Int64)) {
            (Ok(to_int32), Ok(to_int64)) => Ok(Arc::new(Self { device: Arc::clone(device), module, to_int32, to_int64 })),
            (Err(error), _) | (_, Err(error)) => {
                // SAFETY: no kernel of the module runs.
                let _ = unsafe { entered.driver().module_unload(module) };
                Err(error)
            }
        }
    }

    /// The kernel that delivers indices of this type.
    pub(super) fn of(&self, delivered: DType) -> Option<Function> {
        match delivered {
            DType::Int32 => Some(self.to_int32),
            DType::Int64 => Some(self.to_int64),
            _ => None,
        }
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
