// One policy class per instruction: tile sizes, accumulators, and how a block multiplies one stage.
//
// All compute Aᵀ·B for operands whose rows are tokens, so in shared memory both look alike:
//
//      A: kDepth × kTile          B: kDepth × kTile            C: kTile × kTile
//      k ┌───────────────┐        k ┌───────────────┐          m ┌────┬────┬────┬────┐
//        │ token 0       │          │               │            │ w0 │ w1 │ w2 │ w3 │  warps
//        │ token 1       │          │               │            ├────┼────┼────┼────┤
//        └───────────────┘          └───────────────┘            │ w4 │ w5 │ w6 │ w7 │
//              m                          n                      └────┴────┴────┴────┘
//
// Each row is padded so that the lanes of one fragment load fall into different banks: by 16 bytes
// for ldmatrix (8 rows of 16 bytes) and 16-bit words, by 8 words for tf32 and 4 doubles for f64
// (4 tokens × 8 columns at a time).
#pragma once

#include "device.cuh"

namespace liar::cuda {

// bf16 and f16 → f32 by m16n8k16. Products of two 16-bit floats are exact in the accumulator.
template <class T>
struct MmaHalf {
  using Element = T;
  using Scalar = float;
  static constexpr bool kWeighted = false;
  static constexpr int kMostTokens = 512;
  // Four warps of 64×64: eight ldmatrix feed 32 mma, and two blocks share a multiprocessor at 255
  // registers. Eight warps of 64×32 need as many loads for half the products, and spill at 128.
  static constexpr int kTile = 128, kDepth = 32, kStages = 4, kPad = 8;
  static constexpr int kWarpRows = 2, kWarpColumns = 2, kThreads = 128, kBlocks = 2;
  static constexpr int kStride = kTile + kPad;
  static constexpr int kM = kTile / kWarpRows / 16, kN = kTile / kWarpColumns / 8;
  using Accumulator = float[kM][kN][4];

  LIAR_DEVICE static void multiply(Accumulator& c, const T* a, const T* b, const double*, int row0,
                                   int column0, int lane) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t right[kN][2];
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        std::uint32_t r[4];
        load_matrices_transposed(
            r, b + (k + (lane & 15)) * kStride + column0 + 8 * n + 8 * (lane >> 4));
        right[n][0] = r[0], right[n][1] = r[1], right[n + 1][0] = r[2], right[n + 1][1] = r[3];
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        std::uint32_t left[4];
        load_matrices_transposed(
            left, a + (k + (lane & 7) + 8 * (lane >> 4)) * kStride + row0 + 16 * m + (lane & 8));
#pragma unroll
        for (int n = 0; n < kN; ++n) product(c[m][n], left, right[n]);
      }
    }
  }

  LIAR_DEVICE static void product(float (&c)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2]);
};

template <>
LIAR_DEVICE void MmaHalf<f16>::product(float (&c)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
  mma_f16(c, a, b);
}
template <>
LIAR_DEVICE void MmaHalf<bf16>::product(float (&c)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
  mma_bf16(c, a, b);
}

// f32, and 16-bit elements with real weights, by 3×tf32. x = hi + lo with hi = tf32(x) and
// lo = tf32(x − hi), both rounded: |lo| ≤ 2⁻¹¹|x|, and hi + lo misses x by at most 2⁻²²|x|·½.
// a·b ≈ lo·hi + hi·lo + hi·hi leaves out lo·lo ≤ 2⁻²²|ab|: the products are right to about
// 2⁻²¹|ab|, below what f32 accumulation of more than eight of them loses. A 16-bit element is
// exact in hi, so one of the three products falls away on that side. Tensor cores truncate when
// they accumulate, a bias that grows with the number of tokens; so each product of eight tokens
// starts from zero and joins the running sum by an ordinary, rounded addition.
template <class T>
struct MmaTf32 {
  using Element = T;
  using Scalar = float;
  static constexpr bool kWeighted = true;
  static constexpr int kMostTokens = 2048;
  static constexpr int kTile = 128, kDepth = 16, kStages = 3, kPad = 8;
  static constexpr int kWarpRows = 2, kWarpColumns = 4, kThreads = 256, kBlocks = 1;
  static constexpr int kStride = kTile + kPad;
  static constexpr int kM = kTile / kWarpRows / 16, kN = kTile / kWarpColumns / 8;
  using Accumulator = float[kM][kN][4];

  LIAR_DEVICE static void split(float x, std::uint32_t& high, std::uint32_t& low) {
    high = to_tf32(x);
    low = to_tf32(x - float_of(high));
  }

  LIAR_DEVICE static void multiply(Accumulator& c, const T* a, const T* b, const double* weight,
                                   int row0, int column0, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1  // twice the loads in flight don't fit the registers
    for (int k = 0; k < kDepth; k += 8) {
      std::uint32_t high[kN][2], low[kN][2];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          split(to_float(b[(k + t + 4 * r) * kStride + column0 + 8 * n + g]), high[n][r],
                low[n][r]);
      const float w[2] = {static_cast<float>(weight[k + t]), static_cast<float>(weight[k + t + 4])};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        std::uint32_t left[4], left_low[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          split(w[r >> 1] *
                    to_float(a[(k + t + 4 * (r >> 1)) * kStride + row0 + 16 * m + g + 8 * (r & 1)]),
                left[r], left_low[r]);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          float part[4] = {};
          mma_tf32(part, left_low, high[n]);
          if constexpr (sizeof(T) == 4) mma_tf32(part, left, low[n]);
          mma_tf32(part, left, high[n]);
#pragma unroll
          for (int r = 0; r < 4; ++r) c[m][n][r] += part[r];
        }
      }
    }
  }
};

// f64 by m8n8k4: IEEE products and sums.
struct MmaF64 {
  using Element = double;
  using Scalar = double;
  static constexpr bool kWeighted = true;
  static constexpr int kMostTokens = INT32_MAX;
  static constexpr int kTile = 64, kDepth = 16, kStages = 3, kPad = 4;
  static constexpr int kWarpRows = 2, kWarpColumns = 2, kThreads = 128, kBlocks = 2;
  static constexpr int kStride = kTile + kPad;
  static constexpr int kM = kTile / kWarpRows / 8, kN = kTile / kWarpColumns / 8;
  using Accumulator = double[kM][kN][2];

  LIAR_DEVICE static void multiply(Accumulator& c, const double* a, const double* b,
                                   const double* weight, int row0, int column0, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      double right[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) right[n] = b[(k + t) * kStride + column0 + 8 * n + g];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const double left = weight[k + t] * a[(k + t) * kStride + row0 + 8 * m + g];
#pragma unroll
        for (int n = 0; n < kN; ++n) mma_f64(c[m][n], left, right[n]);
      }
    }
  }
};

// f(row, column, value) for each accumulator of this lane, within the block's tile.
template <class Mma, class F>
LIAR_DEVICE void for_each_value(const typename Mma::Accumulator& c, int row0, int column0, int lane,
                                F f) {
  constexpr int kValues = sizeof(c[0][0]) / sizeof(typename Mma::Scalar);
  constexpr int kRows = kValues / 2 * 8;
#pragma unroll
  for (int m = 0; m < Mma::kM; ++m)
#pragma unroll
    for (int n = 0; n < Mma::kN; ++n)
#pragma unroll
      for (int r = 0; r < kValues; ++r)
        f(row0 + kRows * m + lane / 4 + 8 * (r / 2), column0 + 8 * n + 2 * (lane % 4) + r % 2,
          c[m][n][r]);
}

}  // namespace liar::cuda
