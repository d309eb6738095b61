// The CUDA launchers behind the schemas of register.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace liar {

using torch::stable::Tensor;

void gram_update_cuda(Tensor gram, Tensor total, Tensor count, Tensor x, std::optional<Tensor> y,
                      std::optional<Tensor> weight);

std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_cuda(
    Tensor weight, Tensor gram, Tensor kept, Tensor damps, std::optional<Tensor> holdout,
    std::optional<Tensor> cross, std::optional<Tensor> holdout_cross, bool errors_only);

}  // namespace liar
