// torch.ops.annbatch: the schemas in one block, and for each op a body that checks, converts and calls the core once.
//
// Fakes, the ordered effect of `load` and tags are registered by python/annbatch/_core/fakes.py; the meaning of config
// and of every answer is the core's (src/ffi.rs). Written against libtorch's stable ABI: one binary serves torch 2.11
// and later.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "annbatch/src/ffi.rs.h"
#include "device.h"
#include "error.h"
#include "interrupt.h"
#include "state.h"
#include "tensor.h"

namespace annbatch {
namespace {

// How long a wait may keep a signal from its handler.
constexpr std::int64_t wait_slice_ms = 50;

rust::Str borrow(const std::string& text) { return {text.data(), text.size()}; }

Tensor open(std::string config, std::vector<Tensor> buffers) {
  return guarded([&] {
    rust::Vec<core::BufferView> views;
    views.reserve(buffers.size());
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      views.push_back(view_of(buffers[i], "buffers[" + std::to_string(i) + "]"));
    }
    return make_state(core::open(borrow(config), views), std::move(buffers));
  });
}

Tensor stream(Tensor state, std::string config) {
  return guarded([&] {
    const StateRef parent = state_of(state);
    return make_state(core::stream(parent.id, parent.address, borrow(config)), {state});
  });
}

// A batch must not be taken only to find that it cannot be copied to where it was asked for.
void require_usable(const Device& device) {
  const std::int64_t none = 0;
  try {
    torch::stable::empty({&none, 1}, ScalarType::Long, std::nullopt, device);
  } catch (const std::exception&) {
    fail(kind::invalid_argument, "this torch cannot allocate on the device asked for");
  }
}

// Copies a batch to `device`. Where that fails (no memory there), the rows must not be lost: the next load gets them.
std::vector<Tensor> moved(const StateRef& ref, std::vector<Tensor> batch, const Device& device, bool host_rows) {
  std::vector<Tensor> there;
  there.reserve(batch.size());
  try {
    for (const Tensor& host : batch) {
      there.push_back(host_rows && there.empty() ? host : torch::stable::to(host, device));
    }
  } catch (const std::exception& error) {
    undelivered().put(ref, std::move(batch));
    // the stable ABI keeps torch's reason to itself and prints it on stderr
    fail(kind::internal,
         std::string("a batch could not be copied to the device asked for (torch has printed why; is its "
                     "memory full?). The batch is kept: make room and load again. ") +
             error.what());
  }
  return there;
}

std::vector<Tensor> load(Tensor state, std::optional<Device> device, bool host_rows) {
  const ParkAtExit park;
  return guarded([&] {
    const StateRef ref = state_of(state);
    if (const std::int64_t ordinal = core::device_of(ref.id, ref.address); ordinal >= 0) {
      return load_on_device(ref, ordinal, device, host_rows, wait_slice_ms);
    }
    const bool elsewhere = device.has_value() && !device->is_cpu();
    if (elsewhere) {
      require_usable(*device);
    }
    std::vector<Tensor> batch = undelivered().take(ref);
    if (batch.empty()) {
      rust::Box<core::Delivered> delivered = core::load(ref.id, ref.address, wait_slice_ms);
      while (delivered->is_pending()) {
        throw_if_interrupted();
        delivered = core::load(ref.id, ref.address, wait_slice_ms);
      }
      const std::size_t count = delivered->n_tensors();
      batch.reserve(count);
      for (std::size_t i = 0; i < count; ++i) {
        batch.push_back(lend(delivered->take(i)));
      }
    }
    return elsewhere ? moved(ref, std::move(batch), *device, host_rows) : batch;
  });
}

void start(Tensor state, std::int64_t epoch_seed, std::int64_t first_batch) {
  guarded([&] {
    const StateRef ref = state_of(state);
    core::start(ref.id, ref.address, epoch_seed, first_batch);
    undelivered().forget(ref.id);
  });
}

void submit(Tensor state, Tensor rows, Tensor positions, Tensor sizes) {
  guarded([&] {
    const StateRef ref = state_of(state);
    core::submit(ref.id, ref.address, int64_slice(rows, "rows"), int64_slice(positions, "positions"),
                 int64_slice(sizes, "sizes"));
  });
}

void finish(Tensor state) {
  guarded([&] {
    const StateRef ref = state_of(state);
    core::finish(ref.id, ref.address);
  });
}

bool ready(Tensor state, std::int64_t timeout_ms) {
  const ParkAtExit park;
  return guarded([&] {
    const StateRef ref = state_of(state);
    if (timeout_ms < 0) {
      fail(kind::invalid_argument, "timeout_ms must not be negative, got " + std::to_string(timeout_ms));
    }
    if (undelivered().has(ref)) {
      return true;
    }
    for (std::int64_t left = timeout_ms;; left -= wait_slice_ms) {
      const std::int64_t slice = std::min(left, wait_slice_ms);
      if (core::ready(ref.id, ref.address, slice)) {
        return true;
      }
      if (left <= wait_slice_ms) {
        return false;
      }
      throw_if_interrupted();
    }
  });
}

std::string describe(Tensor state) {
  return guarded([&] {
    const StateRef ref = state_of(state);
    return std::string(core::describe(ref.id, ref.address));
  });
}

std::string stats(Tensor state) {
  return guarded([&] {
    const StateRef ref = state_of(state);
    return std::string(core::stats(ref.id, ref.address));
  });
}

std::string locate(Tensor state, Tensor rows) {
  return guarded([&] {
    const StateRef ref = state_of(state);
    return std::string(core::locate(ref.id, ref.address, int64_slice(rows, "rows")));
  });
}

Tensor texts(std::string file, std::string path) {
  return guarded([&] {
    const rust::Vec<std::uint8_t> bytes = core::texts(borrow(file), borrow(path));
    const auto size = static_cast<std::int64_t>(bytes.size());
    Tensor out = torch::stable::empty({&size, 1}, ScalarType::Byte);
    std::copy(bytes.begin(), bytes.end(), static_cast<std::uint8_t*>(out.mutable_data_ptr()));
    return out;
  });
}

std::string layout(std::int64_t number) {
  return guarded([&] { return std::string(core::layout_json(number)); });
}

void close(Tensor state) {
  guarded([&] {
    const StateRef ref = state_of(state);
    core::close(ref.id, ref.address);
    undelivered().forget(ref.id);
  });
}

void close_all(bool at_exit) {
  guarded([&] {
    if (at_exit) {
      announce_exit();
    }
    core::close_all();
  });
}

std::string version() {
  return guarded([] { return std::string(core::version()); });
}

}  // namespace

STABLE_TORCH_LIBRARY(annbatch, m) {
  core::watch_forks();
  // Strings are arguments of ops that open only: torch 2.11's stable headers leak a copy of each string passed in.
  m.def("open(str config, Tensor[] buffers) -> Tensor");
  m.def("stream(Tensor state, str config) -> Tensor");
  m.def("load(Tensor state, *, Device? device=None, bool host_rows=False) -> Tensor[]");
  m.def("start(Tensor state, int epoch_seed, int first_batch=0) -> ()");
  m.def("submit(Tensor state, Tensor rows, Tensor positions, Tensor sizes) -> ()");
  m.def("finish(Tensor state) -> ()");
  m.def("ready(Tensor state, int timeout_ms) -> bool");
  m.def("describe(Tensor state) -> str");
  m.def("stats(Tensor state) -> str");
  m.def("locate(Tensor state, Tensor rows) -> str");
  m.def("texts(str file, str path) -> Tensor");
  m.def("layout(int number) -> str");
  m.def("close(Tensor state) -> ()");
  m.def("close_all(*, bool at_exit=False) -> ()");
  m.def("version() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(annbatch, CompositeExplicitAutograd, m) {
  m.impl("open", TORCH_BOX(&open));
  m.impl("stream", TORCH_BOX(&stream));
  m.impl("load", TORCH_BOX(&load));
  m.impl("start", TORCH_BOX(&start));
  m.impl("submit", TORCH_BOX(&submit));
  m.impl("finish", TORCH_BOX(&finish));
  m.impl("ready", TORCH_BOX(&ready));
  m.impl("describe", TORCH_BOX(&describe));
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("locate", TORCH_BOX(&locate));
  m.impl("texts", TORCH_BOX(&texts));
  m.impl("layout", TORCH_BOX(&layout));
  m.impl("close", TORCH_BOX(&close));
  m.impl("close_all", TORCH_BOX(&close_all));
  m.impl("version", TORCH_BOX(&version));
}

}  // namespace annbatch
