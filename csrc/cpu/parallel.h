// Tasks on somebody's thread pool: torch's inside the extension, the caller's own thread in tests.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace liar {

/// A thread pool seen from the kernels: `run` calls `worker(context)` on up to `threads` threads.
struct Pool {
  int64_t threads = 1;
  void (*run)(int64_t threads, void (*worker)(void* context), void* context) = nullptr;
};

/// Calls `task(i)` once for every i in [0, tasks). Threads take the next index when they are free,
/// so tasks of unequal size balance. A task may only write what no other task touches: then the
/// result does not depend on which thread took it. What a task throws comes out here, once every
/// thread has left: a pool may not know exceptions.
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
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // the first; written by one thread, read when all are done

    void work() {
      try {
        // Relaxed: tasks share nothing, and an order between them would hide from ThreadSanitizer
        // that two of them do.
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) (*task)(i);
      } catch (...) {
        next.store(tasks);  // nobody takes another task
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  } context;
  context.tasks = tasks;
  context.task = &task;
  pool.run(threads, [](void* raw) { static_cast<Context*>(raw)->work(); }, &context);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace liar
