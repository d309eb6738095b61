// AVX-512-BF16: a slot holds a feature of two tokens, and one instruction adds both products to a
// float32 sum, twice the rate of float32. The products of two bfloat16 numbers are exact in
// float32; the instruction takes subnormal inputs (below 1.2e-38) as zero.
#include "simd_avx512.h"

namespace liar {
namespace {

struct SimdBf16 : SimdF32 {
  using Slot = uint32_t;
  using Operand = __m512bh;
  static constexpr int kTokensPerStep = 2;

  static Operand load_slot(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand splat(const uint32_t* p) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p));
  }
  static Vector multiply_add(Operand a, Operand b, Vector sum) {
    return _mm512_dpbf16_ps(sum, a, b);
  }
};

}  // namespace

const PanelKernel kAvx512Bf16 = one_type_kernel<SimdBf16, BrainPairs>();

}  // namespace liar
