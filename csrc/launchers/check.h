// Checks of the operators' arguments. A message starts with the operator's name, then the rule,
// what came, and what to do.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace liar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Throws std::runtime_error with the parts of the message joined, unless `ok`.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

/// The shape as Python prints it: (4, 512, 1536).
inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

/// Whether the columns of a matrix (or the entries of a vector) are next to each other.
inline bool columns_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

}  // namespace liar
