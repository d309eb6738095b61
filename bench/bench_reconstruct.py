"""reconstruct beside torch's factorisation and solve, float64, a fifth of the features removed.

``torch`` is the bare ``cholesky`` + ``cholesky_solve`` with its inputs ready; ours also gathers,
builds the right-hand side, and returns weights and exact errors, as ``torch-whole`` does.
``eigh`` is what one eigendecomposition costs, after which every λ would be cheap.
"""

import math

import pytest
import torch

from liar_ext import ops

SIZES = [(1536, 576), (1536, 4096), (4096, 576), (4096, 4096)]
LADDER = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}-{size[1]}")
def problem(request):
    n, d_out = request.param
    d = n * 5 // 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(d + 512, d, generator=generator, dtype=torch.float64)
    gram = x.mT @ x
    weight = torch.randn(d_out, d, generator=generator, dtype=torch.float64)
    return weight, gram, torch.randperm(d, generator=generator)[:n].sort().values


def run_torch(weight, gram, kept):
    block = gram[kept][:, kept].contiguous()
    block.diagonal().add_(1e-3 * block.diagonal().mean())
    rhs = torch.randn(len(kept), len(weight), dtype=torch.float64)
    return lambda: torch.cholesky_solve(rhs, torch.linalg.cholesky(block))


def run_torch_whole(weight, gram, kept):
    removed = torch.ones(len(gram), dtype=torch.bool).index_fill_(0, kept, False).nonzero()[:, 0]

    def call():
        block = gram[kept][:, kept]
        ridge = 1e-3 * block.diagonal().mean()
        block.diagonal().add_(ridge)
        gone = weight[:, removed]
        rhs = gram[kept][:, removed] @ gone.mT
        solution = torch.cholesky_solve(rhs, torch.linalg.cholesky(block))
        lost = ((gone @ gram[removed][:, removed]) * gone).sum()
        error = lost - (rhs * solution).sum() - ridge * (solution * solution).sum()
        return weight[:, kept] + solution.mT, error

    return call


def run_ours(ladder, holdout, errors_only):
    def prepare(weight, gram, kept):
        damps = torch.tensor(ladder, dtype=torch.float64)
        extra = {"holdout": gram.clone()} if holdout else {}
        return lambda: ops.reconstruct(weight, gram, kept, damps, errors_only=errors_only, **extra)

    return prepare


def run_eigh(weight, gram, kept):
    block = gram[kept][:, kept].contiguous()
    if len(kept) > 2000:
        pytest.skip("minutes")
    return lambda: torch.linalg.eigh(block)


CONTENDERS = {
    "torch": run_torch,
    "torch-whole": run_torch_whole,
    "one": run_ours([1e-3], False, False),
    "one+holdout": run_ours([1e-3], True, False),
    "ladder8-errors": run_ours(LADDER, True, True),
    "ladder8-weights": run_ours(LADDER, True, False),
    "eigh": run_eigh,
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_reconstruct(measure, benchmark, problem, contender):
    weight, gram, kept = problem
    n, d_out = len(kept), len(weight)
    benchmark.group = f"reconstruct n={n} d_out={d_out}"
    # One factorisation and two triangular solves, as torch does; a ladder does one of each per λ.
    flops = n**3 / 3 + 2 * n * n * d_out
    if contender.startswith("ladder"):
        flops *= len(LADDER) - 1
    call = CONTENDERS[contender](weight, gram, kept)
    measure(call, flops=flops, dtype=torch.float64, rounds=3 if n < 2000 else 1)
