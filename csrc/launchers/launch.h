// The launchers behind the schemas of register.cpp, one set for each device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace liar {

using torch::stable::Tensor;

/// Declares the launchers of one device, whose names end in its own.
#define LIAR_LAUNCHERS(device)                                                              \
  void gram_update_##device(Tensor gram, Tensor total, Tensor count, Tensor x,              \
                            std::optional<Tensor> y, std::optional<Tensor> weight);         \
  std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_##device(                          \
      Tensor weight, Tensor gram, Tensor kept, Tensor damps, std::optional<Tensor> holdout, \
      std::optional<Tensor> cross, std::optional<Tensor> holdout_cross, bool errors_only);  \
  std::tuple<Tensor, Tensor, Tensor> obs_curve_##device(                                    \
      Tensor weight, Tensor gram, int64_t width, double damp, int64_t at_least, int64_t groups);

LIAR_LAUNCHERS(cpu)
LIAR_LAUNCHERS(cuda)  // compiled where nvcc was found
#undef LIAR_LAUNCHERS

}  // namespace liar
