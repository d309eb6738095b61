"""A damaged folder is refused in one line, before memory or time is spent on it."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
import transformers
from folders import change, equal_plan, make_plan, pruned, read, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny

from liar_ext import verify_pruned
from liar_ext.checkpoint import load_model, load_pruned, save_pruned
from liar_ext.checkpoint.folder import MANIFEST_FILE, strangers
from liar_ext.system.errors import InputError


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def folder(saved, tmp_path: Path) -> Path:
    return shutil.copytree(saved()[2], tmp_path / "pruned")


def change_tensors(path: Path, **changed) -> None:
    """Replace tensors of a file, or remove those that are None; its metadata stays."""
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors = load_file(path) | {name.replace("__", "."): value for name, value in changed.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, facts)


def refused(load, folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as told:
        load(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 800


def test_a_config_of_more_layers_than_weights(dense: Path) -> None:
    """Random layers would be pruned."""
    change(dense / "config.json", num_hidden_layers=5)
    refused(load_model, dense, r"lacks model.layers.3.\S+, and .* more; copy it again")


def test_an_embedding_that_is_tied_thrice_counts_once(tmp_path: Path) -> None:
    """Of small translation models it is most of the weights."""
    tiny("t5", vocab_size=2048, tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    assert load_model(tmp_path / "dense")[0].config.vocab_size == 2048


def test_a_config_of_fewer_layers_than_weights(dense: Path) -> None:
    change(dense / "config.json", num_hidden_layers=2)
    refused(load_model, dense, r"weights that its config, or plan, doesn't: model.layers.2")


def test_biases_that_the_config_denies(tmp_path: Path) -> None:
    tiny("llama", attention_bias=True).save_pretrained(tmp_path / "dense")
    change(tmp_path / "dense" / "config.json", attention_bias=False)
    refused(load_model, tmp_path / "dense", r"doesn't: model.layers.0.self_attn.k_proj.bias")


def test_a_head_that_the_class_does_not_read_is_no_error(tmp_path: Path) -> None:
    """As in BERT checkpoints, whose pretraining head most classes leave alone."""
    tiny("bert").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    change_tensors(path, cls__seq_relationship__weight=torch.zeros(2, 32))
    assert type(load_model(tmp_path / "dense")[0]).__name__ == "BertForSequenceClassification"


def test_a_config_that_denies_biases(tmp_path: Path) -> None:
    """The biases would be dropped, and the logits be off."""
    model, plan = pruned("llama", bias=True)
    save_pruned(model, tmp_path / "pruned", plan)
    said = read(tmp_path / "pruned")["liar"]
    for sizes in said["modules"].values():
        sizes.pop("bias", None)
    change(tmp_path / "pruned" / "config.json", liar=said, attention_bias=False, mlp_bias=False)
    refused(load_pruned, tmp_path / "pruned", r"doesn't: \S+bias, .* more")
    refused(verify_pruned, tmp_path / "pruned", r"doesn't: \S+bias, .* more")


def test_weights_of_another_shape_are_named(folder: Path, caplog) -> None:
    change_tensors(folder / "model.safetensors", model__norm__weight=torch.zeros(7))
    with caplog.at_level(logging.WARNING, "transformers"):
        refused(load_pruned, folder, r"model.norm.weight with shape \(7,\), .* says \(40,\)")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -2},
        {"hidden_size": "40"},
        {"hidden_size": 10**30},
        {"hidden_size": 10**8},
        {"vocab_size": 10**8},
        {"intermediate_size": -1},
        {"max_position_embeddings": 10**12},
        {"head_dim": 0},
        {"rope_theta": 10**400},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": []},
        {"architectures": ["pipeline"]},
        {"architectures": ["BertModel"]},
        {"model_type": 3},
        {"rms_norm_eps": "small"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_fields_that_no_model_has(fields, kind: str, request) -> None:
    there = request.getfixturevalue("dense" if kind == "dense" else "folder")
    change(there / "config.json", **fields)
    start = time.monotonic()
    refused(load_model if kind == "dense" else load_pruned, there, "load_")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("mark", [1, [], {}, {"version": [1]}, {"version": 1, "layers": None}, "x"])
def test_a_malformed_mark(mark, folder: Path) -> None:
    change(folder / "config.json", liar=mark)
    for load in (load_pruned, verify_pruned, load_model):
        refused(load, folder, "load_pruned: ")


@pytest.mark.parametrize("file", ["config.json", "liar/plan.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"version": ' + "9" * 5000 + "}"])
def test_json_that_is_none(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    for load in (load_pruned, verify_pruned, load_model):
        refused(load, folder, Path(file).name)


@pytest.mark.parametrize("file", ["model.safetensors", "liar/fingerprint.safetensors"])
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_tensors(file: str, size: int, folder: Path) -> None:
    path = folder / file
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    refused(verify_pruned, folder, f"{file} is damaged")


def test_a_header_that_lies(folder: Path) -> None:
    text = b'{"a": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 39999999996]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(load_pruned, folder, "is damaged")


@pytest.mark.parametrize("target", ["nowhere", "/dev/zero", "."])
def test_links_to_no_file(target: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    refused(load_pruned, folder, "is missing, or no ordinary file")


TEXTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "spiece.model", "additional_chat_templates/tools.jinja"),
    "decoder_tokenizer/tokenizer.json",
)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_no_links_out_of_the_folder(name: str, dense: Path) -> None:
    """The loaded model or tokenizer would put a file of the user into what is saved."""
    path, mine = dense / name, dense.with_name("mine")
    path.parent.mkdir(exist_ok=True)
    path.touch()
    shutil.copy(path, mine)
    path.rename(dense / "inside")
    path.symlink_to(dense / "inside")
    load_model(dense)
    path.unlink()
    path.symlink_to(mine)
    refused(load_model, dense, f"{path.name} leads to .*/mine, outside of the folder; remove")


def test_weights_may_be_links_to_anywhere(dense: Path) -> None:
    weights = dense / "model.safetensors"
    weights.rename(dense.with_name("blob"))
    weights.symlink_to(dense.with_name("blob"))
    (dense / ".#config.json").symlink_to("user@host.1")  # a lock of an editor
    load_model(dense)


def test_a_pipe_does_not_hang(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(verify_pruned, folder, "no ordinary file")


def test_a_pipe_for_a_template_does_not_hang(dense: Path) -> None:
    (dense / "chat_template.jinja").unlink(missing_ok=True)
    os.mkfifo(dense / "chat_template.jinja")
    refused(load_model, dense, "chat_template.jinja is missing, or no ordinary file")


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.touch])
def test_a_manifest_that_cannot_be_read_is_told_of(put, folder: Path) -> None:
    """Its weights would not be compared, and a pipe or a device be read without end."""
    (folder / MANIFEST_FILE).unlink()
    assert verify_pruned(folder)["agrees"]
    put(folder / MANIFEST_FILE)
    refused(verify_pruned, folder, "verify: .*liar/manifest.json can't be read; copy the folder")
    assert MANIFEST_FILE in strangers(folder)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("plan_of", [equal_plan, make_plan])
def test_a_fingerprint_that_agrees_with_everything(value, plan_of, tmp_path: Path) -> None:
    """An infinite output makes the tolerance infinite: it is neither written nor believed."""
    model, plan = pruned("llama", plan_of)
    save_pruned(model, tmp_path / "good", plan)
    probe = tmp_path / "good" / "liar/fingerprint.safetensors"
    output = load_file(probe)["output"]
    output[0, 0, 0] = value
    change_tensors(probe, output=output)
    refused(verify_pruned, tmp_path / "good", "NaN or infinity, which agrees with nothing")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    refused(lambda folder: save_pruned(model, folder, plan), tmp_path / "bad", "NaN or infinity")
    assert os.listdir(tmp_path) == ["good"]


@pytest.mark.parametrize(
    "changed",
    [
        {"input": torch.full((1, 16), 10**6)},
        {"input": torch.full((1, 16), -1)},
        {"input": torch.zeros(1, 100_000, dtype=torch.int64)},
        {"input": torch.zeros(1, 16)},
        {"input": None},
        {"output": torch.zeros(0)},
        {"output": torch.zeros(3, dtype=torch.int32)},
    ],
    ids=lambda changed: str({k: v if v is None else v.shape for k, v in changed.items()}),
)
def test_a_damaged_fingerprint(changed, folder: Path) -> None:
    change_tensors(folder / "liar/fingerprint.safetensors", **changed)
    refused(verify_pruned, folder, "verify: ")


@pytest.mark.parametrize("facts", [{"dtype": "nn"}, {"attention": "a/b"}, {"params": "x"}, None])
def test_damaged_facts_of_a_fingerprint(facts, folder: Path) -> None:
    path = folder / "liar/fingerprint.safetensors"
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path), path, None if facts is None else old | facts)
    refused(verify_pruned, folder, "liar/fingerprint.safetensors is damaged")


def test_a_tokenizer_of_a_larger_vocabulary(dense: Path) -> None:
    words = tokenizer()
    words.add_tokens([f"word{i}" for i in range(70)])
    words.save_pretrained(dense)
    refused(load_model, dense, "has tokens up to 73, the model knows 61")


def test_a_special_token_that_came_later(dense: Path) -> None:
    """Of a GGUF file without an unknown token transformers adds one, which has no row."""
    words = tokenizer()
    words.add_tokens([f"word{i}" for i in range(61 - len(words))])
    words.add_tokens("<|endoftext|>", special_tokens=True)
    words.save_pretrained(dense)
    assert len(load_model(dense)[1]) == 62


def test_a_broken_tokenizer_is_not_a_missing_one(dense: Path) -> None:
    (dense / "tokenizer.json").write_text('{"model": 7}')
    refused(load_model, dense, "can't load the tokenizer of")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (dense / file).unlink()
    assert load_model(dense)[1] is None


def test_the_class_that_a_config_names_is_loaded_or_none(tmp_path: Path) -> None:
    """AutoModel in place of an unknown class would lose the head."""
    model = tiny("bert")
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)[0]) is type(model)
    change(tmp_path / "config.json", architectures=["BertForTarot"])
    refused(load_model, tmp_path, "no model class 'BertForTarot'")


def test_an_adapter_is_told_from_a_model(dense: Path) -> None:
    (dense / "adapter_config.json").write_text("{}")
    refused(load_model, dense, "holds an adapter of PEFT; merge it")


def test_unequal_layers_load_without_a_warning(folder: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    root = logging.getLogger("transformers")
    root.addHandler(handler)
    from transformers.integrations.heterogeneity import configuration_utils

    configuration_utils.logger.warning_once.__wrapped__  # noqa: B018
    type(configuration_utils.logger).warning_once.cache_clear()
    try:
        assert verify_pruned(folder)["agrees"]
        load_model(folder)
        model, plan = pruned("qwen2")
        save_pruned(model, folder.with_name("another"), plan)
        assert [text for text in said if "per-layer" in text] == []
        type(configuration_utils.logger).warning_once.cache_clear()
        # Elsewhere transformers warns as ever.
        assert transformers.AutoConfig.from_pretrained(folder).intermediate_size == 24
        assert [text for text in said if "per-layer" in text]
    finally:
        root.removeHandler(handler)
    assert read(folder)["liar"]["layers"] == "unequal"
