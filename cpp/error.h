// Errors leave an op in one shape: std::runtime_error whose text starts "[annbatch:Kind] ". Any other exception type
// reaches Python as ValueError on some torch releases and as RuntimeError on others.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace annbatch {

// The kinds raised on this side of the bridge; python/annbatch/_core/errors.py maps each to a Python class.
namespace kind {
inline constexpr std::string_view invalid_argument = "InvalidArgument";
inline constexpr std::string_view interrupted = "Interrupted";
inline constexpr std::string_view internal = "Internal";
}  // namespace kind

inline constexpr std::string_view error_prefix = "[annbatch:";

[[noreturn]] inline void fail(std::string_view error_kind, std::string_view message) {
  std::string text(error_prefix);
  text.append(error_kind).append("] ").append(message);
  throw std::runtime_error(text);
}

// Runs the body of an op. Errors of the core (rust::Error) keep their text; those of libtorch or the standard library
// carry no kind and become Internal.
template <class Body>
decltype(auto) guarded(Body&& body) {
  std::string text;
  try {
    return std::forward<Body>(body)();
  } catch (const std::exception& error) {
    text = error.what();
  } catch (...) {
    text = "an exception of unknown type";
  }
  if (std::string_view(text).starts_with(error_prefix)) {
    throw std::runtime_error(text);
  }
  fail(kind::internal, text);
}

}  // namespace annbatch
