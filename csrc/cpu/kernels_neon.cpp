// NEON micro-kernels of aarch64: 4 rows × 6 vectors = 24 of 32 registers hold sums, as 8 × 3 would,
// and a panel is one tile wide. The left side stays scalar: the multiply-add takes an element of a
// register.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "panel_solve_impl.h"

namespace liar {
namespace {

struct SimdF32 {
  using Slot = float;
  using Sum = float;
  using Vector = float32x4_t;
  using Operand = float32x4_t;
  static constexpr int kLanes = 4, kRows = 4, kVectors = 6, kTokensPerStep = 1;

  static Vector zero() { return vdupq_n_f32(0); }
  static Vector load(const float* p) { return vld1q_f32(p); }
  static Vector load(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static Vector load(const Brain* p) {
    const uint16x4_t narrow = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return vreinterpretq_f32_u32(vshll_n_u16(narrow, 16));
  }
  static Operand load_slot(const float* p) { return vld1q_f32(p); }
  static float splat(const float* p) { return *p; }
  static Vector multiply_add(float a, Operand b, Vector sum) { return vfmaq_n_f32(sum, b, a); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return vfmaq_f32(sum, a, b); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector scale(Vector a, double by) { return vmulq_n_f32(a, static_cast<float>(by)); }
  static void store(float* p, Vector v) { vst1q_f32(p, v); }
  static void accumulate(float* p, Vector v) { vst1q_f32(p, vaddq_f32(vld1q_f32(p), v)); }
  static void accumulate(double* p, Vector v) {
    vst1q_f64(p, vaddq_f64(vld1q_f64(p), vcvt_f64_f32(vget_low_f32(v))));
    vst1q_f64(p + 2, vaddq_f64(vld1q_f64(p + 2), vcvt_high_f64_f32(v)));
  }
};

struct SimdF64 {
  using Slot = double;
  using Sum = double;
  using Vector = float64x2_t;
  using Operand = float64x2_t;
  static constexpr int kLanes = 2, kRows = 4, kVectors = 6, kTokensPerStep = 1;

  static Vector zero() { return vdupq_n_f64(0); }
  static Vector load(const double* p) { return vld1q_f64(p); }
  static Operand load_slot(const double* p) { return vld1q_f64(p); }
  static double splat(const double* p) { return *p; }
  static Vector multiply_add(double a, Operand b, Vector sum) { return vfmaq_n_f64(sum, b, a); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return vfmaq_f64(sum, a, b); }
  static Vector add(Vector a, Vector b) { return vaddq_f64(a, b); }
  static Vector scale(Vector a, double by) { return vmulq_n_f64(a, by); }
  static void store(double* p, Vector v) { vst1q_f64(p, v); }
  static void accumulate(double* p, Vector v) { vst1q_f64(p, vaddq_f64(vld1q_f64(p), v)); }
  static void accumulate(float* p, Vector v) {
    vst1_f32(p, vadd_f32(vld1_f32(p), vcvt_f32_f64(v)));
  }
};

}  // namespace

const PanelKernel kNeonF32 = single_kernel<SimdF32>();
const PanelKernel kNeonF64 = one_type_kernel<SimdF64, Rows<SimdF64, double>, solve<SimdF64>>();

}  // namespace liar
#endif
