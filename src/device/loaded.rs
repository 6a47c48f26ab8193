//! The loaded kernels that make a consumer's tensors out of what crossed the bus.
//!
//! Column indices travel as uint16 where no column has a number above 65,535, and values as bytes where all of a batch
//! fit (`finish::narrow`); both are widened as they are copied into the consumer's tensors. Where rows are
//! transformed on the device, a kernel does all of it in one pass.

use std::ptr::NonNull;
use std::sync::Arc;

use super::driver::{DevicePtr, Function, Module};
use super::kernels::{COMMON, RowKernel, Variant, widen_name, widen_source};
use super::nvrtc::Nvrtc;
use super::{Device, Entered, Event};
use crate::base::error::{Error, Result};
use crate::finish::narrow;
use crate::schema::DType;

/// Types in which something narrow may be delivered.
const DELIVERED: [DType; 4] = [DType::Int32, DType::Int64, DType::Float32, DType::Float64];

/// The kernels of one stream of batches, loaded into its device.
#[derive(Debug)]
pub struct LoadedKernels {
    device: Arc<Device>,
    module: Option<Module>,
    widening: Vec<(DType, DType, Function)>,
    /// One per element.
    rows: Vec<Option<LoadedRows>>,
}

/// The kernel that transforms one element's rows, for all types in which they may arrive.
#[derive(Debug)]
pub(super) struct LoadedRows {
    pub(super) kernel: RowKernel,
    functions: Vec<(Variant, Function)>,
    maps: Vec<DevicePtr>,
}

/// Every pair of types.
fn pairs() -> Vec<(DType, DType)> {
    narrow::TYPES.into_iter().flat_map(|narrow| DELIVERED.map(|delivered| (narrow, delivered))).collect()
}

/// The name of the kernel for an element's rows.
fn row_name(element: usize, variant: usize) -> String {
    format!("rows_{element}_{variant}")
}

/// The source of all that a stream needs whose elements' rows are transformed by `rows`.
pub(crate) fn source(rows: &[Option<RowKernel>]) -> String {
    let mut source = COMMON.to_owned() + &widen_source(&pairs());
    for (element, kernel) in rows.iter().enumerate() {
        for (number, variant) in kernel.iter().flat_map(|kernel| kernel.variants().into_iter().enumerate()) {
            source.extend(kernel.as_ref().map(|kernel| kernel.source(variant, &row_name(element, number))));
        }
    }
    source
}

impl LoadedKernels {
    /// Compiles the kernels, if this process has not yet, and loads them. `rows` has one for each element whose rows the
    /// device transforms.
    ///
    /// # Errors
    /// [`Device`](Error::Device) where there is no compiler, or the device refuses the code or the memory for column maps.
    pub fn new(device: &Arc<Device>, nvrtc: Option<&str>, rows: Vec<Option<RowKernel>>) -> Result<Arc<Self>> {
        let entered = device.enter()?;
        let capability = entered.driver().capability();
        let image = Nvrtc::load(device.ordinal(), nvrtc)?.compile(device.ordinal(), &source(&rows), capability)?;
        drop(entered);
        Self::load(device, &image, rows)
    }

    /// Loads compiled kernels.
    pub(crate) fn load(device: &Arc<Device>, image: &[u8], rows: Vec<Option<RowKernel>>) -> Result<Arc<Self>> {
        // what is loaded before an error is let go with this
        let mut loaded = Self { device: Arc::clone(device), module: None, widening: Vec::new(), rows: Vec::new() };
        let entered = device.enter()?;
        let module = entered.check("cannot load kernels", entered.driver().module_load(image))?;
        loaded.module = Some(module);
        // SAFETY: the module was just loaded.
        let function = |name: &str| entered.check("lacks a kernel", unsafe { entered.driver().function(module, name) });
        for (from, to) in pairs() {
            loaded.widening.push((from, to, function(&widen_name(from, to))?));
        }
        for (element, kernel) in rows.into_iter().enumerate() {
            let Some(kernel) = kernel else {
                loaded.rows.push(None);
                continue;
            };
            let variants = kernel.variants().into_iter().enumerate();
            let functions = variants.map(|(n, v)| Ok((v, function(&row_name(element, n))?))).collect::<Result<_>>()?;
            let maps: Vec<Vec<u32>> = kernel.maps().map(<[u32]>::to_vec).collect();
            loaded.rows.push(Some(LoadedRows { kernel, functions, maps: Vec::new() }));
            for map in maps {
                let uploaded = upload(device, &entered, &map)?;
                if let Some(Some(rows)) = loaded.rows.last_mut() {
                    rows.maps.push(uploaded);
                }
            }
        }
        drop(entered);
        Ok(Arc::new(loaded))
    }

    /// The kernel that delivers one type as another.
    pub(super) fn widening(&self, from: DType, to: DType) -> Result<Function> {
        let kernel = self.widening.iter().find(|(f, t, _)| (*f, *t) == (from, to));
        kernel.map(|(_, _, function)| *function).ok_or_else(|| missing(format!("no kernel copies {from} as {to}")))
    }

    /// Per element whether the device transforms its rows.
    pub(crate) fn transformed(&self) -> Vec<bool> {
        self.rows.iter().map(Option::is_some).collect()
    }

    /// What transforms the rows of an element, if the device does.
    pub(super) fn rows(&self, element: usize) -> Option<&LoadedRows> {
        self.rows.get(element)?.as_ref()
    }
}

impl LoadedRows {
    /// The kernel for rows that arrive so.
    pub(super) fn function(&self, variant: Variant) -> Result<Function> {
        let found = self.functions.iter().find(|(v, _)| *v == variant);
        found.map(|(_, function)| *function).ok_or_else(|| missing(format!("no kernel transforms rows of {variant:?}")))
    }

    /// Addresses of the column maps, int32, in the order of their steps.
    pub(super) fn maps(&self) -> impl Iterator<Item = u64> {
        self.maps.iter().map(|map| map.0)
    }
}

fn missing(message: String) -> Error {
    Error::Internal { message }
}

/// Device memory of its own with a copy of a column map, once it is there.
fn upload(device: &Arc<Device>, entered: &Entered, map: &[u32]) -> Result<DevicePtr> {
    let (driver, bytes) = (entered.driver(), size_of_val(map) as u64);
    let ptr = entered.check(&format!("has no {bytes} bytes for a column map"), driver.alloc(bytes))?;
    let stream = match entered.check("cannot make a stream", driver.stream_create()) {
        Ok(stream) => stream,
        Err(error) => {
            // SAFETY: nobody uses the memory yet.
            let _ = unsafe { driver.free(ptr) };
            return Err(error);
        }
    };
    let copied = || {
        let from = NonNull::from_ref(map).cast::<u8>();
        // SAFETY: the map outlives the copy, which is waited for below.
        entered.check("cannot copy a column map", unsafe { driver.h2d(ptr, from, bytes, stream) })?;
        Event::record(device, entered, stream)?.wait(entered)
    };
    let result = copied().or_else(|error| {
        // the copy may be running
        entered.check("failed", driver.finish())?;
        Err(error)
    });
    // SAFETY: what was in the stream is done, or the device is lost.
    let _ = unsafe { driver.stream_destroy(stream) };
    if let Err(error) = result {
        // SAFETY: as above.
        let _ = unsafe { driver.free(ptr) };
        return Err(error);
    }
    Ok(ptr)
}

impl Drop for LoadedKernels {
    fn drop(&mut self) {
        if self.device.is_inherited() {
            return;
        }
        if let Ok(entered) = self.device.enter() {
            let maps = self.rows.iter().flatten().flat_map(|rows| &rows.maps);
            // SAFETY: no kernel of the module runs. Who holds this holds the staging blocks too and lets go of them first
            // (the order of the fields of `DeviceBatch` and `TransferTarget`), and the last to let go of those waits for their
            // readers, which come behind the kernels.
            unsafe {
                maps.for_each(|map| {
                    let _ = entered.driver().free(*map);
                });
                if let Some(module) = self.module {
                    let _ = entered.driver().module_unload(module);
                }
            }
        }
    }
}
