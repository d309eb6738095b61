"""``liar compare-methods``: the numbers of each method, as prune has them."""

from __future__ import annotations

import json

import pytest
from tiny import tiny
from transformers import BertModel

from liar_ext import InputError, cli, compare_methods, compress
from liar_ext.job.planning import Sweep

SHORT = {"keep": 0.5, "samples": 8, "seq_len": 16, "eval_samples": 4}


def words(llama_folder, corpus, *more: str) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    texts = ["--calibration", str(corpus[0]), "--eval", str(corpus[1])]
    return ["compare-methods", str(llama_folder), *texts, *options, *more]


def test_each_method_has_the_numbers_of_prune(llama_folder, corpus, tmp_path, capsys, monkeypatch):
    made, begin = [], Sweep.__post_init__
    monkeypatch.setattr(Sweep, "__post_init__", lambda self: (made.append(1), begin(self)))
    methods = ["--methods", "flap", "wanda-sp", "--seeds", "3", "4", "--json"]
    assert cli.main(words(llama_folder, corpus, *methods)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["seed"]) for row in found["runs"]] == [
        *(("flap", 3), ("wanda-sp", 3), ("flap", 4), ("wanda-sp", 4)),
    ]
    assert len(made) == 2  # sums for each seed, which both methods share
    texts = {"text": corpus[0], "eval": str(corpus[1])}
    report = compress(
        llama_folder, out=tmp_path / "out", preset="wanda-sp", seed=4, **texts, **SHORT
    )
    judged = report.evaluation
    assert found["runs"][3]["perplexity"] == pytest.approx(judged["pruned"]["perplexity"])
    assert found["dense"]["perplexity"] == pytest.approx(judged["dense"]["perplexity"])


def test_in_python_the_numbers_are_the_same(llama_folder, corpus, capsys):
    command = words(llama_folder, corpus, "--methods", "flap", "--seeds", "3", "--json")
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    texts = {"text": [corpus[0]], "eval": str(corpus[1])}
    again = compare_methods(llama_folder, **texts, methods=["flap"], seeds=[3], **SHORT)
    for each in (found, again):
        del each["runs"][0]["seconds"]
    assert again == found and capsys.readouterr().out == ""


def test_an_encoder_is_compared_with_the_dense_one(tokenizer, corpus, capsys, tmp_path):
    BertModel(tiny("bert").config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = words(tmp_path, corpus, "--methods", "flap", "wanda-sp", "--seeds", "0", "--json")
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dense"]["cosine"] == 1 and "perplexity" not in found["dense"]
    assert all(0 < row["cosine"] < 1 for row in found["runs"])
    narrow = ["--methods", "liar", "--seeds", "0", "--keep=1", "--keep-hidden=0.5"]
    assert cli.main(words(tmp_path, corpus, *narrow, "--eval-samples=16", "--quiet")) == 0
    assert capsys.readouterr().out.split()[:3] == ["method", "parameters", "neighbours"]


def test_the_table_has_mean_and_spread(llama_folder, corpus, capsys):
    methods = ["--methods", "flap", "liar"]
    assert cli.main(words(llama_folder, corpus, *methods, "--seeds", "0", "1", "--quiet")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["method", "dense", "flap", "liar"]
    middle, low, high = map(float, lines[2][2:5])
    assert low <= middle <= high and lines[1][3:] == ["–", "–", "–"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "0"], "keep must be in"),
        (["--keep-vocab", "0.75"], "--keep-vocab can't be compared"),
    ],
)
def test_what_cannot_be_compared_is_refused(more, message, llama_folder, corpus, capsys):
    assert cli.main(words(llama_folder, corpus, *more)) == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(llama_folder, capsys):
    assert cli.main(["compare-methods", str(llama_folder)]) == 2
    assert "needs --calibration TEXT, --eval TEXT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "compare_methods: needs held-out text, such as eval="),
        ({"seed": 1, "eval": "b.txt"}, "methods and seeds, not preset and seed"),
        ({"certify": 4, "eval": "b.txt"}, "it certifies nothing"),
        ({"methods": ["snip"], "eval": "b.txt"}, "preset must be one of"),
        ({"keeep": 0.5, "eval": "b.txt"}, "unknown field 'keeep'; did you mean keep?"),
    ],
)
def test_a_call_that_cannot_be_is_refused_before_anything_is_read(options, message):
    with pytest.raises(InputError, match=message):
        compare_methods("nowhere", "nowhere.txt", **options)
