// Cholesky factorisation and solves of [A | B], many matrices at once, in f64.
//
// A = UᵀU with U upper, row-major; B (n × m) becomes A⁻¹B. All heavy work is product.cuh's AᵀB:
//
//        p        n      n+m        1  factor:  U_pp = chol(A_pp), and its inverse, in one block
//      ┌────┬──────┬──────┐         2  row:     [U_p* | Y_p] = U_pp⁻ᵀ [A_p* | B_p]
//    p │U_pp│ U_p* │ Y_p  │         3  update:  A_** −= U_p*ᵀ U_p*     (triangle only)
//      ├────┼──────┼──────┤                     B_*  −= U_p*ᵀ Y_p
//      │    │ A_** │ B_*  │         then upwards:  X_p = U_pp⁻¹ Y_p,  Y_above −= U_above,p X_p
//      └────┴──────┴──────┘
//
// so the forward solve costs no pass of its own. The upward update multiplies by U, not Uᵀ; the
// panel is transposed into scratch first, n²/2 elements moved in all against n²m products.
// kPanel = 64 is the product's tile: one tile row, so that step 2 can write over what it reads.
#pragma once

#include "block.cuh"
#include "product.cuh"
#include "workspace.cuh"

namespace liar::cuda {

constexpr int kPanel = 64;
using Mma64 = MmaF64<false>;
static_assert(Mma64::kTile == kPanel);

struct System {
  double* data = nullptr;  // batches × n × stride: A, then at column `right` B
  std::int64_t n = 0, right = 0, m = 0, stride = 0;
  int batches = 0;
  double *inverse = nullptr, *inverse_transposed = nullptr;  // batches × n × kPanel
  double* panel = nullptr;                                   // batches × kPanel × right
  double* diagonal = nullptr;                                // batches × n: of U
  double* code = nullptr;                                    // batches: as LAPACK's info

  LIAR_BOTH std::int64_t batch() const { return n * stride; }

  Operand<double> part(std::int64_t row, std::int64_t column, std::int64_t columns) const {
    return {data + row * stride + column, stride, columns, batch()};
  }

  // Rows start on 16 bytes, B's too.
  static System lay_out(std::int64_t n, std::int64_t m, int batches, Workspace& workspace) {
    System s;
    s.n = n;
    s.m = m;
    s.right = divide_up(n, 2) * 2;
    s.stride = s.right + divide_up(m, 2) * 2;
    s.batches = batches;
    const std::int64_t panels = divide_up(n, kPanel) * kPanel;
    s.data = workspace.take<double>(batches * s.batch());
    s.inverse = workspace.take<double>(batches * panels * kPanel);
    s.inverse_transposed = workspace.take<double>(batches * panels * kPanel);
    s.panel = workspace.take<double>(batches * kPanel * s.right);
    s.diagonal = workspace.take<double>(batches * n);
    s.code = workspace.take<double>(batches);
    return s;
  }
};

struct FactorParams {
  System system;
  std::int64_t p;  // first row of the panel
};

struct FactorShared {
  double u[kPanel][kPanel + 1];
  double inverse[kPanel][kPanel + 1];
};

constexpr unsigned kFactorThreads = 256;

// One block per matrix: U_pp and its inverse. Past the end of A the block is padded with the
// identity. A pivot that is not positive sets `code` once and is replaced by 1: what follows is
// meaningless but finite in time, and the caller discards it.
static __global__ void factor_kernel(const FactorParams params) {
  auto& shared = shared_memory<FactorShared>();
  const System& s = params.system;
  const std::int64_t p = params.p, batch = blockIdx.x;
  const int size = static_cast<int>(smaller<std::int64_t>(kPanel, s.n - p));
  double* a = s.data + batch * s.n * s.stride + p * s.stride + p;
  auto& u = shared.u;
  auto& inverse = shared.inverse;

  for (int e = threadIdx.x; e < kPanel * kPanel; e += blockDim.x) {
    const int i = e / kPanel, j = e % kPanel;
    u[i][j] = i < size && j < size && j >= i ? a[i * s.stride + j] : double(i == j);
    inverse[i][j] = i == j;
  }
  __syncthreads();
  for (int k = 0; k < kPanel; ++k) {
    const double pivot = u[k][k];
    const bool good = pivot > 0 && is_finite(pivot);
    const double root = good ? sqrt(pivot) : 1.0;
    if (threadIdx.x == 0 && !good && s.code[batch] == 0)
      s.code[batch] = static_cast<double>(p + k + 1);
    __syncthreads();  // everybody has the pivot before it changes
    if (threadIdx.x < kPanel && int(threadIdx.x) >= k)
      u[k][threadIdx.x] = int(threadIdx.x) == k ? root : u[k][threadIdx.x] / root;
    __syncthreads();
    for (int e = threadIdx.x; e < kPanel * kPanel; e += blockDim.x) {
      const int i = e / kPanel, j = e % kPanel;
      if (i > k && j >= i) u[i][j] -= u[k][i] * u[k][j];
    }
    __syncthreads();
  }
  // Columns of U⁻¹ by back substitution, one thread each.
  if (threadIdx.x < kPanel) {
    const int j = threadIdx.x;
    for (int i = j; i >= 0; --i) {
      double x = inverse[i][j];
      for (int k = i + 1; k <= j; ++k) x -= u[i][k] * inverse[k][j];
      inverse[i][j] = x / u[i][i];
    }
  }
  __syncthreads();
  const std::int64_t panels = divide_up(s.n, kPanel) * kPanel;
  const std::int64_t at = (batch * panels + p) * kPanel;
  for (int e = threadIdx.x; e < kPanel * kPanel; e += blockDim.x) {
    const int i = e / kPanel, j = e % kPanel;
    if (i < size && j < size && j >= i) a[i * s.stride + j] = u[i][j];
    s.inverse[at + e] = inverse[i][j];
    s.inverse_transposed[at + e] = inverse[j][i];
  }
  if (int(threadIdx.x) < size)
    s.diagonal[batch * s.n + p + threadIdx.x] = u[threadIdx.x][threadIdx.x];
}

// panel[k][i] = U[i][p + k] for the rows above p, by way of a 32×32 tile.
struct TransposeShared {
  double tile[32][33];
};

static __global__ void transpose_panel_kernel(const FactorParams params) {
  auto& shared = shared_memory<TransposeShared>();
  const System& s = params.system;
  const std::int64_t p = params.p, batch = blockIdx.y, first = std::int64_t(blockIdx.x) * 32;
  const std::int64_t width = smaller<std::int64_t>(kPanel, s.n - p);
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const double* from = s.data + batch * s.n * s.stride;
  double* to = s.panel + batch * kPanel * s.right;
  for (int k = 0; k < kPanel; k += 32) {
    for (int i = y; i < 32; i += 8)
      shared.tile[i][x] =
          first + i < p && k + x < width ? from[(first + i) * s.stride + p + k + x] : 0;
    __syncthreads();
    for (int i = y; i < 32; i += 8)
      if (first + x < p) to[(k + i) * s.right + first + x] = shared.tile[x][i];
    __syncthreads();
  }
}

// out (+)= α AᵀB for every system; with no b, the upper triangle of AᵀA.
inline void multiply(const System& s, Operand<double> a, Operand<double> b, std::int64_t depth,
                     double* out, double alpha, bool accumulate, Stream& stream) {
  ProductParams<double> q;
  q.a = a;
  q.b = b;
  q.depth = depth;
  q.out = out;
  q.out_stride = s.stride;
  q.out_batch = s.batch();
  q.alpha = alpha;
  q.accumulate = accumulate;
  q.upper = true;
  q.batches = s.batches;
  product<Mma64>(q, stream);
}

// The half solve: B becomes U⁻ᵀB. `code` must be zero before.
inline void solve_forward(const System& s, Stream& stream) {
  const std::int64_t panels = divide_up(s.n, kPanel) * kPanel;
  const auto batches = static_cast<unsigned>(s.batches);
  for (std::int64_t p = 0; p < s.n; p += kPanel) {
    const std::int64_t size = smaller<std::int64_t>(kPanel, s.n - p), next = p + size;
    launch(factor_kernel, {batches, 1, 1}, kFactorThreads, sizeof(FactorShared), stream,
           FactorParams{s, p});
    const Operand<double> inverse{s.inverse + p * kPanel, kPanel, size, panels * kPanel};
    const Operand<double> rest = s.part(p, next, s.n - next), right = s.part(p, s.right, s.m);
    multiply(s, inverse, rest, size, s.data + p * s.stride + next, 1, false, stream);
    multiply(s, inverse, right, size, s.data + p * s.stride + s.right, 1, false, stream);
    if (next == s.n) continue;
    multiply(s, rest, {}, size, s.data + next * s.stride + next, -1, true, stream);
    multiply(s, rest, right, size, s.data + next * s.stride + s.right, -1, true, stream);
  }
}

// The other half, after it: B becomes U⁻¹B.
inline void solve_backward(const System& s, Stream& stream) {
  const std::int64_t panels = divide_up(s.n, kPanel) * kPanel;
  const auto batches = static_cast<unsigned>(s.batches);
  for (std::int64_t p = panels - kPanel; p >= 0; p -= kPanel) {
    const std::int64_t size = smaller<std::int64_t>(kPanel, s.n - p);
    const Operand<double> right = s.part(p, s.right, s.m);
    multiply(s, {s.inverse_transposed + p * kPanel, kPanel, size, panels * kPanel}, right, size,
             s.data + p * s.stride + s.right, 1, false, stream);
    if (p == 0) continue;
    launch(transpose_panel_kernel, {static_cast<unsigned>(divide_up(p, 32)), batches, 1}, 256,
           sizeof(TransposeShared), stream, FactorParams{s, p});
    multiply(s, {s.panel, s.right, p, kPanel * s.right}, right, size, s.data + s.right, -1, true,
             stream);
  }
}

inline void solve(const System& s, Stream& stream) {
  solve_forward(s, stream);
  solve_backward(s, stream);
}

}  // namespace liar::cuda
