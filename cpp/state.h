// The state tensor: what keys an op call to what the core holds open.
//
// It is an int64 CPU tensor [id, 0, 0, …] whose LENGTH numbers the layout of the batches, so that compiled code is
// reused for states of one layout and for no other. The id is checked in the core's table together with the address
// of the data, hence a copy (clone, pickle, fork) names nothing. No pointer is ever read out of the tensor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "annbatch/src/ffi.rs.h"
#include "error.h"
#include "tensor.h"

namespace annbatch {

struct StateRef {
  std::int64_t id;
  std::size_t address;
};

inline StateRef state_of(const Tensor& state) {
  require_int64_vector(state, "state");
  if (state.numel() < 2) {
    fail(kind::invalid_argument, "state is no tensor that torch.ops.annbatch.open returned");
  }
  const auto* const words = static_cast<const std::int64_t*>(state.const_data_ptr());
  return {words[0], reinterpret_cast<std::size_t>(words)};
}

// Batches that were taken from the core and could not be copied to where they were asked for, by state. Given out again
// before the core is asked for the next one; forgotten when an epoch starts and when the state dies.
class Undelivered {
 public:
  void put(const StateRef& ref, std::vector<Tensor> batch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    batches_[ref.id].push_front(std::move(batch));
    count_.store(batches_.size(), std::memory_order_release);
  }

  // Empty when there is none, which is nearly always: then no lock is taken.
  std::vector<Tensor> take(const StateRef& ref) {
    if (count_.load(std::memory_order_acquire) == 0) {
      return {};
    }
    // closed, cloned and inherited states raise here
    core::check(ref.id, ref.address);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = batches_.find(ref.id);
    if (found == batches_.end()) {
      return {};
    }
    std::vector<Tensor> batch = std::move(found->second.front());
    found->second.pop_front();
    if (found->second.empty()) {
      batches_.erase(found);
    }
    count_.store(batches_.size(), std::memory_order_release);
    return batch;
  }

  bool has(const StateRef& ref) {
    if (count_.load(std::memory_order_acquire) == 0) {
      return false;
    }
    core::check(ref.id, ref.address);
    const std::lock_guard<std::mutex> lock(mutex_);
    return batches_.count(ref.id) != 0;
  }

  void forget(std::int64_t id) {
    if (count_.load(std::memory_order_acquire) == 0) {
      return;
    }
    std::deque<std::vector<Tensor>> dropped;  // after the lock is released: deleters run then
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = batches_.find(id);
    if (found != batches_.end()) {
      dropped = std::move(found->second);
      batches_.erase(found);
    }
    count_.store(batches_.size(), std::memory_order_release);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::int64_t, std::deque<std::vector<Tensor>>> batches_;
  std::atomic<std::size_t> count_{0};
};

// Never destroyed: tensors must not be freed by the exit handlers of a library, after torch's.
inline Undelivered& undelivered() {
  static auto* const only = new Undelivered;
  return *only;
}

namespace detail {

// Inductor copies inputs that are not aligned to 16 bytes, and a copied state is refused; 64 is what torch's own
// allocator gives.
inline constexpr std::align_val_t state_alignment{64};

struct AlignedDelete {
  void operator()(std::int64_t* words) const { ::operator delete[](words, state_alignment); }
};

// Lives as long as the state tensor. `kept` are tensors whose memory the core reads in place, and the parent of a
// `stream`: they are released only after abandon() has returned, when no thread of the core reads them any more.
class StateBlob {
 public:
  StateBlob(std::int64_t id, std::vector<Tensor> kept) : id_(id), kept_(std::move(kept)) {}
  StateBlob(const StateBlob&) = delete;
  StateBlob& operator=(const StateBlob&) = delete;
  ~StateBlob() {
    undelivered().forget(id_);
    core::abandon(id_);
  }

  std::int64_t* allocate(std::int64_t length) {
    const auto count = static_cast<std::size_t>(length);
    words_.reset(static_cast<std::int64_t*>(::operator new[](count * sizeof(std::int64_t), state_alignment)));
    std::fill_n(words_.get(), count, 0);
    words_[0] = id_;
    return words_.get();
  }

 private:
  std::int64_t id_;
  std::vector<Tensor> kept_;
  std::unique_ptr<std::int64_t[], AlignedDelete> words_;
};

}  // namespace detail

// Wraps an id that open() or stream() has just given; on any failure the id is abandoned.
inline Tensor make_state(std::int64_t id, std::vector<Tensor> kept) {
  auto blob = std::make_unique<detail::StateBlob>(id, std::move(kept));
  const std::int64_t length = core::layout_number(id);
  std::int64_t* const words = blob->allocate(length);
  core::bind(id, reinterpret_cast<std::size_t>(words));
  const std::int64_t stride = 1;
  detail::StateBlob* const raw = blob.get();
  Tensor state = torch::stable::from_blob(words, {&length, 1}, {&stride, 1}, Device(DeviceType::CPU), ScalarType::Long,
                                          [raw](void*) { delete raw; });
  blob.release();
  return state;
}

}  // namespace annbatch
