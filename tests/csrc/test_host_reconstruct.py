"""reconstruct as the GPU would run it, executed on the host against the plain-torch reference."""

import numpy as np
import oracle
import pytest
import torch
from host_kernels import LARGE, kernels

pytestmark = pytest.mark.exhaustive

DAMPS = (0.0, 1e-3, 0.5, np.inf)


@pytest.fixture(autouse=True)
def unchanged():
    kernels().configure()
    yield
    kernels().configure()


def problem(seed, d, d_out, n, tokens=None):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens or 3 * d + 2, d)) @ (np.eye(d) + 0.3)
    other = rng.standard_normal((2 * d + 1, d))
    upper = np.triu(np.full((d, d), np.nan), 1)  # nobody may read it
    gram, holdout = np.tril(x.T @ x) + upper, np.tril(other.T @ other) + upper
    weight = rng.standard_normal((d_out, d))
    kept = np.sort(rng.permutation(d)[:n])
    crosses = (
        x.T @ rng.standard_normal((len(x), d_out)),
        other.T @ rng.standard_normal((len(other), d_out)),
    )
    return weight, gram, kept, holdout, *crosses


def compare(got, want, rtol=1e-9):
    for name, a, b in zip(("weight", "error", "holdout_error", "info"), got, want, strict=True):
        b = b.numpy()
        scale = np.abs(b[np.isfinite(b)]).max(initial=1e-300)
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale, err_msg=name)


def expected(*arguments):
    tensors = [None if a is None else torch.from_numpy(np.nan_to_num(a)) for a in arguments]
    tensors[3] = torch.from_numpy(arguments[3])
    return oracle.reconstruct(*tensors)


# A warp's 32 rows and its edges, and all 128 of a block.
SIZES = [(1, 1, 1), (2, 3, 1), (9, 4, 0), (7, 5, 7), (70, 9, 63), (90, 30, 65)]
SMALL = [(40, 5, 31), (40, 129, 32), (40, 33, 33), (140, 7, 127), (130, 4, 128)]
FORMS = ["plain", "holdout", "targets"]


def optional(form, holdout, cross, holdout_cross):
    return {
        "plain": (None, None, None),
        "holdout": (holdout, None, None),
        "targets": (holdout, cross, holdout_cross),
    }[form]


@pytest.mark.parametrize("size", SIZES + SMALL, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_block_a_system_agrees_with_the_reference(size, form):
    weight, gram, kept, *extra = problem(1, *size)
    arguments = (weight, gram, kept, np.array(DAMPS), *optional(form, *extra))
    compare(kernels().reconstruct(*arguments), expected(*arguments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "size", [(5, 4, 2), pytest.param((70, 9, 66), marks=LARGE), (6, 3, 0)], ids=str
)
def test_a_batch_is_its_items_one_by_one(size, form):
    items = [problem(seed, *size) for seed in range(3)]
    weight, gram, kept, *extra = (np.stack(a) for a in zip(*items, strict=True))
    # Rows and matrices of a batch may be strided.
    frame = np.full((3, gram.shape[1] + 1, gram.shape[2] + 3), np.nan)
    frame[:, :-1, :-3] = gram
    arguments = (weight, frame[:, :-1, :-3], kept, np.array(DAMPS), *optional(form, *extra))
    got = kernels().reconstruct(*arguments)
    for i in range(3):
        own = [a if a is None or a.ndim == 1 else a[i] for a in arguments]
        alone = kernels().reconstruct(*own)
        assert all(np.array_equal(a[i], b) for a, b in zip(got, alone, strict=True))
        compare([a[i] for a in got], expected(*own))


@pytest.mark.parametrize("kilobytes", [1, 12, 40, 60])
def test_a_workspace_that_holds_some_items_or_some_damps_changes_nothing(kilobytes):
    # 1: one λ at a time; 12: two λ; 40 and 60: two items with all their λ, or nearly all.
    items = [problem(seed, 12, 9, 7) for seed in range(3)]
    weight, gram, kept, *extra = (np.stack(a) for a in zip(*items, strict=True))
    arguments = (weight, gram, kept, np.array(DAMPS), *extra)
    want = kernels().reconstruct(*arguments)
    got = kernels().reconstruct(*arguments, group_bytes=kilobytes << 10)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_wrong_lane_is_seen():
    arguments = *problem(9, 40, 6, 33)[:3], np.array(DAMPS)
    right = kernels().reconstruct(*arguments)
    kernels().configure(shifted_shuffles=True)
    wrong = kernels().reconstruct(*arguments)
    assert not np.array_equal(right[0][1], wrong[0][1])


def test_errors_alone():
    weight, gram, kept, holdout, *crosses = problem(8, 70, 9, 50)
    arguments = (weight, gram, kept, np.array(DAMPS), holdout, *crosses)
    whole, alone = (kernels().reconstruct(*arguments, errors_only=e) for e in (False, True))
    assert alone[0].shape == (0, 9, 50)
    assert all(np.array_equal(a, b) for a, b in zip(whole[1:], alone[1:], strict=True))


@pytest.mark.parametrize("order", [1, 5])
def test_any_order(order):
    arguments = *problem(2, 90, 20, 66)[:3], np.array(DAMPS)
    first = kernels().reconstruct(*arguments)
    kernels().configure(order=order, late_copies=False)
    again = kernels().reconstruct(*arguments)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_rank_deficient_gram_is_told_by_its_code():
    weight, gram, kept, *_ = problem(3, 80, 6, 70, tokens=20)
    gram[5] = gram[:, 5] = 0  # a dead feature makes the failure exact
    kept = np.union1d(kept, [5])
    weight_out, error, _, info = kernels().reconstruct(
        weight, gram, kept, np.array([0.0, 1e-2, np.inf])
    )
    assert info[0, 0] == list(kept).index(5) + 1 and np.isnan(info[0, 1])
    assert np.isnan(weight_out[0]).all() and np.isnan(error[0])
    assert (info[1:, 0] == 0).all() and np.isfinite(weight_out[1:]).all()
    assert error[1] < error[2]


def test_all_dead():
    weight = np.ones((3, 8))
    out, error, _, info = kernels().reconstruct(
        weight, np.zeros((8, 8)), np.arange(4), np.array([1e-2])
    )
    assert (out == 1).all() and (error == 0).all() and (info == [0, 1]).all()


@pytest.mark.parametrize("kept", [[3, 1], [0, 0], [-1, 2], [0, 99]])
def test_bad_indices_get_code_minus_one_in_their_item_alone(kept):
    weight, gram, *_ = problem(4, 12, 3, 2)
    out, error, _, info = kernels().reconstruct(
        np.stack([weight] * 2),
        np.stack([gram] * 2),
        np.array([kept, [0, 7]]),
        np.array([1e-2, np.inf]),
    )
    assert (info[0, :, 0] == -1).all() and np.isnan(out[0]).all() and np.isnan(error[0]).all()
    assert (info[1, :, 0] == 0).all() and np.isfinite(out[1]).all() and np.isfinite(error[1]).all()


def test_every_barrier_is_needed_and_its_loss_seen():
    problems = [problem(5, 70, 40, 66), problem(7, 100, 500, 40)]

    def run(arguments):
        weight, gram, kept, holdout, *_ = arguments
        damps = np.array([1e-3, 0.5])
        return kernels().reconstruct(weight, gram, kept, damps, holdout)

    kernels().configure()
    right = [run(p) for p in problems]
    sites = [s for s in kernels().synchronization_sites() if "product.cuh" not in s]
    assert any("small.cuh" in s for s in sites)

    def survives(site):
        for order, late in [(0, True), (1, False), (5, False)]:
            for p, want in zip(problems, right, strict=True):
                kernels().configure(order=order, late_copies=late, removed={site})
                if not all(np.array_equal(a, b) for a, b in zip(want, run(p), strict=True)):
                    return False
        return True

    assert sites and [s for s in sorted(sites) if survives(s)] == []
