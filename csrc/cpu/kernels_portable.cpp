// Micro-kernels for any CPU: GCC/Clang vectors of 16 bytes, which SSE2 and NEON both have.
#include "panel_solve_impl.h"

namespace liar {
namespace {

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {  // normal: the exponent bias moves from 15 to 127
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude · 2⁻²⁴ is exact in float
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct SimdF32 {
  using Slot = float;
  using Sum = float;
  typedef float Vector __attribute__((vector_size(16)));
  using Operand = Vector;
  static constexpr int kLanes = 4, kRows = 4, kVectors = 2, kTokensPerStep = 1;

  static Vector zero() { return Vector{}; }
  static Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Vector load(const Half* p) {
    return Vector{half_to_float(p[0].bits), half_to_float(p[1].bits), half_to_float(p[2].bits),
                  half_to_float(p[3].bits)};
  }
  static Vector load(const Brain* p) {
    Vector v;
    uint32_t bits[4];
    for (int k = 0; k < 4; ++k) bits[k] = static_cast<uint32_t>(p[k].bits) << 16;
    std::memcpy(&v, bits, sizeof(v));
    return v;
  }
  static Operand load_slot(const float* p) { return load(p); }
  static Operand splat(const float* p) { return Vector{*p, *p, *p, *p}; }
  static Vector multiply_add(Operand a, Operand b, Vector sum) { return sum + a * b; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector scale(Vector a, double by) { return a * static_cast<float>(by); }
  static void store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
  static void accumulate(float* p, Vector v) { store(p, load(p) + v); }
  static void accumulate(double* p, Vector v) {
    for (int k = 0; k < kLanes; ++k) p[k] += static_cast<double>(v[k]);
  }
};

struct SimdF64 {
  using Slot = double;
  using Sum = double;
  typedef double Vector __attribute__((vector_size(16)));
  using Operand = Vector;
  static constexpr int kLanes = 2, kRows = 4, kVectors = 2, kTokensPerStep = 1;

  static Vector zero() { return Vector{}; }
  static Vector load(const double* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Operand load_slot(const double* p) { return load(p); }
  static Operand splat(const double* p) { return Vector{*p, *p}; }
  static Vector multiply_add(Operand a, Operand b, Vector sum) { return sum + a * b; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector scale(Vector a, double by) { return a * by; }
  static void store(double* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
  static void accumulate(double* p, Vector v) { store(p, load(p) + v); }
  static void accumulate(float* p, Vector v) {
    for (int k = 0; k < kLanes; ++k) p[k] += static_cast<float>(v[k]);
  }
};

}  // namespace

const PanelKernel kPortableF32 = single_kernel<SimdF32>();
const PanelKernel kPortableF64 = one_type_kernel<SimdF64, Rows<SimdF64, double>, solve<SimdF64>>();

}  // namespace liar
