"""The kernels of reconstruct and obs_curve as a GPU would run them, executed on the host.

What torch does around them is what it does on a GPU.
"""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
from host_kernels import LARGE, kernels

from liar_ext.ops import reference

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("unchanged")]

DAMPS = torch.tensor([0.0, 1e-3, 0.5, torch.inf], dtype=torch.float64)
FORMS = {"plain": 0, "held-out": 1, "targets": 3}


def solve(block, side, shifts):
    """Solve as `backends._solve_by_kernel` does, with NaNs where nobody may read."""
    above = np.triu(np.full(block.shape, np.nan), 1)
    x, code, diagonal = map(
        torch.from_numpy,
        kernels().solve_small(np.tril(block.numpy()) + above, side.numpy(), shifts.numpy()),
    )
    return zip(x, code, reference.condition_of(diagonal), strict=True)


def eliminate(s, first, count):
    """Remove single features as `backends._eliminate_by_kernel` does."""
    state = (one.numpy() for one in (s.h, s.v, s.unit, s.lost, s.order, s.error))
    found = kernels().eliminate(*state, first, count, s.per_group)
    return tuple(map(torch.from_numpy, found))


reconstruct = partial(reference.reconstruct, solve=solve)
obs_curve = partial(reference.obs_curve, eliminate=eliminate)


def problem(seed, d, d_out, n=0, tokens=None):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens or 3 * d + 2, d)) @ (np.eye(d) + 0.3)
    other = rng.standard_normal((2 * d + 1, d))
    upper = np.triu(np.full((d, d), np.nan), 1)  # nobody may read it
    weight, kept = rng.standard_normal((d_out, d)), np.sort(rng.permutation(d)[:n])
    crosses = (one.T @ rng.standard_normal((len(one), d_out)) for one in (x, other))
    sums = (np.tril(one.T @ one) + upper for one in (x, other))
    gram, holdout = map(torch.from_numpy, sums)
    weight, kept, *crosses = map(torch.from_numpy, (weight, kept, *crosses))
    return weight, gram, kept, holdout, *crosses


def close(got, want, rtol=1e-9):
    for a, b in zip(got, want, strict=True):
        scale = b.nan_to_num().abs().max() if b.numel() else 0
        torch.testing.assert_close(a, b, rtol=rtol, atol=float(rtol * scale), equal_nan=True)


def equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# A warp's 32 rows and its edges, and all 128 of a block; slices of 128 columns.
SIZES = [(1, 1, 1), (2, 3, 1), (9, 4, 0), (7, 5, 7), (70, 9, 63), (90, 30, 65), (40, 0, 31)]
SIZES += [(40, 5, 31), (300, 129, 32), (40, 33, 33), (140, 7, 127), (130, 4, 128), (330, 300, 9)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_block_a_system_agrees_with_the_oracle(size, form):
    weight, gram, kept, *extra = problem(1, *size)
    arguments = (weight, gram, kept, DAMPS, *extra[: FORMS[form]])
    close(reconstruct(*arguments), oracle.reconstruct(*arguments))


def test_sites_are_solved_as_if_alone():
    items = [problem(seed, 70, 9, 66) for seed in range(3)]
    weight, gram, kept, holdout, *_ = (torch.stack(each) for each in zip(*items, strict=True))
    got = reconstruct(weight, gram, kept, DAMPS, holdout)
    for i in range(3):
        alone = reconstruct(weight[i], gram[i], kept[i], DAMPS, holdout[i])
        assert equal([each[i] for each in got], alone)


def test_a_wrong_lane_is_seen():
    arguments = *problem(9, 40, 6, 33)[:3], DAMPS
    right = reconstruct(*arguments)
    kernels().configure(shifted_shuffles=True)
    assert not torch.equal(right[0][1], reconstruct(*arguments)[0][1])


@pytest.mark.parametrize("order", [1, 5])
def test_solves_in_any_order(order):
    arguments = *problem(2, 90, 20, 66)[:3], DAMPS
    first = reconstruct(*arguments)
    kernels().configure(order=order)
    assert equal(first, reconstruct(*arguments))


def test_a_pivot_that_is_not_positive_is_told_by_its_code():
    weight, gram, kept, *_ = problem(3, 80, 6, 70, tokens=20)
    gram[5], gram[:, 5] = 0, 0  # a dead feature makes the failure exact
    kept = torch.tensor(sorted({*kept.tolist(), 5}))
    damps = torch.tensor([0.0, 1e-2, torch.inf], dtype=torch.float64)
    new, error, _, info = reconstruct(weight, gram, kept, damps)
    assert info[0, 0] == kept.tolist().index(5) + 1 and info[0, 1].isnan()
    assert new[0].isnan().all() and error[0].isnan()
    assert (info[1:, 0] == 0).all() and new[1:].isfinite().all() and error[1] < error[2]


# 64 features make a panel, 256 a block of threads.
CURVES = [
    (1, 1, 0),
    (9, 1, 0),
    (9, 3, 3),
    (70, 1, 0),
    (70, 7, 14),
    pytest.param(270, 1, 100, marks=LARGE),
    pytest.param(300, 3, 0, marks=LARGE),
]


@pytest.mark.parametrize(("d", "groups", "at_least"), CURVES)
def test_curve_agrees_with_the_oracle(d, groups, at_least):
    arguments = *problem(d, d, 7)[:2], 1, 1e-2, at_least, groups
    got, want = obs_curve(*arguments), oracle.obs_curve(*arguments)
    assert torch.equal(got[0], want[0]) and (got[1].diff() >= 0).all()
    close(got, want, 1e-8)


def test_dead_features_go_first_and_cost_nothing():
    weight, gram, *_ = problem(4, 70, 6)
    gram = gram.tril().nan_to_num()
    for i in (3, 17, 66):
        gram[i], gram[:, i] = 0, 0
    order, error, _ = obs_curve(weight, gram, 1, 0.1, 0)
    assert order[:3].tolist() == [3, 17, 66] and not error[:4].any() and error[4] > 0


@pytest.mark.parametrize(("groups", "first"), [(1, [0, 1, 2]), (2, [0, 35, 1, 36])])
def test_equal_costs_take_the_lower_index(groups, first):
    """Also in the second panel, whose features have moved."""
    order, *_ = obs_curve(torch.ones(3, 70), torch.eye(70), 1, 1e-2, 0, groups)
    assert order[: len(first)].tolist() == first
    assert order.view(-1, groups).T.tolist() == torch.arange(70).view(groups, -1).tolist()


@pytest.mark.parametrize("bad", ["gram", "weight"])
def test_a_curve_that_cannot_be_says_so(bad):
    weight, gram = torch.ones(2, 8), torch.eye(8) * (bad != "gram")
    weight[:, 4:] *= torch.inf if bad == "weight" else 1
    order, error, info = obs_curve(weight, gram, 1, 0.0, 0)
    assert (info[0] == 1 if bad == "gram" else info[0] > 8) and error.isnan().all()
    assert order.tolist() == list(range(8))


@pytest.mark.parametrize(("d", "at_least"), [(70, 0), (600, 570)])
@pytest.mark.parametrize("order", [1, 6])
def test_curve_in_any_order(d, at_least, order):
    """Of threads, and at 600 features of the blocks that share a step."""
    arguments = *problem(5, d, 6)[:2], 1, 1e-2, at_least
    first = obs_curve(*arguments)
    kernels().configure(order=order)
    assert equal(first, obs_curve(*arguments))


def test_every_barrier_is_needed_and_its_loss_seen():
    # Three warps hold candidates; then two blocks of threads do, and the first pivots are in the
    # second.
    weight, gram, *_ = problem(8, 90, 20)
    wide_weight, wide_gram, *_ = problem(8, 260, 20)
    wide_weight[:, 256:] *= 1e-3
    jobs = [
        partial(reconstruct, *problem(5, 70, 40, 66)[:3], DAMPS[1:3]),
        partial(reconstruct, *problem(7, 300, 170, 40)[:3], DAMPS[1:3]),
        partial(obs_curve, weight, gram, 1, 1e-2, 84),
        partial(obs_curve, wide_weight, wide_gram, 1, 1e-2, 256),
    ]
    kernels().configure()
    right = [job() for job in jobs]
    sites = sorted(kernels().synchronization_sites())

    def survives(site):
        for order in (0, 1, 5, 6):
            for job, want in zip(jobs, right, strict=True):
                kernels().configure(order=order, removed={site})
                if not equal(want, job()):
                    return False
        return True

    assert len(sites) >= 6 and [s for s in sites if survives(s)] == []
