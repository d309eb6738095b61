"""What a folder holds beside weights, config and tokenizer goes along; weights and code don't."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from folders import as_in_the_hubs_cache, pruned, tokenizer
from tiny import batches, tiny

from liar_ext import load_pruned, prune, save_pruned
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.carrying import MOST_CARD, license_of, source_folder
from liar_ext.checkpoint.placing import check_folder
from liar_ext.report.report import Report

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny("bert").save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Source\n")
    for stays in ("pytorch_model.bin", "model.onnx", "train.py", ".hidden", "tf_model.h5"):
        (folder / stays).write_text("stays behind")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("of the dense model")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_else_a_folder_holds_goes_along(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(source)
    report = prune(model, batches(model), 0.7)
    out = tmp_path / "out"
    save_pruned(model, out, report.plan, report=report, tokenizer=tokenizer())
    carried = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    assert carried <= names(out)
    assert not {"pytorch_model.bin", "model.onnx", "train.py", ".hidden", "tf_model.h5"} & names(
        out
    )
    assert not (out / "onnx").exists()
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "# source, pruned" in card
    assert "How to load" in card and f"{report.params['after']:,}" in card
    check_folder(out, overwrite=True)  # all of it is ours to replace
    # From the pruned folder it goes along once more.
    again = load_pruned(out)
    save_pruned(again, tmp_path / "again", report.plan)
    assert carried <= names(tmp_path / "again")


@pytest.mark.parametrize("name", ["word_embedding_dimension", "embedding_dimension"])
def test_a_pooling_module_counts_the_features_that_are_left(name, source, tmp_path: Path) -> None:
    (source / "1_Pooling" / "config.json").write_text(json.dumps({name: 32}))
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text('{"in_features": 32, "out_features": 8}')
    (source / "2_Dense" / "model.safetensors").write_text("the layer's own weights")
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (source / "modules.json").write_text(json.dumps([*MODULES, dense]))
    model, _ = load_model(source)
    report = prune(model, batches(model), keep=1.0, keep_hidden=0.75)
    save_pruned(model, tmp_path / "out", report.plan, report=report)
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling == {name: 24}
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()
    assert any("2_Dense reads 32 features" in warning for warning in report.warnings)
    assert "2_Dense reads 32 features" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_from_outside_of_the_folder_goes_along(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (source / "link.json").symlink_to(secret)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    paths = ["../elsewhere", str(tmp_path / "elsewhere"), "1_Pooling", "liar", "..", "a/../../b"]
    (source / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    model, plan = pruned("bert")
    report = Report("bert")
    save_pruned(model, tmp_path / "out", plan, report=report, source=source)
    assert not (tmp_path / "out" / "link.json").exists()
    assert not (tmp_path / "out" / "elsewhere").exists()
    save_pruned(model, tmp_path / "again", plan, report=report, source=source)
    assert sum("leads" in warning for warning in report.warnings) == 6  # each once


def test_a_module_with_a_name_that_no_file_can_have_is_left_out(source: Path, tmp_path) -> None:
    paths = ["a\0b", "\ud800", "a" * 300]
    text = json.dumps([*MODULES, *({"path": path} for path in paths)])
    (source / "modules.json").write_text(text)
    model, plan = pruned("bert")
    save_pruned(model, tmp_path / "out", plan, source=source)
    assert (tmp_path / "out/1_Pooling/config.json").is_file()
    assert (tmp_path / "out/modules.json").read_text() == text


def test_a_module_that_is_a_link_is_not_walked(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "private.txt").write_text("of the user")
    (source / "2_Home").symlink_to(tmp_path / "home")
    (source / "modules.json").write_text(json.dumps([*MODULES, {"path": "2_Home"}]))
    model, plan = pruned("bert")
    report = Report("bert")
    save_pruned(model, tmp_path / "out", plan, report=report, source=source)
    assert "private" not in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/2_Home").exists()


def test_only_kinds_of_files_that_loaders_read_go_along(source: Path, tmp_path: Path) -> None:
    stay = {"evil.PY", "run.bash", "evil.cu", "MODEL.BIN", "Makefile", "1_Pooling/evil.PYX"}
    go = {"LICENSE", "NOTICE.txt", "vocab.txt", "1_Pooling/model.safetensors"}
    for name in stay | go:
        (source / name).write_text("")
    model, plan = pruned("bert")
    save_pruned(model, tmp_path / "out", plan, source=source)
    assert go <= names(tmp_path / "out") and not stay & names(tmp_path / "out")


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_card_without_end_names_no_licence(put, source: Path) -> None:
    card = source / "README.md"
    card.write_text(card.read_text() + "a" * MOST_CARD)
    assert license_of(source) == "apache-2.0"
    card.unlink()
    put(card)
    assert license_of(source) is None


def test_the_card_shows_a_name_as_it_is(tmp_path: Path) -> None:
    model, plan = pruned("bert")
    report = Report("a\n# b <script>[x](y)")
    report.warnings.append("c\n<img>")
    save_pruned(model, tmp_path / "out", plan, report=report)
    card = (tmp_path / "out/README.md").read_text()
    assert r"# a \# b &lt;script>\[x\](y), pruned" in card and r"- c &lt;img>" in card


@pytest.mark.parametrize("name", ["", ".", "downloads", "nowhere", "no/where", "\0"])
def test_only_a_model_folder_is_a_source(name: str, tmp_path: Path, monkeypatch) -> None:
    """A model from a config has no name, and one from a GGUF file that of the folder around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "downloads").mkdir()
    for folder in (tmp_path, tmp_path / "downloads"):
        (folder / "private.txt").write_text("of the user")
        (folder / "other.json").write_text("{}")
    model, plan = pruned("llama")
    model.config.name_or_path = name
    report = Report("llama")
    save_pruned(model, tmp_path / "out", plan, report=report)
    told = [f"What else {name} holds could not be read, and stays behind."]
    assert report.warnings == (told if name and not (tmp_path / name).is_dir() else [])
    assert not {"private.txt", "other.json"} & names(tmp_path / "out")


def test_a_source_without_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model, plan = pruned("llama")
    with pytest.warns(UserWarning, match="What else .*empty holds could not be read"):
        save_pruned(model, tmp_path / "out", plan, source=tmp_path / "empty")


def test_a_name_of_the_hub_needs_no_owner(source: Path, monkeypatch) -> None:
    known = {"gpt2": source}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: known[name])
    assert source_folder("gpt2") == source and source_folder("gpt3") is None


@pytest.mark.parametrize("text", ["", "[" * 10**5, '{"path": 1}', "[1]", '[{"path": null}]'])
def test_modules_that_are_none(text: str, source: Path, tmp_path: Path) -> None:
    (source / "modules.json").write_text(text)
    model, plan = pruned("bert")
    save_pruned(model, tmp_path / "out", plan, report=Report("bert"), source=source)
    assert torch.isfinite(load_pruned(tmp_path / "out").classifier.weight).all()


def test_files_of_the_hubs_cache_are_links(source: Path, tmp_path: Path) -> None:
    tokenizer().save_pretrained(source)
    snapshot = as_in_the_hubs_cache(source)
    assert (snapshot / "config.json").is_symlink()
    model, words = load_model(snapshot)
    save_pruned(model, tmp_path / "out", prune(model, batches(model), 0.7).plan, tokenizer=words)
    assert read_text(tmp_path / "out") == '{"max_seq_length": 64}'


def read_text(folder: Path) -> str:
    path = folder / "sentence_bert_config.json"
    assert not path.is_symlink()
    return path.read_text()
