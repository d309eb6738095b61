"""Text whose old tokens all stay is tokenized exactly as before, for every kind of tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, bpe, byte_alphabet, load, spec, texts, tokenizers

from liar_ext.system.errors import InputError
from liar_ext.vocabulary.pieces import (
    BYTES,
    choose,
    counts_of,
    edited,
    order_of,
    read_pieces,
    size_of,
)


def cut(facts: dict, kept: set[int]) -> tuple[dict[int, int], dict]:
    """Return the new number of each token that stays with its needs, and the edited JSON."""
    pieces = read_pieces(facts)
    names = pieces.names
    closed = set().union(*(pieces.needs(names[at]) for at in {*pieces.always, *kept}))
    order = order_of(pieces, closed)
    return {old: at for at, old in enumerate(order)}, edited(facts, pieces, order)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=75, deadline=None)
@given(data=st.data())
def test_covered_text_is_read_as_before(kind, data):
    facts = data.draw(tokenizers(kind))
    old, pieces = load(facts), read_pieces(facts)
    text = data.draw(texts())
    ids = old.encode(text, add_special_tokens=False).ids
    assume(ids)
    # The tokens of the text stay, some others do, and the rest goes.
    others = data.draw(st.sets(st.sampled_from(sorted(pieces.names))))
    moved, smaller = cut(facts, {*ids, *others})
    new = load(smaller)
    if kind == "WordPiece" and pieces.unknown in ids:
        return  # a word without a match may have one now; below
    assert new.encode(text, add_special_tokens=False).ids == [moved[at] for at in ids]
    assert [new.id_to_token(at) for at in range(len(moved))] == [
        pieces.names[at] for at in sorted(moved, key=moved.get)
    ]
    # And any other text of which that is true.
    more = data.draw(texts())
    ids = old.encode(more, add_special_tokens=False).ids
    if set(ids) <= moved.keys() and not (kind == "WordPiece" and pieces.unknown in ids):
        assert new.encode(more, add_special_tokens=False).ids == [moved[at] for at in ids]


def test_without_its_derivation_a_token_is_lost():
    """The needs are no luxury: here the only way to abc begins with ab."""
    facts = spec(bpe([*"abc", "ab", "abc", "bc"], [("a", "b"), ("ab", "c"), ("b", "c")]))
    pieces = read_pieces(facts)
    assert pieces.needs("abc") == {0, 1, 2, 3, 4}
    without = load(edited(facts, pieces, [0, 1, 2, 4]))
    assert without.encode("abc").tokens == ["a", "b", "c"]
    moved, smaller = cut(facts, {4})
    assert load(smaller).encode("abc").ids == [moved[4]]


def test_every_merge_that_makes_a_token_counts():
    """The text of abcd begins with bc, although another merge of abcd has a lower rank."""
    merges = [("ab", "cd"), ("b", "c"), ("a", "bc"), ("abc", "d"), ("a", "b"), ("c", "d")]
    facts = spec(bpe([*"abcd", "ab", "cd", "abcd", "bc", "abc"], merges))
    assert {read_pieces(facts).names[at] for at in read_pieces(facts).needs("abcd")} == {
        *"abcd",
        "bc",
        "abc",
        "abcd",
    }


def test_unigram_keeps_the_lowest_score():
    """Unknown characters cost 10 more than it: without it they would become cheap."""
    scores = {"xa": -9.0, "bc": -9.0, "de": -9.0, "abcde": 0.0, "x": -50.0}
    rows = [["<unk>", 0.0], *([each, 0.0] for each in BYTES), *map(list, scores.items())]
    facts = spec({"type": "Unigram", "unk_id": 0, "vocab": rows, "byte_fallback": True})
    pieces = read_pieces(facts)
    assert load(facts).encode("xabcde").tokens == ["xa", "bc", "de"]
    assert pieces.ids["x"] in pieces.always
    without = edited(facts, pieces, [at for at in pieces.names if at != pieces.ids["x"]])
    assert load(without).encode("xabcde").tokens == ["<0x78>", "abcde"]


def test_an_unknown_word_may_be_known_without_a_longer_piece():
    """The one exception, which docs/method.md states: WordPiece gives up on a whole word."""
    vocab = {"[UNK]": 0, "a": 1, "ab": 2, "##bc": 3, "b": 4, "c": 5}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    facts = spec({**model, "max_input_chars_per_word": 9, "vocab": vocab}, added=[("[UNK]", 0)])
    assert load(facts).encode("abc").tokens == ["[UNK]"]
    _, smaller = cut(facts, {3})
    assert load(smaller).encode("abc").tokens == ["a", "##bc"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_number_of_tokens_is_the_one_asked_for(kind, data):
    facts = data.draw(tokenizers(kind))
    pieces, old = read_pieces(facts), load(facts)
    size = data.draw(st.integers(1, len(pieces.names)))
    counts = counts_of(old, [data.draw(texts())], len(pieces.names))
    try:
        kept = choose(pieces, counts, size, ())
    except InputError as error:
        assert "must stay" in str(error) and "\n" not in str(error)
        return
    assert len(kept) == size and pieces.always <= kept
    assert all(pieces.needs(pieces.names[at]) <= kept for at in kept)
    assert load(edited(facts, pieces, order_of(pieces, kept))).get_vocab_size() == size


def test_frequent_tokens_stay_and_ties_go_by_number():
    names = [*"abcd", "ab", "cd", "bc", "da"]
    facts = spec(bpe(names, [(*name,) for name in names[4:]]))
    counts = np.array([1, 1, 1, 1, 0, 9, 0, 2])
    assert choose(read_pieces(facts), counts, 6, ()) == {0, 1, 2, 3, 5, 7}
    assert choose(read_pieces(facts), counts, 7, ()) == {0, 1, 2, 3, 4, 5, 7}
    assert choose(read_pieces(facts), counts, 5, [6]) == {0, 1, 2, 3, 6}


@pytest.mark.parametrize(
    ("keep", "tokens", "size"),
    [(0.5, 1000, 512), (0.01, 1000, 64), (1.0, 1000, 1000), (2048, 1000, 1000), (300, 1000, 320)],
)
def test_sizes_are_multiples_of_64(keep, tokens, size):
    assert size_of(keep, tokens) == size


def test_what_comes_after_the_model_is_renumbered():
    facts = spec(bpe(["x", *"abcd", "<s>", "</s>"], []), added=[("<s>", 5), ("</s>", 6)])
    template = {"type": "TemplateProcessing", "single": [], "pair": []}
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 6], "cls": ["<s>", 5]}
    facts["post_processor"] = {"type": "Sequence", "processors": [template, roberta]}
    facts["padding"] = {"pad_id": 6}
    pieces = read_pieces(facts)
    found = edited(facts, pieces, [1, 2, 5, 6])
    template, roberta = found["post_processor"]["processors"]
    assert template["special_tokens"]["<s>"]["ids"] == [2]
    assert roberta["sep"] == ["</s>", 3] and roberta["cls"] == ["<s>", 2]
    assert found["padding"]["pad_id"] == 3
    assert [each["id"] for each in found["added_tokens"]] == [2, 3]
    assert json.dumps(facts).count('"ids": [5]') == 1  # the old one is as it was


def test_tokens_of_a_script_are_those_of_its_letters():
    signs = byte_alphabet()
    level = ["".join(signs[b] for b in word.encode()) for word in ("да", " Haus", "aд", "12", "λ")]
    facts = spec(bpe([*signs, *level], []), {"type": "ByteLevel"})
    pieces = read_pieces(facts)

    def words(pieces, *scripts):
        return {pieces.names[at] for at in pieces.of_scripts(scripts)}

    letters = {*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert words(pieces, "cyrillic") == {level[0]} and words(pieces, "greek") == {level[4]}
    assert words(pieces, "Latin") == letters | {level[1]} and not words(pieces)
    assert words(pieces, "latin", "cyrillic") == letters | {level[0], level[1]}
    vocab = {"[UNK]": 0, "don't": 1, "##да": 2, "语": 3, "##a語": 4}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    pieces = read_pieces(spec({**model, "max_input_chars_per_word": 9, "vocab": vocab}))
    assert words(pieces, "cyrillic", "han") == {"##да", "语"}
    assert words(pieces, "latin") == {"[UNK]", "don't"}


def test_tokens_of_a_script_come_with_their_needs():
    facts = spec(bpe([*"abд", "ab", "aд"], [("a", "b"), ("a", "д")]))
    pieces = read_pieces(facts)
    counts = np.array([0, 0, 0, 0, 9])
    assert choose(pieces, counts, 4, pieces.of_scripts(["latin"])) == {0, 1, 2, 3}
