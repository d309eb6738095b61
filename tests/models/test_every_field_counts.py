"""No field of a recipe is ignored: with another value each gives another model, or report."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from tiny import batches, tiny

from liar_ext import cli, prune
from liar_ext.models.recipe_fields import recipe_fields

# Of a job in memory, where the budget is met by leaving channels and groups of heads.
IN_MEMORY = {
    "keep": 0.5,
    "of": "params",
    "tile": 8,
    "uniform_layers": True,
    "keep_hidden": 0.8,
    "keep_blocks": 0.7,
    "keep_experts": 0.5,
    "kinds": ("mlp",),
    "attn_unit": "head",
    "criterion": "magnitude",
    "allocation": "uniform",
    "reconstruct": "none",
    "damp": 10.0,
    "schedule": "one-pass",
    "rescale": True,
}
# Of the command, which reads texts.
OF_COMMAND = {
    "dtype": "bfloat16",
    "samples": 6,
    "self_text": 0.5,
    "random_tokens": 0.5,
    "seq_len": 24,
    "seed": 1,
    "certify": 4,
    "eval_samples": 2,
}
# Where a job runs, what it may take, and what it reads; vocabularies and of="latency" have tests of
# their own.
ELSEWHERE = {
    "keep_vocab",
    "vocab_text",
    "vocab_scripts",
    "model",
    "device",
    "calibration",
    "eval",
    "batch_size",
    "memory",
}
LATENCY = {"latency_phase", "latency_batch", "latency_prompt", "latency_new_tokens"}


def test_every_field_is_tried():
    tried = IN_MEMORY.keys() | OF_COMMAND.keys() | ELSEWHERE | LATENCY | {"latency_table"}
    assert tried == {each.name for each in recipe_fields()}


@cache
def job(family: str, name: str | None = None) -> dict[str, torch.Tensor]:
    model = tiny(family)
    prune(model, batches(model, 3), **{"keep": 0.7, **({name: IN_MEMORY[name]} if name else {})})
    return model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(each, other[name]) for name, each in one.items())


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_job_in_memory_heeds_it(name):
    family = "mixtral" if name == "keep_experts" else "llama"
    assert not same(job(family), job(family, name))


@pytest.fixture(scope="module")
def command(llama_folder, corpus, tmp_path_factory):
    @cache
    def run(*more: str) -> tuple[dict, dict]:
        out = tmp_path_factory.mktemp("job") / "out"
        texts = ["--calibration", str(corpus[0]), "--eval", str(corpus[1])]
        short = ["--samples", "8", "--seq-len", "16", "--eval-samples", "4", "--quiet"]
        quick = ["--schedule", "one-pass", "--allocation", "uniform"]
        quick += ["--self-text", "0", "--random-tokens", "0"]
        job = ["prune", str(llama_folder), *texts, *short, *quick, "--out", str(out), *more]
        assert cli.main(job) == 0
        report = json.loads((out / "liar/report.json").read_text())
        return load_file(out / "model.safetensors"), report

    return run


@pytest.mark.parametrize("name", OF_COMMAND)
def test_the_command_heeds_it(name, command):
    weights, report = command()
    given = "--" + name.replace("_", "-"), str(OF_COMMAND[name])
    other, theirs = command(*given)
    if name == "certify":
        assert all(row["certified_error"] is None for row in report["sites"])
        assert all(row["certified_error"] is not None for row in theirs["sites"])
    elif name == "eval_samples":
        assert report["evaluation"] != theirs["evaluation"]
    else:
        assert not same(weights, other)
