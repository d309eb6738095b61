// AMX tiles for a CPU that has none, as Intel's manual specifies TDPBF16PS; instructions that a CPU
// would refuse end the process. Included by kernels_amx.cpp if LIAR_EMULATE_AMX is defined.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace liar {
namespace {

struct Tile {
  int rows = 0, row_bytes = 0;
  unsigned char data[16][64] = {};
};

struct Tiles {
  bool configured = false;
  Tile tile[8];
};

thread_local Tiles tile_file;

inline void tile_require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline Tile& tile_at(int index) {
  tile_require(tile_file.configured,
               "tiles are used before they are configured, or after the release");
  return tile_file.tile[index];
}

inline void tile_configure(const void* raw) {
  const auto* config = static_cast<const unsigned char*>(raw);
  tile_require(config[0] == 1 && config[1] == 0, "the palette is not 1");
  for (int i = 2; i < 16; ++i) tile_require(config[i] == 0, "reserved bytes are set");
  tile_file = Tiles{};  // what tiles held is lost
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, 2);
    tile_require(bytes <= 64 && config[48 + i] <= 16, "a tile is larger than 16 rows of 64 bytes");
    tile_file.tile[i].row_bytes = bytes;
    tile_file.tile[i].rows = config[48 + i];
  }
  tile_file.configured = true;
}

inline void tile_load(int index, const void* from, int64_t stride) {
  Tile& tile = tile_at(index);
  std::memset(tile.data, 0, sizeof(tile.data));
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.data[r], static_cast<const char*>(from) + r * stride,
                static_cast<size_t>(tile.row_bytes));
  }
}

inline void tile_store(int index, void* to, int64_t stride) {
  const Tile& tile = tile_at(index);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r],
                static_cast<size_t>(tile.row_bytes));
  }
}

/// Subnormal numbers are zero, both as inputs and as results.
inline float tile_flush(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline float tile_brain(const unsigned char* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return tile_flush(value);
}

/// sum[m][n] += Σ_k left[m][2k] right[k][2n] + left[m][2k + 1] right[k][2n + 1].
inline void tile_multiply(int sum, int left, int right) {
  Tile &c = tile_at(sum), &a = tile_at(left), &b = tile_at(right);
  tile_require(a.rows == c.rows && b.row_bytes == c.row_bytes && a.row_bytes == 4 * b.rows,
               "the shapes of the tiles of a product do not fit");
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float product = 0, old;
      for (int k = 0; k < b.rows; ++k) {
        for (int half = 0; half < 4; half += 2) {
          product = tile_flush(std::fma(tile_brain(&a.data[m][4 * k + half]),
                                        tile_brain(&b.data[k][4 * n + half]), product));
        }
      }
      std::memcpy(&old, &c.data[m][4 * n], 4);
      product = tile_flush(old + product);
      std::memcpy(&c.data[m][4 * n], &product, 4);
    }
  }
}

}  // namespace
}  // namespace liar

#define LIAR_TILE_CONFIGURE(config) tile_configure(config)
#define LIAR_TILE_RELEASE() tile_file.configured = false
#define LIAR_TILE_ZERO(tile) std::memset(tile_at(tile).data, 0, sizeof(Tile::data))
#define LIAR_TILE_LOAD(tile, from, stride) tile_load(tile, from, stride)
#define LIAR_TILE_STORE(tile, to, stride) tile_store(tile, to, stride)
#define LIAR_TILE_MULTIPLY(sum, left, right) tile_multiply(sum, left, right)
