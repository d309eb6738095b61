// The peak rate of fused multiply-adds on this core: prints float32, float64 and (with
// AVX-512-BF16, else 0) bfloat16 GFLOP/s. Build with -O2 -march=native.
#include <algorithm>
#include <cstdio>
#include <ctime>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kChains = kBytes == 64 ? 24 : 12;  // independent sums: enough to hide the latency

double seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Best of five runs of `step`, which does `flops` operations on every chain.
template <class Vector, class Step>
double rate(double flops, Step step) {
  constexpr long kRounds = 4000000;
  double best = 1e9;
  for (int run = 0; run < 5; ++run) {
    Vector sum[kChains] = {};
    const double start = seconds();
    for (long k = 0; k < kRounds; ++k) {
#pragma GCC unroll 24
      for (int i = 0; i < kChains; ++i) sum[i] = step(sum[i]);
      asm volatile("");
    }
    best = std::min(best, seconds() - start);
    for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(sum[i]));
  }
  return flops * kChains * kRounds / best / 1e9;
}

template <class Value>
double fma_rate() {
  typedef Value Vector __attribute__((vector_size(kBytes)));
  Vector factor = Vector{} + static_cast<Value>(0.999),
         addend = Vector{} + static_cast<Value>(1e-4);
  asm volatile("" : "+m"(factor), "+m"(addend));
  return rate<Vector>(2.0 * kBytes / sizeof(Value),
                      [=](Vector sum) { return sum * factor + addend; });
}

}  // namespace

int main() {
  double bf16 = 0;
#ifdef __AVX512BF16__
  auto pair = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  asm volatile("" : "+v"(pair));
  bf16 = rate<__m512>(64, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, pair, pair); });
#endif
  std::printf("%.1f %.1f %.1f\n", fma_rate<float>(), fma_rate<double>(), bf16);
}
