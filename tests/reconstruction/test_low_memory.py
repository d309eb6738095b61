"""Solves in low memory, by blocks in a file: the same results."""

from __future__ import annotations

import math
import pickle
import resource
from pathlib import Path

import forked
import pytest
import torch
from tiny import batches, tiny

from liar_ext import InputError, Moments, ops, prune
from liar_ext.reconstruction import ladder, ridge
from liar_ext.reconstruction.ladder import ROW_BLOCK
from liar_ext.reconstruction.ridge import Residual
from liar_ext.reconstruction.solve import BY_BLOCKS, solution_of, solve
from liar_ext.system.errors import is_out_of_memory

D_IN, D_OUT = ROW_BLOCK + 90, ridge.OUTPUTS + 30
KEPT = torch.tensor([i for i in range(D_IN) if i % 7])  # more than a block of rows
FORMS = [(mode, damp) for mode in ("linear", "affine") for damp in ("auto", 1e-3, math.inf)]


def problem(tokens=(500, 700), dtype=torch.float64):
    """A consumer, and the sums of its input and of the residual of a target."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    moments, residual = Moments.zeros(D_IN, dtype=dtype), Residual.zeros(D_IN, D_OUT)
    mix, away = draw(D_IN, D_IN) / 9, draw(D_IN, D_OUT) / 40
    for fold, count in enumerate(tokens):
        x = draw(count, D_IN) @ mix + 0.5
        used = torch.ones(count, dtype=torch.bool)
        moments.update(x, fold, used)
        residual.update(x, x @ away + draw(count, D_OUT) + 0.4, fold, used)
    moments.gram += torch.full_like(moments.gram, 1e30).triu(1)  # which nothing may read
    return draw(D_OUT, D_IN), draw(D_OUT), moments, residual


def assert_same(found, expected):
    for name in ("weight", "bias"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None and b.numel():
            assert (a - b).abs().max() <= 1e-10 * b.abs().max(), name
    for name in ("error", "holdout_error", "condition", "step_size"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-10), name
    assert (found.damp, found.path) == (expected.damp, expected.path)


def both(*given, step=(0.0, 0.0), damp="auto"):
    """Solve in low memory and in memory."""
    for system in (ridge.SystemInFile, ridge.System):
        yield solution_of(system(*given), step, damp)


@pytest.mark.parametrize(("mode", "damp"), [*FORMS, ("none", "auto"), ("bias", "auto")])
def test_one_pass_in_low_memory(mode, damp):
    weight, bias, moments, _ = problem()
    for given in (None, bias):
        assert_same(*both(weight, given, moments, KEPT, None, mode, damp=damp))


@pytest.mark.parametrize(("mode", "damp"), FORMS)
@pytest.mark.parametrize("step", [(0.0, 1.0), (1.0, 1.0)])
def test_towards_a_target(mode, damp, step):
    weight, bias, moments, residual = problem()
    found, expected = both(weight, bias, moments, KEPT, residual, mode, step=step, damp=damp)
    assert_same(found, expected)
    assert damp != "auto" or (found.step_size > 0 and found.damp < math.inf)


@pytest.mark.parametrize("kept", [[], [4], [*range(D_IN)]])
def test_little_and_everything_kept(kept):
    weight, bias, moments, residual = problem()
    kept = torch.tensor(kept, dtype=torch.long)
    for mode in ("linear", "affine"):
        assert_same(*both(weight, bias, moments, kept, None, mode))
        assert_same(*both(weight, bias, moments, kept, residual, mode, step=(0.0, 1.0)))


def test_dropping_where_a_fold_has_no_tokens():
    weight, _, moments, residual = problem((500, 0))
    for sums in (moments, Moments.zeros(D_IN)):
        for target in (None, residual if sums is moments else None):
            found, expected = both(weight, None, sums, KEPT, target, "none", step=(0.0, 1.0))
            assert_same(found, expected)
            assert found.path == "drop, a fold has no tokens" and found.damp == math.inf
            assert torch.equal(found.weight, weight[:, KEPT])
            assert found.holdout_error == pytest.approx(found.error)


def test_sums_in_float32_and_weights_in_bfloat16():
    weight, bias, moments, _ = problem(dtype=torch.float32)
    wide = Moments(moments.gram.double(), moments.total.double(), moments.count)
    weight, bias = weight.bfloat16(), bias.bfloat16()
    found = solution_of(ridge.SystemInFile(weight, bias, moments, KEPT), damp=1e-2)
    assert_same(found, solve(weight.requires_grad_(), bias, wide, KEPT, damp=1e-2))


def test_errors_are_those_of_the_ordinary_solve():
    weight, bias, moments, residual = problem((20, 20))
    spoilt, stays = weight.clone(), weight.clone()
    spoilt[0, 0] = stays[0, 1] = math.nan  # of a feature that goes, and of one that stays
    cases = [
        (weight, moments, None, 0.0),
        (spoilt, moments, None, 0.1),
        (spoilt, moments, None, "auto"),
        (stays, moments, None, "auto"),
        (stays, moments, None, 0.1),
        (weight, moments, residual, 0.0),
        (weight, Moments.zeros(D_IN), None, "auto"),
    ]
    for given, sums, target, damp in cases:
        said = []
        for system in (ridge.SystemInFile, ridge.System):
            with pytest.raises(InputError) as caught:
                solution_of(system(given, None, sums, KEPT, target), (0.0, 1.0), damp)
            said.append(str(caught.value))
        assert said[0] == said[1]


def without_room(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": schedule, "reconstruct": reconstruct}
        for schedule in ("one-pass", "layerwise")
        for reconstruct in ("auto", "affine")
    ]
    + [{"schedule": "one-pass", "keep_hidden": 0.75}],
)
def test_a_job_says_that_it_was_solved_so(options, monkeypatch):
    options = {"allocation": "uniform", **options}
    expected, model = tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    prune(expected, batches(expected), 0.7, **options)
    monkeypatch.setattr(ops, "reconstruct", without_room)
    monkeypatch.setattr(ridge.System, "equations", without_room)
    report = prune(model, batches(model), 0.7, **options)
    assert report.sites and all(row.path.endswith(f", {BY_BLOCKS}") for row in report.sites)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-11)


def test_no_room_on_the_disk_either(monkeypatch):
    weight, _, moments, _ = problem()
    monkeypatch.setattr(ops, "reconstruct", without_room)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(MemoryError, match="no file of 0.58 MiB in .*File too large.*TMPDIR"):
            solve(weight, None, moments, KEPT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_is_where_it_is_wanted_and_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tensor = ladder.in_file(40, 1000)
    assert not tensor.any() and tensor.shape == (40, 1000) and not list(tmp_path.iterdir())
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    tensor += 1.0
    del tensor
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_process_that_may_not_have_more_memory(tmp_path):
    """A limit of private memory that the ordinary solve doesn't fit, and the one by blocks does."""
    d = 1600  # a square is 20 MiB
    weight, moments = torch.randn(64, d).double(), Moments.zeros(d)
    for fold in range(2):
        moments.update(torch.randn(2 * d, d).double(), fold)
    kept = torch.arange(0, d, 2)
    expected = solve(weight, None, moments, kept)

    def limited() -> int:
        forked.cramp(24 << 20)
        try:
            solution_of(ridge.System(weight, None, moments, kept))
            return 8
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                return 7
        found = solve(weight, None, moments, kept)
        (tmp_path / "found").write_bytes(pickle.dumps(found))
        return 0

    assert forked.end(forked.fork(limited)) == 0
    found = pickle.loads((tmp_path / "found").read_bytes())
    assert found.path == f"{expected.path}, {BY_BLOCKS}"
    assert torch.allclose(found.weight, expected.weight, rtol=1e-10, atol=1e-12)
