// The table of micro-kernels that each instruction set fills in, and how to find the right one.
//
// Every matrix product here is `out[i, j] += Σ_k a[k, i] · b[k, j]` over *packed panels*:
//
//      source rows (k = token)              packed: one panel per `panel` features
//      k0  [ f0 f1 ... fP-1 | fP ... ]      panel 0: k0 f0..fP-1, k1 f0..fP-1, k2 ...
//      k1  [ f0 f1 ... fP-1 | fP ... ]  ->  panel 1: k0 fP..f2P-1, k1 ...
//
// The same panel serves as the left and as the right operand, so a Gram matrix packs its tokens
// once. Features beyond the last are zero in the panel; a step that holds several tokens (bfloat16
// pairs) is filled up with zero tokens.
#pragma once

#include <cstdint>
#include <string>

namespace liar {

enum class DType : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

/// Which out[i, j] a product touches: all, j <= i, or j >= i.
enum class Triangle { kAll, kLower, kUpper };

/// One product of packed panels over features [i0, i1) of `a` and [j0, j1) of `b`.
struct PanelProduct {
  int64_t steps;           // packed steps (tokens, or pairs of tokens) to multiply
  const void* a;           // panels of the left operand, panel 0 holds feature 0
  const void* b;           // panels of the right operand
  int64_t a_panel_stride;  // bytes from a panel to the next one
  int64_t b_panel_stride;
  int64_t i0, i1;  // i0 and j0 are multiples of the panel width
  int64_t j0, j1;
  void* out;        // out[0, 0]
  int64_t out_row;  // elements from a row of `out` to the next one
  Triangle triangle;
  double scale = 1;  // of what is added to `out`
};

/// Float16 and bfloat16 values by their bits.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

constexpr int64_t kPackRows = 8;  // rows packed together: their column sums stay in registers

/// Up to kPackRows rows to pack as the steps from `step` on.
struct PackRows {
  DType dtype;
  const void* const* rows;
  int64_t count;         // a multiple of tokens_per_step, but for the last rows of a chunk
  const double* weight;  // row r is scaled by weight[r]; null: by 1
  int64_t features;
  void* panels;
  int64_t panel_stride;  // bytes from a panel to the next one
  int64_t step;
  double* sums;      // gets the column sums of what was packed added; null: not wanted
  void* scratch;     // with sums: room for kMostLanes more than `features` values, as sums has
  bool trusted;      // add the sums whatever is returned
  int64_t ahead;     // bytes from a row to the one that is packed after these; 0: not known
  double limit = 0;  // no |value|, weighed, may be more
};

constexpr int64_t kMostLanes = 16;  // of any vector

/// A substitution with a diagonal block of a triangular matrix, in place on one panel of right-hand
/// sides. For i from i0 up to i1, or from i1 down to i0,
///
///     x[i] = (x[i] − Σ_k a(k, i) x[k]) · inverse[i]     over k in [first, i), or in (i, last)
struct PanelSolve {
  const double* a;         // panels; the block's rows are steps and its columns features
  int64_t a_panel_stride;  // bytes
  const double* inverse;   // reciprocals of the diagonal
  double* x;               // row-major, rows of the panel width
  int64_t columns;         // that are live
  int64_t i0, i1;          // up to whole register tiles; what is beyond the block has to be zero
  int64_t first, last;
  bool backward;
};

/// The micro-kernels of one instruction set for one arithmetic type.
struct PanelKernel {
  int64_t panel;            // features per panel
  int64_t rows;             // features of the left side in a register tile; divides `panel`
  int64_t slot_bytes;       // bytes per feature and step
  int64_t tokens_per_step;  // 1, or 2 where a step holds a pair of tokens
  int64_t steps_at_once;    // panels have room for a multiple of so many steps
  bool (*within)(DType dtype, const void* row, int64_t features, double limit);
  // Returns whether all values are known to be within `limit`: their squares, a multiplication
  // each, add up to less than a quarter of its square. False also where many values near it do not.
  // Sums are added to only if true is returned, or the rows are trusted.
  bool (*pack)(const PackRows&);
  void (*multiply_f32)(const PanelProduct&);  // out is float32
  void (*multiply_f64)(const PanelProduct&);  // out is float64
  void (*solve)(const PanelSolve&);           // float64 kernels only, else null
};

extern const PanelKernel kPortableF32, kPortableF64;
#if defined(__x86_64__)
extern const PanelKernel kAvx2F32, kAvx2F64, kAvx512F32, kAvx512F64, kAvx512Bf16, kAmxBf16;
#elif defined(__aarch64__)
extern const PanelKernel kNeonF32, kNeonF64;
#endif

/// What one instruction set offers.
struct KernelSet {
  const char* name;         // portable, neon, avx2, avx512, avx512_bf16, amx_bf16
  const PanelKernel* f32;   // float16, bfloat16 and float32 rows, float32 products
  const PanelKernel* f64;   // float64 rows and products
  const PanelKernel* bf16;  // bfloat16 rows, paired dot products; null where the CPU has none
};

/// The set in use: the best that this CPU supports, or the one that the environment variable
/// LIAR_CPU_KERNEL names. Throws std::runtime_error if that is unknown or unsupported here.
const KernelSet& kernels();

/// The names of the sets that this CPU supports, best first, separated by ", ".
std::string kernel_names();

}  // namespace liar
