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

const PanelKernel kAvx512Bf16 = one_type_kernel<SimdBf16, BrainPairs>();

}  // namespace liar
