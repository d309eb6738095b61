"""The norm that reads what a layer gives is told from what scales along, and from a sum's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liar_ext.suggest.trace import Call, Trace


class Block(nn.Module):
    """An MLP, then a dropout, and what ``kind`` says between that and the stream."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down, self.out = (nn.Linear(*d) for d in ((6, 9), (9, 6), (6, 6)))
        self.dropout, self.norm = nn.Dropout(), nn.RMSNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.down(self.up(x).relu()))
        if self.kind == "of the sum":
            return self.norm(x + y)
        if self.kind == "beside":
            return x + y + self.norm(y)
        return x + (self.norm(y) if self.kind == "alone" else self.out(y))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "norm"), [("alone", "norm"), ("of the sum", ""), ("beside", ""), ("a layer", "")]
)
def test_the_norm_after_a_layer(kind, norm):
    torch.manual_seed(0)
    block = Block(kind).double().eval()
    trace = Trace(Call(block, (torch.randn(2, 11, 6, dtype=torch.float64),), {}))
    assert trace.norm_after("down") == norm
