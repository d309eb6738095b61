// The tensor-core and asynchronous-copy instructions that the kernels use, on the host.
//
// Fragment layouts are those of the PTX manual. With g = lane / 4 and t = lane % 4:
//
//   mma.m16n8k16 (f16, bf16)   A: {g, 2t}{g+8, 2t}{g, 2t+8}{g+8, 2t+8}, two halves each (row, k)
//                              B: {2t, g}{2t+8, g}, two halves each (k, column)
//   mma.m16n8k8 (tf32)         A: {g, t}{g+8, t}{g, t+4}{g+8, t+4}      B: {t, g}{t+4, g}
//   mma.m8n8k4 (f64)           A: {g, t}                                B: {t, g}
//   accumulators               {g, 2t}{g, 2t+1} and, with 16 rows, {g+8, 2t}{g+8, 2t+1}
#pragma once

#include "cuda_on_host.h"

namespace liar::testing {

inline float half_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                : exponent     ? std::ldexp(1024.f + mantissa, exponent - 25)
                               : std::ldexp(float(mantissa), -24);
  return bits >> 15 ? -value : value;
}

inline float bfloat_to_float(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Tensor cores add with truncation, not with round-to-nearest; the shim takes the worse of the two,
// so that an error bound that holds here holds there.
inline float truncate(double value) {
  const float nearest = float(value);
  if (!std::isfinite(nearest) || std::fabs(double(nearest)) <= std::fabs(value)) return nearest;
  return std::nextafter(nearest, 0.f);
}

inline float tf32_bits(std::uint32_t bits) {
  bits &= 0xffffe000u;  // the instruction ignores the low 13 bits
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Lanes4 {
  std::uint32_t r[4];
};
struct MmaIn {
  std::uint32_t a[4], b[2];
  float c[4];
};
struct MmaOut {
  float c[4];
};

inline void finish(std::array<MmaOut, 32>& out) {
  if (settings().swapped_fragments) std::swap(out[0], out[1]);
}

}  // namespace liar::testing

namespace liar::cuda {

// D = A·B + C, element by element; `convert` reads one 16-bit operand.
template <class Convert>
void mma_m16n8k16_on_host(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                          Convert convert, const char* file, int line) {
  using namespace testing;
  MmaIn in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  const auto out = Block::current().collective<MmaIn, MmaOut>(
      "mma.m16n8k16", 0xffffffffu, {file, line}, in, [&](auto& in, auto& out) {
        double left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r)
            for (int e = 0; e < 2; ++e) {
              const auto bits = std::uint16_t(in[lane].a[r] >> (16 * e));
              left[g + 8 * (r & 1)][2 * t + e + 8 * (r >> 1)] = convert(bits);
              if (r < 2)
                right[2 * t + e + 8 * r][g] = convert(std::uint16_t(in[lane].b[r] >> (16 * e)));
            }
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
            double sum = in[lane].c[r];
            for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
            out[lane].c[r] = truncate(sum);
          }
        finish(out);
      });
  for (int r = 0; r < 4; ++r) c[r] = out.c[r];
}

inline void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     LIAR_SITE) {
  mma_m16n8k16_on_host(c, a, b, testing::bfloat_to_float, file, line);
}

inline void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                    LIAR_SITE) {
  mma_m16n8k16_on_host(c, a, b, testing::half_to_float, file, line);
}

inline void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     LIAR_SITE) {
  using namespace testing;
  MmaIn in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  const auto out = Block::current().collective<MmaIn, MmaOut>(
      "mma.m16n8k8", 0xffffffffu, {file, line}, in, [](auto& in, auto& out) {
        double left[16][8], right[8][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r)
            left[g + 8 * (r & 1)][t + 4 * (r >> 1)] = tf32_bits(in[lane].a[r]);
          for (int r = 0; r < 2; ++r) right[t + 4 * r][g] = tf32_bits(in[lane].b[r]);
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
            double sum = in[lane].c[r];
            for (int k = 0; k < 8; ++k) sum += left[row][k] * right[k][column];
            out[lane].c[r] = truncate(sum);
          }
        finish(out);
      });
  for (int r = 0; r < 4; ++r) c[r] = out.c[r];
}

inline void mma_f64(double (&c)[2], double a, double b, LIAR_SITE) {
  using namespace testing;
  struct In {
    double a, b, c[2];
  };
  struct Out {
    double c[2];
  };
  const auto out = Block::current().collective<In, Out>(
      "mma.m8n8k4", 0xffffffffu, {file, line}, In{a, b, {c[0], c[1]}}, [](auto& in, auto& out) {
        for (int lane = 0; lane < 32; ++lane)
          for (int e = 0; e < 2; ++e) {
            double sum = in[lane].c[e];
            for (int k = 0; k < 4; ++k)
              sum = std::fma(in[lane / 4 * 4 + k].a, in[(2 * (lane % 4) + e) * 4 + k].b, sum);
            out[lane].c[e] = sum;
          }
        if (settings().swapped_fragments) std::swap(out[0], out[1]);
      });
  c[0] = out.c[0];
  c[1] = out.c[1];
}

// ldmatrix.x4.trans: four 8×8 matrices of halves; lane 8m + r names row r of matrix m; lane (g, t)
// receives elements (2t, g) and (2t+1, g) of each.
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row, LIAR_SITE) {
  using namespace testing;
  if (reinterpret_cast<std::uintptr_t>(row) % 16)
    Block::current().fail("ldmatrix: row address is not a multiple of 16 bytes");
  const auto out = Block::current().collective<const void*, Lanes4>(
      "ldmatrix.x4.trans", 0xffffffffu, {file, line}, row, [](auto& in, auto& out) {
        for (int lane = 0; lane < 32; ++lane)
          for (int m = 0; m < 4; ++m) {
            out[lane].r[m] = 0;
            for (int e = 0; e < 2; ++e) {
              std::uint16_t half;
              const char* base = static_cast<const char*>(in[8 * m + 2 * (lane % 4) + e]);
              std::memcpy(&half, base + 2 * (lane / 4), 2);
              out[lane].r[m] |= std::uint32_t(half) << (16 * e);
            }
          }
      });
  for (int m = 0; m < 4; ++m) r[m] = out.r[m];
}

inline void perform(const testing::Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

// cp.async of `kBytes`, of which `valid` are read and the rest become zero.
template <int kBytes>
void copy_async(void* to, const void* from, int valid) {
  using namespace testing;
  const auto misaligned = [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % kBytes != 0;
  };
  if (misaligned(to) || (valid && misaligned(from)) || valid < 0 || valid > kBytes)
    Block::current().fail("cp.async: an address is not a multiple of its size");
  const Copy copy{to, from, kBytes, valid};
  if (settings().late_copies)
    Block::current().thread().copies.back().push_back(copy);
  else
    perform(copy);
}

inline void copy_commit(LIAR_SITE) {
  if (testing::Block::current().skip("cp.async.commit_group", {file, line})) return;
  testing::Block::current().thread().copies.emplace_back();
}

// Waits until at most `kPending` of this thread's committed groups are still on their way. The
// groups that must be there by now arrive youngest first: nothing orders them among each other.
template <int kPending>
void copy_wait(LIAR_SITE) {
  if (testing::Block::current().skip("cp.async.wait_group", {file, line})) return;
  auto& copies = testing::Block::current().thread().copies;
  const int due = int(copies.size()) - 1 - kPending;
  for (int group = due - 1; group >= 0; --group)
    for (auto& copy : copies[group]) perform(copy);
  if (due > 0) copies.erase(copies.begin(), copies.begin() + due);
}

}  // namespace liar::cuda
