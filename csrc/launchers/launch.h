// The launchers behind the schemas of register.cpp. Names end in the device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace liar {

using torch::stable::Tensor;

void gram_update_cpu(Tensor gram, Tensor total, Tensor count, Tensor x, std::optional<Tensor> y,
                     std::optional<Tensor> weight);
std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_cpu(
    Tensor weight, Tensor gram, Tensor kept, Tensor damps, std::optional<Tensor> holdout,
    std::optional<Tensor> cross, std::optional<Tensor> holdout_cross, bool errors_only);
std::tuple<Tensor, Tensor, Tensor> obs_curve_cpu(Tensor weight, Tensor gram, int64_t width,
                                                 double damp, int64_t at_least, int64_t groups);

// Compiled where nvcc was found.
void gram_update_cuda(Tensor gram, Tensor total, Tensor count, Tensor x, std::optional<Tensor> y,
                      std::optional<Tensor> weight);
std::tuple<Tensor, Tensor, Tensor> solve_small_cuda(Tensor block, Tensor side, Tensor shifts);
void eliminate_cuda(Tensor h, Tensor v, Tensor unit, Tensor lost, Tensor order, Tensor error,
                    Tensor left, Tensor right, Tensor gone, Tensor h_diagonal, Tensor v_diagonal,
                    int64_t first, int64_t per_group);

}  // namespace liar
