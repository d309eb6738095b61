"""obs_curve beside torch's inverse alone, on the shapes of real layers.

Inverting ``G + Λ`` takes ``d³`` flops, downdating H and M over all removals ``d³/3`` and
``2 d³/3``, and ``M = WᵀW`` takes ``d_out · d²``: rates are of that work.
"""

import pytest
import torch

from liar_ext import ops

SHAPES = {  # d_out, d, width
    "SmolLM2-135M.mlp": (576, 1536, 1),
    "SmolLM2-135M.attn": (576, 576, 192),
    "BERT-base.mlp": (768, 3072, 1),
    "Qwen2.5-0.5B.mlp": (896, 4864, 1),
    "Llama-2-7B.attn": (4096, 4096, 128),
}


def ours(weight, gram, width):
    flops = 2 * len(gram) ** 3 + weight.numel() * len(gram)
    return lambda: ops.obs_curve(weight, gram, width, 1e-2, 0), flops


def torch_inverse(weight, gram, width):
    """Half of the work, with nothing chosen yet."""
    shifted = gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return lambda: torch.cholesky_inverse(torch.linalg.cholesky(shifted)), len(gram) ** 3


CONTENDERS = {"ours": ours, "torch_inverse": torch_inverse}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_obs_curve(measure, benchmark, shape, contender):
    d_out, d, width = SHAPES[shape]
    benchmark.group = f"obs_curve {shape}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(d, d, generator=generator) @ torch.randn(d, d, generator=generator)
    weight = torch.randn(d_out, d, generator=generator).double()
    call, flops = CONTENDERS[contender](weight, (x.mT @ x).double(), width)
    measure(call, flops=flops, dtype=torch.float64, rounds=2)
