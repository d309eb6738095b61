// Which output tile a block computes next.
//
// A persistent grid walks the tiles of the lower triangle (or of a rectangle) in bands of eight
// tile rows, column by column, so that blocks in flight at one time share operands in L2:
//
//      column  0 1 2 3 4 5 6 7 8 9
//   row 0      0                        band 0: a triangle only
//   row 1      1 2
//   ...
//   row 8      T0 T2 T4 …        . .    band 1: first the rectangle, down each column,
//   row 9      T1 T3 T5 …        . .            then the triangle at its end
#pragma once

#include <cmath>

#include "device.cuh"

namespace liar::cuda {

struct Tile {
  std::int64_t row, column;
};

constexpr std::int64_t kBand = 8;

LIAR_BOTH std::int64_t triangle(std::int64_t n) { return n * (n + 1) / 2; }

// Row of the `index`-th element of a row-by-row lower triangle. The root is only a guess: it is
// exact up to 2^52, and the two loops mend its last step.
LIAR_BOTH std::int64_t triangle_row(std::int64_t index) {
  auto row = static_cast<std::int64_t>((sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (triangle(row) > index) --row;
  while (triangle(row + 1) <= index) ++row;
  return row;
}

LIAR_BOTH Tile triangular_tile(std::int64_t index, std::int64_t tile_rows) {
  const std::int64_t first = triangle_row(index) / kBand * kBand;
  const std::int64_t height = smaller(kBand, tile_rows - first);
  index -= triangle(first);
  if (index < first * height) return {first + index % height, index / height};
  index -= first * height;
  const std::int64_t row = triangle_row(index);
  return {first + row, first + index - triangle(row)};
}

LIAR_BOTH Tile rectangular_tile(std::int64_t index, std::int64_t tile_rows,
                                std::int64_t tile_columns) {
  const std::int64_t first = index / (kBand * tile_columns) * kBand;
  const std::int64_t height = smaller(kBand, tile_rows - first);
  index -= first * tile_columns;
  return {first + index % height, index / height};
}

}  // namespace liar::cuda
