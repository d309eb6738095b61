"""A folder loads without liar_ext, and is saved again by anybody, any number of times."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fresh_workers
import pytest
import torch
import transformers
from covers import cover, some
from folders import change, equal_plan, pruned, read
from tiny import TINY, VOCAB, batches, outputs, tiny, tiny_inputs

from liar_ext import InputError, apply_plan, load_pruned, prune, save_pruned, verify_pruned
from liar_ext.models.registry import family_of
from liar_ext.models.running import block_config
from liar_ext.models.sites import sites

# A process in which liar_ext can't be imported; every folder is loaded, and saved again, there.
ELSEWHERE = """
import sys, warnings
sys.modules["liar_ext"] = None
import torch, transformers
from pathlib import Path
for folder in sorted(Path(sys.argv[1]).iterdir()):
    inputs, expected, auto = torch.load(folder / "expected.pt", weights_only=False)
    loader = getattr(transformers, auto)
    try:
        loader.from_pretrained(folder)
        raise SystemExit(f"{folder}: a stock loader has built layers of unequal sizes")
    except RuntimeError as error:
        assert "size" in str(error), error
    for name in ("", "again", "and again"):
        model = loader.from_pretrained(folder / name, trust_remote_code=True).eval()
        with torch.no_grad():
            found = model(**inputs)
        found = found.logits if hasattr(found, "logits") else found.last_hidden_state
        assert torch.equal(found, expected), (folder, name)
        model.save_pretrained(folder / ("again" if name == "" else "and again"))
"""


@pytest.mark.exhaustive
def test_a_process_without_liar_ext_loads_and_saves_unequal_layers(tmp_path: Path) -> None:
    """Of every family, with and without new biases: one process, as its imports take seconds."""
    for name, bias in itertools.product(TINY, (False, True)):
        folder = tmp_path / f"{name} {bias}"
        model, plan = pruned(name, bias=bias)
        save_pruned(model, folder, plan)
        auto = next(
            auto
            for auto, loader in read(folder)["auto_map"].items()
            if loader == f"liar_loader.{type(model).__name__}"
        )
        inputs = tiny_inputs(model)
        torch.save((dict(inputs), outputs(model, inputs), auto), folder / "expected.pt")
    result = fresh_workers.run_script(ELSEWHERE, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for folder in tmp_path.iterdir():
        again = load_pruned(folder / "and again")
        assert torch.equal(outputs(again), outputs(load_pruned(folder)))


def saved_by(model, folder: Path):
    """Return a model that was saved by transformers, and loaded by it."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@cover(
    1,
    choices=[{}, {"uniform_layers": True}, {"keep_hidden": 0.8}],
    name=["llama", "qwen2", "bert", "mpnet", "opt"],
)
def test_a_model_in_memory_is_saved_by_transformers(name, choices, tmp_path: Path) -> None:
    if name == "opt" and "keep_hidden" in choices:
        pytest.skip("the hidden size of this family isn't pruned")
    model = tiny(name)
    prune(model, batches(model), 0.7, **choices)
    again = saved_by(model, tmp_path / "one")
    twice = saved_by(again, tmp_path / "two")
    for other in (again, twice, load_pruned(tmp_path / "one"), load_pruned(tmp_path / "two")):
        assert torch.equal(outputs(other), outputs(model))
        assert other.config.liar == model.config.liar
    unequal = model.config.liar["layers"] == "unequal"
    assert (tmp_path / "two" / "liar_loader.py").exists() == unequal
    if unequal:
        assert read(tmp_path / "two")["auto_map"] == read(tmp_path / "one")["auto_map"]


def test_another_model_of_the_same_config_keeps_it() -> None:
    model = tiny("llama")
    other = type(model)(model.config)
    prune(model, batches(model), 0.7)
    assert not hasattr(other.config, "liar") and other.config.intermediate_size == 24
    assert other.config is not model.config is model.model.config


def test_no_code_is_trusted_where_liar_ext_is_imported(saved, tmp_path: Path) -> None:
    model, _, folder = saved("bert", bias=True)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert not type(loaded).__module__.startswith("transformers_modules")
    assert torch.equal(outputs(loaded), outputs(model))
    base = transformers.AutoModel.from_pretrained(folder)
    assert base.encoder.layer[0].intermediate.dense.out_features == 12
    dense = tiny("bert")
    dense.save_pretrained(tmp_path / "dense")
    assert type(type(dense).from_pretrained(tmp_path / "dense")) is type(dense)


@some("first", ["liar_ext", "transformers.modeling_utils"], "transformers.modeling_utils")
def test_it_does_not_matter_what_is_imported_first(first, saved) -> None:
    *_, folder = saved("llama")
    script = f"""
import {first}
import liar_ext, transformers
model = transformers.LlamaForCausalLM.from_pretrained({str(folder)!r})
assert model.model.layers[0].mlp.down_proj.in_features == 12, model
assert type(model).__module__ == "liar_ext.models.liar_loader"
"""
    if first == "liar_ext":
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    else:
        result = fresh_workers.run_script(script)
    assert result.returncode == 0, result.stderr[-2000:]


def test_transformers_own_layers_fit_the_sizes_in_the_config(saved) -> None:
    """Its draft of models of unequal layers builds each from ``config.per_layer_config[index]``."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model, _, folder = saved("llama", bias=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    part = block_config(family_of(model), config)
    for index, layer in enumerate(model.model.layers):
        theirs = LlamaDecoderLayer(part.per_layer_config[index], index)
        assert {name: p.shape for name, p in theirs.named_parameters()} == {
            name: p.shape for name, p in layer.named_parameters()
        }
        groups = layer.self_attn.num_key_value_groups
        assert theirs.self_attn.num_key_value_groups == groups


def test_a_second_pruning_is_saved_and_composes(tmp_path: Path) -> None:
    """Prune, save, load, fine-tune a little, prune, save: the folder tells of the dense model."""
    model = tiny("qwen2")
    first = prune(model, batches(model), 0.8)
    save_pruned(model, tmp_path / "first", first.plan, report=first)
    model = load_pruned(tmp_path / "first")
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    inputs = tiny_inputs(model)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimiser.step()
    second = prune(model.eval(), batches(model), 0.8)
    save_pruned(model, tmp_path / "second", second.plan, report=second)
    assert verify_pruned(tmp_path / "second")["agrees"]
    assert torch.equal(outputs(load_pruned(tmp_path / "second")), outputs(model))
    dense = {site.name: site.units for site in sites(tiny("qwen2"))}
    assert {name: site.units for name, site in second.plan.sites.items()} == dense
    assert len(read(tmp_path / "second")["liar"]["history"]) == 2


def rope(**more) -> dict:
    return {"rope_type": "default", "rope_theta": 5000.0, **more}


WHOLE = {"partial_rotary_factor": 1.0}  # most take a quarter, or a half, by default
LINEAR = {"rope_type": "linear", "factor": 2.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
PHI3 = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2]}
TWO = {"full_attention": rope(rope_theta=7000.0), "sliding_attention": rope()}
SCALED = {**TWO, "full_attention": {"rope_theta": 7000.0, **LINEAR}}
MODERNBERT = {"global_rope_theta": 7000.0, "local_rope_theta": 5000.0}
GEMMA = {"rope_theta": 7000.0, "rope_local_base_freq": 5000.0}


@pytest.mark.parametrize(
    ("name", "given", "older"),
    [
        ("llama", rope(), {"rope_theta": 5000.0}),
        ("llama", rope(**LINEAR), {"rope_theta": 5000.0, "rope_scaling": LINEAR}),
        *((name, rope(**WHOLE), WHOLE) for name in "stablelm phi nemotron glm glm4".split()),
        ("qwen3_next", rope(**WHOLE), WHOLE),
        ("phi3", rope(partial_rotary_factor=0.5), {"partial_rotary_factor": 0.5}),
        ("phi3", rope(**LONG), {"rope_scaling": PHI3}),
        ("gpt_neox", rope(**WHOLE), {"rotary_pct": 1.0, "rotary_emb_base": 5000.0}),
        ("gpt_oss", rope(), {"rope_scaling": None}),  # which is scaled by default
        ("qwen2_vl", None, {"rope_scaling": SECTIONS}),
        ("gemma3_text", TWO, GEMMA),
        ("gemma3_text", SCALED, {**GEMMA, "rope_scaling": LINEAR}),
        ("olmo3", SCALED, {"rope_theta": 7000.0, "rope_scaling": LINEAR}),
        ("modernbert", TWO, MODERNBERT),
        ("modernbert-decoder", TWO, MODERNBERT),
        ("gemma4_text", None, {}),  # which version 4 lacks
    ],
)
def test_an_older_transformers_finds_the_rotation(name, given, older, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 8} if name == "phi3" else {}
    model = tiny(name, **sizes, **({} if given is None else {"rope_parameters": given}))
    plan = equal_plan(model, ("mlp",))
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "pruned", plan)
    fields = read(tmp_path / "pruned")
    fields = fields.get("text_config", fields)
    assert {name: fields.get(name, "lacks it") for name in older} == older
    assert older or "rope_theta" not in fields
    for load in (load_pruned, type(model).from_pretrained):
        assert torch.equal(outputs(load(tmp_path / "pruned")), outputs(model))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"modules": {"layers.0.mlp.down_proj": {"weight": [4000, 9000]}}}, "the dense model has"),
        ({"modules": {"layers.0.mlp.down_proj": {"forward": 1}}}, "hasn't"),
        ({"modules": {"layers.77.mlp": {"weight": [1]}}}, "plan says"),
        ({"modules": [1]}, "modules"),
        ({"modules": {"layers.0.mlp.down_proj": {"weight": "x"}}}, "modules"),
        ({"modules": {}, "head_inputs": {"layers.0": [0, "x", [10**30]]}}, "head_inputs"),
    ],
)
def test_sizes_that_no_model_has_are_refused(said, why, changed) -> None:
    folder = changed()
    change(folder / "config.json", liar={**read(folder)["liar"], **said})
    with pytest.raises(InputError, match=why):
        load_pruned(folder)


@pytest.fixture
def changed(saved, tmp_path: Path):
    """Give a function that returns a folder with other fields in its config."""

    def copy(**said: object) -> Path:
        folder = shutil.copytree(saved()[2], tmp_path / "pruned")
        change(folder / "config.json", **said)
        return folder

    return copy


@pytest.mark.parametrize("head_dim", [2, 8, 16, 10**6])
def test_a_head_size_that_the_layers_deny_is_refused(head_dim, changed) -> None:
    """Shapes alone would fit, and the model would compute something else."""
    with pytest.raises(InputError, match="load_pruned: "):
        load_pruned(changed(head_dim=head_dim))


@pytest.mark.parametrize("names", [{"a": 1}, [], "LlamaForCausalLM", None, [7]])
def test_a_class_that_is_none_is_refused(names, changed) -> None:
    with pytest.raises(InputError, match="has no model class"):
        verify_pruned(changed(architectures=names))


@pytest.mark.parametrize("name", ["bert", "mpnet", "gpt2", "opt", "gpt_neox"])
def test_tokens_can_be_added_and_removed_after_loading(name, tmp_path: Path) -> None:
    model = tiny(name)
    report = prune(model, batches(model), 0.5, keep_hidden=0.5)
    save_pruned(model, tmp_path / "pruned", report.plan, report=report)
    loader = getattr(transformers, next(iter(read(tmp_path / "pruned")["auto_map"])))
    for more in (3, -3):
        model = loader.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
        model.resize_token_embeddings(VOCAB + more)
        model.save_pretrained(tmp_path / "resized")
        inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
        expected = outputs(model, inputs)
        for again in (
            loader.from_pretrained(tmp_path / "resized", trust_remote_code=True),
            load_pruned(tmp_path / "resized"),
        ):
            assert torch.equal(outputs(again, inputs), expected)


def test_a_folder_that_says_whole_sizes_still_loads(tmp_path: Path) -> None:
    """As folders did before null stood for all of a dimension."""
    model = tiny("gpt_neox")
    report = prune(model, batches(model), 0.5, keep_hidden=0.5)
    folder = tmp_path / "pruned"
    save_pruned(model, folder, report.plan, report=report)
    fields = read(folder)
    for path, sizes in fields["liar"]["modules"].items():
        for key, size in sizes.items():
            if isinstance(size, list) and None in size:
                sizes[key] = list(model.base_model.get_parameter(f"{path}.{key}").shape)
    for path, sizes in fields["liar"]["head"].items():
        sizes["weight"] = list(model.get_parameter(f"{path}.weight").shape)
    assert None in read(folder)["liar"]["modules"]["embed_in"]["weight"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert "null" not in json.dumps(fields["liar"]["modules"])
    assert torch.equal(outputs(load_pruned(folder)), outputs(model))
    loader = transformers.AutoModelForCausalLM
    loaded = loader.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(outputs(loaded), outputs(model))
    assert verify_pruned(folder)["agrees"]
