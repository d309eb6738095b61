"""Tokenizers that the rules don't cover are refused in one line."""

from __future__ import annotations

import pytest
from small_tokenizers import LETTERS, bpe, spec

from liar_ext.system.errors import InputError
from liar_ext.vocabulary.pieces import BYTES, edited, read_pieces

WORDS = {"type": "WordPiece", "unk_token": "[UNK]", "max_input_chars_per_word": 9}


def unigram(rows: list, **facts) -> dict:
    return spec({"type": "Unigram", "unk_id": 0, "vocab": rows, **facts})


def changed(facts: dict, **model) -> dict:
    return {**facts, "model": {**facts["model"], **model}}


HOSTILE = {
    "another kind": (spec({"type": "WordLevel", "vocab": {"a": 0}}), "must be one of BPE"),
    "one number twice": (
        changed(spec(bpe(["a", "b"], [])), vocab={"a": 0, "b": 0}),
        "two tokens of one id",
    ),
    "a piece twice": (unigram([["<unk>", 0.0], ["a", -1.0], ["a", -2.0]]), "a token twice"),
    "random merges": (spec(bpe([*LETTERS], [], dropout=0.1)), "draws merges at random"),
    "merges of fallback": (
        spec(bpe([*BYTES, BYTES[1] + BYTES[2]], [(BYTES[1], BYTES[2])], byte_fallback=True)),
        "merges bytes",
    ),
    "an endless token": (
        spec(bpe([*LETTERS, "a" * 600], [])),
        "has a token of 600 characters",
    ),
    "another prefix": (
        spec({**WORDS, "continuing_subword_prefix": "@@", "vocab": {"[UNK]": 0}}),
        "by ##",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_refused_in_one_line(what):
    facts, message = HOSTILE[what]
    with pytest.raises(InputError, match=message) as caught:
        read_pieces(facts)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 220


def test_a_step_that_adds_an_unlisted_token_is_refused():
    facts = spec(bpe([*"abcd", "<s>"], []))
    facts["post_processor"] = {"type": "BertProcessing", "sep": ["<s>", 4], "cls": ["<s>", 4]}
    with pytest.raises(InputError, match="does not list as a special token"):
        edited(facts, read_pieces(facts), [0, 1, 2, 3])
