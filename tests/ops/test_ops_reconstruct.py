"""reconstruct against least squares, brute force and degenerate Gram matrices."""

import math

import oracle
import pytest
import torch
from covers import cover
from oracle import by_threads, gram_of, problem

from liar_ext import ops
from liar_ext.ops import reference

LADDER = torch.tensor([0.0, 1e-4, 1e-2, 1.0, math.inf], dtype=torch.float64)


# By the compiled operator of the CPU, and by torch.linalg, which CUDA takes.
both = pytest.mark.parametrize(
    "run", [ops.reconstruct, reference.reconstruct], ids=["csrc", "torch"]
)


def extra_of(grams, crosses, holdout, dense_targets):
    """Return the arguments of held-out sums, the second ones, and of dense targets."""
    extra = {"holdout": grams[1]} if holdout else {}
    if dense_targets:
        extra["cross"] = crosses[0]
        if holdout:
            extra["holdout_cross"] = crosses[1]
    return extra


def every_third_removed(d):
    return torch.tensor([k for k in range(d) if k % 3 != 1])


def output_error(weight, new, kept, x):
    """Brute force: the squared change of the layer's output over the tokens ``x``."""
    return (x[:, kept] @ new.mT - x @ weight.mT).square().sum()


@pytest.mark.parametrize(("d", "d_out"), [(2, 1), (7, 3), (40, 6), (129, 200), (260, 31)])
def test_undamped_equals_least_squares(d, d_out):
    weight, x = problem(3 * d + 50, d, d_out)
    kept = every_third_removed(d)
    new, error, held_out, info = ops.reconstruct(weight, gram_of(x), kept, LADDER[:1])
    refit = torch.linalg.lstsq(x[:, kept], x @ weight.mT).solution.mT
    assert (new[0] - refit).abs().max() <= 1e-10 * refit.abs().max()
    brute = output_error(weight, new[0], kept, x)
    assert abs(error[0] - brute) <= 1e-10 * (x @ weight.mT).square().sum()
    assert held_out.shape == (0,)
    assert info[0, 0] == 0 and info[0, 1] >= 1


@pytest.mark.parametrize(("d", "d_out"), [(7, 3), (129, 20), (129, 300)])
def test_errors_equal_brute_force(d, d_out):
    weight, x = problem(400, d, d_out)
    _, held_out_x = problem(350, d, d_out, seed=1)
    kept = every_third_removed(d)
    new, error, held_out, _ = ops.reconstruct(
        weight, gram_of(x), kept, LADDER, holdout=gram_of(held_out_x)
    )
    for k in range(len(LADDER)):
        for value, tokens in ((error[k], x), (held_out[k], held_out_x)):
            brute = output_error(weight, new[k], kept, tokens)
            assert abs(value - brute) <= 1e-10 * brute


@both
@cover(
    2,
    errors_only=[False, True],
    holdout=[False, True],
    dense_targets=[False, True],
    d_out=[1, 9, 70],
    kept=[0, 10, 26, 35, 40],
)
def test_matches_the_reference(run, errors_only, holdout, dense_targets, d_out, kept):
    weight, x = problem(200, 40, d_out)
    other = problem(200, 40, d_out, seed=2)[1]
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(200, d_out, generator=generator).double()
    chosen = torch.randperm(40, generator=generator)[:kept].sort().values
    grams, crosses = zip(*((gram_of(one), one.mT @ target) for one in (x, other)), strict=True)
    extra = extra_of(grams, crosses, holdout, dense_targets) | {"errors_only": errors_only}
    arguments = (weight, grams[0], chosen, LADDER)
    got, want = run(*arguments, **extra), oracle.reconstruct(*arguments, **extra)
    near = 1e-8 if kept == 40 else 1e-10  # with all features and no λ the system is ill-conditioned
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)
        assert a.shape == b.shape and a.is_contiguous()


@cover(2, errors_only=[False, True], d_out=[1, 25, 130], n=[23, 24, 25, 95, 96, 97, 200])
def test_matches_the_reference_at_the_edges_of_panels_and_strips(n, d_out, errors_only):
    d = n + 50
    weight, x = problem(2 * d, d, d_out)
    kept = torch.randperm(d, generator=torch.Generator().manual_seed(n))[:n].sort().values
    arguments = (weight, gram_of(x), kept, LADDER[1:], gram_of(x[:d]))
    got = ops.reconstruct(*arguments, errors_only=errors_only)
    want = oracle.reconstruct(*arguments, errors_only=errors_only)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_removed_features_that_no_output_reads_cost_nothing():
    """With several λ the errors alone go by a root of W_PᵀW_P, whose diagonal is then 0."""
    weight, x = problem(200, 40, 30)
    weight[:, [1, 7]] = 0
    arguments = (weight, gram_of(x), every_third_removed(40), LADDER, gram_of(x[:60]))
    got = ops.reconstruct(*arguments, errors_only=True)
    want = ops.reconstruct(*arguments)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_units_of_features_change_no_bit():
    d = 260
    weight, x = problem(3 * d, d, 31)
    kept = every_third_removed(d)
    generator = torch.Generator().manual_seed(5)
    unit = 2.0 ** torch.randint(-30, 30, (d,), generator=generator).double()
    want = ops.reconstruct(weight, gram_of(x), kept, LADDER[:1])
    got = ops.reconstruct(weight / unit, gram_of(x * unit), kept, LADDER[:1])
    assert torch.equal(got[0] * unit[kept], want[0]) and torch.equal(got[1], want[1])


def test_dense_targets_error_is_the_squared_distance():
    weight, x = problem(200, 20, 5)
    target = torch.randn(200, 5, generator=torch.Generator().manual_seed(4)).double()
    kept = every_third_removed(20)
    new, error, _, _ = ops.reconstruct(weight, gram_of(x), kept, LADDER, cross=x.mT @ target)
    for k in range(len(LADDER)):
        brute = (x[:, kept] @ new[k].mT - target).square().sum()
        assert abs(error[k] + target.square().sum() - brute) <= 1e-10 * brute
    refit = torch.linalg.lstsq(x[:, kept], target).solution.mT
    assert (new[0] - refit).abs().max() <= 1e-10


def test_infinite_damp_is_plain_dropping():
    weight, x = problem()
    kept = every_third_removed(40)
    new, error, _, info = ops.reconstruct(weight, gram_of(x), kept, LADDER[-1:])
    assert torch.equal(new[0], weight[:, kept])
    brute = output_error(weight, weight[:, kept], kept, x)
    assert abs(error[0] - brute) <= 1e-12 * brute
    assert info.tolist() == [[0, 1]]


def test_keeping_everything_is_the_identity():
    weight, x = problem()
    kept = torch.arange(40)
    new, error, held_out, info = ops.reconstruct(
        weight, gram_of(x), kept, LADDER, holdout=gram_of(x)
    )
    assert torch.equal(new, weight.expand_as(new))
    assert not error.any() and not held_out.any()
    assert not info[:, 0].any()


def test_keeping_nothing_loses_everything():
    weight, x = problem()
    new, error, _, info = ops.reconstruct(
        weight, gram_of(x), torch.empty(0, dtype=torch.long), LADDER
    )
    assert new.shape == (len(LADDER), 6, 0)
    energy = (x @ weight.mT).square().sum()
    assert (error - energy).abs().max() <= 1e-12 * energy
    assert not info[:, 0].any()


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_dropping_on_the_calibration_tokens(seed):
    weight, x = problem(60 + 30 * seed, 50, 8, seed)
    kept = torch.randperm(50, generator=torch.Generator().manual_seed(seed))[:30].sort().values
    ladder = torch.tensor([1e-8, 1e-5, 1e-2, 0.1, 1, 100, 1e6, math.inf], dtype=torch.float64)
    error = ops.reconstruct(weight, gram_of(x), kept, ladder)[1]
    assert (error <= error[-1] * (1 + 1e-12)).all()
    assert (error.diff() >= -1e-12 * error[-1]).all(), "more damping, more calibration error"


def degenerate(kind):
    weight, x = problem(200, 40, 6)
    if kind == "few tokens":
        x = x[:10]
    elif kind == "one token":
        x = x[:1]
    elif kind == "duplicates":
        x[:, 20:] = x[:, :20]
    elif kind == "dead":
        x[:, ::2] = 0
    elif kind == "all dead":
        x = torch.zeros_like(x)
    elif kind == "huge scale":
        x = x * 1e12
    elif kind == "tiny scale":
        x = x * 1e-12
    return weight, x


@pytest.mark.parametrize("damp", [1e-9, 1e-6, 1e-2])
@pytest.mark.parametrize(
    "kind",
    ["few tokens", "one token", "duplicates", "dead", "all dead", "huge scale", "tiny scale"],
)
def test_degenerate_grams_give_finite_certified_results(kind, damp):
    weight, x = degenerate(kind)
    kept = every_third_removed(40)
    damps = torch.tensor([damp, math.inf], dtype=torch.float64)
    new, error, held_out, info = ops.reconstruct(
        weight, gram_of(x), kept, damps, holdout=gram_of(x)
    )
    assert not info[:, 0].any()
    assert new.isfinite().all() and error.isfinite().all() and held_out.isfinite().all()
    energy = (x @ weight.mT).square().sum()
    for k in range(2):
        brute = output_error(weight, new[k], kept, x)
        assert abs(error[k] - brute) <= 1e-10 * energy
        assert abs(held_out[k] - brute) <= 1e-10 * energy
    assert error[0] <= error[1] * (1 + 1e-12)


@both
def test_a_gram_that_is_not_positive_definite_is_reported(run):
    gram = torch.diag(torch.tensor([1.0, 1.0, -4.0, 1.0], dtype=torch.float64))
    weight = torch.ones(2, 4, dtype=torch.float64)
    kept = torch.tensor([0, 1, 2])
    damps = torch.tensor([0.0, math.inf], dtype=torch.float64)
    new, error, held_out, info = run(weight, gram, kept, damps, holdout=gram)
    assert info[0, 0] == 3 and info[1].tolist() == [0, 1]
    assert new[0].isnan().all() and error[0].isnan() and held_out[0].isnan()
    assert torch.equal(new[1], weight[:, kept])
    dead = torch.zeros(4, 4, dtype=torch.float64)
    assert run(weight, dead, kept, damps)[3][:, 0].tolist() == [1, 0]


@both
def test_a_gram_that_float32_made_indefinite_has_no_error_below_zero(run):
    """Of one token, 1 and 1/3: the error is 1/9 − (1/3)², and less as float32 rounds both."""
    x = torch.tensor([[1.0, 1 / 3]], dtype=torch.float64)
    gram, kept = (x.mT @ x).float(), torch.tensor([0])
    damps = torch.tensor([1e-12], dtype=torch.float64)
    arguments = torch.ones(1, 2), gram, kept, damps
    assert -1e-8 < oracle.reconstruct(*arguments)[1] < -5e-9
    _, error, _, info = run(*arguments)
    assert error[0] == 0 and info[0, 0] == 0


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("damps", [LADDER[:0], LADDER[1:]], ids=len)
def test_narrow_weights_and_grams_are_widened(run, damps, dtype):
    weight, x = problem(200, 40, 6)
    kept = every_third_removed(40)
    narrow, gram = weight.to(dtype), gram_of(x).float()
    got = run(narrow, gram, kept, damps, holdout=gram)
    want = run(narrow.double(), gram.double(), kept, damps, holdout=gram.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)


def test_strided_arguments_equal_contiguous():
    weight, x = problem(200, 40, 6)
    kept, gram = every_third_removed(40), gram_of(x)
    wide = torch.zeros(40, 60, dtype=torch.float64)
    wide[:, :40] = gram
    want = ops.reconstruct(weight, gram, kept, LADDER)
    transposed = weight.mT.contiguous().mT
    got = ops.reconstruct(transposed, wide[:, :40], kept, LADDER)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("sites", [None, 3])
def test_bit_identical_whatever_the_threads(sites):
    weight, x = problem(700, 300, 129)
    arguments = (weight, gram_of(x), every_third_removed(300), LADDER, gram_of(x[:350]))
    if sites is not None:
        arguments = [
            tensor if tensor is LADDER else torch.stack([(k + 1) * tensor for k in range(sites)])
            for tensor in arguments
        ]
        arguments[2] = every_third_removed(300).expand(sites, -1)
    results = by_threads(lambda: ops.reconstruct(*arguments), 1, 1, 2, 2)
    for first, second in ((0, 1), (2, 3)):
        for a, b in zip(results[first], results[second], strict=True):
            assert torch.equal(a, b)


def several_sites(sites, d=40, d_out=6):
    weights, grams, kept, crosses = [], [], [], []
    for seed in range(sites):
        weight, x = problem(200, d, d_out, seed)
        chosen = torch.randperm(d, generator=torch.Generator().manual_seed(seed))[: d // 2]
        weights.append(weight)
        grams.append(gram_of(x))
        kept.append(chosen.sort().values)
        crosses.append(x.mT @ x[:, :d_out].flip(0))
    return [torch.stack(tensors) for tensors in (weights, grams, kept, crosses)]


@pytest.mark.parametrize("run", [ops.reconstruct, reference.reconstruct, oracle.reconstruct])
@cover(
    2,
    errors_only=[False, True],
    holdout=[False, True],
    dense_targets=[False, True],
    sites=[0, 1, 5],
)
def test_several_sites_equal_a_call_each(run, errors_only, holdout, dense_targets, sites):
    weight, gram, kept, cross = several_sites(max(sites, 1))
    extra = extra_of((gram, gram.flip(0)), (cross, cross.flip(0)), holdout, dense_targets)
    got = run(
        weight[:sites],
        gram[:sites],
        kept[:sites],
        LADDER,
        **{name: tensor[:sites] for name, tensor in extra.items()},
        errors_only=errors_only,
    )
    assert all(len(tensor) == sites and tensor.is_contiguous() for tensor in got)
    for site in range(max(sites, 1)):
        own = {name: tensor[site] for name, tensor in extra.items()}
        want = run(weight[site], gram[site], kept[site], LADDER, **own, errors_only=errors_only)
        for a, b in zip(got, want, strict=True):
            assert a.shape[1:] == b.shape and a.dtype == b.dtype
            assert sites == 0 or torch.equal(a[site], b)


def test_sites_too_large_to_go_side_by_side():
    d = 2100  # more than csrc/cpu/reconstruct.cpp solves one per thread
    gram = torch.eye(d, dtype=torch.float64) + 0.5
    grams = torch.stack([gram, 2 * gram.tril()])
    weight = torch.linspace(-1, 1, 2 * d, dtype=torch.float64).view(2, 1, d)
    kept = torch.arange(d - 1).expand(2, -1)
    got = ops.reconstruct(weight, grams, kept, LADDER[1:3], holdout=grams.flip(0))
    for site in range(2):
        want = ops.reconstruct(
            weight[site], grams[site], kept[site], LADDER[1:3], holdout=grams[1 - site]
        )
        assert all(torch.equal(a[site], b) for a, b in zip(got, want, strict=True))


def test_expanded_and_narrow_sites_equal_stacked():
    weight, gram, kept, _ = several_sites(3)
    single = gram.float()
    shared, rows = weight[:1].expand(3, -1, -1), kept[:1].expand(3, -1)
    want = ops.reconstruct(shared.contiguous(), single.double(), rows.contiguous(), LADDER)
    got = ops.reconstruct(shared, single, rows, LADDER)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kept", [[3, 2], [2, 2], [-1, 2], [2, 40]])
def test_indices_that_do_not_ascend_have_a_code(kept):
    weight, x = problem(90, 40, 6)
    _, error, _, info = reference.reconstruct(weight, x.mT @ x, torch.tensor(kept), LADDER)
    assert info[:, 0].tolist() == [-1] * 5 and error.isnan().all()


def test_nothing_waits_for_a_value():
    """Nor could a graph be captured: tensors without values have none to wait for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight, x = problem(90, 40, 50)
    gram, kept = x.mT @ x, torch.arange(0, 40, 3)
    want = reference.reconstruct(weight, gram, kept, LADDER, gram)
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(one) for one in (weight, gram, kept, LADDER, gram)]
        got = reference.reconstruct(*inputs)
    assert [one.shape for one in got] == [one.shape for one in want]


def test_rejected_arguments_name_the_rule_and_the_remedy():
    weight, x = problem(50, 6, 3)
    gram, kept = x.mT @ x, torch.tensor([0, 2, 5])
    cases = [
        ((weight, gram[:5], kept, LADDER), {}, r"gram must be \(6, 6\), got \(5, 6\)"),
        ((weight, gram, kept.int(), LADDER), {}, r"kept must be \(n,\) int64"),
        ((weight, gram, torch.tensor([0, 6]), LADDER), {}, "kept must index 6 features, got 6"),
        ((weight, gram, torch.tensor([2, 2]), LADDER), {}, "strictly ascending"),
        ((weight, gram, kept, LADDER.float()), {}, r"damps must be \(L,\) float64"),
        ((weight, gram, kept, -LADDER), {}, "damps must be at least 0"),
        ((weight, gram, kept, LADDER * torch.nan), {}, "damps must be at least 0"),
        ((weight.int(), gram, kept, LADDER), {}, "weight must be a float tensor"),
        ((weight, gram, kept, LADDER), {"holdout": gram[1:]}, r"holdout must be \(6, 6\)"),
        ((weight, gram, kept, LADDER), {"cross": weight}, r"cross must be \(6, 3\)"),
        (
            (weight, gram, kept, LADDER),
            {"holdout": gram, "cross": weight.mT},
            "holdout_cross must be given exactly when",
        ),
        ((weight[None], gram, kept, LADDER), {}, r"gram must be \(1, 6, 6\), got \(6, 6\)"),
        ((weight, gram[None], kept, LADDER), {}, r"gram must be \(6, 6\), got \(1, 6, 6\)"),
        ((weight[None], gram[None], kept, LADDER), {}, r"kept must be \(sites, n\) int64"),
        (
            (weight[None], gram[None], torch.stack([kept, kept]), LADDER),
            {},
            r"kept must be \(sites, n\) .*, got \(2, 3\)",
        ),
        ((weight[None], gram[None], kept[None].flip(1), LADDER), {}, "strictly ascending"),
        (
            (weight[None], gram[None], kept[None], LADDER),
            {"holdout": gram},
            r"holdout must be \(1, 6, 6\)",
        ),
    ]
    for arguments, extra, message in cases:
        with pytest.raises(RuntimeError, match="reconstruct: .*" + message):
            ops.reconstruct(*arguments, **extra)
