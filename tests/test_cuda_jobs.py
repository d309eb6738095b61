"""Whole jobs on a CUDA device, real or simulated, give what they give on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import TINY, outputs, tiny, tiny_inputs

from liar_ext import cli, prune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

JOBS = {
    "default": {},
    "global": {"allocation": "global"},
    "refine": {"refine": 1},
    "heads": {"attn_unit": "head"},
    "affine": {"reconstruct": "affine"},
    "groups of sites": {"memory": 1e-5},
    "hidden": {"keep_hidden": 0.8},
    "refit": {"schedule": "layerwise", "refit": True},
    **{
        f"layerwise {target}": {"schedule": "layerwise", "target": target}
        for target in ("dense-input", "branch", "auto")
    },
    **{name: {"criterion": name, "allocation": "uniform"} for name in ("obs", "energy", "fisher")},
}


def batches(model):
    return [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(4)]


def pruned(device, family="llama", **options):
    """Return the pruned model's outputs and its plan."""
    model = tiny(family).to(device)
    report = prune(model, batches(model), 0.7, **options)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    return outputs(model.cpu()), report.plan


def assert_as_on_the_cpu(**options):
    (want, plan), (got, planned) = (pruned(device, **options) for device in ("cpu", "cuda"))
    assert planned == plan
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("job", JOBS)
def test_a_job_does_what_it_does_on_the_cpu(job):
    assert_as_on_the_cpu(**JOBS[job])


@pytest.mark.parametrize("family", [family for family in TINY if family != "llama"])
def test_a_family_is_pruned_as_on_the_cpu(family):
    assert_as_on_the_cpu(family=family, allocation="uniform")


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "bert", "mpnet"])
def test_a_family_is_narrowed_as_on_the_cpu(family):
    assert_as_on_the_cpu(family=family, allocation="uniform", keep_hidden=0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("job", ["default", "layerwise auto", "fisher"])
def test_narrow_dtypes(dtype, job):
    model = tiny("llama", dtype=dtype).to("cuda")
    report = prune(model, batches(model), 0.7, **JOBS[job])
    assert model.dtype == dtype and torch.isfinite(outputs(model.cpu())).all()
    assert all(0 <= row.error < 1.5 for row in report.sites)


def test_the_command_on_a_device(llama_folder, corpus, tmp_path, capsys):
    def run(*arguments) -> str:
        assert cli.main([*map(str, arguments), "--device", "cuda"]) == 0
        return capsys.readouterr().out

    out, texts = tmp_path / "pruned", ("--calibration", corpus[0], "--eval", corpus[1])
    options = ("--sites", "mlp", "--uniform-layers", "--samples", 16, "--seq-len", 32, "--quiet")
    run("prune", llama_folder, *texts, "--keep", 0.7, *options, "--out", out)
    report = json.loads((out / "liar_report.json").read_text())
    assert report["evaluation"]["pruned"]["perplexity"] > 1
    assert "LlamaForCausalLM.from_pretrained: same outputs" in run("verify", out)
    assert "perplexity" in run("eval", out, "--text", corpus[1], "--seq-len", 32)
