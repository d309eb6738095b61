"""obs_curve against solving again from the tokens for every candidate, and on degenerate input."""

import math

import oracle
import pytest
import torch
from covers import cover
from oracle import by_threads, gram_of

from liar_ext import ops
from liar_ext.ops import dispatch, reference

DAMP = 1e-3


def problem(tokens=200, d=24, d_out=5, seed=0):
    return oracle.problem(tokens, d, d_out, seed)


def shift_of(x, damp):
    return damp * (float(x.square().sum(0).mean()) or 1.0)


def objective(weight, x, gone, width, shift):
    """Brute force: fold the gone units into the others by least squares on augmented tokens."""
    weight = torch.where(x.square().sum(0) == 0, 0.0, weight)
    units = weight.shape[1] // width
    goes = torch.zeros(units, width, dtype=torch.bool)
    goes[list(gone)] = True
    goes = goes.flatten()
    rows = torch.cat([x, math.sqrt(shift) * torch.eye(len(goes), dtype=x.dtype)])
    target = rows[:, goes] @ weight[:, goes].mT
    if goes.all():
        return target.square().sum()
    change = torch.linalg.lstsq(rows[:, ~goes], target).solution
    return (rows[:, ~goes] @ change - target).square().sum()


def check_by_brute_force(weight, x, width, groups=1, damp=DAMP, at_least=0):
    order, error, info = ops.obs_curve(weight, gram_of(x), width, damp, at_least, groups)
    units, shift = weight.shape[1] // width, shift_of(x, damp)
    every = float(objective(weight, x, range(units), width, shift))
    tolerance = (1e-10 + 1e-14 / damp) * every  # rounding grows with the condition
    assert info[0] == 0
    assert len(order) == units - at_least == len(set(order.tolist())) and error[0] == 0
    for k in range(len(order)):
        gone, done = order[:k].tolist(), k // groups * groups
        lost = {unit * groups // units for unit in order[done:k].tolist()}
        candidates = [u for u in range(units) if u not in gone and u * groups // units not in lost]
        assert int(order[k]) in candidates
        best = min(float(objective(weight, x, [*gone, u], width, shift)) for u in candidates)
        assert abs(float(error[k + 1]) - best) <= tolerance, k


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (1, 3), (2, 1), (2, 4), (6, 1), (24, 1)])
def test_every_choice_is_the_best_there_is(width, groups):
    check_by_brute_force(*problem(), width, groups)


@pytest.mark.parametrize("at_least", [0, 3, 12])
def test_stops_at_the_least_count(at_least):
    check_by_brute_force(*problem(), 2, at_least=at_least)


def degenerate(kind):
    weight, x = problem()
    if kind == "few tokens":
        x = x[:5]
    elif kind == "one token":
        x = x[:1]
    elif kind == "duplicates":
        x[:, 12:] = x[:, :12]
    elif kind == "duplicates that cancel":
        x[:, 12:] = x[:, :12]
        weight[:, 12:] = -weight[:, :12]
    elif kind == "dead":
        x[:, ::2] = 0
    elif kind == "half dead units":
        x[:, 1::4] = 0
    elif kind == "all dead":
        x = torch.zeros_like(x)
    elif kind == "no outputs":
        weight = torch.zeros_like(weight)
    elif kind == "huge scale":
        x = x * 1e12
    elif kind == "tiny scale":
        x = x * 1e-12
    return weight, x


@cover(
    2,
    width=[1, 2],
    damp=[1e-6, 1e-2],
    kind=[
        "few tokens",
        "one token",
        "duplicates",
        "duplicates that cancel",
        "dead",
        "half dead units",
        "all dead",
        "no outputs",
        "huge scale",
        "tiny scale",
    ],
)
def test_degenerate_input_is_normal_input(kind, damp, width):
    check_by_brute_force(*degenerate(kind), width, damp=damp)


def test_dead_units_go_first_and_cost_nothing():
    weight, x = problem()
    x[:, [3, 17, 20]] = 0
    order, error, _ = ops.obs_curve(weight, gram_of(x), 1, DAMP, 0)
    assert order[:3].tolist() == [3, 17, 20]
    assert not error[:4].any() and error[4] > 0


# Panels and row blocks of the kernel end at 64 and 256.
@pytest.mark.parametrize(
    ("d", "width", "groups"),
    [(63, 1, 1), (65, 1, 5), (130, 1, 1), (520, 1, 1), (260, 20, 1), (330, 66, 1), (512, 32, 4)],
)
def test_matches_the_reference(d, width, groups):
    weight, x = problem(2 * d, d, 17)
    got = ops.obs_curve(weight, gram_of(x), width, DAMP, groups, groups)
    want = oracle.obs_curve(weight, gram_of(x), width, DAMP, groups, groups)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=1e-9 * float(want[1][-1]))
    torch.testing.assert_close(got[2], want[2])
    assert all(a.is_contiguous() for a in got)


def test_error_less_the_damping_is_the_error_of_reconstruct():
    """The objective is tr(ΔW G ΔWᵀ) + Λ|ΔW|², and reconstruct reports the first term."""
    weight, x = problem()
    order, error, _ = ops.obs_curve(weight, gram_of(x), 1, DAMP, 0)
    for k in (1, 8, 20):
        stays = torch.ones(24, dtype=torch.bool)
        stays[order[:k]] = False
        kept = stays.nonzero().flatten()
        own_mean = x.square().sum(0)[kept].mean()
        damp = torch.tensor([shift_of(x, DAMP) / float(own_mean)], dtype=torch.float64)
        new, plain, _, _ = ops.reconstruct(weight, gram_of(x), kept, damp)
        change = (new[0] - weight[:, kept]).square().sum() + weight[:, ~stays].square().sum()
        torch.testing.assert_close(error[k], plain[0] + shift_of(x, DAMP) * change)


def test_a_gram_that_cannot_be_factored_is_reported():
    weight, x = problem()
    x[:, 7] = x[:, 3]
    for op in (ops.obs_curve, reference.obs_curve):
        order, error, info = op(weight, torch.zeros(24, 24), 1, 0.0, 0)
        assert info[0] == 1 and info[1].isnan() and error.isnan().all()
        assert order.tolist() == list(range(24))


@pytest.mark.parametrize("width", [1, 2])
def test_a_weight_that_is_no_number_is_reported(width):
    weight, x = problem()
    weight[0, 3] = torch.nan
    for op in (ops.obs_curve, reference.obs_curve):
        _, error, info = op(weight, gram_of(x), width, DAMP, 0)
        assert info[0] > 0 and error.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_arguments_are_widened_and_left_alone(dtype):
    weight, x = problem()
    x[:, 5] = 0
    weight, gram = weight.to(dtype), gram_of(x).float()
    before = weight.clone(), gram.clone()
    got = ops.obs_curve(weight, gram, 2, DAMP, 0)
    want = ops.obs_curve(weight.double(), gram.double(), 2, DAMP, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(weight, before[0]) and torch.equal(gram.tril(), before[1].tril())


def test_strided_arguments_equal_contiguous():
    weight, x = problem()
    gram = gram_of(x)
    wide = torch.zeros(24, 60, dtype=torch.float64)
    wide[:, :24] = gram
    got = ops.obs_curve(weight.mT.contiguous().mT, wide[:, :24], 1, DAMP, 0)
    want = ops.obs_curve(weight, gram, 1, DAMP, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(bool(dispatch.MISSING), reason="what torch does not promise")
@pytest.mark.parametrize("width", [1, 20])
def test_bit_identical_whatever_the_threads(width):
    weight, x = problem(1300, 600, 40)
    arguments = weight, gram_of(x), width, DAMP, 0
    first, *others = by_threads(lambda: ops.obs_curve(*arguments), 1, 1, 2)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (3, 2)])
def test_opcheck_and_meta(width, groups):
    weight, x = problem()
    gram = x.mT @ x
    op = torch.ops.liar_ext.obs_curve.default
    torch.library.opcheck(op, (weight, gram, width, DAMP, groups, groups))
    order, error, info = ops.obs_curve(weight.to("meta"), gram.to("meta"), width, DAMP, 2)
    assert (len(order), len(error), len(info)) == (24 // width - 2, 24 // width - 1, 2)


def test_rejected_arguments_name_the_rule_and_the_remedy():
    weight, x = problem()
    gram = x.mT @ x
    cases = [
        ((weight[0], gram, 1, DAMP, 0), r"weight must be a float tensor \(d_out, d\)"),
        ((weight, gram[:5], 1, DAMP, 0), r"gram must be \(24, 24\), got \(5, 24\)"),
        ((weight, gram.half(), 1, DAMP, 0), "gram must be float32 or float64"),
        ((weight, gram, 5, DAMP, 0), "width must divide the 24 features, got 5"),
        ((weight, gram, 0, DAMP, 0), "width must divide the 24 features, got 0"),
        ((weight, gram, 1, DAMP, 25), "at_least must be a multiple of groups from 0 to 24"),
        ((weight, gram, 1, DAMP, 1, 2), "at_least must be a multiple of groups"),
        ((weight, gram, 1, DAMP, 0, 5), "groups must divide the 24 units, got 5"),
        ((weight, gram, 1, -1.0, 0), "damp must be finite and at least 0, got -1"),
        ((weight, gram, 1, math.inf, 0), "damp must be finite"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match="obs_curve: .*" + message):
            ops.obs_curve(*arguments)
