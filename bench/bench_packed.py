"""Linear layers of few rows, as a language model has them while it writes: torch.mm and oneDNN.

The layers of four blocks are multiplied in turn, and the head, so weights come from memory.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liar_ext.calibration.generated import packed

# Of SmolLM2-135M: output and input features, and how many.
LAYERS = ((1536, 576, 8), (576, 1536, 4), (576, 576, 8), (192, 576, 8), (49152, 576, 1))


@pytest.mark.parametrize("contender", ["ours", "torch_mm"])
@pytest.mark.parametrize("rows", [1, 5, 43])
def test_linear_layers_of_few_rows(measure, benchmark, rows, contender):
    """Five rows are those of 16 sequences of text, 43 those of 128."""
    benchmark.group = f"linear layers, {rows} rows"
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(d, out, bias=False) for out, d, n in LAYERS for _ in range(n))
    given = {d: torch.randn(rows, d) for d in (576, 1536)}
    flops = rows * sum(2 * layer.weight.numel() for layer in layers)

    def call() -> None:
        for layer in layers:
            layer(given[layer.in_features])

    with torch.no_grad():
        if contender == "torch_mm":
            measure(call, flops=flops, dtype=torch.float32)
        else:
            with packed(layers, rows):
                measure(call, flops=flops, dtype=torch.float32)
