"""Folders of sentence encoders whose config names a class with a head that the weights lack."""

from __future__ import annotations

import json

import pytest
import torch
from folders import tokenizer
from safetensors.torch import load_file, save_file
from tiny import batches, tiny
from transformers import AutoModel

from liar_ext import cli, load_pruned, prune, save_pruned
from liar_ext.checkpoint import load_model
from liar_ext.system.errors import InputError

HEADS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "mpnet": "MPNetForMaskedLM",
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def write(folder, name, *, head=None, modules=False, without=()):
    """Write the bare weights of a tiny encoder under a config that names another class."""
    model = AutoModel.from_config(tiny(name, num_hidden_layers=2).config)
    state = {key: each for key, each in model.state_dict().items() if not key.startswith(without)}
    model.save_pretrained(folder, state_dict=state if without else None)
    words = tokenizer()
    words.pad_token = words.convert_ids_to_tokens(0)
    words.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [head]}))
    if modules:
        (folder / "modules.json").write_text(json.dumps(MODULES))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return model.eval()


@pytest.mark.parametrize("modules", [False, True], ids=["plain", "modules.json"])
@pytest.mark.parametrize("name", HEADS)
def test_the_bare_encoder_is_loaded_and_said(name, modules, tmp_path):
    bare = write(tmp_path / "dense", name, head=HEADS[name], modules=modules)
    model, _ = load_model(tmp_path / "dense")
    assert type(model) is type(bare)
    assert all(
        torch.equal(each, model.state_dict()[key]) for key, each in bare.state_dict().items()
    )
    (note,) = model.liar_notes
    assert f"loaded as {type(bare).__name__}: config.json names {HEADS[name]}" in note


@pytest.mark.parametrize("name", HEADS)
def test_from_prune_to_sentence_transformers(name, tmp_path, corpus, capsys):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    write(tmp_path / "dense", name, head=HEADS[name], modules=True)
    job = ["prune", str(tmp_path / "dense"), "--calibration", str(corpus[0]), "--seq-len", "16"]
    job += ["--samples", "8", "--keep", "0.7", "--allocation", "uniform", "--quiet"]
    assert cli.main([*job, "--out", str(tmp_path / "pruned")]) == 0
    report = json.loads((tmp_path / "pruned" / "liar" / "report.json").read_text())
    assert any("The model was loaded as" in warning for warning in report["warnings"])
    encoder = sentence_transformers.SentenceTransformer(
        str(tmp_path / "pruned"), device="cpu", trust_remote_code=True
    )
    found = torch.from_numpy(encoder.encode(["one two three"]))
    with pytest.raises(InputError, match="give model.transformers_model"):
        prune(encoder, [torch.arange(8).view(2, 4)], keep=0.8)
    model, read = load_model(tmp_path / "pruned")
    with torch.no_grad():
        states = model(**read(["one two three"], return_tensors="pt")).last_hidden_state
    assert torch.allclose(found, states.mean(1), atol=1e-5)


@pytest.mark.parametrize("longest", [12, None, "twelve"])
def test_texts_are_cut_where_sentence_transformers_cuts_them(longest, tmp_path, corpus, capsys):
    write(tmp_path / "dense", "bert", head="BertModel", modules=True)
    settings = json.dumps({"max_seq_length": longest, "do_lower_case": False})
    (tmp_path / "dense" / "sentence_bert_config.json").write_text(settings)
    job = ["prune", str(tmp_path / "dense"), "--calibration", str(corpus[0]), "--seq-len", "16"]
    job += ["--samples", "8", "--keep", "0.7", "--allocation", "uniform", "--quiet"]
    code = cli.main([*job, "--out", str(tmp_path / "pruned")])
    if longest == "twelve":
        assert code == 2 and "cuts texts after 'twelve' tokens" in capsys.readouterr().err
        return
    report = json.loads((tmp_path / "pruned" / "liar" / "report.json").read_text())
    assert (code, report["settings"]["seq_len"]) == (0, longest or 16)
    read = load_model(tmp_path / "pruned")[1]
    assert getattr(read, "liar_longest", None) == longest
    assert read.model_max_length > 16, "the tokenizer is saved as it was"


def test_a_pooler_that_the_folder_lacks_is_silent(tmp_path):
    write(tmp_path / "dense", "bert", head="BertModel", without=("pooler",))
    model, _ = load_model(tmp_path / "dense")
    assert not model.pooler.dense.weight.any() and not model.pooler.dense.bias.any()


def test_a_pruned_folder_has_its_pooler(tmp_path):
    write(tmp_path / "dense", "bert", head="BertModel")
    model, _ = load_model(tmp_path / "dense")
    report = prune(model, batches(model, 2), 0.7, allocation="uniform")
    save_pruned(model, tmp_path / "pruned", report.plan, report=report)
    file = tmp_path / "pruned" / "model.safetensors"
    kept = {name: each for name, each in load_file(file).items() if "pooler" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks pooler.dense"):
        load_pruned(tmp_path / "pruned")


@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
def test_anything_else_that_is_missing_is_refused(head, tmp_path):
    write(tmp_path / "dense", "bert", head=head, without=("encoder.layer.1.output",))
    with pytest.raises(InputError, match="lacks encoder.layer.1.output"):
        load_model(tmp_path / "dense")


def test_a_head_that_is_there_is_kept(tmp_path):
    model = tiny("mpnet", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    loaded, _ = load_model(tmp_path / "dense")
    assert type(loaded) is type(model) and not hasattr(loaded, "liar_notes")
