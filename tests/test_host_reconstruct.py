"""reconstruct as the GPU would run it, executed on the host against the plain-torch reference."""

import numpy as np
import pytest
import torch
from host_kernels import kernels

from liar_ext import reference

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
    return reference.reconstruct(*tensors)


SIZES = [(1, 1, 1), (2, 3, 1), (9, 4, 0), (7, 5, 7), (70, 9, 63), (90, 30, 65), (150, 70, 129)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", ["plain", "holdout", "targets"])
def test_agrees_with_the_reference(size, form):
    weight, gram, kept, holdout, cross, holdout_cross = problem(1, *size)
    extra = {
        "plain": (None, None, None),
        "holdout": (holdout, None, None),
        "targets": (holdout, cross, holdout_cross),
    }[form]
    arguments = (weight, gram, kept, np.array(DAMPS), *extra)
    compare(kernels().reconstruct(*arguments), expected(*arguments))


def test_errors_alone():
    weight, gram, kept, holdout, *crosses = problem(8, 70, 9, 50)
    arguments = (weight, gram, kept, np.array(DAMPS), holdout, *crosses)
    whole, alone = (kernels().reconstruct(*arguments, errors_only=e) for e in (False, True))
    assert alone[0].shape == (0, 9, 50)
    assert all(np.array_equal(a, b) for a, b in zip(whole[1:], alone[1:], strict=True))


@pytest.mark.parametrize("order", [1, 5])
def test_any_thread_order(order):
    weight, gram, kept, *_ = problem(2, 90, 20, 66)
    first = kernels().reconstruct(weight, gram, kept, np.array(DAMPS))
    kernels().configure(order=order, late_copies=False)
    again = kernels().reconstruct(weight, gram, kept, np.array(DAMPS))
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
def test_bad_indices_get_code_minus_one(kept):
    weight, gram, *_ = problem(4, 12, 3, 2)
    out, error, _, info = kernels().reconstruct(
        weight, gram, np.array(kept), np.array([1e-2, np.inf])
    )
    assert (info[:, 0] == -1).all() and np.isnan(out).all() and np.isnan(error).all()


def test_every_barrier_is_needed_and_its_loss_seen():
    problems = [problem(5, 70, 40, 66), problem(6, 150, 70, 129), problem(7, 100, 500, 40)]

    def run(arguments):
        weight, gram, kept, holdout, *_ = arguments
        return kernels().reconstruct(weight, gram, kept, np.array([1e-3, 0.5]), holdout, None, None)

    kernels().configure()
    right = [run(p) for p in problems]
    sites = [s for s in kernels().synchronization_sites() if "product.cuh" not in s]

    def survives(site):
        for order, late in [(0, True), (1, False), (5, False)]:
            for p, want in zip(problems, right, strict=True):
                kernels().configure(order=order, late_copies=late, removed={site})
                if not all(np.array_equal(a, b) for a, b in zip(want, run(p), strict=True)):
                    return False
        return True

    assert sites and [s for s in sorted(sites) if survives(s)] == []
