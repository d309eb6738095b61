// AMX: tiles of bfloat16. A slot holds a feature of two tokens, as with AVX-512-BF16, and one
// instruction multiplies up to 16 such steps of 16 × 16 features:
//
//      right: as packed                  left: turned
//      k0  [ f0 f1 ... f15 ]             f0  [ k0 k1 ... k15 ]
//      k1  [ f0 f1 ... f15 ]             f1  [ k0 k1 ... k15 ]
//      ...                               ...
//
// So a panel of 32 features holds every value twice. Of the eight tiles four are sums, 32 × 32, two
// are of the left side and two of the right:
//
//      [ steps × 32, as packed | for each 16 steps: 32 × 16, turned ]
//
// Tile instructions round sums to nearest, and take subnormal inputs and results as zero.
#include "simd_avx512.h"
#if defined(LIAR_EMULATE_AMX)
#include "testing/amx_on_host.h"
#endif

namespace liar {
namespace {

#if !defined(LIAR_EMULATE_AMX)
#define LIAR_TILE_CONFIGURE(config) _tile_loadconfig(config)
#define LIAR_TILE_RELEASE() _tile_release()
#define LIAR_TILE_ZERO(tile) _tile_zero(tile)
#define LIAR_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define LIAR_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define LIAR_TILE_MULTIPLY(sum, left, right) _tile_dpbf16ps(sum, left, right)
#endif

constexpr int64_t kWide = 32;                    // features of a panel
constexpr int64_t kDeep = 16;                    // steps of a tile
constexpr int64_t kStepBytes = kWide * 4;        // in either half of a panel, and a row of sums
constexpr int64_t kSegment = 128 / (2 * kDeep);  // tiles that one sum takes in, as elsewhere
constexpr int64_t kLine = kDeep * 4, kHalf = kWide / 2;

struct SimdPairs : SimdF32 {
  using Slot = uint32_t;
  static constexpr int kVectors = 2, kTokensPerStep = 2;
};
using Packing = PanelPacking<SimdPairs>;

/// From the beginning of a panel to its turned half; the last line keeps panels off the same sets.
int64_t turned(int64_t panel_stride) { return (panel_stride - 64) / 2; }

/// Copies the four steps from p.step on, a multiple of four, to where they lie turned.
void turn(const PackRows& p) {
  for (int64_t c = 0; c < p.features; c += kHalf) {
    char* panel = static_cast<char*>(p.panels) + c / kWide * p.panel_stride;
    const char* from = panel + p.step * kStepBytes + c % kWide * 4;
    char* to = panel + turned(p.panel_stride) + p.step / kDeep * kDeep * kStepBytes +
               c % kWide * kLine + p.step % kDeep * 4;
    const __m512i k0 = _mm512_loadu_si512(from), k1 = _mm512_loadu_si512(from + kStepBytes),
                  k2 = _mm512_loadu_si512(from + 2 * kStepBytes),
                  k3 = _mm512_loadu_si512(from + 3 * kStepBytes);
    const __m512i low = _mm512_unpacklo_epi32(k0, k1), low2 = _mm512_unpacklo_epi32(k2, k3);
    const __m512i high = _mm512_unpackhi_epi32(k0, k1), high2 = _mm512_unpackhi_epi32(k2, k3);
    // Lane l of the r-th holds feature 4 l + r.
    const __m512i four[] = {_mm512_unpacklo_epi64(low, low2), _mm512_unpackhi_epi64(low, low2),
                            _mm512_unpacklo_epi64(high, high2), _mm512_unpackhi_epi64(high, high2)};
    for (int r = 0; r < 4; ++r) {
      const auto put = [&](int lane, __m128i value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (4 * lane + r) * kLine), value);
      };
      put(0, _mm512_extracti32x4_epi32(four[r], 0));
      put(1, _mm512_extracti32x4_epi32(four[r], 1));
      put(2, _mm512_extracti32x4_epi32(four[r], 2));
      put(3, _mm512_extracti32x4_epi32(four[r], 3));
    }
  }
}

/// Tiles 0 to 3 are sums, 4 and 5 of the left side, 6 and 7 of the right, `depth` steps deep.
void configure(int64_t depth) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? depth * 4 : kLine);
    config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? depth : kHalf);
  }
  LIAR_TILE_CONFIGURE(&config);
}

/// sums[32][32] += `tiles` products of `depth` steps each.
void multiply_steps(const char* left, const char* right, int64_t tiles, float* sums) {
  alignas(64) float part[kWide * kWide];
  for (int64_t begin = 0; begin < tiles; begin += kSegment) {
    LIAR_TILE_ZERO(0);
    LIAR_TILE_ZERO(1);
    LIAR_TILE_ZERO(2);
    LIAR_TILE_ZERO(3);
    for (int64_t k = begin; k < tiles && k < begin + kSegment; ++k) {
      const char *a = left + k * kDeep * kStepBytes, *b = right + k * kDeep * kStepBytes;
      LIAR_TILE_LOAD(4, a, kLine);
      LIAR_TILE_LOAD(5, a + kHalf * kLine, kLine);
      LIAR_TILE_LOAD(6, b, kStepBytes);
      LIAR_TILE_LOAD(7, b + kHalf * 4, kStepBytes);
      LIAR_TILE_MULTIPLY(0, 4, 6);
      LIAR_TILE_MULTIPLY(1, 4, 7);
      LIAR_TILE_MULTIPLY(2, 5, 6);
      LIAR_TILE_MULTIPLY(3, 5, 7);
    }
    LIAR_TILE_STORE(0, part, kStepBytes);
    LIAR_TILE_STORE(1, part + kHalf, kStepBytes);
    LIAR_TILE_STORE(2, part + kHalf * kWide, kStepBytes);
    LIAR_TILE_STORE(3, part + kHalf * kWide + kHalf, kStepBytes);
    for (int64_t i = 0; i < kWide * kWide; ++i) sums[i] += part[i];
  }
}

/// Adds a block of sums from (i, j) on, of which only what the product asks for.
template <class Out>
void add_block(const PanelProduct& p, int64_t i, int64_t j, const float* sums) {
  const auto scale = static_cast<float>(p.scale);
  for (int64_t r = 0; r < kWide && i + r < p.i1; ++r) {
    const int64_t middle = i + r - j;  // column of the diagonal
    const int64_t begin = p.triangle == Triangle::kUpper && middle > 0 ? middle : 0;
    int64_t end = p.j1 - j < kWide ? p.j1 - j : kWide;
    if (p.triangle == Triangle::kLower && middle + 1 < end) end = middle + 1;
    Out* out = static_cast<Out*>(p.out) + (i + r) * p.out_row + j;
    for (int64_t c = begin; c < end; ++c) out[c] += static_cast<Out>(scale * sums[r * kWide + c]);
  }
}

template <class Out>
void multiply(const PanelProduct& p) {
  // As many whole tiles as there are, then what is left in one that is less deep.
  for (int64_t first = 0, depth = 0, tiles = 0; first < p.steps; first += tiles * depth) {
    depth = p.steps - first < kDeep ? p.steps - first : kDeep;
    tiles = (p.steps - first) / depth;
    configure(depth);
    for (int64_t j = p.j0; j < p.j1; j += kWide) {
      const auto* right = static_cast<const char*>(p.b) + j / kWide * p.b_panel_stride;
      const int64_t below = p.triangle == Triangle::kLower && j > p.i0 ? j : p.i0;
      const int64_t above = p.triangle == Triangle::kUpper && j + kWide < p.i1 ? j + kWide : p.i1;
      for (int64_t i = below; i < above; i += kWide) {
        const auto* left = static_cast<const char*>(p.a) + i / kWide * p.a_panel_stride;
        alignas(64) float sums[kWide * kWide] = {};
        multiply_steps(left + turned(p.a_panel_stride) + first * kStepBytes,
                       right + first * kStepBytes, tiles, sums);
        add_block<Out>(p, i, j, sums);
      }
    }
  }
  LIAR_TILE_RELEASE();
}

}  // namespace

const PanelKernel kAmxBf16 = {kWide,
                              kWide,
                              8,  // a slot, twice
                              2,
                              kDeep,
                              [](DType, const void* row, int64_t n, double limit) {
                                return Packing::row_within<BrainPairs>(row, n, limit);
                              },
                              [](const PackRows& p) {
                                const bool within = Packing::pack_rows<BrainPairs>(p);
                                turn(p);
                                return within;
                              },
                              [](const PanelProduct& p) { multiply<float>(p); },
                              [](const PanelProduct& p) { multiply<double>(p); },
                              nullptr};

}  // namespace liar
