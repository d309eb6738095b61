from __future__ import annotations

import pytest
import torch
from torch import nn

from liar_ext.calibration.taps import Ended, replaced, watched


def test_a_watched_module_gives_what_it_gave():
    layer, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    plain = layer(x)

    def watch(args, output):
        seen.append((args, output))
        return torch.zeros(1)  # which is no new output

    with watched(layer, watch):
        assert torch.equal(layer(x), plain)
    layer(x)
    ((args, output),) = seen
    assert args[0] is x and torch.equal(output, plain)


def test_hooks_are_removed_when_a_pass_ends_early():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)

    def end(args, output):
        raise Ended(output)

    with pytest.raises(Ended) as ended, watched(layer, end):
        layer(x)
    assert torch.equal(ended.value.args[0], layer(x)) and not layer._forward_hooks


def test_a_replaced_forward_is_given_back():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with replaced(layer, lambda x: -x):
        assert torch.equal(layer(x), -x)
        with replaced(layer, lambda x: 2 * x):
            assert torch.equal(layer(x), 2 * x)
        assert torch.equal(layer(x), -x)
    assert "forward" not in vars(layer) and layer(x).shape == (4, 2)
