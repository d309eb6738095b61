"""Modifiers in llm-compressor itself: run by ``make check-llmcompressor``, in its own venv.

Not collected by ``make test``: llm-compressor takes other versions of transformers.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny import VOCAB, tiny
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from liar_ext import InputError, prune, sites
from liar_ext.integrations.llmcompressor import (
    LIARGPTQModifier,
    LIARPruningModifier,
    calibration_batches,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
W4 = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
    "ignore": ["lm_head"],
}


def groups_of(size):
    groups = copy.deepcopy(W4["config_groups"])
    groups["group_0"]["weights"]["group_size"] = size
    return groups


EQUAL = {"keep": 0.7, "tile": 32, "uniform_layers": True}
QUANTISERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "shared": LIARGPTQModifier}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama", **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def rows(count=16, tokens=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 1, (count, tokens), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def loader(some=None, batch=4):
    return DataLoader(some or rows(), batch_size=batch)


def padded(row, width, side):
    gap = width - len(row["input_ids"])
    at = (gap, 0) if side == "left" else (0, gap)
    pad = torch.nn.functional.pad
    return {name: pad(value, at) if value.dim() else value for name, value in row.items()}


def run(folder, *modifiers, **settings):
    settings.setdefault("dataset", loader())
    return oneshot(model=load(folder), recipe=list(modifiers), **settings)


def logits(model):
    ids = torch.stack([row["input_ids"] for row in rows(3, seed=9)])
    with torch.no_grad():
        return model(input_ids=ids).logits


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
    pruning = LIARPruningModifier(**EQUAL, allocation="uniform")
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
    assert LIARPruningModifier(preset="best").schedule == "layerwise"
    assert LIARPruningModifier(preset="best", schedule="one-pass").schedule == "one-pass"
    dumped = LIARPruningModifier(preset="best", schedule="one-pass").model_dump()
    known = {name: value for name, value in dumped.items() if not name.endswith("_")}
    assert LIARPruningModifier(**known).schedule == "one-pass"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kep": 0.8}, "did you mean keep"),
        ({"keep": 1.8}, r"keep must be in \(0, 1\]"),
        ({"keep": "half"}, "keep must be a number"),
        ({"criterion": "magic"}, "magic"),
        ({"samples": 8}, "samples must be given to oneshot"),
        ({"preset": "fastest"}, "preset must be one of"),
        ({"kinds": "mlp"}, "kinds must be some of"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LIARPruningModifier(**fields)


def test_a_wrong_field_in_yaml_is_named(folder):
    recipe = "s_stage:\n  s_modifiers:\n    LIARPruningModifier:\n      kep: 0.8\n"
    with pytest.raises(ValueError, match="did you mean keep"):
        oneshot(model=load(folder), recipe=recipe, dataset=loader())


def test_no_dataset(folder):
    with pytest.raises(InputError, match="has no calibration data"):
        oneshot(model=load(folder), recipe=[LIARPruningModifier()])


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setattr("liar_ext.integrations.llmcompressor.is_distributed", lambda: True)
    with pytest.raises(InputError, match="in one process"):
        run(folder, LIARPruningModifier(**EQUAL))


def test_shared_grams_need_pruning_before(folder):
    with pytest.raises(InputError, match="before it in the recipe"):
        run(folder, LIARGPTQModifier(**W4))
    with pytest.raises(InputError, match="before it in the recipe"):
        run(folder, LIARGPTQModifier(**W4), LIARPruningModifier(**EQUAL))


def test_shared_grams_of_a_layer_outside_of_the_blocks(folder):
    with pytest.raises(InputError, match="lm_head"):
        run(folder, LIARPruningModifier(**EQUAL), LIARGPTQModifier(**{**W4, "ignore": []}))


def test_shared_grams_and_a_smaller_hidden_size(folder):
    with pytest.raises(InputError, match="keep_hidden"):
        run(folder, LIARPruningModifier(**EQUAL, keep_hidden=0.5), LIARGPTQModifier(**W4))


def test_sizes_that_groups_do_not_divide_are_refused_before_calibration(folder):
    touched = DataLoader(rows(), collate_fn=lambda _: pytest.fail("calibrated"))
    for multiple in (1, 16):
        modifiers = LIARPruningModifier(tile=multiple), QuantizationModifier(**W4)
        with pytest.raises(InputError, match="set tile=32"):
            run(folder, *modifiers, dataset=touched)


def test_heads_that_groups_do_not_divide_are_refused(folder):
    others = "re:.*(q|k|v|gate|up|down)_proj"
    quantiser = QuantizationModifier(config_groups=groups_of(128), ignore=["lm_head", others])
    with pytest.raises(InputError, match=r"o_proj reads 64 features, which groups of 128"):
        run(folder, LIARPruningModifier(keep=0.5, kinds=["attn"]), quantiser)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(folder, side):
    short = [
        {name: value[: 10 + i] for name, value in row.items()} for i, row in enumerate(rows(8))
    ]
    long = [padded(row, 24, side) for row in short]
    reports = []
    for some, batch in ((short, 1), (long, 4)):
        modifier = LIARPruningModifier(**EQUAL, allocation="uniform")
        run(folder, modifier, dataset=loader(some, batch))
        reports.append(modifier.report)
    (one, other) = reports
    assert one.settings["calibration_tokens"] == other.settings["calibration_tokens"]
    assert one.plan == other.plan
    for a, b in zip(one.sites, other.sites, strict=True):
        assert a.holdout_error == pytest.approx(b.holdout_error, rel=1e-3)


def test_a_row_of_padding_alone_counts_for_nothing_and_a_batch_is_refused(folder):
    some = rows(8)
    empty = {"input_ids": torch.zeros(24, dtype=torch.long)}
    empty["attention_mask"] = torch.zeros_like(empty["input_ids"])
    modifier = LIARPruningModifier(**EQUAL)
    run(folder, modifier, dataset=loader([*some[:3], empty, *some[3:]], 3))
    assert modifier.report.settings["calibration_tokens"] == 8 * 24
    assert all(row.dropped_rows == 0 for row in modifier.report.sites)
    with pytest.raises(InputError, match="holds only padding"):
        run(folder, LIARPruningModifier(**EQUAL), dataset=loader([*some, empty], 1))


def test_loss_masks_leave_tokens_out(folder):
    some = [{**row, "loss_mask": torch.arange(24) >= 8} for row in rows(8)]
    batches = list(calibration_batches(load(folder), loader(some)))
    assert all(int(batch.mask.sum()) == 4 * 16 for batch in batches)
    assert all("loss_mask" not in batch.inputs for batch in batches)
    modifier = LIARPruningModifier(**EQUAL)
    run(folder, modifier, dataset=loader(some), use_loss_mask=True)
    assert modifier.report.settings["calibration_tokens"] == 8 * 16


def test_a_text_dataset_is_tokenised_by_oneshot(folder):
    words = "structured pruning removes whole heads and channels of a model "
    texts = [words[i:] + words[:i] for i in range(16)]
    modifier = LIARPruningModifier(**EQUAL)
    run(folder, modifier, dataset=Dataset.from_dict({"text": texts}), max_seq_length=32)
    assert modifier.report.settings["calibration_sequences"] == 16


def test_a_failure_leaves_the_model_and_no_session_behind(folder):
    model = load(folder)
    before = logits(model)
    with pytest.raises(InputError):
        oneshot(model=model, recipe=[LIARPruningModifier(keep=1e-9)], dataset=loader())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    run(folder, LIARPruningModifier(**EQUAL))
    assert active_session().lifecycle.finalized


def test_the_report_is_written(folder, tmp_path):
    modifier = LIARPruningModifier(**EQUAL, report_to=str(tmp_path / "report"))
    with pytest.raises(InputError, match="no report yet"):
        _ = modifier.report
    run(folder, modifier)
    assert (tmp_path / "report" / "plan.json").exists()


def test_the_blocks_of_the_page_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").symlink_to(folder)
    text = (Path(__file__).parents[2] / "docs" / "llmcompressor.md").read_text("utf-8")
    python = re.findall(r"^```py\n(.*?)^```$", text, re.M | re.S)
    yaml = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    assert len(python) == 2 and len(yaml) == 1
    (tmp_path / "recipe.yaml").write_text(yaml[0])
    words = "structured pruning removes whole heads and channels of a model "
    texts = [words[i:] + words[:i] for i in range(16)]
    names = {
        "dataset": Dataset.from_dict({"text": texts}),
        "w4a16_of_32": W4["config_groups"],
    }
    for block in python:
        exec(block, names)
    assert load(tmp_path / "pruned-w4a16").config.intermediate_size < SIZES["intermediate_size"]


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
