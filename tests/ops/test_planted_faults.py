"""Faults planted in the plain-torch solves are noticed, each by its difference to the oracle."""

import sys
import types
from pathlib import Path

import oracle
import pytest
import torch
from test_ops_obs_curve import gram_of, problem
from test_ops_reconstruct import LADDER

from liar_ext.ops import reference

FAULTS = {
    "wrong damp": ("shifts = damps * mean", "shifts = damps * mean.sqrt()"),
    "mean over all features": ("block.diagonal().mean()", "gram.diag().mean()"),
    "lost column of the held-out sums": (
        "held_rows[:, kept]",
        "held_rows[:, kept].index_fill(1, kept.new_tensor([2]), 0.0)",
    ),
    "wrong sign of a trace": ("- shift * _dot(v, x)", "+ shift * _dot(v, x)"),
    "half of a trace": ("- 2 * _dot(v, held_side)", "- _dot(v, held_side)"),
    "target without its damping": ("- _dot(v, pulled)", ""),
    "upper triangle": ("full = gram.tril()", "full = gram.triu()"),
    "metric of the outputs": (
        "x if metric is None else x @ metric",
        "x",
    ),
    "highest of equal units": (
        "cost.argmin(0, keepdim=True)",
        "len(cost) - 1 - cost.flip(0).argmin(0, keepdim=True)",
    ),
    "ranks closed in another order": (
        "gone.to(torch.int8).argsort(stable=True)",
        "gone.to(torch.int8).argsort(stable=True).flip(0)",
    ),
    "names kept after ranks are closed": ("s.unit[stays]", "s.unit[: len(stays)]"),
    "whole square": ("square[slot][0] / 2 @", "square[slot][0] @"),
    "one turned product lost": ("torch.cat([right, left])", "torch.cat([right, 0 * left])"),
    "panel not taken off a row": ("(s.h[own] - l_u @ left)", "s.h[own]"),
    "no round of groups": ("(s.lost[group] == step // groups)", "(s.lost[group] == step)"),
    "dead features that cost": ("torch.where(diagonal == 0, 0.0, ", "torch.add(0.0, "),
}


def module_with(old: str, new: str):
    """Return plain torch of the same source, but for one place."""
    source = Path(reference.__file__).read_text("utf-8")
    assert source.count(old) == 1, old
    name = "reference_with_a_fault"
    changed = types.ModuleType(name)
    sys.modules[name] = changed  # a dataclass looks its module up
    exec(compile(source.replace(old, new), name, "exec"), changed.__dict__)
    return changed


def agrees(found, want) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-8, atol=1e-8 * float(b.nan_to_num().abs().max()))
        for a, b in zip(found, want, strict=True)
        if len(b)
    )


def solves(module) -> bool:
    """Tell whether a module's solves are those of the oracle: few outputs, many, and targets."""
    for d_out, targets in ((3, False), (20, False), (3, True)):
        weight, x = problem(80, 12, d_out)
        other = problem(60, 12, d_out, seed=1)[1]
        kept = torch.tensor([0, 1, 4, 5, 6, 9, 11])
        crosses = [one.mT @ (one @ weight.mT + 1) for one in (x, other)] if targets else []
        arguments = weight, gram_of(x), kept, LADDER, gram_of(other), *crosses
        if not agrees(module.reconstruct(*arguments), oracle.reconstruct(*arguments)):
            return False
    return True


def curves(module) -> bool:
    """Tell whether a module's curves are: two panels, groups, wide units, dead and equal ones."""
    weight, x = problem(200, 70, 5)
    x[:, [3, 20]] = 0
    equal = torch.ones(3, 70, dtype=torch.float64), torch.eye(70, dtype=torch.float64)
    for given, width, groups in (
        ((weight, gram_of(x)), 1, 1),
        ((weight, gram_of(x)), 1, 5),
        ((weight, gram_of(x)), 14, 1),
        (equal, 1, 1),
    ):
        arguments = *given, width, 1e-2, 0, groups
        if not agrees(module.obs_curve(*arguments), oracle.obs_curve(*arguments)):
            return False
    return True


def test_without_a_fault_they_agree():
    assert solves(reference) and curves(reference)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault):
    module = module_with(*FAULTS[fault])
    assert not (solves(module) and curves(module))
