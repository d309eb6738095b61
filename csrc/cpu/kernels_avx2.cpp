// AVX2 + FMA + F16C micro-kernels: 4 rows × 3 vectors = 12 of 16 registers hold sums.
#include <immintrin.h>

#include "panel_solve_impl.h"

namespace liar {
namespace {

struct SimdF32 {
  using Slot = float;
  using Sum = float;
  using Vector = __m256;
  using Operand = __m256;
  static constexpr int kLanes = 8, kRows = 4, kVectors = 3, kTokensPerStep = 1;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vector load(const Brain* p) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }
  static Operand load_slot(const float* p) { return _mm256_loadu_ps(p); }
  static Operand splat(const float* p) { return _mm256_set1_ps(*p); }
  static Vector multiply_add(Operand a, Operand b, Vector sum) {
    return _mm256_fmadd_ps(a, b, sum);
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector scale(Vector a, double by) {
    return _mm256_mul_ps(a, _mm256_set1_ps(static_cast<float>(by)));
  }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static void accumulate(float* p, Vector v) {
    _mm256_storeu_ps(p, _mm256_add_ps(_mm256_loadu_ps(p), v));
  }
  static void accumulate(double* p, Vector v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), low));
    _mm256_storeu_pd(p + 4, _mm256_add_pd(_mm256_loadu_pd(p + 4), high));
  }
};

struct SimdF64 {
  using Slot = double;
  using Sum = double;
  using Vector = __m256d;
  using Operand = __m256d;
  static constexpr int kLanes = 4, kRows = 4, kVectors = 3, kTokensPerStep = 1;

  static Vector zero() { return _mm256_setzero_pd(); }
  static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  static Operand load_slot(const double* p) { return _mm256_loadu_pd(p); }
  static Operand splat(const double* p) { return _mm256_set1_pd(*p); }
  static Vector multiply_add(Operand a, Operand b, Vector sum) {
    return _mm256_fmadd_pd(a, b, sum);
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_pd(a, b); }
  static Vector scale(Vector a, double by) { return _mm256_mul_pd(a, _mm256_set1_pd(by)); }
  static void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }
  static void accumulate(double* p, Vector v) {
    _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), v));
  }
  static void accumulate(float* p, Vector v) {
    _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), _mm256_cvtpd_ps(v)));
  }
};

}  // namespace

const PanelKernel kAvx2F32 = single_kernel<SimdF32>();
const PanelKernel kAvx2F64 = one_type_kernel<SimdF64, Rows<SimdF64, double>, solve<SimdF64>>();

}  // namespace liar
