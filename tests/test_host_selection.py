"""Scores of units as the GPU would compute them, executed on the host against brute force."""

import numpy as np
import pytest
from host_kernels import kernels


@pytest.fixture(autouse=True)
def unchanged():
    kernels().configure()
    yield
    kernels().configure()


def problem(seed, d, d_out):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * d, d)) @ rng.standard_normal((d, d))
    return rng.standard_normal((d_out, d)), np.tril(x.T @ x) + np.triu(np.full((d, d), np.nan), 1)


def full(gram):
    lower = np.tril(np.nan_to_num(gram))
    return lower + np.tril(lower, -1).T


def damped_error(weight, system, gone):
    """Return tr(ΔW (G + Λ) ΔWᵀ) when the rest is solved anew."""
    kept = np.setdiff1d(np.arange(len(system)), gone)
    rest = weight[:, gone]
    change = (
        np.linalg.solve(system[np.ix_(kept, kept)], system[np.ix_(kept, gone)] @ rest.T)
        if len(kept)
        else np.zeros((0, len(weight)))
    )
    total = np.einsum("oi,ij,oj->", rest, system[np.ix_(gone, gone)], rest)
    return total - np.sum(change * (system[np.ix_(kept, gone)] @ rest.T))


@pytest.mark.parametrize("d", [1, 2, 9, 40])
def test_each_step_of_the_curve_is_the_cheapest(d):
    weight, gram = problem(d, d, 7)
    order, error, info = kernels().obs_curve(weight, gram, 1e-2)
    system = full(gram) + 1e-2 * np.diag(full(gram)).mean() * np.eye(d)
    assert sorted(order) == list(range(d)) and info[0] == 0
    for k in range(d):
        gone = list(order[:k])
        costs = {u: damped_error(weight, system, [*gone, u]) for u in range(d) if u not in gone}
        assert costs[order[k]] <= min(costs.values()) * (1 + 1e-8)
        np.testing.assert_allclose(error[k], costs[order[k]], rtol=1e-7)


def test_past_several_lazy_blocks_and_several_thread_blocks():
    d = 270
    weight, gram = problem(3, d, 5)
    order, error, _ = kernels().obs_curve(weight, gram, 1e-3, at_least=100)
    assert len(order) == 170 and len(set(order)) == 170 and (np.diff(error) >= 0).all()
    system = full(gram) + 1e-3 * np.diag(full(gram)).mean() * np.eye(d)
    for k in (1, 63, 64, 65, 128, 129, 170):
        np.testing.assert_allclose(error[k - 1], damped_error(weight, system, order[:k]), rtol=1e-6)


def test_dead_features_go_first_and_cost_nothing():
    weight, gram = problem(4, 20, 6)
    gram[[3, 11]] = np.where(np.isnan(gram[[3, 11]]), np.nan, 0)
    gram[:, [3, 11]] = np.where(np.isnan(gram[:, [3, 11]]), np.nan, 0)
    order, error, _ = kernels().obs_curve(weight, gram, 0.1)
    assert list(order[:2]) == [3, 11] and (error[:2] == 0).all() and error[2] > 0


def test_singular_gram_without_damping_says_so():
    _, error, info = kernels().obs_curve(np.ones((2, 4)), np.zeros((4, 4)), 0.0)
    assert info[0] == 1 and np.isnan(error).all()


@pytest.mark.parametrize("order", [1, 6])
def test_curve_in_any_thread_order(order):
    weight, gram = problem(5, 70, 6)
    first = kernels().obs_curve(weight, gram, 1e-2)
    kernels().configure(order=order)
    again = kernels().obs_curve(weight, gram, 1e-2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("d", "width"), [(1, 1), (7, 1), (12, 3), (129, 43), (70, 70)])
def test_unit_energy(d, width):
    weight, gram = problem(6, d, 11)
    got = kernels().unit_energy(weight, gram, width)
    for u, value in enumerate(got):
        part = slice(u * width, (u + 1) * width)
        want = np.einsum("oi,ij,oj->", weight[:, part], full(gram)[part, part], weight[:, part])
        np.testing.assert_allclose(value, want, rtol=1e-10)


@pytest.mark.parametrize(("tokens", "d", "width"), [(0, 4, 2), (1, 1, 1), (300, 12, 4)])
def test_fisher_update(tokens, d, width):
    rng = np.random.default_rng(7)
    x, grad = rng.standard_normal((2, tokens, d))
    fisher = np.ones(d // width)
    kernels().fisher_update_(fisher, x, grad, width)
    want = 1 + ((x * grad).reshape(tokens, d // width, width).sum(2) ** 2).sum(0)
    np.testing.assert_allclose(fisher, want, rtol=1e-12)


def test_every_barrier_is_needed_and_its_loss_seen():
    weight, gram = problem(8, 300, 20)
    weight[:, 256:] *= 1e-3  # the second block of threads holds the first pivots

    def run():
        curve = kernels().obs_curve(weight, gram, 1e-2, at_least=294)
        return *curve, kernels().unit_energy(weight, gram, 150)

    kernels().configure()
    right = run()
    sites = [
        s for s in kernels().synchronization_sites() if "selection.cuh" in s or "block.cuh" in s
    ]

    def survives(site):
        for order in (0, 1, 5, 6):
            kernels().configure(order=order, removed={site})
            if not all(np.array_equal(a, b) for a, b in zip(right, run(), strict=True)):
                return False
        return True

    # block_sum's first barrier guards a second use of its scratch, which these kernels don't make.
    assert len(sites) > 3
    assert [s for s in sorted(sites) if survives(s) and "block.cuh" not in s] == []
