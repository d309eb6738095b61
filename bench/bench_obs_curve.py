"""obs_curve beside the same elimination in plain torch, on the shapes of real layers.

Inverting ``G + Λ`` and downdating H takes ``d³ + d³/3`` flops, downdating M ``2 d³/3``, and
``M = WᵀW`` takes ``d_out · d²``: rates are of that work.
"""

import pytest
import torch

from liar_ext import ops, reference

SHAPES = {  # d_out, d, width
    "SmolLM2-135M.mlp": (576, 1536, 1),
    "SmolLM2-135M.attn": (576, 576, 192),
    "BERT-base.mlp": (768, 3072, 1),
    "Qwen2.5-0.5B.mlp": (896, 4864, 1),
    "Llama-2-7B.attn": (4096, 4096, 128),
}
CONTENDERS = {"ours": ops.obs_curve, "torch": reference.obs_curve}
SLOW = 2000  # features: beyond, plain torch takes minutes


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_obs_curve(benchmark, shape, contender):
    d_out, d, width = SHAPES[shape]
    if contender == "torch" and width == 1 and d > SLOW:
        pytest.skip("minutes")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(d, d, generator=generator) @ torch.randn(d, d, generator=generator)
    gram = (x.mT @ x).double()
    weight = torch.randn(d_out, d, generator=generator).double()
    benchmark.pedantic(
        CONTENDERS[contender], (weight, gram, width, 1e-2, 0), rounds=1, warmup_rounds=0
    )
    flops = 2 * d**3 + d_out * d**2
    benchmark.extra_info["gflops"] = round(flops / benchmark.stats.stats.median / 1e9, 1)
