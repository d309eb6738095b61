"""Encoders are judged by commands: against the dense model, and by pairs of texts."""

from __future__ import annotations

import json
import random
import shutil
from copy import deepcopy

import pytest
import torch
from command import run
from tiny import tiny
from tokenizers import processors
from transformers import BertForSequenceClassification, BertModel

from liar_ext import encoder_similarity
from liar_ext.calibration.documents import read_documents
from liar_ext.calibration.texts import evaluation_sequences
from liar_ext.checkpoint import load_model
from liar_ext.cli import evaluate
from liar_ext.measure.embeddings import DenseEncoder
from liar_ext.system.progress import shows_bars


def sentence(generator: random.Random) -> str:
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(9)]
    return " ".join(words)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """An encoder pruned by the command with its report, its dense model, and texts."""
    at = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(tiny("bert").config).save_pretrained(at / "dense")
    tokenizer.save_pretrained(at / "dense")
    generator = random.Random(0)
    for name, count in (("text", 40), ("held_out", 20)):
        lines = [json.dumps({"text": sentence(generator)}) for _ in range(count)]
        (at / f"{name}.jsonl").write_text("\n".join(lines))
    options = ("--samples", 16, "--seq-len", 32, "--keep", 0.5)
    text = ("--calibration", at / "text.jsonl", "--eval", at / "held_out.jsonl")
    assert run("prune", at / "dense", *text, *options, "--out", at / "small") == 0
    return at


def evaluated(capsys, *arguments) -> dict:
    assert run("eval", *arguments, "--seq-len", 32, "--json", "--quiet") == 0
    return json.loads(capsys.readouterr().out)


def test_a_job_says_what_an_encoder_keeps(files, capsys):
    found = json.loads((files / "small/liar/report.json").read_text())["evaluation"]
    (dense, tokenizer), (pruned, _) = (load_model(files / name) for name in ("dense", "small"))
    documents = read_documents(str(files / "held_out.jsonl"))
    sequences = evaluation_sequences(documents, tokenizer, seq_len=32, packed=False)
    assert sequences.input_ids.shape == (20, 32)
    expected = encoder_similarity(pruned, dense, sequences.batches())
    assert found["pruned"] == pytest.approx(expected, rel=1e-5)
    assert (found["dense"]["cosine"], found["dense"]["neighbours"]) == (1.0, 1.0)
    # The dense model is the one that the report names.
    text = ("--text", files / "held_out.jsonl")
    again = evaluated(capsys, files / "small", *text)
    assert again.pop("against") == str(files / "dense")
    assert again == pytest.approx(expected, rel=1e-5)
    assert evaluated(capsys, files / "small", *text, "--samples", 5)["sequences"] == 5
    assert run("eval", files / "small", *text, "--seq-len", 32) == 0
    said = capsys.readouterr().out
    assert f"neighbours {found['pruned']['neighbours']:.4g} over 20 inputs of at most 32" in said


def test_pages_show_what_an_encoder_keeps(files, tmp_path):
    assert run("report", files / "small", "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    found = json.loads((files / "small/liar/report.json").read_text())["evaluation"]["pruned"]
    both = ("-o", tmp_path / "both.html", "--png", tmp_path / "png")
    assert run("compare", files / "small", files / "small", *both) == 0
    compared = (tmp_path / "both.html").read_text()
    for name in ("cosine", "neighbours"):
        assert f"{found[name]:.4g}" in page and f"{found[name]:.4g}" in compared
        assert f"{name.capitalize()} against parameters" in compared
        assert (tmp_path / f"png/{name}.png").is_file()
    assert "erplexity" not in page + compared


def test_without_its_dense_model_an_encoder_asks_for_it(files, tmp_path, capsys):
    shutil.copytree(files / "small", tmp_path / "small")
    report = tmp_path / "small/liar/report.json"
    report.write_text(report.read_text().replace(str(files / "dense"), "gone"))
    text = ("--text", files / "held_out.jsonl", "--seq-len", 32)
    assert run("eval", tmp_path / "small", *text) == 2
    assert "its report names none that is there\nhint: give it by" in capsys.readouterr().err
    report.write_text(report.read_text().replace("gone", str(tmp_path / "small")))
    assert run("eval", tmp_path / "small", *text) == 2
    assert "its report names none that is there\nhint: give it by" in capsys.readouterr().err
    assert run("eval", files / "dense", *text) == 2
    assert "its report names none that is there\nhint: give it by" in capsys.readouterr().err
    against = ("--against", files / "dense")
    assert evaluated(capsys, files / "dense", *text[:2], *against)["neighbours"] == 1.0


def test_pairs_need_no_dense_model(files, tmp_path, capsys):
    lines = [f"{'a' * n} b{n % 3}\t{'b' * (12 - n)} a{n % 4}\t{n}" for n in range(1, 9)]
    (tmp_path / "scored.tsv").write_text("\n".join(lines))
    (tmp_path / "same.tsv").write_text(
        "\n".join(f"{'a' * n}b\t{'a' * n}b" for n in range(9, 1, -1))
    )
    pairs = ("--pairs", tmp_path / "scored.tsv")
    dense = evaluated(capsys, files / "dense", *pairs)
    assert dense.keys() == {"spearman", "pairs"} and dense["pairs"] == 8
    small = evaluated(capsys, files / "small", *pairs)
    assert small["dense_spearman"] == dense["spearman"]
    # Texts of different lengths: each pair is still one of equal texts.
    assert evaluated(capsys, files / "dense", "--pairs", tmp_path / "same.tsv")["recall_at_1"] == 1
    assert run("eval", files / "small", *pairs, "--seq-len", 32) == 0
    assert f"(dense {dense['spearman']:.4f}) over 8 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["plain", "none"])
def test_progress_is_shown_as_asked(files, monkeypatch, wanted):
    shown = []

    def measured(*_):
        shown.append(shows_bars())
        return {"cosine": 1.0, "sequences": 1}

    monkeypatch.setattr(evaluate, "encoder_similarity", measured)
    text = ("--text", files / "held_out.jsonl", "--seq-len", 32)
    against = ("--against", files / "dense")
    assert run("eval", files / "small", *text, *against, "--progress", wanted) == 0
    assert shown == [wanted == "plain"]


def test_what_an_evaluation_of_encoders_lacks_is_told(
    files, llama_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_tasks", lambda *_: {})
    text = files / "held_out.jsonl"
    (tmp_path / "pairs.tsv").write_text("a\tb\nc\td")
    pairs = ("--pairs", tmp_path / "pairs.tsv", "--seq-len", 32)
    against = ("--against", files / "dense", "--seq-len", 32)
    for arguments, said in (
        ((files / "small",), "needs --text TEXT, --tasks TASK, or of an encoder --pairs"),
        ((files / "small", "--tasks", "a"), "--tasks needs a causal language model, got Be"),
        ((files / "small", "--tasks", "a", *against[:2]), "--against goes with --text"),
        ((llama_folder, "--text", text, *against), "--against is for encoders, got Llama"),
        ((llama_folder, *pairs[:2], "--seq-len", 10**6), "--pairs is for encoders, got"),
    ):
        assert run("eval", *arguments) == 2
        assert f"error: {said}" in capsys.readouterr().err


def test_texts_that_judge_are_apart(files, tmp_path, capsys):
    text = ("--calibration", files / "text.jsonl", "--eval", files / "text.jsonl")
    assert run("prune", files / "dense", *text, "--out", tmp_path / "out") == 2
    assert "40 of 40 documents are in the calibration text" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_blocks_of_an_encoder_are_judged_in_a_job(files, tmp_path, tokenizer, kind):
    torch.manual_seed(1)
    kind(tiny("bert").config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    text = ("--calibration", files / "text.jsonl", "--eval", files / "held_out.jsonl")
    options = ("--samples", 16, "--seq-len", 32, "--keep", 0.5, "--max-memory", "4GiB")
    assert run("prune", tmp_path / "dense", *text, *options, "--out", tmp_path / "small") == 0
    found = json.loads((tmp_path / "small/liar/report.json").read_text())["evaluation"]
    (dense, tokenizer), (pruned, _) = (load_model(tmp_path / name) for name in ("dense", "small"))
    documents = read_documents(str(files / "held_out.jsonl"))
    sequences = evaluation_sequences(documents, tokenizer, seq_len=32, packed=False)
    expected = encoder_similarity(pruned, dense, sequences.batches())
    assert found["pruned"] == pytest.approx(expected, rel=1e-5)
    assert found["dense"] == DenseEncoder(dense, sequences.batches()).own


def test_a_sweep_has_a_column_for_each_measure(files, capsys):
    text = ("--calibration", files / "text.jsonl", "--eval", files / "held_out.jsonl")
    options = ("--samples", 16, "--seq-len", 32, "--keep", 0.7, "--quiet", "--json")
    assert run("sweep", files / "dense", *text, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dense"]["cosine"] == found["dense"]["neighbours"] == 1.0
    assert 0 < found["budgets"][0]["cosine"] < 1


def test_a_cross_encoder_is_pruned_on_pairs(tmp_path, tokenizer, capsys):
    """Its one score per pair has no distribution, and each layer's sensitivity is above 0."""
    tokenizer, generator = deepcopy(tokenizer), random.Random(0)  # other tests share it
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        pair="$A [EOS] $B:1", special_tokens=[("[EOS]", 2)]
    )
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    tiny("bert", num_labels=1).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    settings = tmp_path / "dense/tokenizer_config.json"  # a class of its own, as BERT's, has these
    settings.write_text(json.dumps(json.loads(settings.read_text()) | names))
    tokenizer = load_model(tmp_path / "dense")[1]
    for name, count in (("text", 40), ("held_out", 20)):
        rows = [
            {"text": sentence(generator)[:9], "text_pair": sentence(generator)}
            for _ in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = ("--calibration", tmp_path / "text.jsonl", "--eval", tmp_path / "held_out.jsonl")
    options = ("--samples", 16, "--seq-len", 32, "--keep", 0.5, "--out", tmp_path / "small")
    assert run("prune", tmp_path / "dense", *text, *options) == 0
    report = json.loads((tmp_path / "small/liar/report.json").read_text())
    assert not any("text_pair" in said for said in report["warnings"])
    assert all(row["sensitivity"] > 0 for row in report["sites"])
    kept = report["evaluation"]["pruned"]["correlation"]
    assert report["evaluation"]["dense"]["correlation"] == pytest.approx(1) and 0 < kept < 1
    capsys.readouterr()
    again = evaluated(capsys, tmp_path / "small", "--text", tmp_path / "held_out.jsonl")
    assert again["correlation"] == pytest.approx(kept, rel=1e-5) and again["sequences"] == 20
    models = [load_model(tmp_path / name)[0] for name in ("dense", "small")]
    rows = map(json.loads, (tmp_path / "held_out.jsonl").read_text().splitlines())
    how = {"truncation": True, "max_length": 32, "return_tensors": "pt"}
    pairs = [tokenizer(row["text"], row["text_pair"], **how) for row in rows]
    assert all(pair["token_type_ids"].any() for pair in pairs)
    with torch.no_grad():
        scores = [torch.cat([model(**pair).logits for pair in pairs]) for model in models]
    assert kept == pytest.approx(float(torch.corrcoef(torch.cat(scores, 1).T)[0, 1]), rel=1e-4)
    alone = [json.dumps({"text": sentence(generator)}) for _ in range(40)]
    (tmp_path / "alone.jsonl").write_text("\n".join(alone))
    options = ("--calibration", tmp_path / "alone.jsonl", *options[:-1], tmp_path / "alone")
    assert run("prune", tmp_path / "dense", *options) == 0
    assert "warning: The model gives one score" in capsys.readouterr().err
