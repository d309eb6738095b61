"""Random calls of the operators, each with what it has to come to.

A call either agrees with the float64 oracle, or is spoilt in one argument and has to be refused
with an error that names the operator, its arguments untouched. Tensors have any stride, dtype and
value, by a source of choices with ``integer(low, high)``, both included, and ``pick(options)``:
:class:`RandomChoices`, or what hypothesis draws in `test_fuzz.py`, so that it can shrink what the
command of `fuzz.py` finds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIZES = (0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 65)
WIDTHS = (1, 1, 2, 3, 8, 20)
KINDS = ("normal", "normal", "integers", "zeros", "tiny", "large")
WIDE = (torch.float32, torch.float64)
DAMPS = (1e-3, 1e-2, 1.0, torch.inf)
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


@dataclass
class Call:
    """An operator, its arguments by name, and what is known of them."""

    operator: str
    arguments: dict
    written: dict[str, Tensor] = field(default_factory=dict)  # what surrounds them
    spoilt: str = ""  # how: the call has to be refused
    finite: bool = True  # whether every argument is

    def tensors(self) -> dict[str, Tensor]:
        """Return the arguments that are tensors."""
        return {name: a for name, a in self.arguments.items() if isinstance(a, Tensor)}


def gram_update_(choices) -> Call:
    """Sums of any dtype over tokens of any, with weights and NaNs among them."""
    tokens, d = choices.pick((*SIZES, 130, 1100)), choices.pick(SIZES)
    cols = choices.pick((None, None, *SIZES))
    dtype, wide, kind = choices.pick(FLOATS), choices.pick(WIDE), choices.pick(KINDS)
    call = Call("gram_update_", {})
    shapes = {"gram": (d, d if cols is None else cols), "total": (d,), "count": (2,)}
    for name, shape in shapes.items():
        start = numbers(choices, *shape, kind=choices.pick(("zeros", "integers")))
        dtype_of = torch.float64 if name == "count" else wide
        call.arguments[name], call.written[name] = surrounded(choices, start.to(dtype_of))
    rows = {"x": d} if cols is None else {"x": d, "y": cols}
    for name, width in rows.items():
        values = numbers(choices, tokens, width, kind=kind).to(dtype).double()
        if choices.integer(0, 3) == 0:
            beyond = (1e30, -1e20) if dtype in (torch.bfloat16, *WIDE) else ()
            spoil_values(choices, values, (torch.nan, torch.inf, -torch.inf, *beyond))
        call.arguments[name] = laid_out(choices, values, dtype)
    call.arguments["weight"] = _token_weights(choices, tokens)
    return call


def _token_weights(choices, tokens: int) -> Tensor | None:
    """Return none, a mask, or weights of which some are 0 and perhaps some are none."""
    kind = choices.pick(("none", "mask", "float32", "float64"))
    if kind == "none":
        return None
    values = numbers(choices, tokens).clamp(min=0)
    if kind == "mask":
        return values > 0
    if choices.integer(0, 3) == 0:
        spoil_values(choices, values, (torch.nan, torch.inf, -1.0, 1e20))
    weight = values.to(getattr(torch, kind))
    if choices.integer(0, 1):
        return weight
    return torch.stack([weight, weight + 1], dim=1)[:, 0]


def reconstruct(choices) -> Call:
    """One site or several, any part kept, with or without held-out sums and dense targets."""
    sites, d = choices.pick((None, None, None, None, 0, 1, 3)), choices.pick((1, *SIZES))
    d_out, lead = choices.pick(SIZES), () if sites is None else (sites,)
    n = choices.integer(0, d)
    keeps = numbers(choices, *lead, d).argsort(-1)[..., :n].sort(-1).values
    call = Call("reconstruct", {})

    def add(name: str, values: Tensor, dtypes) -> None:
        if choices.integer(0, 15) == 0:
            call.finite &= not spoil_values(choices, values)
        tensor = laid_out(choices, values, choices.pick(dtypes), ("contiguous", "padded rows"))
        call.arguments[name] = tensor

    kind = choices.pick(("normal", "normal", "integers", "zeros"))
    add("weight", numbers(choices, *lead, d_out, d, kind=kind), FLOATS)
    add("gram", _gram(choices, *lead, d), WIDE)
    call.arguments["kept"] = keeps
    ladder = [choices.pick(DAMPS) for _ in range(choices.pick((0, 1, 1, 2, 3, 4)))]
    call.arguments["damps"] = torch.tensor(ladder, dtype=torch.float64)
    held_out, dense = choices.integer(0, 1), choices.integer(0, 1)
    if held_out:
        add("holdout", _gram(choices, *lead, d), WIDE)
    for name, wanted in (("cross", dense), ("holdout_cross", dense and held_out)):
        if wanted:
            add(name, numbers(choices, *lead, d, d_out), FLOATS)
    call.arguments["errors_only"] = bool(choices.integer(0, 1))
    return call


def _gram(choices, *shape: int) -> Tensor:
    """Return Gram matrices of tokens of any number, or of none; NaN above the diagonal at times."""
    *lead, d = shape
    x = numbers(choices, *lead, choices.pick((0, 1, d, 2 * d + 1)), d, kind=choices.pick(KINDS[:3]))
    if d and choices.integer(0, 3) == 0:
        x[..., choices.integer(0, d - 1)] = 0  # a dead feature
    gram = x.mT @ x
    if choices.integer(0, 1):
        gram[..., torch.ones(d, d, dtype=torch.bool).triu(1)] = torch.nan
    return gram


def obs_curve(choices) -> Call:
    """Units of any width and number, in groups or not, down to any number that stays."""
    call, width = Call("obs_curve", {}), choices.pick(WIDTHS)
    units = choices.pick((1, 2, 3, 4, 6, 12, 33)) if width < 20 else choices.pick((1, 2, 4))
    d, d_out = units * width, choices.pick(SIZES)
    kind = choices.pick(("normal", "integers", "zeros"))
    weight, gram = numbers(choices, d_out, d, kind=kind), _gram(choices, d)
    for values in (weight, gram):
        if choices.integer(0, 15) == 0:
            call.finite &= not spoil_values(choices, values)
    call.arguments["weight"] = laid_out(choices, weight, choices.pick(FLOATS))
    call.arguments["gram"] = laid_out(choices, gram, choices.pick(WIDE), ("contiguous", "strided"))
    call.arguments["width"] = width
    groups = choices.pick([g for g in range(1, units + 1) if units % g == 0])
    call.arguments["damp"] = choices.pick((1e-3, 1e-2, 1.0))
    call.arguments["at_least"] = groups * choices.integer(0, units // groups)
    call.arguments["groups"] = groups
    return call
