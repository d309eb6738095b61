// A panel of the greedy elimination of single features, one launch a step.
// liar_ext/ops/reference.py has the formulas, wider units, and what comes before and after a panel.
// With width 1, N = V_uu / H_uu is the cost, and the rows of unit u are
//
//     L = H_u: / √H_uu        R = V_u: / √H_uu − ½ N L
//
// H and V stay as they were when the panel began. Only their diagonals are kept up to date, and the
// rows of a unit are made when it goes, from those of the panel so far.
#pragma once

#include "../calls.h"
#include "block.cuh"
#include "workspace.cuh"

namespace liar::cuda {

constexpr unsigned kPanelThreads = 256;

struct Candidate {
  double cost;
  std::int64_t at;
};

// The lesser cost, and of equal costs the lower index: the order never depends on the schedule.
LIAR_DEVICE Candidate better(Candidate a, Candidate b) {
  return b.cost < a.cost || (b.cost == a.cost && b.at < a.at) ? b : a;
}

// Rounding may take a cost below 0; one that is no number is the last to be chosen.
LIAR_DEVICE double cost_of(double trace) { return trace > 0 ? trace : trace <= 0 ? 0 : INFINITY; }

struct CandidateShared {
  double cost[kPanelThreads];
  std::int64_t at[kPanelThreads];
};

LIAR_DEVICE Candidate block_best(Candidate mine, CandidateShared& shared) {
  __syncthreads();  // the last user is done
  shared.cost[threadIdx.x] = mine.cost;
  shared.at[threadIdx.x] = mine.at;
  for (unsigned half = kPanelThreads / 2; half > 0; half /= 2) {
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

struct PanelState {
  PanelCall call;
  double* lowest;           // 2 × blocks: each block's least cost of this and of the next step
  std::int64_t* lowest_at;  // 2 × blocks
  std::int64_t row;         // of the panel

  LIAR_DEVICE std::int64_t group(std::int64_t i) const { return call.unit[i] / call.per_group; }
  LIAR_DEVICE std::int64_t round(std::int64_t r) const { return (call.first + r) / call.groups; }
};

// Whether i may go as row r of the panel, when `last` goes as the row before: each group loses one
// unit a round. `last` is asked for by name, as another block may not have booked it yet.
LIAR_DEVICE bool eligible(const PanelState& s, std::int64_t i, std::int64_t r, std::int64_t last) {
  if (s.call.gone[i] || i == last) return false;
  if (s.call.lost[s.group(i)] == s.round(r)) return false;
  return last < 0 || s.group(i) != s.group(last) || s.round(r) != s.round(r - 1);
}

LIAR_DEVICE Candidate candidate(const PanelState& s, std::int64_t i, std::int64_t r,
                                std::int64_t last) {
  const bool may = i < s.call.n && eligible(s, i, r, last);
  return {may ? cost_of(s.call.v_diagonal[i] / s.call.h_diagonal[i]) : INFINITY,
          may ? i : INT64_MAX};
}

static __global__ void first_features_kernel(const PanelState s) {
  auto& shared = shared_memory<CandidateShared>();
  const std::int64_t i = std::int64_t(blockIdx.x) * kPanelThreads + threadIdx.x;
  const Candidate best = block_best(candidate(s, i, 0, -1), shared);
  if (threadIdx.x == 0) {
    s.lowest[blockIdx.x] = best.cost;
    s.lowest_at[blockIdx.x] = best.at;
  }
}

// One elimination. Every block finds the same pivot from the blocks' least costs, makes its part of
// the pivot's rows, moves its diagonals on, and leaves its least cost for the next step.
static __global__ void eliminate_kernel(const PanelState s) {
  auto& shared = shared_memory<CandidateShared>();
  const PanelCall& q = s.call;
  const std::int64_t now = s.row % 2 * gridDim.x, next = (s.row + 1) % 2 * gridDim.x;
  Candidate pivot{INFINITY, INT64_MAX};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kPanelThreads)
    pivot = better(pivot, {s.lowest[now + b], s.lowest_at[now + b]});
  pivot = block_best(pivot, shared);
  const std::int64_t u = smaller(pivot.at, q.n - 1);
  const std::int64_t i = std::int64_t(blockIdx.x) * kPanelThreads + threadIdx.x;
  const bool mine = i < q.n;

  double h = mine ? q.h[u * q.n + i] : 0, v = mine ? q.v[u * q.n + i] : 0;
  double h_uu = q.h[u * q.n + u], v_uu = q.v[u * q.n + u];
  for (std::int64_t k = 0; k < s.row; ++k) {
    const double *left = q.left + k * q.n, *right = q.right + k * q.n;
    const double l_u = left[u], r_u = right[u];
    h_uu -= l_u * l_u;
    v_uu -= 2 * l_u * r_u;
    if (mine) {
      h -= left[i] * l_u;
      v -= right[i] * l_u + left[i] * r_u;
    }
  }
  if (mine) {
    const double root = sqrt(h_uu), l = h / root, r = v / root - v_uu / h_uu / 2 * l;
    q.left[s.row * q.n + i] = l;
    q.right[s.row * q.n + i] = r;
    if (i == u) {
      const std::int64_t step = q.first + s.row;
      q.gone[u] = true;
      q.lost[s.group(u)] = s.round(s.row);
      q.order[step] = q.unit[u];
      q.error[step + 1] = q.error[step] + (h_uu > 0 ? pivot.cost : INFINITY);
    } else if (!q.gone[i]) {
      q.h_diagonal[i] -= l * l;
      q.v_diagonal[i] -= 2 * l * r;
    }
  }
  const Candidate best = block_best(candidate(s, i, s.row + 1, u), shared);
  if (threadIdx.x == 0) {
    s.lowest[next + blockIdx.x] = best.cost;
    s.lowest_at[next + blockIdx.x] = best.at;
  }
}

// Returns the bytes of workspace; with a workspace, launches.
inline std::int64_t eliminate(const PanelCall& q, void* memory, Stream& stream) {
  Workspace workspace(memory);
  const auto blocks = static_cast<unsigned>(divide_up(q.n, kPanelThreads));
  PanelState s{q, workspace.take<double>(2 * blocks), workspace.take<std::int64_t>(2 * blocks), 0};
  if (!memory) return workspace.bytes();
  launch(first_features_kernel, {blocks, 1, 1}, kPanelThreads, sizeof(CandidateShared), stream, s);
  for (; s.row < q.count; ++s.row)
    launch(eliminate_kernel, {blocks, 1, 1}, kPanelThreads, sizeof(CandidateShared), stream, s);
  return workspace.bytes();
}

}  // namespace liar::cuda
