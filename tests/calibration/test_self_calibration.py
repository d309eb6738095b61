from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny

from liar_ext import InputError, cli
from liar_ext.calibration import self_calibration
from liar_ext.calibration.self_calibration import write_documents


def written(tokenizer, **how):
    return write_documents(tiny("llama"), tokenizer, **{"documents": 3, "tokens": 9} | how)


def test_the_seed_decides_and_the_callers_draws_go_on(tokenizer):
    model = tiny("llama")
    state = torch.random.get_rng_state()
    first = write_documents(model, tokenizer, documents=3, tokens=9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == written(tokenizer) != written(tokenizer, seed=1)
    assert len(first) == 3 and all(0 < len(text) <= 9 for text in first)


def test_tokens_follow_the_models_own_distribution(tokenizer, monkeypatch):
    model = tiny("llama").train()
    model.generation_config.update(temperature=0.01, top_k=1, do_sample=False)
    monkeypatch.setattr(self_calibration, "MOST_ROWS", 4000)
    texts = write_documents(model, tokenizer, documents=4000, tokens=1)
    assert model.training and model.generation_config.temperature == 0.01
    model.eval()
    start = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        expected = model(start).logits[0, -1].softmax(-1)
    for letter in "aeiou":
        share = texts.count(letter) / len(texts)
        wanted = float(expected[tokenizer.convert_tokens_to_ids(letter)])
        assert share == pytest.approx(wanted, abs=4 * (wanted / len(texts)) ** 0.5)


@pytest.mark.parametrize(
    "said",
    [
        {"eos_token_id": list(range(40))},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_p": 0.9},
        {"suppress_tokens": list(range(20))},
        {"num_beams": 3},
    ],
    ids=lambda said: next(iter(said)),
)
def test_nothing_else_that_the_model_says_of_generation_holds(said, tokenizer):
    model = tiny("llama")
    wanted = write_documents(model, tokenizer, documents=8, tokens=12)
    model.generation_config.update(**said)
    assert write_documents(model, tokenizer, documents=8, tokens=12) == wanted
    assert said.items() <= model.generation_config.to_dict().items()


def test_documents_are_written_in_rounds_that_fit_in_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(self_calibration, "MOST_ROWS", 2)
    assert len(written(tokenizer, documents=5)) == 5
    monkeypatch.setattr(self_calibration, "CACHE_BYTES", 1)
    assert len(written(tokenizer)) == 3


def test_what_cannot_write_is_refused(tokenizer):
    with pytest.raises(
        InputError,
        match='"self" lets the model write .* BertForSequenceClassification can\'t; give',
    ):
        write_documents(tiny("bert"), tokenizer, documents=1, tokens=4)
    broken = tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="probabilities that are not finite"):
        write_documents(broken, tokenizer, documents=1, tokens=4)


def test_the_command_calibrates_on_what_the_model_writes(llama_folder, corpus, tmp_path, capsys):
    out = tmp_path / "pruned"
    options = ["--keep", "0.7", "--samples", "8", "--seq-len", "16", "--certify", "2", "--quiet"]
    sources = ["--calibration", "self", str(corpus[0])]
    assert cli.main(["prune", str(llama_folder), *sources, "--out", str(out), *options]) == 0
    report = json.loads((out / "liar/report.json").read_text())
    assert report["settings"]["calibration"] == ["self", str(corpus[0])]
    assert report["settings"]["calibration_sequences"] == 8 + 3  # of random tokens
    assert all(site["certified_error"] is not None for site in report["sites"])
