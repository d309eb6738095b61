// What the operators that write into their arguments owe them: memory that is nobody else's, and a
// new version.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace liar {

/// Throws if `written` shares memory with `other`: from its first to its last element, so that rows
/// of one tensor between those of another count as shared.
inline void check_apart(const char* op, const char* name, const Tensor& written,
                        const char* other_name, const std::optional<Tensor>& other) {
  if (!other.has_value() || written.numel() == 0 || other->numel() == 0) return;
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return begin(t) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  check(end(written) <= begin(*other) || end(*other) <= begin(written), op, name,
        " must have memory of its own, but shares some with ", other_name, "; clone one of them");
}

/// Tells autograd that a tensor changes: a kernel of ours writes past torch, which counts versions
/// only of what its own operators write. Filling none of the elements is such an operator.
inline void mark_changed(const char* op, const char* name, Tensor& tensor) {
  try {
    Tensor nothing = torch::stable::narrow(tensor, 0, 0, 0);
    torch::stable::zero_(nothing);
  } catch (const std::exception&) {
    check(false, op, name, " must be a tensor that may be written in place; detach or clone one ",
          "that requires a gradient or was made in inference mode");
  }
}

}  // namespace liar
