// Kernels read every pointer as one of the host's.
#pragma once

#include "../check.h"

namespace liar {

inline void check_cpu(const char* op, const char* name, const std::optional<Tensor>& tensor,
                      const char* first) {
  check(!tensor.has_value() || tensor->is_cpu(), op, name, " must be on the CPU, as ", first,
        " is; move it with .to(\"cpu\")");
}

}  // namespace liar
