"""unit_energy and fisher_update_ beside the same in plain torch, on the shapes of real layers.

Products ``W_uᵀW_u`` take ``d_out · d · width`` flops, squared mask gradients 2 an element: rates
are of that work.
"""

import pytest
import torch

from liar_ext import ops

ENERGY = {  # d_out, d, width
    "SmolLM2-135M.mlp": (576, 1536, 1),
    "SmolLM2-135M.attn": (576, 576, 192),
    "BERT-base.mlp": (768, 3072, 1),
    "BERT-base.attn": (768, 768, 64),
}
FISHER = {  # d, width, dtype; 4 sequences of 512 tokens
    "SmolLM2-135M.mlp, float32": (1536, 1, torch.float32),
    "SmolLM2-135M.mlp, bfloat16": (1536, 1, torch.bfloat16),
    "SmolLM2-135M.attn, float32": (576, 192, torch.float32),
    "SmolLM2-135M.attn, bfloat16": (576, 192, torch.bfloat16),
}


def torch_energy(weight, gram, width):
    units = len(gram) // width
    blocks = gram.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = blocks.tril() + blocks.tril(-1).mT
    columns = weight.reshape(-1, units, width)
    return torch.einsum("oui,uij,ouj->u", columns, blocks, columns)


def torch_fisher(fisher, x, grad, width):
    product = (x.float() * grad.float()).reshape(len(x), -1, len(fisher), width)
    fisher += product.sum((1, 3), dtype=torch.float64).square().sum(0)


@pytest.mark.parametrize("contender", ["ours", "torch"])
@pytest.mark.parametrize("shape", ENERGY)
def test_unit_energy(measure, shape, contender):
    d_out, d, width = ENERGY[shape]
    x = torch.randn(d, d, dtype=torch.float64)
    weight, gram = torch.randn(d_out, d, dtype=torch.float64), x.mT @ x
    op = ops.unit_energy if contender == "ours" else torch_energy
    measure(lambda: op(weight, gram, width), flops=d_out * d * (width + 1), dtype=torch.float64)


@pytest.mark.parametrize("contender", ["ours", "torch"])
@pytest.mark.parametrize("shape", FISHER)
def test_fisher_update(measure, shape, contender):
    d, width, dtype = FISHER[shape]
    x, grad = torch.randn(2, 4, 512, d).to(dtype)
    fisher = torch.zeros(d // width, dtype=torch.float64)
    op = ops.fisher_update_ if contender == "ours" else torch_fisher
    measure(lambda: op(fisher, x, grad, width), flops=2 * x.numel(), dtype=torch.float64)
