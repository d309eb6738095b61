"""A folder is written whole or not at all, and holds what its loaders need."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from folders import equal_plan, make_plan, pruned, read, tokenizer
from tiny import outputs, tiny

from liar_ext.checkpoint import load_pruned, placing, saving
from liar_ext.checkpoint.placing import check_folder
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import auto_classes, how_to_load
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import sites
from liar_ext.models.slicing import apply_plan
from liar_ext.system.errors import InputError


def test_config_says_the_size_of_each_layer(saved) -> None:
    model, _, folder = saved("llama")
    config = transformers.AutoConfig.from_pretrained(folder)
    for block, (attn, mlp) in enumerate(zip(sites(model)[::2], sites(model)[1::2], strict=True)):
        layer = config.per_layer_config[block]
        assert layer.intermediate_size == mlp.d_in
        assert layer.num_attention_heads == attn.sizes["heads"]
        assert layer.num_key_value_heads == attn.sizes["kv_heads"]


@pytest.mark.parametrize("plan_of", [equal_plan, make_plan])
def test_saving_leaves_the_model_as_it_is(plan_of, tmp_path: Path) -> None:
    model, plan = pruned("llama", plan_of)
    expected, config, before = outputs(model), model.config, model.config.to_dict()
    model.train()
    save_pruned(model, tmp_path / "pruned", plan)
    assert model.training and model.config is config and config.to_dict() == before
    assert torch.equal(outputs(model.eval()), expected)


def test_tokenizer_and_chat_template_are_kept(tmp_path: Path) -> None:
    model, plan = pruned("llama")
    save_pruned(model, tmp_path / "pruned", plan, tokenizer=tokenizer())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert loaded("b a")["input_ids"] == [3, 2]
    assert loaded.chat_template == "{{ messages[0].content }}!"


def test_reports_are_written(tmp_path: Path) -> None:
    class Report:
        def save(self, folder) -> None:
            (Path(folder) / "liar/report.md").write_text("# Report")

    model, plan = pruned("llama")
    save_pruned(model, tmp_path / "one", plan, report={"seconds": 1})
    assert json.loads((tmp_path / "one" / "liar/report.json").read_text()) == {"seconds": 1}
    save_pruned(model, tmp_path / "two", plan, report=Report())
    assert (tmp_path / "two" / "liar/report.md").read_text() == "# Report"


class Quantiser:
    """What transformers leaves on a model that it dequantised: it refuses to be saved."""

    quantization_config = type("Config", (), {"quant_method": "gguf"})

    def is_serializable(self) -> bool:
        return False


def test_a_dequantised_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    from transformers.quantizers.base import HfQuantizer

    model, plan = pruned("llama")
    quantiser = type("Gguf", (Quantiser, HfQuantizer), {"__init__": lambda self: None})
    quantiser.__abstractmethods__ = frozenset()
    model.hf_quantizer = quantiser()
    model.is_quantized, model.quantization_method = True, "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "plain")
    save_pruned(model, tmp_path / "pruned", plan)
    assert "quantization_config" not in read(tmp_path / "pruned")
    assert torch.equal(outputs(load_pruned(tmp_path / "pruned")), outputs(model))
    assert model.is_quantized and model.config.quantization_config and model.hf_quantizer


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    model, plan = pruned("llama")
    folder = tmp_path / "pruned"
    save_pruned(model, folder, plan)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="exists"):
        save_pruned(model, folder, plan)
    assert tree(tmp_path) == before
    other, other_plan = pruned("qwen2")
    save_pruned(other, folder, other_plan, overwrite=True)
    assert torch.equal(outputs(load_pruned(folder)), outputs(other))
    assert os.listdir(tmp_path) == ["pruned"]


def test_only_a_pruned_model_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    for what in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(InputError, match="holds precious.txt, which save_pruned didn't write"):
            check_folder(what, overwrite=True)
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", overwrite=True)
    check_folder(tmp_path / "new")


@pytest.mark.parametrize("broken", ["save_pretrained", "write_fingerprint", "rename"])
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_loses_nothing(old: bool, broken: str, tmp_path: Path, monkeypatch) -> None:
    model, plan = pruned("llama")
    folder = tmp_path / "pruned"
    if old:
        save_pruned(model, folder, plan)
    before = tree(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_half(folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        full()

    if broken == "save_pretrained":
        monkeypatch.setattr(model, "save_pretrained", write_half)
    elif broken == "write_fingerprint":
        monkeypatch.setattr(saving, "write_fingerprint", full)
    else:
        rename = Path.rename

        def refuse(self, to):
            written = self.name.startswith(".") and not self.name.endswith(".old")
            full() if written else rename(self, to)

        monkeypatch.setattr(placing, "_renameat2", lambda *args: False)
        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="No space left on device; nothing was left behind"):
        save_pruned(model, folder, plan, overwrite=old)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == (["pruned"] if old else [])


def test_a_plan_that_was_not_applied_is_refused(tmp_path: Path) -> None:
    model, plan = pruned("llama")
    with pytest.raises(InputError, match="the plan that was applied, got str; give it as plan="):
        save_pruned(model, tmp_path / "c", "a report")
    with pytest.raises(InputError, match="pass the plan that pruned this model"):
        save_pruned(model, tmp_path / "pruned", equal_plan(tiny("llama")))
    assert os.listdir(tmp_path) == []


def test_biases_alone_that_a_stock_loader_would_drop_are_refused(tmp_path: Path) -> None:
    model = tiny("mistral")
    kept = {site.name: SitePlan(24, tuple(range(24)), True) for site in sites(model, ("mlp",))}
    plan = Plan("mistral", "auto", kept)
    apply_plan(model, plan)
    with pytest.raises(InputError, match="would drop silently"):
        save_pruned(model, tmp_path / "pruned", plan)


@pytest.mark.parametrize(
    ("family", "plan_of", "settings", "options"),
    [
        ("llama", make_plan, {}, "`--uniform-layers`"),
        ("bert", equal_plan, {}, "`--sites mlp --uniform-layers`"),
        ("dinov2", equal_plan, {}, "`--sites attn --uniform-layers`"),
        ("mistral", equal_plan, {"bias": True}, "`--reconstruct linear --uniform-layers`"),
    ],
)
def test_the_way_to_a_stock_loader_is_told(family, plan_of, settings, options, tmp_path: Path):
    model, plan = pruned(family, plan_of, **settings)
    sentence = how_to_load(model, plan)
    assert "load_pruned(folder)" in sentence and "trust_remote_code=True" in sentence
    assert options in sentence
    save_pruned(model, tmp_path / "pruned", plan)
    assert read(tmp_path / "pruned")["liar"]["layers"] == "unequal"
    assert set(read(tmp_path / "pruned")["auto_map"]) >= set(auto_classes(model)) != set()


def test_a_folder_for_a_stock_loader_says_so(tmp_path: Path):
    model, plan = pruned("llama", equal_plan)
    assert "plain `transformers.AutoModelForCausalLM" in how_to_load(model, plan)
    save_pruned(model, tmp_path / "pruned", plan)
    assert "auto_map" not in read(tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "liar_loader.py").exists()


@pytest.mark.parametrize("plan_of", [make_plan, equal_plan])
def test_weights_are_the_only_safetensors_at_the_top(plan_of, saved):
    """vLLM, and whatever else globs ``*.safetensors``, takes every one there for weights."""
    *_, folder = saved("llama", plan_of)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "liar" / "fingerprint.safetensors").is_file()
