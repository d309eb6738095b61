"""The quality of smaller vocabularies on one text, and the smallest one at a stated loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from byte_level import TOKENS, byte_level_tokenizer
from tiny import tiny

from liar_ext import InputError, Recipe, choose_tokens, keep_tokens
from liar_ext.job import vocabulary
from liar_ext.job.vocabulary import (
    LOSSES,
    VocabularyQuality,
    held_out_of,
    smaller_copy,
    smallest,
)

HOW = {"seq_len": 32, "batch_size": 3}


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return byte_level_tokenizer([path.read_text() for path in corpus])


@pytest.fixture(scope="module")
def texts(corpus):
    return [line for path in corpus for line in path.read_text().splitlines() if line.strip()]


def cut(model, tokenizer, texts, size=320):
    return smaller_copy(model, tokenizer, choose_tokens(model, tokenizer, texts, size))


def test_bits_per_byte_are_those_of_one_text(tokenizer, texts):
    model = tiny("llama", vocab_size=TOKENS)
    document = " ".join(texts)[:400]
    quality = VocabularyQuality(model, tokenizer, [document], **HOW)
    assert "".join(quality.texts) == document and len(quality.texts) > 2
    for each, words in ((model, tokenizer), cut(model, tokenizer, [document])):
        bits = 0.0
        for piece in quality.texts:  # each token but the first of a piece
            ids = torch.tensor([words(piece)["input_ids"]])
            with torch.no_grad():
                logs = each(input_ids=ids).logits.double().log_softmax(-1)
            bits -= float(logs[0, :-1].gather(1, ids[0, 1:, None]).sum()) / math.log(2)
        found = quality.compare(each, words)
        assert found["bits_per_byte"][1] == pytest.approx(bits / len(document.encode()), rel=1e-5)
    assert found["tokens_per_byte"][1] > found["tokens_per_byte"][0]
    few = VocabularyQuality(model, tokenizer, [document], samples=2, **HOW)
    assert (
        len(few.texts) == 2 and few.compare(model, tokenizer)["tokens_per_byte"] == [few.rate] * 2
    )
    before, after = found["bits_per_byte"]
    assert quality.loss(found) == pytest.approx(after / before - 1)


@pytest.mark.parametrize(("seq_len", "longest"), [(8, 512), (32, 8)])
def test_text_that_becomes_too_long_is_infinitely_bad(seq_len, longest):
    """Also where the tokenizer cuts it earlier: the bits of what is left are not those of all."""
    text = "abcdefghijklmnop " * 9
    long = byte_level_tokenizer([text])
    long.model_max_length = longest
    model = tiny("llama", vocab_size=len(long))
    quality = VocabularyQuality(model, long, [text], seq_len=seq_len, batch_size=2)
    found = quality.compare(model, keep_tokens(model, long, list(range(259))))
    assert found["bits_per_byte"][1] == math.inf == quality.loss(found)


def test_the_model_is_as_it_was_and_shares_its_other_weights(tokenizer, texts):
    model = tiny("llama", vocab_size=TOKENS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied, smaller = cut(model, tokenizer, texts)
    assert copied.config.vocab_size == len(smaller) == 320
    assert model.config.vocab_size == len(tokenizer) == TOKENS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    one, two = (each.model.layers[0].mlp.up_proj.weight for each in (model, copied))
    assert one is two and not hasattr(model, "liar_vocabulary")


def test_encoders_and_classifiers_read_the_new_tokens(tokenizer, texts):
    """Classifiers were once run on ids of the old tokenizer, which have other meanings now."""
    some = texts[:16]
    for model, judged_by in (
        (tiny("mpnet", vocab_size=TOKENS), "cosine"),
        (tiny("bert", vocab_size=TOKENS), "agreement"),
        (tiny("bert", vocab_size=TOKENS, num_labels=1), "correlation"),
        (tiny("bert", vocab_size=TOKENS, problem_type="multi_label_classification"), "agreement"),
        (tiny("bert", vocab_size=TOKENS, problem_type="regression"), "correlation"),
    ):
        quality = VocabularyQuality(model, tokenizer, some, **HOW)
        same = quality.compare(model, tokenizer)
        assert quality.judged_by == judged_by and same[judged_by] == pytest.approx(1)
        assert quality.loss(same) == pytest.approx(0, abs=1e-5)
        found = quality.compare(*cut(model, tokenizer, some[:1]))
        assert found[judged_by] <= 1 and found["tokens_per_byte"][1] > found["tokens_per_byte"][0]
        few = VocabularyQuality(model, tokenizer, [*some[:1], "~" * 50], samples=1, **HOW)
        alone = VocabularyQuality(model, tokenizer, 2 * some[:1], **HOW)
        assert few.rate == alone.rate == few.compare(model, tokenizer)["tokens_per_byte"][1]


@pytest.mark.parametrize(
    ("good_from", "taken"), [(0, 320), (300, 320), (400, 448), (500, None), (10**6, None)]
)
def test_the_smallest_size_within_the_loss_is_taken(good_from, taken, monkeypatch):
    """What measures worse than the loss is never taken, whatever else was."""
    tried = []

    def choose(size):
        if size < 300:
            raise InputError("vocabulary: more must stay")
        return vocabulary.Choice(list(range(size)), "", {})

    def loss(found):
        return 0.001 if found["size"] >= good_from else 0.1

    def compare(size):
        tried.append(size)
        return {"size": size, "tokens_per_byte": [1.0, 2.0]}

    monkeypatch.setattr(
        vocabulary, "smaller_copy", lambda model, tokenizer, choice: (len(choice.order),)
    )
    counted = SimpleNamespace(choose=choose, size=TOKENS, model=None, tokenizer=None)
    measured = {"compare": compare, "loss": loss}
    quality = SimpleNamespace(judged_by="bits_per_byte", **measured)
    found, facts = smallest(counted, quality)
    assert (found and len(found.order)) == taken
    assert all(size % 64 == 0 for size in tried) and sorted(set(tried)) == sorted(tried)
    assert facts["most_loss"] == LOSSES["bits_per_byte"] == 0.01
    assert [row[0] for row in facts["curve"]] == sorted(tried)
    if found:
        assert found.facts["held_out"]["size"] == taken
        assert not [row for row in facts["curve"] if row[0] < taken and row[1] <= 0.01]


def test_models_whose_outputs_do_not_compare_are_refused(tokenizer, texts):
    model = transformers.BertForMaskedLM(tiny("bert", vocab_size=TOKENS).config)
    quality = VocabularyQuality(model, tokenizer, texts[:16], **HOW)
    assert quality.compare(model, tokenizer).keys() == {"tokens_per_byte"}
    recipe = Recipe(keep=0.5, keep_vocab="auto", calibration=("a",), seq_len=32)
    with pytest.raises(InputError, match="give a number of tokens instead of auto"):
        vocabulary.SmallerVocabulary(recipe, model, tokenizer, {"a": 4 * texts}, None, None)


def test_held_out_documents_choose_nothing(texts):
    documents = [f"document {at}" for at in range(40)]
    chosen, judging = held_out_of(documents)
    assert judging == documents[::5] and sorted(chosen + judging) == sorted(documents)
    long = " ".join(str(at) for at in range(20_000))
    chosen, judging = held_out_of([long])
    assert len(judging) > 5 and not {*chosen} & {*judging}
    with pytest.raises(InputError, match="needs 20 documents or pieces of 2,000 characters"):
        held_out_of(["short"] * 3)


def test_old_ids_may_stand_for_a_choice(tokenizer):
    model = tiny("llama", vocab_size=TOKENS)
    smaller = keep_tokens(model, tokenizer, list(range(320)))
    assert len(smaller) == model.config.vocab_size == 320
    assert smaller.get_vocab() == {n: at for n, at in tokenizer.get_vocab().items() if at < 320}
