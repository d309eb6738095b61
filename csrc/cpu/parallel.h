// Tasks on somebody's thread pool: torch's inside the extension, the caller's own thread in tests.
#pragma once

#include <atomic>
#include <cstdint>

namespace liar {

/// A thread pool seen from the kernels: `run` calls `worker(context)` on up to `threads` threads.
struct Pool {
  int64_t threads = 1;
  void (*run)(int64_t threads, void (*worker)(void* context), void* context) = nullptr;
};

/// Calls `task(i)` once for every i in [0, tasks). Threads take the next index when they are free,
/// so tasks of unequal size balance. A task may only write what no other task touches: then the
/// result does not depend on which thread took it.
template <class Task>
void parallel_tasks(const Pool& pool, int64_t tasks, Task&& task) {
  const int64_t threads = pool.threads < tasks ? pool.threads : tasks;
  if (threads <= 1 || pool.run == nullptr) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    Task* task;
  } context;
  context.tasks = tasks;
  context.task = &task;
  pool.run(
      threads,
      [](void* raw) {
        auto& shared = *static_cast<Context*>(raw);
        for (int64_t i; (i = shared.next.fetch_add(1)) < shared.tasks;) (*shared.task)(i);
      },
      &context);
}

}  // namespace liar
