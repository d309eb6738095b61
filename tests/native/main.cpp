// The CPU kernels without torch, meant to run under sanitizers: every result against plain loops,
// on buffers of exactly the needed size so that a stray access is seen. LIAR_CPU_KERNEL names the
// instruction set; exit code 77 says that this CPU doesn't have it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/panel_kernel.h"

namespace liar::native {
namespace {

int failures = 0;

void run_threads(int64_t threads, void (*worker)(void*), void* context) {
  std::vector<std::thread> crew;
  for (int64_t i = 0; i < threads; ++i) crew.emplace_back(worker, context);
  for (std::thread& one : crew) one.join();
}

/// Whether a refused LIAR_CPU_KERNEL is an instruction set that other CPUs have. The portable one
/// is on all.
bool only_missing_here() {
  const char* wanted = std::getenv("LIAR_CPU_KERNEL");
  const std::string name = wanted == nullptr ? "" : wanted;
  for (const char* each : {"neon", "avx2", "avx512", "avx512_bf16", "amx_bf16"}) {
    if (name == each) return true;
  }
  return false;
}

}  // namespace

Values random_values(int64_t count, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::uniform_int_distribution<int> small(-8, 8);
  Values values = zeros(count);
  for (double& value : values) value = small(engine);
  return values;
}

Values gram_of(const Values& x, int64_t tokens, int64_t d) {
  Values gram(at(d * d), std::numeric_limits<double>::quiet_NaN());
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t) sum += x[at(t * d + i)] * x[at(t * d + j)];
      gram[at(i * d + j)] = sum;
    }
  }
  return gram;
}

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

void expect_near(const Values& got, const Values& want, double tolerance, const std::string& what) {
  double scale = 1, worst = got.size() == want.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    scale = std::max(scale, std::fabs(want[i]));
    worst = std::isnan(got[i]) ? std::numeric_limits<double>::infinity()
                               : std::max(worst, std::fabs(got[i] - want[i]));
  }
  const bool ok = worst <= tolerance * scale;
  expect(ok, ok ? what : what + ": off by " + std::to_string(worst));
}

int run() {
  try {
    std::printf("kernels: %s\n", kernels().name);
  } catch (const std::runtime_error& error) {
    std::printf("%s: %s\n", only_missing_here() ? "skipped" : "FAILED", error.what());
    return only_missing_here() ? 77 : 1;
  }
#ifdef __SANITIZE_THREAD__
  const std::vector<int64_t> crews = {2};  // one thread races with nobody
#else
  const std::vector<int64_t> crews = {1, 2, 3};
#endif
  for (const int64_t threads : crews) {
    const Pool pool{threads, threads > 1 ? &run_threads : nullptr};
    test_gram(pool);
    test_solve(pool);
    test_reconstruct(pool);
    test_sweep(pool);
    test_obs_curve(pool);
  }
  std::printf(failures == 0 ? "all right\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace liar::native

int main() { return liar::native::run(); }
