"""Tokenizers that contradict themselves, or that the rules don't cover, are refused in one line."""

from __future__ import annotations

import pytest
from small_tokenizers import LETTERS, bpe, spec

from liar_ext.system.errors import InputError
from liar_ext.vocabulary.keep import edited
from liar_ext.vocabulary.pieces import BYTES, byte_alphabet, read_pieces

LEVEL = {"type": "ByteLevel"}
WORDS = {"type": "WordPiece", "unk_token": "[UNK]", "max_input_chars_per_word": 9}


def unigram(rows: list, **facts) -> dict:
    return spec({"type": "Unigram", "unk_id": 0, "vocab": rows, **facts})


def changed(facts: dict, **model) -> dict:
    return {**facts, "model": {**facts["model"], **model}}


HOSTILE = {
    "another kind": (spec({"type": "WordLevel", "vocab": {"a": 0}}), "must be one of BPE"),
    "no tokens": (spec(bpe([], [])), "has no tokens"),
    "a merge into itself": (
        spec(bpe(["a", "", "aa"], [("a", "")])),
        "has an empty token",
    ),
    "an empty part": (spec(bpe(["a"], [("a", "")])), "joins no two tokens"),
    "a merge of three": (changed(spec(bpe([*"abc"], [])), merges=["a b c"]), "joins no two"),
    "a lost part": (spec(bpe(["a", "ab"], [("a", "b")])), "lacks the token 'b'"),
    "a lost result": (spec(bpe(["a", "b"], [("a", "b")])), "lacks the token 'ab'"),
    "one number twice": (
        changed(spec(bpe(["a", "b"], [])), vocab={"a": 0, "b": 0}),
        "two tokens of id 0",
    ),
    "two numbers": (spec(bpe(["a", "b"], []), added=[("a", 1)]), "two ids, 0 and 1"),
    "random merges": (spec(bpe([*LETTERS], [], dropout=0.1)), "draws merges at random"),
    "missing bytes": (spec(bpe(byte_alphabet()[:200], []), LEVEL), "lacks the token"),
    "missing fallback": (
        spec(bpe([*BYTES[:-1], "a"], [], byte_fallback=True)),
        "lacks the token '<0xFF>'",
    ),
    "merges of fallback": (
        spec(bpe([*BYTES, BYTES[1] + BYTES[2]], [(BYTES[1], BYTES[2])], byte_fallback=True)),
        "merges bytes",
    ),
    "an endless token": (
        spec(bpe([*LETTERS, "a" * 600], [])),
        "has a token of 600 characters",
    ),
    "a cycle": (spec(bpe(["a", "aa"], [("a", "aa")])), "lacks the token 'aaa'"),
    "a negative number": (changed(spec(bpe(["a"], [])), vocab={"a": -1}), "a negative id"),
    "no unknown": (spec(bpe(["a"], [], unk_token="<unk>")), "lacks the token '<unk>'"),
    "a piece twice": (unigram([["<unk>", 0.0], ["a", -1.0], ["a", -2.0]]), "'a' twice"),
    "no number": (unigram([["<unk>", 0.0], ["a", float("nan")]]), "score that is not finite"),
    "an unknown far away": (unigram([["a", 0.0]], unk_id=7), "and 7 for unknown"),
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
