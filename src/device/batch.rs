//! One batch on its way to the consumer's tensors.

use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::driver::{DevicePtr, Grid, Stream};
use super::staging::{Block, Staging};
use super::widening::Widening;
use super::{Entered, Event};
use crate::batch::{BatchElement, HostBatch, Tensor};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// One tensor that the consumer is to make, and where its content is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Element type.
    pub dtype: DType,
    /// Elements per dimension.
    pub shape: Vec<u64>,
    /// Byte of the staging block where the tensor begins; `None`: it is all zeros.
    pub(super) offset: Option<u64>,
    /// Type of the elements in the staging block.
    pub(super) staged: DType,
}

/// A batch in staging memory, copied there or being copied.
///
/// Dropped without [`place`](DeviceBatch::place), it only gives its memory back.
#[derive(Debug)]
pub struct DeviceBatch {
    number: u64,
    /// What the first tensor holds, for who needs it on the host.
    rows: Vec<i64>,
    outputs: Vec<Output>,
    /// `None`: nothing was staged, or the batch was placed.
    staged: Option<Staged>,
    placed: bool,
    staging: Arc<Staging>,
    /// Behind `staging`: see [`Widening`]'s drop.
    kernels: Option<Arc<Widening>>,
}

/// Where a batch lies, and when it is there.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) block: Block,
    pub(super) copy_done: Arc<Event>,
}

impl Output {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        self.len() * self.dtype.size() as u64
    }

    /// Bytes of the tensor in the staging block.
    pub(super) fn staged_bytes(&self) -> u64 {
        self.len() * self.staged.size() as u64
    }

    fn len(&self) -> u64 {
        self.shape.iter().product()
    }
}

impl DeviceBatch {
    pub(super) fn new(
        number: u64,
        rows: Vec<i64>,
        outputs: Vec<Output>,
        staged: Staged,
        staging: Arc<Staging>,
        kernels: Option<Arc<Widening>>,
    ) -> Self {
        Self { number, rows, outputs, staged: Some(staged), placed: false, staging, kernels }
    }

    /// The batch of no rows that stands for the end of an epoch, shaped as `host` is.
    pub(super) fn end(host: &HostBatch, staging: Arc<Staging>, kernels: Option<Arc<Widening>>) -> Self {
        // of a batch without rows only the row pointers have a byte, and that is zero
        let output = |(t, dtype): (&Tensor, DType)| Output { dtype, shape: t.shape.clone(), offset: None, staged: dtype };
        let outputs = tensors(host).map(output).collect();
        Self { number: u64::MAX, rows: Vec::new(), outputs, staged: None, placed: false, staging, kernels }
    }

    pub(super) fn staging_is_inherited(&self) -> bool {
        self.staging.device().is_inherited()
    }

    /// Its number within the epoch; `u64::MAX` for the end.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether it is the end of an epoch.
    pub fn is_end(&self) -> bool {
        self.number == u64::MAX
    }

    /// Global rows, `[n]`.
    pub fn rows(&self) -> &[i64] {
        &self.rows
    }

    /// `rows`, then each element's tensors (CSR: indptr, indices, data).
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Number of rows.
    pub fn n_rows(&self) -> u64 {
        self.outputs[0].shape[0]
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.outputs.iter().map(Output::bytes).sum()
    }

    /// Fills tensors at `addresses`, one for each output, on the consumer's stream; the calling thread does not wait. A
    /// tensor at address 0 is not wanted.
    /// After an error the batch is as it was and may be placed again, in other tensors.
    ///
    /// # Safety
    /// `stream` is a stream of this batch's device. Each address has room for its output's bytes in memory of the device
    /// that is not used otherwise before `stream` has passed this call: torch's allocator gives such on its current stream.
    pub unsafe fn place(&mut self, addresses: &[u64], stream: Stream) -> Result<()> {
        if self.placed || addresses.len() != self.outputs.len() {
            let message = format!("{} addresses for batch {} of {} tensors", addresses.len(), self.number, self.outputs.len());
            return Err(Error::Internal { message });
        }
        let device = Arc::clone(self.staging.device());
        let entered = device.enter()?;
        // SAFETY: the caller's promise.
        let issued = unsafe { self.issue(&entered, addresses, stream) };
        if let Some(staged) = &mut self.staged {
            // also after an error: what was issued before it reads the block
            match Event::record(&device, &entered, stream) {
                Ok(reuse_ready) => staged.block.add_reader(reuse_ready),
                Err(error) => {
                    staged.block.set_untold();
                    return Err(issued.err().unwrap_or(error).within(&format!("batch {}", self.number)));
                }
            }
        }
        issued.map_err(|e| e.within(&format!("batch {}", self.number)))?;
        self.placed = true;
        if let Some(staged) = self.staged.take() {
            self.staging.give_back(staged.block);
        }
        Ok(())
    }

    /// # Safety
    /// As for [`DeviceBatch::place`].
    unsafe fn issue(&self, entered: &Entered, addresses: &[u64], stream: Stream) -> Result<()> {
        if let Some(staged) = &self.staged {
            staged.copy_done.hold(entered, stream)?;
        }
        for (output, &address) in self.outputs.iter().zip(addresses) {
            let (bytes, to) = (output.bytes(), DevicePtr(address));
            if bytes == 0 || address == 0 {
                continue;
            }
            let called = match (output.offset, &self.staged) {
                (Some(offset), Some(staged)) if output.staged != output.dtype => {
                    let kernel = self.kernels.as_ref().and_then(|kernels| kernels.of(output.staged, output.dtype));
                    let kernel = kernel.ok_or_else(|| Error::Internal {
                        message: format!("no kernel copies {} as {}", output.staged, output.dtype),
                    })?;
                    let parameters = [staged.block.ptr().offset(offset).0, address, output.len()];
                    // SAFETY: as below; the kernel writes as many elements as the output has.
                    unsafe { entered.driver().launch(kernel, grid_for(output.len()), &parameters, stream) }
                }
                (Some(offset), Some(staged)) => {
                    // SAFETY: the caller's promise about the target; the block holds the batch, is not filled again before
                    // `stream` has passed `reuse_ready`, and is there once `stream` has passed `copy_done`.
                    unsafe { entered.driver().d2d(to, staged.block.ptr().offset(offset), bytes, stream) }
                }
                // SAFETY: the caller's promise.
                _ => unsafe { entered.driver().zero(to, bytes, stream) },
            };
            entered.check("cannot copy a batch into tensors", called)?;
        }
        Ok(())
    }
}

impl Drop for DeviceBatch {
    fn drop(&mut self) {
        if let Some(staged) = self.staged.take() {
            self.staging.give_back(staged.block);
        }
    }
}

/// Blocks enough to keep a GPU busy with `n` elements, four a thread.
fn grid_for(n: u64) -> Grid {
    let threads = 256;
    Grid { blocks: n.div_ceil(4 * u64::from(threads)).clamp(1, 2048) as u32, threads }
}

/// The tensors of a batch in host memory, in the order of delivery, and the types in which they are delivered.
pub(super) fn tensors(host: &HostBatch) -> impl Iterator<Item = (&Tensor, DType)> {
    fn of(element: &BatchElement) -> SmallVec<[&Tensor; 3]> {
        match element {
            BatchElement::Csr { indptr, indices, data } => smallvec![indptr, indices, data],
            BatchElement::Dense(tensor) => smallvec![tensor],
        }
    }
    std::iter::once(&host.rows).chain(host.elements.iter().flat_map(of)).map(|tensor| (tensor, tensor.delivered))
}
