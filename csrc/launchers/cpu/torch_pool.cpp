#include "torch_pool.h"

#include <torch/csrc/stable/ops.h>

namespace liar {
namespace {

struct Job {
  void (*worker)(void*);
  void* context;
};

void run(int64_t threads, void (*worker)(void*), void* context) {
  Job job{worker, context};
  // An error here is torch's own, such as a thread that did not start: workers do not throw.
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(
      0, threads, /*grain_size=*/1,
      [](int64_t begin, int64_t end, void* raw) {
        auto& each = *static_cast<Job*>(raw);
        for (int64_t i = begin; i < end; ++i) each.worker(each.context);
      },
      &job));
}

}  // namespace

Pool torch_pool() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {static_cast<int64_t>(threads), &run};
}

}  // namespace liar
