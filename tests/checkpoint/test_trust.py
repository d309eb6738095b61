"""No code of a folder is run unless it is, byte for byte, the code that is written into folders."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from folders import change, equal_plan, make_plan, pruned, read, tokenizer
from tiny import outputs, tiny

from liar_ext import verify_pruned
from liar_ext.checkpoint import load_model, load_pruned, save_pruned
from liar_ext.checkpoint.folder import LOADER_CODE
from liar_ext.system.errors import InputError


@pytest.fixture
def evil(tmp_path: Path) -> str:
    return f"open({str(tmp_path / 'PWNED')!r}, 'w')\n" + LOADER_CODE


@pytest.fixture
def save(saved, tmp_path: Path):
    def make(plan_of) -> tuple[Path, torch.nn.Module]:
        model, _, folder = saved("llama", plan_of)
        return shutil.copytree(folder, tmp_path / "pruned"), model

    return make


def refuses_its_code(folder: Path, model, match: str) -> None:
    """Verify refuses, load_pruned loads the weights, and neither runs anything."""
    with pytest.raises(InputError, match=match):
        verify_pruned(folder)
    loaded = load_pruned(folder, trust_remote_code=True)
    assert torch.equal(outputs(loaded), outputs(model))
    load_model(folder)
    assert not (folder.parent / "PWNED").exists()


def test_a_loader_that_was_replaced(save, evil) -> None:
    folder, model = save(make_plan)
    (folder / "liar_loader.py").write_text(evil)
    refuses_its_code(folder, model, "liar_loader.py, which save_pruned didn't write")


@pytest.mark.parametrize("loader", ["evil.PrunedModel", "someone/repo--liar_loader.PrunedModel", 3])
def test_an_auto_map_to_other_code(loader, save, evil) -> None:
    folder, model = save(make_plan)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": loader})
    refuses_its_code(folder, model, "auto_map with AutoModelForCausalLM")
    change(folder / "config.json", auto_map={"AutoConfig": "liar_loader.PrunedModel"})
    refuses_its_code(folder, model, "auto_map with AutoConfig")
    (folder / "evil.py").write_text(evil)
    refuses_its_code(folder, model, "evil.py")


def test_equal_layers_need_no_code(save, evil) -> None:
    folder, model = save(equal_plan)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "liar_loader.PrunedModel"})
    refuses_its_code(folder, model, "auto_map with AutoModelForCausalLM")
    (folder / "liar_loader.py").write_text(LOADER_CODE)
    refuses_its_code(folder, model, "liar_loader.py, which save_pruned didn't write")


def test_code_for_generate_is_not_run(save, evil) -> None:
    folder, model = save(make_plan)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(evil)
    refuses_its_code(folder, model, "custom_generate/generate.py")


def test_a_config_that_leads_to_other_files(save) -> None:
    folder, _ = save(make_plan)
    good = read(folder)
    for name in ("configuration_files", "transformers_weights"):
        change(folder / "config.json", **{name: ["other.json"]})
        with pytest.raises(InputError, match=f"{name}, which leads to other files"):
            load_pruned(folder)
        (folder / "config.json").write_text(json.dumps(good))
    change(folder / "config.json", _attn_implementation="someone/kernel")
    with pytest.raises(InputError, match="asks for code of 'someone/kernel'"):
        load_pruned(folder)


class Run:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [load_model, load_pruned])
def test_pickled_weights_are_refused(load, save, tmp_path: Path) -> None:
    folder, _ = save(make_plan)
    if load is load_model:
        folder = tmp_path / "dense"
        tiny("llama").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Run(tmp_path / "PWNED")))
    with pytest.raises(InputError, match=r"pytorch_model.bin only.*save them as safetensors"):
        load(folder)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("outside", ["../outside.safetensors", "/outside.safetensors", "..", ""])
def test_an_index_names_files_beside_it_only(outside: str, save) -> None:
    folder, _ = save(make_plan)
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": outside.replace("/out", f"{folder.parent}/out")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="must name safetensors files that lie beside it"):
        load_pruned(folder)


def test_shards_beside_an_index_load(save, monkeypatch, tmp_path: Path) -> None:
    model, plan = pruned("llama")
    save_pretrained = type(model).save_pretrained
    monkeypatch.setattr(
        type(model), "save_pretrained", lambda *a, **k: save_pretrained(*a, max_shard_size="4KB")
    )
    save_pruned(model, tmp_path / "shards", plan)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert torch.equal(outputs(load_pruned(tmp_path / "shards")), outputs(model))


def test_a_dense_model_with_code_of_its_own_is_explained(tmp_path: Path) -> None:
    """Without a question that waits for an answer."""
    tiny("llama").save_pretrained(tmp_path)
    change(tmp_path / "config.json", model_type="unheard", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(InputError, match=r"is of type 'llama', config.json says 'unheard'"):
        load_model(tmp_path)
    change(tmp_path / "config.json", architectures=["UnheardForCausalLM"])
    with pytest.raises(InputError, match="no model class 'UnheardForCausalLM'.*code of its own"):
        load_model(tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    code = {"AutoTokenizer": ["evil.Evil", None]}
    change(tmp_path / "tokenizer_config.json", tokenizer_class="Evil", auto_map=code)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(InputError, match="can't load the tokenizer"):
        load_model(tmp_path)
    assert not (tmp_path / "PWNED").exists()
