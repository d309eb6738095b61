"""What is no number is refused with its cause, and never reported as an error of 0."""

import math

import pytest
import torch

from liar_ext import ops
from liar_ext.calibration.moments import Moments
from liar_ext.errors import InputError
from liar_ext.reconstruction.ridge import ratio
from liar_ext.reconstruction.solve import solve


def moments(d=8):
    bank = Moments.zeros(d)
    for fold in range(2):
        x = torch.randn(60, d, generator=torch.Generator().manual_seed(fold))
        count = torch.zeros(2, dtype=torch.float64)
        ops.gram_update_(bank.gram[fold], bank.total[fold], count, x)
        bank.tokens[fold] += count[0]
    return bank


@pytest.mark.parametrize("where", ["weight", "gram"])
@pytest.mark.parametrize("kept", [[0, 2, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_a_nan_is_refused_with_its_cause(where, kept):
    weight, sums = torch.ones(3, 8), moments()
    solve(weight, None, sums, torch.tensor(kept))
    (weight if where == "weight" else sums.gram[0])[2, 1] = torch.nan
    with pytest.raises(InputError, match="must be finite, got"):
        solve(weight, None, sums, torch.tensor(kept))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_ratio_of_nans_is_none(bad):
    one, bad = torch.tensor(1.0), torch.tensor(bad)
    assert math.isnan(ratio(torch.tensor(torch.nan), one)) and math.isnan(ratio(bad, bad))
    assert not ratio(bad, torch.tensor(0.0)) == 0
    assert ratio(torch.tensor(-1e-18), one) == 0 and ratio(one, torch.tensor(0.0)) == 0
