"""Whole jobs on a CUDA device, real or simulated, give what they give on the CPU."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from tiny import TINY, outputs, tiny, tiny_inputs

from liar_ext import (
    Budget,
    MomentBank,
    Moments,
    allocate,
    apply_plan,
    calibrate,
    cli,
    criterion,
    error_curves,
    ops,
    prune,
    reconstruct,
    score,
    sites,
    verify_pruned,
)
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.reconstruction.ladder import in_file
from liar_ext.reconstruction.solve import BY_BLOCKS, ON_HOST
from liar_ext.selection import error_curves as curves_module
from liar_ext.selection.criteria import _CRITERIA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

JOBS = {
    "default": {},
    "global": {"allocation": "global"},
    "heads": {"attn_unit": "head"},
    "affine": {"reconstruct": "affine"},
    "groups of sites": {"memory": 1},
    "hidden": {"keep_hidden": 0.8},
    "layerwise": {"schedule": "layerwise"},
    **{
        name: {"criterion": name, "allocation": "uniform", "schedule": "one-pass"}
        for name in ("obs", "fisher")
    },
}

ON_ONE = (
    "default",
    "groups of sites",
    "hidden",
    "layerwise",
)  # on one device as well, whatever there is


def batches(model):
    return [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(4)]


def on_cuda(model):
    return model.to("cuda")


def over_two_devices(model):
    """Place a llama-like model as `device_map` does; its inputs and outputs are on the first."""
    blocks = {f"model.layers.{i}": min(i, 1) for i in range(len(model.model.layers))}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0}
    return accelerate.dispatch_model(model, blocks | ends)


def devices(model):
    return {name: parameter.device for name, parameter in model.named_parameters()}


def assert_as_on_the_cpu(family="llama", place=on_cuda, **options):
    dense, model = tiny(family), place(tiny(family))
    want, before = prune(dense, batches(dense), 0.7, **options), devices(model)
    got = prune(model, batches(model), 0.7, **options)
    assert got.plan == want.plan and before.items() <= devices(model).items()
    inputs = {name: value.to("cuda") for name, value in tiny_inputs(model).items()}
    torch.testing.assert_close(outputs(model, inputs).cpu(), outputs(dense), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("job", JOBS)
def test_a_job_does_what_it_does_on_the_cpu(job):
    """On two devices where there are two, so that what lies on one meets what lies on another."""
    if torch.cuda.device_count() > 1 and job not in ON_ONE:
        assert_as_on_the_cpu("mistral", over_two_devices, **JOBS[job])
    else:
        assert_as_on_the_cpu(**JOBS[job])


def without_room(monkeypatch, where, name: str, host: bool) -> None:
    """Let a function find no memory on a GPU, and on the host neither but in a file."""
    function = getattr(where, name)

    def cramped(weight, *more, **choices):
        if weight.is_cuda:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        if not host and not any(each is in_file for each in more):
            raise MemoryError
        return function(weight, *more, **choices)

    monkeypatch.setattr(where, name, cramped)


@pytest.mark.parametrize("host", [True, False], ids=["host", "file"])
@pytest.mark.parametrize("schedule", ["one-pass", "layerwise"])
def test_a_solve_that_a_gpu_has_no_memory_for_is_done_on_the_cpu(schedule, host, monkeypatch):
    """There in memory, or in a file where it has none either."""

    dense, model = tiny("llama"), tiny("llama").to("cuda")
    options = {"allocation": "uniform", "schedule": schedule}
    prune(dense, batches(dense), 0.7, **options)
    without_room(monkeypatch, ops, "reconstruct", host)
    report = prune(model, batches(model), 0.7, **options)
    assert report.sites and all(row.path.endswith(ON_HOST) for row in report.sites)
    assert all((BY_BLOCKS in row.path) is not host for row in report.sites)
    inputs = {name: value.to("cuda") for name, value in tiny_inputs(model).items()}
    torch.testing.assert_close(outputs(model, inputs).cpu(), outputs(dense), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("host", [True, False], ids=["host", "file"])
def test_a_curve_that_a_gpu_has_no_memory_for_is_computed_on_the_cpu(host, monkeypatch):
    model = tiny("llama").to("cuda")
    bank, at = calibrate(model, batches(model)), sites(model)
    given = model, bank, at, score(model, bank, at, "wifv")
    expected = error_curves(*given)
    without_room(monkeypatch, curves_module, "error_curve", host)
    for name, curve in error_curves(*given).items():
        torch.testing.assert_close(curve, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("job", ON_ONE)
def test_a_model_over_two_devices_is_pruned_as_on_the_cpu(job):
    assert_as_on_the_cpu("mistral", over_two_devices, **JOBS[job])


@pytest.mark.parametrize("family", [family for family in TINY if family != "llama"])
def test_a_family_is_pruned_as_on_the_cpu(family):
    assert_as_on_the_cpu(family=family, allocation="uniform")


@pytest.mark.parametrize("family", ["opt", "mpnet"])  # norms before, and after the sum
def test_a_family_is_narrowed_as_on_the_cpu(family):
    assert_as_on_the_cpu(family=family, allocation="uniform", keep_hidden=0.75)


def test_moments_on_two_devices_are_compared():
    moments = calibrate(tiny("llama"), batches(tiny("llama")))["0.mlp"]
    there = Moments(*(each.to("cuda") for each in vars(moments).values()))
    assert moments == there and there == moments
    there.total[0, 0] += 1
    assert moments != there


@pytest.mark.parametrize("name", sorted(_CRITERIA))
def test_a_bank_that_was_loaded_serves_a_model_on_a_gpu(name, tmp_path):
    """It lies on the CPU: what was summed on one machine is used on another."""
    dense, model = tiny("llama"), tiny("llama").to("cuda")
    at = sites(dense)
    calibrate(dense, batches(dense), at).save(tmp_path / "bank.safetensors")
    bank = MomentBank.load(tmp_path / "bank.safetensors")
    plans = []
    for each in (dense, model):
        scores = score(each, bank, at, name, batches=batches(each))
        curves = error_curves(each, bank, at, scores)
        plans += [allocate(at, scores, Budget(0.7), "curve", model_type="llama", losses=curves)]
        for site in at:
            assert scores[site.name].device == bank[site.name].gram.device
        apply_plan(each, plans[-1], reconstruct(each, bank, plans[-1])[0])
    assert plans[0] == plans[1]
    inputs = {name: value.to("cuda") for name, value in tiny_inputs(model).items()}
    torch.testing.assert_close(outputs(model, inputs).cpu(), outputs(dense), rtol=1e-3, atol=1e-4)


def test_a_criterion_may_weigh_gradients_by_moments_that_were_loaded():
    dense, model = tiny("llama"), tiny("llama").to("cuda")
    at = sites(dense)
    bank = calibrate(dense, batches(dense), at)

    @criterion("mixed", needs="gradient")
    def mixed(stats):
        return stats.gradients.fisher * stats.moments.variance().view(-1, stats.width).sum(1)

    try:
        want, got = (score(m, bank, at, "mixed", batches=batches(m)) for m in (dense, model))
        for site in at:
            torch.testing.assert_close(got[site.name], want[site.name], rtol=1e-3, atol=1e-9)
    finally:
        del _CRITERIA["mixed"], CRITERIA["mixed"]


def test_sums_take_half_of_what_is_free(monkeypatch):
    dense, model = tiny("llama"), tiny("llama").to("cuda")
    want = prune(dense, batches(dense), 0.7, schedule="one-pass")
    # Sites of 32 and of 24 features, three of each: room for one of each at a time.
    free = 2 * 2 * 8 * (32**2 + 24**2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 8 << 30))
    got = prune(model, batches(model), 0.7, schedule="one-pass")
    assert got.plan == want.plan
    assert (want.settings["calibrate_passes"], got.settings["calibrate_passes"]) == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("job", ["default", "layerwise", "fisher"])
def test_narrow_dtypes(dtype, job):
    model = tiny("llama", dtype=dtype).to("cuda")
    report = prune(model, batches(model), 0.7, **JOBS[job])
    assert model.dtype == dtype and torch.isfinite(outputs(model.cpu())).all()
    assert all(0 <= row.error < 1.5 for row in report.sites)


@pytest.fixture
def bench(monkeypatch):
    """Give bench/bench_cuda.py with sizes that take no time."""
    path = Path(__file__).parents[2] / "bench" / "bench_cuda.py"
    spec = importlib.util.spec_from_file_location("bench_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"CHUNK": 40, "D_OUT": 8, "EVICTED": 64}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_the_calls_of_the_bench(bench):
    """Time on a GPU is dear: what the bench will call there has run."""
    jobs = [
        list(rows)
        for rows in (
            bench.gram_rows("tiny", 24, 80, 1.0),
            bench.reconstruct_rows(20, 1.0),
            bench.small_rows(2, 16, 8, 8),
            bench.curve_rows(16, 1, 4),
            bench.curve_rows(16, 4, 2),
        )
    ]
    rows = sum(jobs, [])
    refused = {row["way"] for row in rows if "not run" in row}
    assert refused <= {"torch.mm bf16 to f32, add", "ours, triton bf16"}
    assert sum(row["way"].startswith("ours") and "ms" in row for row in rows) >= 9
    said = [bench.verdict(job) for job in jobs]
    assert all(re.search(r"is (faster|slower|level), [\d.]+x of \w", one) for one in said), said


def test_a_verdict_compares_equal_work(bench):
    def row(way, ms, **more):
        return {"job": "gram", "way": way, "ms": ms, **more}

    rows = [
        row("ours, a", 4.0),
        row("ours, b", 2.0),
        row("ours, whole", 0.1, **{"other work": True}),
    ]
    others = [row("chosen, f32", 0.5), row("mm", 3.0), row("peers", 9.0)]
    assert bench.verdict(rows + others) == "gram: ours, b is faster, 1.50x of mm"
    assert bench.verdict([row("ours", 3.0), row("mm", 3.1)]) == "gram: ours is level, 1.03x of mm"
    missing = {"job": "gram", "way": "mm", "not run": "out of memory"}
    assert "no verdict" in bench.verdict([row("ours", 3.0), missing])


@pytest.mark.parametrize("device", ["cuda:1", "auto"])
def test_the_command_on_a_device(device, llama_folder, corpus, tmp_path, capsys, monkeypatch):
    def run(*arguments) -> str:
        assert cli.main([*map(str, arguments), "--device", device]) == 0
        return capsys.readouterr().out

    count = torch.cuda.device_count()
    if device == "cuda:1" and count < 2:
        pytest.skip("one GPU")
    # So little on the first that `auto` needs the second as well.
    if count > 1:

        def little(device=None):
            return 8 << 30 if torch.device(device or 0).index else 40_000, 8 << 30

        monkeypatch.setattr(torch.cuda, "mem_get_info", little)

    out, texts = tmp_path / "pruned", ("--calibration", corpus[0], "--eval", corpus[1])
    options = ("--sites", "mlp", "--uniform-layers", "--samples", 16, "--seq-len", 32, "--quiet")
    run("prune", llama_folder, *texts, "--keep", 0.7, *options, "--out", out)
    report = json.loads((out / "liar/report.json").read_text())
    assert report["evaluation"]["pruned"]["perplexity"] > 1
    used = {"cuda": "cuda:0", "auto": ", ".join(f"cuda:{i}" for i in range(min(count, 2)))}
    assert report["settings"]["device"] == used.get(device, device)
    if "simulated_gpu" in sys.modules:  # the command starts processes, which no simulation reaches
        facts = verify_pruned(out, device)
        assert (
            facts["agrees"] and "transformers.LlamaForCausalLM.from_pretrained" in facts["loaders"]
        )
    else:
        assert "LlamaForCausalLM.from_pretrained: same outputs" in run("verify", out)
    assert "perplexity" in run("eval", out, "--text", corpus[1], "--seq-len", 32)
