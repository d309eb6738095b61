"""reconstruct never gives a number for what is not one: NaN, and a code that says so."""

import pytest
import torch

from liar_ext import ops
from liar_ext.ops import reference

D, D_OUT = 70, 9
LADDER = torch.tensor([0.0, 1e-3, 1.0, torch.inf], dtype=torch.float64)
NOT_FINITE = -2


def problem(targets, holdout):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, z = random(300, D), random(300, D)
    arguments = {"weight": random(D_OUT, D), "gram": (x.mT @ x).tril()}
    if holdout:
        arguments["holdout"] = (z.mT @ z).tril()
    if targets:
        arguments["cross"] = x.mT @ random(300, D_OUT)
        if holdout:
            arguments["holdout_cross"] = z.mT @ random(300, D_OUT)
    return arguments


CASES = [
    (targets, holdout, name)
    for targets in (False, True)
    for holdout in (False, True)
    for name in problem(targets, holdout)
]


@pytest.mark.parametrize("op", [ops, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("targets", "holdout", "name"), CASES)
def test_no_argument_may_hold_a_nan(op, targets, holdout, name, bad):
    arguments = problem(targets, holdout)
    rows, cols = arguments[name].shape
    places = {(0, 0), (rows - 1, cols - 1), (rows - 1, 0), (rows // 2, cols // 3)}
    for place in places:
        spoilt = {**arguments, name: arguments[name].clone()}
        spoilt[name][place] = bad
        for kept in (torch.arange(0, D, 2), torch.arange(D), torch.arange(0)):
            for errors_only in (False, True):
                weight, error, held_out, info = op.reconstruct(
                    **spoilt, kept=kept, damps=LADDER, errors_only=errors_only
                )
                assert weight.isnan().all() and error.isnan().all() and held_out.isnan().all()
                assert (info[:, 0] == NOT_FINITE).all() and info[:, 1].isnan().all()


@pytest.mark.parametrize("op", [ops, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("fold", ["gram", "holdout"])
def test_an_error_beyond_float64_is_no_error(op, fold):
    arguments = problem(False, True)
    arguments["weight"] *= 1e100
    arguments[fold] = arguments[fold] * 1e150
    weight, error, held_out, info = op.reconstruct(
        **arguments, kept=torch.arange(0, D, 2), damps=LADDER
    )
    assert error.isnan().all() and held_out.isnan().all() and weight.isnan().all()
    assert (info[:, 0] == NOT_FINITE).all()


def test_the_upper_triangle_is_still_not_read():
    arguments = problem(False, True)
    want = ops.reconstruct(**arguments, kept=torch.arange(0, D, 2), damps=LADDER)
    upper = torch.ones(D, D, dtype=torch.bool).triu(1)
    for name in ("gram", "holdout"):
        arguments[name][upper] = torch.nan
    got = ops.reconstruct(**arguments, kept=torch.arange(0, D, 2), damps=LADDER)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_one_bad_site_spoils_no_other():
    arguments = {name: torch.stack([one, one, one]) for name, one in problem(False, True).items()}
    kept = torch.arange(0, D, 2).expand(3, -1)
    want = ops.reconstruct(**arguments, kept=kept, damps=LADDER)
    arguments["gram"][1, 5, 3] = torch.nan
    got = ops.reconstruct(**arguments, kept=kept, damps=LADDER)
    for mine, clean in zip(got, want, strict=True):
        assert torch.equal(mine[0], clean[0]) and torch.equal(mine[2], clean[2])
    assert got[1][1].isnan().all() and (got[3][1, :, 0] == NOT_FINITE).all()


@pytest.mark.parametrize("width", [1, 7])
def test_a_curve_of_nans_says_so(width):
    arguments = problem(False, False)
    for name in ("weight", "gram"):
        for bad in (torch.nan, torch.inf):
            spoilt = {**arguments, name: arguments[name].clone()}
            spoilt[name][3, 2] = bad
            _, error, info = ops.obs_curve(**spoilt, width=width, damp=1e-3, at_least=0)
            assert info[0] != 0 and info[1].isnan() and error.isnan().all()
