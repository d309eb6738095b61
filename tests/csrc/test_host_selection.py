"""obs_curve as the GPU would compute it, executed on the host."""

import numpy as np
import pytest
import torch
from host_kernels import LARGE, kernels

from liar_ext.ops import reference

pytestmark = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def unchanged():
    kernels().configure()
    yield
    kernels().configure()


def problem(seed, d, d_out):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * d, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)))
    return rng.standard_normal((d_out, d)), np.tril(x.T @ x) + np.triu(np.full((d, d), np.nan), 1)


def full(gram):
    lower = np.tril(np.nan_to_num(gram))
    return lower + np.tril(lower, -1).T


def compare(weight, gram, width, damp, at_least=0, groups=1, rtol=1e-8):
    got = kernels().obs_curve(weight, gram, width, damp, at_least, groups)
    tensors = torch.from_numpy(weight), torch.from_numpy(full(gram))
    want = [a.numpy() for a in reference.obs_curve(*tensors, width, damp, at_least, groups)]
    assert np.array_equal(got[0], want[0])
    np.testing.assert_allclose(
        got[1], want[1], rtol=rtol, atol=rtol * np.nanmax(want[1], initial=0)
    )
    np.testing.assert_allclose(got[2], want[2], rtol=rtol)
    return got


# 64 steps make a lazy block, 64 features a panel of the solver, 256 features a block of threads.
@pytest.mark.parametrize(
    ("d", "width", "groups", "at_least"),
    [
        (1, 1, 1, 0),
        (9, 1, 1, 0),
        (9, 1, 3, 3),
        (70, 1, 1, 0),
        (70, 1, 7, 14),
        pytest.param(270, 1, 1, 100, marks=LARGE),
        (12, 2, 1, 0),
        (12, 3, 2, 2),
        (20, 20, 1, 0),
        (66, 33, 1, 0),
        (130, 65, 1, 0),
        pytest.param(140, 7, 4, 4, marks=LARGE),
        pytest.param(160, 20, 1, 1, marks=LARGE),
        pytest.param(192, 64, 1, 0, marks=LARGE),
        pytest.param(260, 65, 2, 0, marks=LARGE),
        pytest.param(384, 128, 1, 0, marks=LARGE),
        pytest.param(384, 192, 1, 0, marks=LARGE),
    ],
)
def test_agrees_with_the_reference(d, width, groups, at_least):
    weight, gram = problem(d + width, d, 7)
    order, error, info = compare(weight, gram, width, 1e-2, at_least, groups)
    assert len(order) == d // width - at_least and info[0] == 0 and (np.diff(error) >= 0).all()


def test_removing_nothing_still_reports():
    weight, gram = problem(1, 12, 4)
    for width in (1, 3):
        order, error, info = compare(weight, gram, width, 1e-2, at_least=12 // width)
        assert len(order) == 0 and list(error) == [0] and info[1] > 1


@pytest.mark.parametrize("width", [1, 2])
def test_dead_features_go_first_and_cost_nothing(width):
    weight, gram = problem(4, 20, 6)
    dead = [4, 5, 10, 11]
    gram[dead] = np.where(np.isnan(gram[dead]), np.nan, 0)
    gram[:, dead] = np.where(np.isnan(gram[:, dead]), np.nan, 0)
    order, error, _ = compare(weight, gram, width, 0.1)
    first = dead if width == 1 else [2, 5]
    assert list(order[: len(first)]) == first
    assert (error[: len(first) + 1] == 0).all() and error[len(first) + 1] > 0


def test_half_dead_units_count_by_their_live_half():
    weight, gram = problem(5, 24, 6)
    gram[1::4] = np.where(np.isnan(gram[1::4]), np.nan, 0)
    gram[:, 1::4] = np.where(np.isnan(gram[:, 1::4]), np.nan, 0)
    compare(weight, gram, 2, 1e-2)


@pytest.mark.parametrize("width", [1, 4])
def test_equal_costs_take_the_lower_index(width):
    weight = np.ones((3, 16))
    order, *_ = kernels().obs_curve(weight, np.eye(16), width, 1e-2)
    assert list(order) == list(range(16 // width))
    order, *_ = kernels().obs_curve(weight, np.eye(16), width, 1e-2, groups=2)
    half = 16 // width // 2
    assert list(order) == [g * half + k for k in range(half) for g in range(2)]


@pytest.mark.parametrize("width", [1, 2])
def test_singular_gram_without_damping_says_so(width):
    order, error, info = kernels().obs_curve(np.ones((2, 4)), np.zeros((4, 4)), width, 0.0)
    assert info[0] == 1 and np.isnan(info[1]) and np.isnan(error).all()
    assert list(order) == list(range(4 // width))


@pytest.mark.parametrize("width", [1, 2])
def test_costs_that_are_not_finite_say_so(width):
    weight = np.ones((2, 8))
    weight[:, 4:] = np.inf
    order, error, info = kernels().obs_curve(weight, np.eye(8), width, 1e-2)
    assert info[0] > 8 and np.isnan(error).all() and list(order) == list(range(8 // width))


@pytest.mark.parametrize(("d", "width", "at_least"), [(70, 1, 0), (600, 1, 570), (70, 10, 0)])
@pytest.mark.parametrize("order", [1, 6])
def test_curve_in_any_order(d, width, at_least, order):
    """Of threads, and at 600 features of the blocks that share a step."""
    weight, gram = problem(5, d, 6)
    first = kernels().obs_curve(weight, gram, width, 1e-2, at_least)
    kernels().configure(order=order, late_copies=False)
    again = kernels().obs_curve(weight, gram, width, 1e-2, at_least)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_wrong_fragment_is_seen():
    weight, gram = problem(9, 24, 6)
    right = kernels().obs_curve(weight, gram, 4, 1e-2)
    kernels().configure(swapped_fragments=True)
    assert not np.array_equal(kernels().obs_curve(weight, gram, 4, 1e-2)[1], right[1])


def test_every_barrier_is_needed_and_its_loss_seen():
    # Three warps hold candidates, single features or units; then two blocks of threads do, and the
    # first pivots are in the second.
    weight, gram = problem(8, 140, 20)
    wide_weight, wide_gram = problem(8, 260, 20)
    wide_weight[:, 256:] *= 1e-3
    jobs = [
        lambda: kernels().obs_curve(weight[:, :90], gram[:90, :90], 1, 1e-2, at_least=84),
        lambda: kernels().obs_curve(weight, gram, 2, 1e-2, at_least=66),
        lambda: kernels().obs_curve(wide_weight, wide_gram, 1, 1e-2, at_least=256),
    ]
    kernels().configure()
    right = [job() for job in jobs]
    files = ("choice.cuh", "curve.cuh", "block.cuh")
    sites = [s for s in kernels().synchronization_sites() if any(f in s for f in files)]

    def survives(site):
        for order in (0, 1, 5, 6):
            for job, want in zip(jobs, right, strict=True):
                kernels().configure(order=order, removed={site})
                if not all(np.array_equal(a, b) for a, b in zip(want, job(), strict=True)):
                    return False
        return True

    # block_sum's first barrier guards a second use of its scratch, which these kernels don't make.
    needed = [s for s in sorted(sites) if "block.cuh" not in s]
    assert len(needed) >= 3 and [s for s in needed if survives(s)] == []
