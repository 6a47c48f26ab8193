// Batches of streams to a GPU: torch allocates, the core fills, both on torch's current stream of that GPU.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annbatch/src/ffi.rs.h"
#include "error.h"
#include "interrupt.h"
#include "state.h"
#include "tensor.h"

namespace annbatch {

// The CUDA stream that torch works on now. The function is in a library that torch without CUDA lacks, and which no
// torch puts in the global scope: it is asked for by the name it was loaded under.
inline std::size_t current_cuda_stream(std::int32_t ordinal) {
  using GetStream = AOTITorchError (*)(std::int32_t, void**);
  static const auto get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get == nullptr) {
    fail(kind::invalid_argument, "this torch has no CUDA: install a build of torch with CUDA, or leave the device out");
  }
  void* stream = nullptr;
  if (get(ordinal, &stream) != AOTI_TORCH_SUCCESS) {
    fail(kind::internal, "torch has no current stream on GPU " + std::to_string(ordinal));
  }
  return reinterpret_cast<std::size_t>(stream);
}

// Refuses any place but the GPU that the stream delivers to.
inline void require_device(std::int64_t ordinal, const std::optional<Device>& device) {
  const std::string own = "cuda:" + std::to_string(ordinal);
  const std::string remedy = "; load with device=\"" + own + "\", or open another stream";
  if (!device.has_value()) {
    fail(kind::invalid_argument, "this stream delivers to " + own + ", but load was given no device" + remedy);
  }
  if (!device->is_cuda()) {
    fail(kind::invalid_argument,
         "this stream delivers to " + own + ", but load was given a device that is no CUDA one" + remedy);
  }
  // "cuda" by itself is the current one
  const std::int64_t asked =
      device->index() >= 0 ? device->index() : torch::stable::accelerator::getCurrentDeviceIndex();
  if (asked != ordinal) {
    fail(kind::invalid_argument,
         "this stream delivers to " + own + ", but load was given cuda:" + std::to_string(asked) + remedy);
  }
}

inline std::vector<Tensor> load_on_device(const StateRef& ref, std::int64_t ordinal,
                                          const std::optional<Device>& device, bool host_rows,
                                          std::int64_t wait_slice_ms) {
  require_device(ordinal, device);
  const std::size_t stream = current_cuda_stream(static_cast<std::int32_t>(ordinal));
  rust::Box<core::DeviceDelivered> delivered = core::load_on_device(ref.id, ref.address, wait_slice_ms);
  while (delivered->is_pending()) {
    throw_if_interrupted();
    delivered = core::load_on_device(ref.id, ref.address, wait_slice_ms);
  }
  // From here on an exception gives the batch back: the next load gets it.
  const Device here(DeviceType::CUDA, static_cast<torch::stable::accelerator::DeviceIndex>(ordinal));
  const std::size_t count = delivered->n_tensors();
  std::vector<Tensor> batch;
  std::vector<std::uint64_t> addresses;
  batch.reserve(count);
  addresses.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (i == 0 && host_rows) {
      const rust::Slice<const std::int64_t> rows = delivered->rows();
      const std::int64_t n = static_cast<std::int64_t>(rows.size());
      batch.push_back(torch::stable::empty({&n, 1}, ScalarType::Long, std::nullopt, Device(DeviceType::CPU)));
      std::copy(rows.begin(), rows.end(), static_cast<std::int64_t*>(batch.back().mutable_data_ptr()));
      addresses.push_back(0);  // not wanted there
      continue;
    }
    const rust::Vec<std::int64_t> shape = delivered->shape(i);
    const ScalarType dtype = to_torch(delivered->dtype(i));
    try {
      batch.push_back(torch::stable::empty({shape.data(), shape.size()}, dtype, std::nullopt, here));
    } catch (const std::exception& error) {
      // the stable ABI keeps torch's reason to itself and prints it on stderr
      fail(kind::internal, std::string("a batch found no memory on the GPU (torch has printed why). The batch is kept: "
                                       "make room and load again. ") +
                               error.what());
    }
    addresses.push_back(reinterpret_cast<std::uint64_t>(batch.back().mutable_data_ptr()));
  }
  delivered->place({addresses.data(), addresses.size()}, stream);
  return batch;
}

}  // namespace annbatch
