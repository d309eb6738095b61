// The cheapest of many candidates, in an order that never depends on the schedule.
#pragma once

#include "device.cuh"

namespace liar::cuda {

constexpr unsigned kCurveThreads = 256;

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

}  // namespace liar::cuda
