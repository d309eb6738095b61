// The CPU launchers behind the schemas of register.cpp.
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

}  // namespace liar
