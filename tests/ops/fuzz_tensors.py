"""Tensors of any stride, dtype and value, from a source of choices.

A source of choices has ``integer(low, high)``, both included, and ``pick(options)``:
:class:`RandomChoices` here, or what hypothesis draws in `test_fuzz.py`. The same calls are made of
both, so that what the command of `fuzz.py` finds, hypothesis can shrink.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SENTINEL = 7.0  # what surrounds a tensor that is written to
LAYOUTS = ("contiguous", "contiguous", "padded rows", "transposed", "strided", "expanded")


class RandomChoices:
    """Choices of a seed."""

    def __init__(self, seed: object):
        self._random = random.Random(str(seed))

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high."""
        return self._random.randint(low, high)

    def pick(self, options):
        """Return one of the options."""
        return options[self._random.randrange(len(options))]


def numbers(choices, *shape: int, kind: str = "normal") -> Tensor:
    """Return float64 values of a kind: normal, small integers, zeros, or of a far scale."""
    generator = torch.Generator().manual_seed(choices.integer(0, 2**31))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "integers":
        return (3 * values).round()
    return values * {"normal": 1.0, "zeros": 0.0, "tiny": 1e-30, "large": 1e13}[kind]


def spoil_values(choices, values: Tensor, wrong=(torch.nan, torch.inf, -torch.inf)) -> bool:
    """Overwrite up to three entries by what is not a number; return whether there were any."""
    flat = values.view(-1)
    count = choices.integer(1, 3) if len(flat) else 0
    for _ in range(count):
        flat[choices.integer(0, len(flat) - 1)] = choices.pick(wrong)
    return count > 0


def laid_out(choices, values: Tensor, dtype: torch.dtype, layouts=LAYOUTS) -> Tensor:
    """Return ``values`` as ``dtype`` with strides of some layout.

    An expanded tensor repeats its first row, and so has other values.
    """
    values, layout = values.to(dtype), choices.pick(layouts)
    if layout == "contiguous" or values.dim() < 2:
        return values
    rows, cols = values.shape[-2:]
    lead = values.shape[:-2]
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "expanded" and rows > 0:
        return values[..., :1, :].expand(values.shape)
    step = 2 if layout == "strided" else 1
    base = torch.full((*lead, rows * step + 1, cols * step + 3), SENTINEL).to(dtype)
    view = base[..., 1 : 1 + rows * step : step, 2 : 2 + cols * step : step]
    view.copy_(values)
    return view


def surrounded(choices, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy with contiguous columns, and the larger tensor that it is a part of."""
    shape = values.shape
    if len(shape) == 1:
        base = values.new_full((shape[0] + 2,), SENTINEL)
        view = base[1 : 1 + shape[0]]
    else:
        pad = choices.integer(0, 3)
        base = values.new_full((shape[0] + 2, shape[1] + pad), SENTINEL)
        view = base[1 : 1 + shape[0], : shape[1]]
    view.copy_(values)
    return view, base


def overwritten_outside(view: Tensor, base: Tensor) -> bool:
    """Say whether anything but ``view`` was written; ``view`` is filled on the way."""
    view.fill_(SENTINEL)
    return bool((base != SENTINEL).any())
