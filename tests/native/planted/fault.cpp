// A fault that the sanitizer of this build must find: a run of it that ends well means that nothing
// is watched. Under ThreadSanitizer two tasks of the kernels' own `parallel_tasks` write the same
// number, so many of them that both threads take some; under AddressSanitizer one writes past the
// end of a buffer.
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

void run_threads(int64_t threads, void (*worker)(void*), void* context) {
  std::vector<std::thread> crew;
  for (int64_t i = 0; i < threads; ++i) crew.emplace_back(worker, context);
  for (std::thread& one : crew) one.join();
}

}  // namespace

int main() {
  std::vector<double> sum(1, 0.0);
#ifdef __SANITIZE_THREAD__
  const int64_t past_the_end = 0;
#else
  const int64_t past_the_end = 1;
#endif
  liar::parallel_tasks(liar::Pool{2, &run_threads}, 1000000, [&](int64_t task) {
    double& shared = sum.data()[past_the_end];
    shared = shared + static_cast<double>(task);
  });
  std::printf("%f\n", sum[0]);  // or the compiler would leave the sum out
  return 0;
}
