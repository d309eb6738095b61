// Torch's own thread pool and thread count as the kernels' Pool.
#pragma once

#include "../../cpu/parallel.h"

namespace liar {

/// The pool that torch.set_num_threads() governs.
Pool torch_pool();

}  // namespace liar
