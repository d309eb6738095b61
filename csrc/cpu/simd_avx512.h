// The AVX-512 policies for float32 and float64, and how pairs of bfloat16 rows are packed; a unit
// that includes this is compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "panel_kernel_impl.h"

namespace liar {
namespace {

struct SimdF32 {
  using Slot = float;
  using Sum = float;
  using Vector = __m512;
  using Operand = __m512;
  static constexpr int kLanes = 16, kRows = 8, kVectors = 3, kTokensPerStep = 1;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vector load(const Brain* p) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  static Operand load_slot(const float* p) { return _mm512_loadu_ps(p); }
  static Operand splat(const float* p) { return _mm512_set1_ps(*p); }
  static Vector multiply_add(Operand a, Operand b, Vector sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector scale(Vector a, double by) {
    return _mm512_mul_ps(a, _mm512_set1_ps(static_cast<float>(by)));
  }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static void accumulate(float* p, Vector v) {
    _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), v));
  }
  static void accumulate(double* p, Vector v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), low));
    _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), high));
  }
};

struct SimdF64 {
  using Slot = double;
  using Sum = double;
  using Vector = __m512d;
  using Operand = __m512d;
  static constexpr int kLanes = 8, kRows = 8, kVectors = 3, kTokensPerStep = 1;

  static Vector zero() { return _mm512_setzero_pd(); }
  static Vector load(const double* p) { return _mm512_loadu_pd(p); }
  static Operand load_slot(const double* p) { return _mm512_loadu_pd(p); }
  static Operand splat(const double* p) { return _mm512_set1_pd(*p); }
  static Vector multiply_add(Operand a, Operand b, Vector sum) {
    return _mm512_fmadd_pd(a, b, sum);
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_pd(a, b); }
  static Vector scale(Vector a, double by) { return _mm512_mul_pd(a, _mm512_set1_pd(by)); }
  static void store(double* p, Vector v) { _mm512_storeu_pd(p, v); }
  static void accumulate(double* p, Vector v) {
    _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), v));
  }
  static void accumulate(float* p, Vector v) {
    _mm256_storeu_ps(p, _mm256_add_ps(_mm256_loadu_ps(p), _mm512_cvtpd_ps(v)));
  }
};

/// Two tokens a step: the first in the low half of every slot, the second in the high half.
struct BrainPairs {
  using Value = Brain;
  static __m512 load(const Brain* p) { return SimdF32::load(p); }
  static void pack(const Brain* const* rows, int64_t r, int64_t count, const double* /*weight*/,
                   uint32_t* out, __m512& sum, __m512& squares) {
    const __m512 first = load(rows[r]);
    const __m512 second = r + 1 < count ? load(rows[r + 1]) : _mm512_setzero_ps();
    const __m512i low = _mm512_castps_si512(first), high = _mm512_castps_si512(second);
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
    sum = _mm512_add_ps(_mm512_add_ps(sum, first), second);
    squares = SimdF32::multiply_add(first, first, squares);
    squares = SimdF32::multiply_add(second, second, squares);
  }
};

}  // namespace
}  // namespace liar
