"""Finite or not, against every single place."""

from __future__ import annotations

import math

import pytest
import torch

from liar_ext.calibration.bank_file import all_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_is_seen_wherever_it_is(dtype, bad):
    """Sizes about the width of vector registers, and one that threads would share."""
    for size in (1, 2, 15, 33, 64, 65):
        values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert all_finite(values)
        for at in range(size):
            spoilt = values.clone()
            spoilt[at] = bad
            assert not all_finite(spoilt)
    large = torch.ones(70_001, 3).to(dtype)
    large[-1, 1] = bad
    assert not all_finite(large) and not all_finite(large.T) and all_finite(large[:-1])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_has_no_order_in_torch_is_looked_at_too(dtype):
    values = torch.ones(3, 2).to(dtype)
    spoilt = values.clone()
    spoilt[1, 1] = complex(0, math.inf) if dtype.is_complex else math.nan
    assert all_finite(values) and all_finite(values.conj()) and not all_finite(spoilt)


def test_no_values_are_finite():
    assert all_finite(torch.empty(0, 4))
    assert all_finite(torch.tensor([1, 2]))
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.tensor([largest, -largest]))
