// Scores of units: unit_energy, fisher_update_, and obs_curve, the greedy elimination.
//
// obs_curve keeps H = (G + Λ)⁻¹ and V = WᵀW. Removing feature u of width 1 costs V_uu / H_uu and
// changes W by −W_u H_u: / H_uu, so that with s = H_uu, p = H_:u / √s, v = V_:u / √s, β = V_uu / s
//
//     H ← H − p pᵀ         V ← V − q pᵀ − p qᵀ,   q = v − β/2 · p
//
// and no step touches the d_out rows of W. Within a block of kLazy steps the matrices stay as they
// are; only their diagonals are kept up to date, and a column is made when it is needed, from the
// block's p and q. Then one product does the whole block:
//
//     H −= PᵀP      V −= QᵀP + PᵀQ            (P, Q: kLazy × d, rows are steps)
//
// Traffic is d³/kLazy elements instead of d³, and the block's own columns, d²·kLazy/2 in all.
#pragma once

#include "cholesky.cuh"

namespace liar::cuda {

constexpr int kLazy = 64;
constexpr unsigned kCurveThreads = 256;

struct CurveState {
  std::int64_t d;
  const double *gram, *h, *v;  // d × d; H and V full and as of the block's start
  std::int64_t gram_stride, h_stride, stride;
  double *p, *q;                    // kLazy × stride
  double *h_diagonal, *v_diagonal;  // d, of this step
  unsigned char* gone;              // d
  double* lowest;           // 2 × blocks: each block's least cost, of this step and the next
  std::int64_t* lowest_at;  // 2 × blocks
  double* error;            // one per step: the cost so far, added up
  std::int64_t* order;      // one per step
  std::int64_t step;        // steps done
  int in_block;             // of them in this block
};

struct Candidate {
  double cost;
  std::int64_t at;
};

// The lesser cost, and of equal costs the lower index: the order never depends on the schedule.
LIAR_DEVICE Candidate better(Candidate a, Candidate b) {
  return b.cost < a.cost || (b.cost == a.cost && b.at < a.at) ? b : a;
}

struct CandidateShared {
  double cost[kCurveThreads];
  std::int64_t at[kCurveThreads];
};

LIAR_DEVICE Candidate block_best(Candidate mine, CandidateShared& shared) {
  __syncthreads();  // the last user is done
  shared.cost[threadIdx.x] = mine.cost;
  shared.at[threadIdx.x] = mine.at;
  for (unsigned half = kCurveThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      const Candidate best =
          better({shared.cost[threadIdx.x], shared.at[threadIdx.x]},
                 {shared.cost[threadIdx.x + half], shared.at[threadIdx.x + half]});
      shared.cost[threadIdx.x] = best.cost;
      shared.at[threadIdx.x] = best.at;
    }
  }
  __syncthreads();
  return {shared.cost[0], shared.at[0]};
}

LIAR_DEVICE Candidate candidate(const CurveState& s, std::int64_t i) {
  const bool alive = i < s.d && !s.gone[i];
  return {alive ? s.v_diagonal[i] / s.h_diagonal[i] : INFINITY, alive ? i : INT64_MAX};
}

static __global__ void start_curve_kernel(const CurveState s) {
  auto& shared = shared_memory<CandidateShared>();
  const std::int64_t i = std::int64_t(blockIdx.x) * kCurveThreads + threadIdx.x;
  if (i < s.d) {
    s.h_diagonal[i] = s.h[i * s.h_stride + i];
    // A feature without activations costs nothing, whatever Λ says; it is tied to no other.
    s.v_diagonal[i] = s.gram[i * s.gram_stride + i] == 0 ? 0 : s.v[i * s.stride + i];
    s.gone[i] = 0;
  }
  const Candidate best = block_best(candidate(s, i), shared);
  if (threadIdx.x == 0) {
    s.lowest[blockIdx.x] = best.cost;
    s.lowest_at[blockIdx.x] = best.at;
  }
}

// One elimination. Every block finds the same pivot from the blocks' least costs, makes its part of
// the pivot's columns, moves its diagonals on, and leaves its least cost for the next step.
static __global__ void eliminate_kernel(const CurveState s) {
  auto& shared = shared_memory<CandidateShared>();
  const std::int64_t now = s.step % 2 * gridDim.x, next = (s.step + 1) % 2 * gridDim.x;
  Candidate pivot{INFINITY, INT64_MAX};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kCurveThreads)
    pivot = better(pivot, {s.lowest[now + b], s.lowest_at[now + b]});
  pivot = block_best(pivot, shared);
  const std::int64_t u = pivot.at, i = std::int64_t(blockIdx.x) * kCurveThreads + threadIdx.x;

  // Columns u of H and V; the rows of P and Q that make them up to date lie one stride apart.
  double h = 0, v = 0, s_uu = 0, v_uu = 0;
  if (u < s.d) {
    s_uu = s.h[u * s.h_stride + u];
    v_uu = s.v[u * s.stride + u];
    if (i < s.d) {
      h = s.h[u * s.h_stride + i];
      v = s.v[u * s.stride + i];
    }
    for (int k = 0; k < s.in_block; ++k) {
      const double p_u = s.p[k * s.stride + u], q_u = s.q[k * s.stride + u];
      s_uu -= p_u * p_u;
      v_uu -= 2 * p_u * q_u;
      if (i < s.d) {
        const double p_i = s.p[k * s.stride + i], q_i = s.q[k * s.stride + i];
        h -= p_i * p_u;
        v -= q_i * p_u + p_i * q_u;
      }
    }
  }
  if (i < s.d) {
    // The pivot's own column, and those of features that are gone, are zero from here on.
    const double root = sqrt(s_uu), beta = v_uu / s_uu;
    const bool gone = s.gone[i];
    const double p = gone ? 0 : h / root, q = gone ? 0 : v / root - beta / 2 * p;
    s.p[s.in_block * s.stride + i] = p;
    s.q[s.in_block * s.stride + i] = q;
    if (i == u) {
      s.gone[i] = 1;
      s.order[s.step] = u;
      s.error[s.step] = larger(0.0, pivot.cost) + (s.step > 0 ? s.error[s.step - 1] : 0);
    } else if (!gone) {
      s.h_diagonal[i] -= p * p;
      s.v_diagonal[i] = larger(0.0, s.v_diagonal[i] - 2 * p * q);
    }
  }
  const Candidate best = block_best(candidate(s, i), shared);
  if (threadIdx.x == 0) {
    s.lowest[next + blockIdx.x] = best.cost;
    s.lowest_at[next + blockIdx.x] = best.at;
  }
}

struct EnergyParams {
  const double* weight;  // d_out × d
  std::int64_t weight_stride, d_out;
  const double* gram;  // d × d, lower triangle
  std::int64_t gram_stride, width;
  double* energy;  // d / width
};

struct EnergyShared {
  double scratch[kCurveThreads / kWarp];
};

// tr(W_u G_uu W_uᵀ), one block a unit: a warp takes a row of W_u, a lane its columns.
static __global__ void unit_energy_kernel(const EnergyParams q) {
  auto& shared = shared_memory<EnergyShared>();
  const std::int64_t first = blockIdx.x * q.width;
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double sum = 0;
  for (std::int64_t row = warp; row < q.d_out; row += kCurveThreads / kWarp) {
    const double* w = q.weight + row * q.weight_stride + first;
    for (std::int64_t j = lane; j < q.width; j += kWarp) {
      const double* g = q.gram + (first + j) * q.gram_stride + first;
      double part = g[j] * w[j] / 2;
      for (std::int64_t k = 0; k < j; ++k) part += g[k] * w[k];
      sum += 2 * w[j] * part;
    }
  }
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) q.energy[blockIdx.x] = sum;
}

template <class T>
struct FisherParams {
  const T *x, *grad;  // tokens × d
  std::int64_t x_stride, grad_stride, tokens, width;
  double* fisher;  // d / width
};

// fisher_u += Σ_t (Σ_{i∈u} x_ti g_ti)², one block a unit, a thread a token.
template <class T>
__global__ void fisher_update_kernel(const FisherParams<T> q) {
  auto& shared = shared_memory<EnergyShared>();
  const std::int64_t first = blockIdx.x * q.width;
  double sum = 0;
  for (std::int64_t t = threadIdx.x; t < q.tokens; t += kCurveThreads) {
    double mask_gradient = 0;
    for (std::int64_t i = first; i < first + q.width; ++i)
      mask_gradient +=
          to_double(q.x[t * q.x_stride + i]) * to_double(q.grad[t * q.grad_stride + i]);
    sum += mask_gradient * mask_gradient;
  }
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) q.fisher[blockIdx.x] += sum;
}

inline void unit_energy(const EnergyParams& q, std::int64_t units, Stream& stream) {
  launch(unit_energy_kernel, {static_cast<unsigned>(units), 1, 1}, kCurveThreads,
         sizeof(EnergyShared), stream, q);
}

template <class T>
void fisher_update(const FisherParams<T>& q, std::int64_t units, Stream& stream) {
  launch(fisher_update_kernel<T>, {static_cast<unsigned>(units), 1, 1}, kCurveThreads,
         sizeof(EnergyShared), stream, q);
}

// The host side of obs_curve.

struct Curve {
  std::int64_t d = 0, d_out = 0, steps = 0;  // steps: features to remove
  const double* weight = nullptr;            // d_out × d
  std::int64_t weight_stride = 0;
  const double* gram = nullptr;  // d × d, lower triangle
  std::int64_t gram_stride = 0;
  double damp = 0;
  std::int64_t* order = nullptr;  // steps
  double* error = nullptr;        // steps
  double* info = nullptr;         // [code, condition]
};

struct CurveParams {
  Curve curve;
  System system;  // [G + Λ | I]
  double* mean;
};

static __global__ void curve_mean_kernel(const CurveParams q) {
  auto& shared = shared_memory<EnergyShared>();
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < q.curve.d; i += blockDim.x)
    sum += q.curve.gram[i * q.curve.gram_stride + i];
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) *q.mean = sum == 0 ? 1 : sum / static_cast<double>(q.curve.d);
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
  if (threadIdx.x == 0) {
    q.curve.info[0] = s.code[0];
    q.curve.info[1] = s.code[0] == 0 ? high / low * (high / low) : NAN;
  }
  if (s.code[0] != 0)
    for (std::int64_t k = threadIdx.x; k < q.curve.steps; k += kWarp) q.curve.error[k] = NAN;
}

// Width 1. Returns the bytes of workspace; with a workspace, launches.
inline std::int64_t obs_curve(const Curve& c, void* memory, Stream& stream) {
  Workspace workspace(memory);
  const std::int64_t d = c.d, stride = divide_up(d, 2) * 2;
  const auto blocks = static_cast<unsigned>(divide_up(d, kCurveThreads));
  CurveParams params{c, System::lay_out(d, d, 1, workspace), workspace.take<double>(1)};
  CurveState s{};
  s.d = d;
  s.gram = c.gram;
  s.gram_stride = c.gram_stride;
  s.h_stride = params.system.stride;
  s.stride = stride;
  s.p = workspace.take<double>(kLazy * s.stride);
  s.q = workspace.take<double>(kLazy * s.stride);
  double* v = workspace.take<double>(d * s.stride);
  s.h_diagonal = workspace.take<double>(d);
  s.v_diagonal = workspace.take<double>(d);
  s.gone = workspace.take<unsigned char>(d);
  s.lowest = workspace.take<double>(2 * blocks);
  s.lowest_at = workspace.take<std::int64_t>(2 * blocks);
  s.error = c.error;
  s.order = c.order;
  if (!memory || c.steps == 0) return workspace.bytes();

  launch(curve_mean_kernel, {1, 1, 1}, kCurveThreads, sizeof(EnergyShared), stream, params);
  const auto rows = static_cast<unsigned>(smaller<std::int64_t>(d, 65535));
  launch(curve_system_kernel, {rows, 1, 1}, 256, 0, stream, params);
  solve(params.system, stream);
  double* h = params.system.data + params.system.right;
  s.h = h;
  s.v = v;
  const auto add = [&](const double* a, const double* b, std::int64_t in_stride, std::int64_t depth,
                       double* out, std::int64_t out_stride, double alpha, bool accumulate) {
    ProductParams<double> q;
    q.a = {a, in_stride, d, 0};
    q.b = {b, in_stride, d, 0};
    q.depth = depth;
    q.out = out;
    q.out_stride = out_stride;
    q.alpha = alpha;
    q.accumulate = accumulate;
    product<Mma64>(q, stream);
  };
  add(c.weight, c.weight, c.weight_stride, c.d_out, v, stride, 1, false);
  launch(start_curve_kernel, {blocks, 1, 1}, kCurveThreads, sizeof(CandidateShared), stream, s);
  for (s.step = 0; s.step < c.steps; ++s.step) {
    launch(eliminate_kernel, {blocks, 1, 1}, kCurveThreads, sizeof(CandidateShared), stream, s);
    if (++s.in_block == kLazy && s.step + 1 < c.steps) {
      add(s.p, s.p, s.stride, kLazy, h, s.h_stride, -1, true);
      add(s.q, s.p, s.stride, kLazy, v, stride, -1, true);
      add(s.p, s.q, s.stride, kLazy, v, stride, -1, true);
      s.in_block = 0;
    }
  }
  launch(curve_info_kernel, {1, 1, 1}, kWarp, 0, stream, params);
  return workspace.bytes();
}

}  // namespace liar::cuda
