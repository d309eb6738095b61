// obs_curve, the greedy elimination of units. Two symmetric matrices say everything,
//
//     H = (G + Λ)⁻¹        V = WᵀW  of the re-solved weights W
//
// and no step touches the d_out rows of W. Removing unit u costs tr(V_uu S⁻¹) with S = H_uu = C Cᵀ:
//
//     L = C⁻¹ H_u:     E = S⁻¹ H_u:     R = V_u: − ½ V_uu E
//     H ← H − LᵀL      V ← V − EᵀR − RᵀE
//
// Within a block of kLazy steps the matrices stay as they are. Only the diagonal blocks H_uu and
// V_uu of all units are kept up to date, for the costs; the rows of a unit are made when it goes,
// from the rows of L, E and R in the block. Then three products apply the whole block. Traffic is
// d³/kLazy elements instead of d³, and d²·kLazy/2 for the rows.
//
//     width 1   one launch a step: choose, make the column, move the diagonals on
//     width w   choose ─▶ rows ─▶ [S | H_u:] ─forward─▶ L ─backward─▶ E, R ─▶ blocks ─▶ costs,
//               every arrow a batched launch of the solver or of the product
//
// H and V are kept as lower triangles.
#pragma once

#include "choice.cuh"
#include "cholesky.cuh"

namespace liar::cuda {

constexpr int kLazy = 64;

struct Curve {
  std::int64_t d = 0, d_out = 0, width = 1, groups = 1;
  std::int64_t steps = 0;          // units to remove
  const double* weight = nullptr;  // d_out × d
  std::int64_t weight_stride = 0;
  const double* gram = nullptr;  // d × d, lower triangle
  std::int64_t gram_stride = 0;
  double damp = 0;
  std::int64_t* order = nullptr;  // steps
  double* error = nullptr;        // steps + 1, from 0
  double* info = nullptr;         // [code, condition]
  int most_batches = 65535;       // see ProductParams
};

struct CurveState {
  Curve curve;
  std::int64_t units, stride;
  double *h, *v;  // d × d, lower triangle, as of the block's start
  std::int64_t h_stride;
  double *l, *e, *r;          // rows of the block × stride; of width 1, L = E
  double *h_block, *v_block;  // units × width × width, of this step
  double* cost;               // units
  unsigned char* gone;        // units
  std::int64_t* lost;         // groups: the round in which each lost its last unit
  std::int64_t* pivot;        // the unit that goes, of width above 1
  double* lowest;  // width 1: 2 × blocks, each block's least cost of this and the next step
  std::int64_t* lowest_at;  // 2 × blocks
  double* code;
  std::int64_t step;  // steps done
  int rows;           // rows in the block

  LIAR_DEVICE std::int64_t group(std::int64_t unit) const { return unit / (units / curve.groups); }
  LIAR_DEVICE double h_at(std::int64_t i, std::int64_t j) const {
    return h[larger(i, j) * h_stride + smaller(i, j)];
  }
  LIAR_DEVICE double v_at(std::int64_t i, std::int64_t j) const {
    return v[larger(i, j) * stride + smaller(i, j)];
  }
  LIAR_DEVICE bool dead(std::int64_t i) const { return curve.gram[i * curve.gram_stride + i] == 0; }
};

// Books the unit that goes; by one thread. Without a positive definite S it can't go, and then the
// code says so: the rest of the run means nothing, but stays within bounds.
LIAR_DEVICE void record(const CurveState& s, std::int64_t unit, double cost, bool good) {
  if (!good && *s.code == 0) *s.code = static_cast<double>(s.curve.d + s.step + 1);
  s.gone[unit] = 1;
  s.lost[s.group(unit)] = s.step / s.curve.groups;
  s.curve.order[s.step] = unit;
  s.curve.error[s.step + 1] = s.curve.error[s.step] + cost;
}

// Whether unit i may go at `step`, when `last` goes at the step before it: each group loses one
// unit a round. `last` is asked for by name, as another block may not have booked it yet.
LIAR_DEVICE bool eligible(const CurveState& s, std::int64_t i, std::int64_t step,
                          std::int64_t last) {
  if (s.gone[i] || i == last) return false;
  const std::int64_t round = step / s.curve.groups;
  if (s.lost[s.group(i)] == round) return false;
  return last < 0 || s.group(i) != s.group(last) || round != (step - 1) / s.curve.groups;
}

static __global__ void start_curve_kernel(const CurveState s) {
  const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < s.units) s.gone[i] = 0;
  if (i < s.curve.groups) s.lost[i] = -1;
  if (i == 0) s.curve.error[0] = 0;
}

// Diagonal blocks of H and V, a block of threads each. A feature without activations gives nothing
// to the output, so its column of W counts as zero; in H it is tied to no other.
static __global__ void unit_blocks_kernel(const CurveState s) {
  const std::int64_t w = s.curve.width, first = blockIdx.x * w;
  for (std::int64_t e = threadIdx.x; e < w * w; e += blockDim.x) {
    const std::int64_t i = first + e / w, j = first + e % w;
    s.h_block[blockIdx.x * w * w + e] = s.h_at(i, j);
    s.v_block[blockIdx.x * w * w + e] = s.dead(i) || s.dead(j) ? 0 : s.v_at(i, j);
  }
}

// Width 1.

LIAR_DEVICE Candidate candidate(const CurveState& s, std::int64_t i, std::int64_t step,
                                std::int64_t last) {
  const bool may = i < s.units && eligible(s, i, step, last);
  return {may ? cost_of(s.v_block[i] / s.h_block[i]) : INFINITY, may ? i : INT64_MAX};
}

static __global__ void first_features_kernel(const CurveState s) {
  auto& shared = shared_memory<CandidateShared>();
  const std::int64_t i = std::int64_t(blockIdx.x) * kCurveThreads + threadIdx.x;
  const Candidate best = block_best(candidate(s, i, 0, -1), shared);
  if (threadIdx.x == 0) {
    s.lowest[blockIdx.x] = best.cost;
    s.lowest_at[blockIdx.x] = best.at;
  }
}

// One elimination. Every block finds the same pivot from the blocks' least costs, makes its part of
// the pivot's rows, moves its diagonals on, and leaves its least cost for the next step.
static __global__ void eliminate_kernel(const CurveState s) {
  auto& shared = shared_memory<CandidateShared>();
  const std::int64_t now = s.step % 2 * gridDim.x, next = (s.step + 1) % 2 * gridDim.x;
  Candidate pivot{INFINITY, INT64_MAX};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kCurveThreads)
    pivot = better(pivot, {s.lowest[now + b], s.lowest_at[now + b]});
  pivot = block_best(pivot, shared);
  const std::int64_t u = smaller(pivot.at, s.units - 1);
  const std::int64_t i = std::int64_t(blockIdx.x) * kCurveThreads + threadIdx.x;
  const bool mine = i < s.units;

  double h = mine ? s.h_at(u, i) : 0, v = mine ? s.v_at(u, i) : 0;
  double h_uu = s.h_at(u, u), v_uu = s.dead(u) ? 0 : s.v_at(u, u);
  for (int k = 0; k < s.rows; ++k) {
    const double l_u = s.l[k * s.stride + u], r_u = s.r[k * s.stride + u];
    h_uu -= l_u * l_u;
    v_uu -= 2 * l_u * r_u;
    if (mine) {
      const double l_i = s.l[k * s.stride + i], r_i = s.r[k * s.stride + i];
      h -= l_i * l_u;
      v -= r_i * l_u + l_i * r_u;
    }
  }
  if (mine) {
    // The pivot's own column, and those of features that are gone, count as zero from here on.
    const double root = sqrt(h_uu);
    const bool gone = s.gone[i];
    const double l = gone ? 0 : h / root, r = gone ? 0 : v / root - v_uu / h_uu / 2 * l;
    s.l[s.rows * s.stride + i] = l;
    s.r[s.rows * s.stride + i] = r;
    if (i == u) {
      record(s, u, pivot.cost, h_uu > 0 && is_finite(pivot.cost));
    } else if (!gone) {
      s.h_block[i] -= l * l;
      s.v_block[i] -= 2 * l * r;
    }
  }
  const Candidate best = block_best(candidate(s, i, s.step + 1, u), shared);
  if (threadIdx.x == 0) {
    s.lowest[next + blockIdx.x] = best.cost;
    s.lowest_at[next + blockIdx.x] = best.at;
  }
}

// Width above 1.

struct UnitParams {
  CurveState state;
  System pivot;    // [S | H_u:] of the unit that goes
  System costs;    // [H_vv | V_vv] of every unit v
  double* square;  // V_uu of the unit that goes, full
};

// [H_vv | V_vv] as systems to solve; of units that are gone, [I | 0].
static __global__ void cost_systems_kernel(const UnitParams q) {
  const CurveState& s = q.state;
  const System& t = q.costs;
  const std::int64_t unit = blockIdx.x, w = s.curve.width;
  const double *h = s.h_block + unit * w * w, *v = s.v_block + unit * w * w;
  const bool gone = s.gone[unit];
  if (threadIdx.x == 0) t.code[unit] = 0;
  for (std::int64_t e = threadIdx.x; e < w * t.stride; e += blockDim.x) {
    const std::int64_t i = e / t.stride, j = e % t.stride, column = j < w ? j : j - t.right;
    double value = j < w ? double(i == j) : 0;
    if (!gone && column >= 0 && column < w)
      value = (j < w ? h : v)[larger(i, column) * w + smaller(i, column)];
    t.data[unit * t.batch() + e] = value;
  }
}

// tr(H_vv⁻¹ V_vv), a warp each; infinite where H_vv is not positive definite.
static __global__ void unit_costs_kernel(const UnitParams q) {
  const System& t = q.costs;
  const std::int64_t unit = std::int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (unit >= q.state.units) return;
  double sum = 0;
  for (std::int64_t i = threadIdx.x % kWarp; i < t.n; i += kWarp)
    sum += t.data[unit * t.batch() + i * t.stride + t.right + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) q.state.cost[unit] = t.code[unit] == 0 ? cost_of(sum) : INFINITY;
}

// One block.
static __global__ void choose_unit_kernel(const UnitParams q) {
  auto& shared = shared_memory<CandidateShared>();
  const CurveState& s = q.state;
  Candidate best{INFINITY, INT64_MAX};
  for (std::int64_t i = threadIdx.x; i < s.units; i += kCurveThreads)
    if (eligible(s, i, s.step, -1)) best = better(best, {s.cost[i], i});
  best = block_best(best, shared);
  if (threadIdx.x == 0) {
    const std::int64_t unit = smaller(best.at, s.units - 1);
    *s.pivot = unit;
    record(s, unit, best.cost, is_finite(best.cost));
    q.pivot.code[0] = 0;
  }
}

// S and V_uu, and the rows H_u: and V_u: with the block's steps taken off; the latter lie where R
// will. Columns of units that are gone are zero from here on.
static __global__ void unit_rows_kernel(const UnitParams q) {
  const CurveState& s = q.state;
  const System& t = q.pivot;
  const std::int64_t w = s.curve.width, unit = *s.pivot, i = blockIdx.y;
  const std::int64_t j = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t row = unit * w + i;
  if (j < w) {
    const std::int64_t at = unit * w * w + larger(i, j) * w + smaller(i, j);
    t.data[i * t.stride + j] = s.h_block[at];
    q.square[i * w + j] = s.v_block[at];
  }
  if (j >= s.curve.d) return;
  double h = 0, v = 0;
  if (!s.gone[j / w]) {
    h = s.h_at(row, j);
    v = s.v_at(row, j);
    for (int k = 0; k < s.rows; ++k) {
      const std::int64_t at = k * s.stride;
      h -= s.l[at + row] * s.l[at + j];
      v -= s.e[at + row] * s.r[at + j] + s.r[at + row] * s.e[at + j];
    }
  }
  t.data[i * t.stride + t.right + j] = h;
  s.r[(s.rows + i) * s.stride + j] = v;
}

// What stands on the right of the pivot's system becomes rows of L or of E.
struct KeepParams {
  System from;
  double* to;
  std::int64_t stride;
};

static __global__ void keep_rows_kernel(const KeepParams q) {
  const std::int64_t j = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x, i = blockIdx.y;
  if (j < q.from.m) q.to[i * q.stride + j] = q.from.data[i * q.from.stride + q.from.right + j];
}

// The beginning, [G + Λ | I], and the end.

struct CurveParams {
  Curve curve;
  System system;
  double* mean;
};

struct CurveSumShared {
  double scratch[kCurveThreads / kWarp];
};

static __global__ void curve_mean_kernel(const CurveParams q) {
  auto& shared = shared_memory<CurveSumShared>();
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < q.curve.d; i += blockDim.x)
    sum += q.curve.gram[i * q.curve.gram_stride + i];
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) *q.mean = sum > 0 ? sum / static_cast<double>(q.curve.d) : 1;
}

static __global__ void curve_system_kernel(const CurveParams q) {
  const System& s = q.system;
  if (blockIdx.x == 0 && threadIdx.x == 0) s.code[0] = 0;
  for (std::int64_t i = blockIdx.x; i < s.n; i += gridDim.x)
    for (std::int64_t j = threadIdx.x; j < s.stride; j += blockDim.x) {
      double value = 0;
      if (j < s.n)
        value = q.curve.gram[larger(i, j) * q.curve.gram_stride + smaller(i, j)] +
                (i == j ? q.curve.damp * *q.mean : 0);
      else if (j >= s.right && j < s.right + s.m)
        value = j - s.right == i;
      s.data[i * s.stride + j] = value;
    }
}

static __global__ void curve_info_kernel(const CurveParams q) {
  const System& s = q.system;
  double low = s.diagonal[0], high = low;
  for (std::int64_t i = threadIdx.x; i < s.n; i += kWarp) {
    low = smaller(low, s.diagonal[i]);
    high = larger(high, s.diagonal[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    low = smaller(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = larger(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
  const double code = s.code[0];
  if (threadIdx.x == 0) {
    q.curve.info[0] = code;
    q.curve.info[1] = code == 0 ? high / low * (high / low) : NAN;
  }
  if (code == 0) return;
  for (std::int64_t k = threadIdx.x; k <= q.curve.steps; k += kWarp) {
    q.curve.error[k] = NAN;
    if (k < q.curve.steps) q.curve.order[k] = k;
  }
}

}  // namespace liar::cuda
