"""Modifiers in llm-compressor itself: what they make of a model.

``make check-llmcompressor`` runs this file and its neighbours in an environment of their own;
``make test`` doesn't collect them, since llm-compressor takes other versions of transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from compressing import EQUAL, SIZES, W4, load, loader, logits, rows, run
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny import tiny
from transformers import AutoModelForCausalLM

from liar_ext import InputError, prune, sites
from liar_ext.integrations.llmcompressor import LIARGPTQModifier, LIARPruningModifier

QUANTISERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "shared": LIARGPTQModifier}


def test_it_prunes_as_prune_does(folder):
    modifier = LIARPruningModifier(**EQUAL, seed=3)
    model = run(folder, modifier)
    by_hand = load(folder)
    report = prune(by_hand, list(loader()), **EQUAL, seed=3)
    assert modifier.report.plan == report.plan
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=0, atol=0)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_pruning_and_w4a16_in_one_recipe(folder, tmp_path, quantiser, pipeline):
    out = tmp_path / "out"
    pruning = LIARPruningModifier(**EQUAL)
    model = run(
        folder, pruning, QUANTISERS[quantiser](**W4), pipeline=pipeline, output_dir=str(out)
    )
    params = pruning.report.params
    assert params["after"] < params["before"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    site = sites(tiny("llama", **SIZES), ("mlp",))[0]
    kept = len(pruning.report.plan.sites["0.mlp"].kept)
    assert config["intermediate_size"] == kept < site.units
    again = load(out)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    ids = rows(1)[0]["input_ids"][None]
    assert again.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_shared_grams_are_twice_the_sums_of_kept_inputs(folder, monkeypatch):
    """With nothing pruned and no padding, GPTQ's own Hessians of the first block are the same."""
    seen: dict[str, dict] = {}

    def watch(kind):
        compress = kind.compress_modules

        def compress_modules(self):
            for module, hessian in self._hessians.items():
                name = self._module_names[module]
                seen.setdefault(kind.__name__, {})[name] = hessian / self._num_samples[module]
            compress(self)

        monkeypatch.setattr(kind, "compress_modules", compress_modules)

    watch(LIARGPTQModifier)
    run(folder, LIARPruningModifier(keep=1.0, tile=32), LIARGPTQModifier(**W4))
    monkeypatch.undo()
    watch(GPTQModifier)
    run(folder, GPTQModifier(**W4))
    ours, theirs = seen["LIARGPTQModifier"], seen["GPTQModifier"]
    assert ours.keys() == theirs.keys() and len(ours) == 7 * 3
    first = [name for name in ours if ".layers.0." in name]
    assert len(first) == 7
    for name in first:  # the others read what quantised blocks gave
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_shared_grams_run_the_model_no_more(folder, monkeypatch):
    calls = []
    model = load(folder)
    pruning = LIARPruningModifier(**EQUAL, allocation="uniform", schedule="one-pass")
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    oneshot(model=model, recipe=[pruning, LIARGPTQModifier(**W4)], dataset=loader())
    assert len(calls) == len(loader())


def test_yaml_recipe_and_back(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n"
        "  prune_modifiers:\n"
        "    LIARPruningModifier: {keep: 0.7, tile: 32, uniform_layers: true}\n"
        "quantize_stage:\n"
        "  quantize_modifiers:\n"
        "    LIARGPTQModifier:\n"
        "      ignore: [lm_head]\n"
        "      config_groups: {group_0: {targets: [Linear], weights: {num_bits: 4, type: int,\n"
        "        symmetric: true, strategy: group, group_size: 32}}}\n"
    )
    out = tmp_path / "out"
    first = oneshot(model=load(folder), recipe=str(recipe), dataset=loader(), output_dir=str(out))
    written = (out / "recipe.yaml").read_text()
    assert "keep: 0.7" in written and "criterion: wifv" in written
    torch.testing.assert_close(logits(load(out)), logits(first), rtol=1e-4, atol=1e-4)


def test_the_saved_recipe_prunes_again(folder, tmp_path):
    """Of pruning alone: llm-compressor writes enums of its GPTQ that no safe loader reads."""
    out = tmp_path / "out"
    first = run(folder, LIARPruningModifier(**EQUAL, damp="0.01"), output_dir=str(out))
    again = oneshot(model=load(folder), recipe=str(out / "recipe.yaml"), dataset=loader())
    torch.testing.assert_close(logits(again), logits(first), rtol=0, atol=0)


def test_a_preset_is_where_fields_begin():
    assert LIARPruningModifier(preset="best").rescale
    assert LIARPruningModifier(preset="best", schedule="one-pass").schedule == "one-pass"
    dumped = LIARPruningModifier(preset="best", schedule="one-pass").model_dump()
    known = {name: value for name, value in dumped.items() if not name.endswith("_")}
    assert LIARPruningModifier(**known).schedule == "one-pass"


def test_the_report_is_written(folder, tmp_path):
    modifier = LIARPruningModifier(**EQUAL, report_to=str(tmp_path / "report"))
    with pytest.raises(InputError, match="no report yet"):
        _ = modifier.report
    run(folder, modifier)
    assert (tmp_path / "report" / "plan.json").exists()


WITHOUT = """
import importlib.util, sys
assert importlib.util.find_spec("liar_ext") is None
import torch
from transformers import AutoModelForCausalLM
folder, trust = sys.argv[1], sys.argv[2] == "unequal"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
ids = torch.tensor([[3, 4, 5, 6]])
print("logits", model(input_ids=ids).logits.sum().item())
print("tokens", model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist())
"""


@pytest.mark.parametrize("quantiser", [None, *QUANTISERS])
@pytest.mark.parametrize("layers", ["equal", "unequal"])
def test_the_folder_loads_where_liar_ext_is_not(folder, tmp_path, layers, quantiser):
    out = tmp_path / "out"
    pruning = LIARPruningModifier(**{**EQUAL, "uniform_layers": layers == "equal"})
    recipe = [pruning] + ([QUANTISERS[quantiser](**W4)] if quantiser else [])
    run(folder, *recipe, output_dir=str(out))
    kept = {len(site.kept) for name, site in pruning.report.plan.sites.items() if "mlp" in name}
    assert (len(kept) == 1) == (layers == "equal")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(out), layers],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=layers == "unequal")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = again(input_ids=ids).logits.sum().item()
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert float(said["logits"]) == pytest.approx(expected, rel=1e-4)
    made = again.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
    assert json.loads(said["tokens"]) == made


def test_a_model_that_is_pruned_already_is_pruned_further(folder):
    modifier = LIARPruningModifier(**EQUAL)
    once = run(folder, modifier)
    shared = LIARPruningModifier(**{**EQUAL, "keep": 0.6})
    twice = oneshot(model=once, recipe=[shared, LIARGPTQModifier(**W4)], dataset=loader())
    assert shared.report.params["before"] == modifier.report.params["after"]
    assert shared.report.params["after"] < modifier.report.params["after"]
    assert torch.isfinite(logits(twice)).all()
