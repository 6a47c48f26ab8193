// Tensors in: checked, and described to the core as addresses. Tensors out: leases of the core as zero-copy tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "annbatch/src/ffi.rs.h"
#include "error.h"

namespace annbatch {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

inline ScalarType to_torch(core::DType dtype) {
  switch (dtype) {
    case core::DType::Bool: return ScalarType::Bool;
    case core::DType::Int8: return ScalarType::Char;
    case core::DType::Int16: return ScalarType::Short;
    case core::DType::Int32: return ScalarType::Int;
    case core::DType::Int64: return ScalarType::Long;
    case core::DType::UInt8: return ScalarType::Byte;
    case core::DType::UInt16: return ScalarType::UInt16;
    case core::DType::UInt32: return ScalarType::UInt32;
    case core::DType::UInt64: return ScalarType::UInt64;
    case core::DType::Float16: return ScalarType::Half;
    case core::DType::Float32: return ScalarType::Float;
    case core::DType::Float64: return ScalarType::Double;
    case core::DType::BFloat16: return ScalarType::BFloat16;
  }
  fail(kind::internal, "the core delivered a dtype unknown to the op library");
}

inline core::DType to_core(ScalarType dtype, const std::string& argument) {
  switch (dtype) {
    case ScalarType::Bool: return core::DType::Bool;
    case ScalarType::Char: return core::DType::Int8;
    case ScalarType::Short: return core::DType::Int16;
    case ScalarType::Int: return core::DType::Int32;
    case ScalarType::Long: return core::DType::Int64;
    case ScalarType::Byte: return core::DType::UInt8;
    case ScalarType::UInt16: return core::DType::UInt16;
    case ScalarType::UInt32: return core::DType::UInt32;
    case ScalarType::UInt64: return core::DType::UInt64;
    case ScalarType::Half: return core::DType::Float16;
    case ScalarType::Float: return core::DType::Float32;
    case ScalarType::Double: return core::DType::Float64;
    default: break;
  }
  fail(kind::invalid_argument, argument + " has a dtype that is neither bool, (unsigned) integer nor float16/32/64");
}

inline void require_lendable(const Tensor& tensor, const std::string& argument) {
  if (!tensor.defined()) {
    fail(kind::invalid_argument, argument + " is undefined");
  }
  // Asked before anything else: sparse tensors have no data pointer, and is_contiguous() fails on them.
  if (tensor.layout() != torch::headeronly::Layout::Strided) {
    fail(kind::invalid_argument, argument + " must be a dense (strided) tensor");
  }
  if (!tensor.is_cpu()) {
    fail(kind::invalid_argument, argument + " must be a CPU tensor: call .cpu()");
  }
  if (!tensor.is_contiguous()) {
    fail(kind::invalid_argument, argument + " must be contiguous: call .contiguous()");
  }
}

inline void require_int64_vector(const Tensor& tensor, const std::string& argument) {
  require_lendable(tensor, argument);
  if (tensor.scalar_type() != ScalarType::Long) {
    fail(kind::invalid_argument, argument + " must have dtype int64");
  }
  if (tensor.dim() != 1) {
    fail(kind::invalid_argument, argument + " must have one dimension, not " + std::to_string(tensor.dim()));
  }
}

inline rust::Slice<const std::int64_t> int64_slice(const Tensor& tensor, const std::string& argument) {
  require_int64_vector(tensor, argument);
  return {static_cast<const std::int64_t*>(tensor.const_data_ptr()), static_cast<std::size_t>(tensor.numel())};
}

inline core::BufferView view_of(const Tensor& tensor, const std::string& argument) {
  require_lendable(tensor, argument);
  core::BufferView view;
  view.address = reinterpret_cast<std::size_t>(tensor.const_data_ptr());
  view.dtype = to_core(tensor.scalar_type(), argument);
  for (const std::int64_t size : tensor.sizes()) {
    view.shape.push_back(size);
  }
  return view;
}

// The tensor owns the lease: its deleter runs when the last view dies, on whichever thread that is, and hands the
// buffer back to its pool.
inline Tensor lend(rust::Box<core::Lease> lease) {
  const rust::Vec<std::int64_t> shape = lease->shape();
  const std::vector<std::int64_t> sizes(shape.begin(), shape.end());
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t axis = sizes.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * (sizes[axis] > 0 ? sizes[axis] : 1);
  }
  void* const data = reinterpret_cast<void*>(lease->address());
  const ScalarType dtype = to_torch(lease->dtype());
  core::Lease* const raw = lease.into_raw();
  const auto give_back = [raw](void*) { rust::Box<core::Lease>::from_raw(raw); };
  try {
    return torch::stable::from_blob(data, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                                    Device(DeviceType::CPU), dtype, give_back);
  } catch (...) {
    give_back(nullptr);
    throw;
  }
}

}  // namespace annbatch
