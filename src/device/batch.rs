//! One batch on its way to the consumer's tensors.

use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::driver::{DevicePtr, Grid, Stream};
use super::kernels::{RowForm, RowKernel, Variant};
use super::loaded::LoadedKernels;
use super::staging::{Staging, StagingBlock};
use super::{Entered, Event};
use crate::base::error::{Error, Result};
use crate::base::nvtx;
use crate::batch::{BatchElement, HostBatch, Tensor};
use crate::schema::DType;

/// One tensor that the consumer is to make, and what becomes its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Element type.
    pub dtype: DType,
    /// Elements per dimension.
    pub shape: Vec<u64>,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Zeros,
    /// Staged elements, widened where they are of another type.
    Copy(TensorPiece),
    /// What the kernel of this element's rows makes of them.
    Rows {
        element: usize,
        rows: u64,
        indptr: Option<TensorPiece>,
        indices: Option<TensorPiece>,
        values: TensorPiece,
    },
}

/// Elements of one tensor in a staging block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TensorPiece {
    /// Byte of the block where they begin.
    at: u64,
    dtype: DType,
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
    /// Whether a consumer has had it, and put it back if it has it no more.
    taken: bool,
    staging: Arc<Staging>,
    /// Behind `staging`: see [`LoadedKernels`]'s drop.
    kernels: Option<Arc<LoadedKernels>>,
}

/// Where a batch lies, and when it is there.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) block: StagingBlock,
    pub(super) copy_done: Arc<Event>,
}

impl Output {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        self.len() * self.dtype.size() as u64
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
        kernels: Option<Arc<LoadedKernels>>,
    ) -> Self {
        Self { number, rows, outputs, staged: Some(staged), placed: false, taken: false, staging, kernels }
    }

    /// The batch of no rows that stands for the end of an epoch, shaped as `host` is.
    pub(super) fn end(host: &HostBatch, staging: Arc<Staging>, kernels: Option<Arc<LoadedKernels>>) -> Self {
        // of a batch without rows only the row pointers have a byte, and that is zero
        let output = |t: &Tensor| Output { dtype: t.delivered, shape: t.shape.clone(), content: Content::Zeros };
        let of = |element| tensors(element).into_iter().map(output);
        let outputs = std::iter::once(output(&host.rows)).chain(host.elements.iter().flat_map(of)).collect();
        Self { number: u64::MAX, rows: Vec::new(), outputs, staged: None, placed: false, taken: false, staging, kernels }
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

    /// Whether no consumer had the batch before; says that one has it now.
    pub(crate) fn is_taken_first(&mut self) -> bool {
        !std::mem::replace(&mut self.taken, true)
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
        let _range = nvtx::range(c"annbatch: place");
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
            let at = |piece: &TensorPiece| self.staged.as_ref().map_or(0, |staged| staged.block.ptr().offset(piece.at).0);
            // SAFETY: of all of them: the caller's promise about the target; the block holds the batch, is not filled again
            // before `stream` has passed `reuse_ready`, and is there once `stream` has passed `copy_done`. Kernels write as
            // many elements as the output has.
            let called = unsafe {
                match &output.content {
                    Content::Zeros => entered.driver().zero(to, bytes, stream),
                    Content::Copy(piece) if piece.dtype == output.dtype => {
                        entered.driver().d2d(to, DevicePtr(at(piece)), bytes, stream)
                    }
                    Content::Copy(piece) => {
                        let kernel = self.kernels()?.widening(piece.dtype, output.dtype)?;
                        let parameters = [at(piece), address, output.len()];
                        entered.driver().launch(kernel, grid_for(output.len().div_ceil(4)), &parameters, stream)
                    }
                    Content::Rows { element, rows, indptr, indices, values } => {
                        let loaded = self.kernels()?.rows(*element).ok_or_else(no_kernels)?;
                        let any = |piece: &Option<TensorPiece>| piece.map_or(DType::Int32, |piece| piece.dtype);
                        let reads_columns = loaded.kernel.reads_columns();
                        let index = if reads_columns { any(indices) } else { any(indptr) };
                        let variant = Variant { values: values.dtype, indices: index, indptr: any(indptr) };
                        let mut parameters: SmallVec<[u64; 8]> = indptr.iter().map(at).collect();
                        parameters.extend(indices.iter().filter(|_| reads_columns).map(at));
                        parameters.extend([at(values), address, *rows]);
                        let widths = [loaded.kernel.n_in(), loaded.kernel.transform().n_out() as u64];
                        match loaded.kernel.form() {
                            RowForm::CsrValues => {}
                            RowForm::CsrToDense => parameters.push(widths[1]),
                            RowForm::Dense => parameters.extend(widths),
                        }
                        parameters.extend(loaded.maps());
                        // a warp each
                        let grid = grid_for(rows.saturating_mul(32));
                        entered.driver().launch(loaded.function(variant)?, grid, &parameters, stream)
                    }
                }
            };
            entered.check("cannot copy a batch into tensors", called)?;
        }
        Ok(())
    }

    fn kernels(&self) -> Result<&LoadedKernels> {
        self.kernels.as_deref().ok_or_else(no_kernels)
    }
}

impl Drop for DeviceBatch {
    fn drop(&mut self) {
        if let Some(staged) = self.staged.take() {
            self.staging.give_back(staged.block);
        }
    }
}

fn no_kernels() -> Error {
    Error::Internal { message: "a batch for kernels that are not loaded".into() }
}

/// Blocks for so many threads, or enough to keep a GPU busy.
fn grid_for(n_threads: u64) -> Grid {
    let threads = 256;
    Grid { blocks: n_threads.div_ceil(u64::from(threads)).clamp(1, 2048) as u32, threads }
}

/// How a batch lies in a staging block, and what is made of it.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    /// Each tensor, and the byte where it goes.
    pub(super) pieces: Vec<(&'a Tensor, u64)>,
    /// What is delivered, in order.
    pub(super) outputs: Vec<Output>,
    /// Of the block.
    pub(super) bytes: u64,
}

/// Tensors begin at multiples of this, as in memory of their own.
const ALIGN: u64 = 256;

impl<'a> Layout<'a> {
    pub(super) fn of(host: &'a HostBatch, kernels: Option<&LoadedKernels>) -> Self {
        let mut layout = Self { pieces: Vec::new(), outputs: Vec::new(), bytes: 0 };
        layout.copy(&host.rows);
        for (number, element) in host.elements.iter().enumerate() {
            match kernels.and_then(|kernels| kernels.rows(number)) {
                Some(rows) => layout.rows(number, element, &rows.kernel, host.n_rows()),
                None => tensors(element).into_iter().for_each(|tensor| layout.copy(tensor)),
            }
        }
        layout
    }

    fn piece(&mut self, tensor: &'a Tensor) -> TensorPiece {
        let piece = TensorPiece { at: self.bytes, dtype: tensor.dtype };
        self.pieces.push((tensor, self.bytes));
        self.bytes += staged_bytes(tensor).next_multiple_of(ALIGN);
        piece
    }

    fn copy(&mut self, tensor: &'a Tensor) {
        let content = Content::Copy(self.piece(tensor));
        self.outputs.push(Output { dtype: tensor.delivered, shape: tensor.shape.clone(), content });
    }

    /// An element whose rows a kernel transforms.
    fn rows(&mut self, number: usize, element: &'a BatchElement, kernel: &RowKernel, n_rows: u64) {
        let spreads = kernel.form() == RowForm::CsrToDense;
        let (indptr, indices, values) = match element {
            BatchElement::Csr { indptr, indices, data } if spreads => (Some(self.piece(indptr)), Some(self.piece(indices)), data),
            BatchElement::Csr { indptr, indices, data } => {
                self.copy(indptr);
                self.copy(indices);
                let [.., Output { content: Content::Copy(pointers), .. }, Output { content: Content::Copy(columns), .. }] =
                    self.outputs[..]
                else {
                    return;
                };
                (Some(pointers), Some(columns), data)
            }
            BatchElement::Dense(values) => (None, None, values),
        };
        let shape = match kernel.form() {
            RowForm::CsrValues => values.shape.clone(),
            RowForm::CsrToDense | RowForm::Dense => vec![n_rows, kernel.transform().n_out() as u64],
        };
        let values = self.piece(values);
        let content = Content::Rows { element: number, rows: n_rows, indptr, indices, values };
        self.outputs.push(Output { dtype: kernel.transform().dtype(), shape, content });
    }
}

/// Bytes of a tensor in a staging block.
pub(super) fn staged_bytes(tensor: &Tensor) -> u64 {
    tensor.shape.iter().product::<u64>() * tensor.dtype.size() as u64
}

/// The tensors of an element, in the order of delivery.
fn tensors(element: &BatchElement) -> SmallVec<[&Tensor; 3]> {
    match element {
        BatchElement::Csr { indptr, indices, data } => smallvec![indptr, indices, data],
        BatchElement::Dense(tensor) => smallvec![tensor],
    }
}
