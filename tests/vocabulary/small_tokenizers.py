"""Random tokenizers of all kinds, by hypothesis: small, and stranger than trained ones."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer

from liar_ext.vocabulary.pieces import BYTES

LETTERS = "abc"
UNKNOWN = "é\N{SNOWMAN}"
KINDS = ("byte-level", "byte-fallback", "BPE", "WordPiece", "Unigram", "Unigram-bytes")
PLAIN = {"type": "Whitespace"}
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in byte-level tokenizers."""
    others = iter(range(256, 512))
    return [chr(byte) if byte in PRINTED else chr(next(others)) for byte in range(256)]


def spec(model: dict[str, Any], pre_tokenizer: dict[str, Any] | None = None, added=()) -> dict:
    """Return the JSON of a tokenizer."""
    names = [{"id": at, "content": name} for name, at in added]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**each, **flags, "special": True} for each in names],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def bpe(names: list[str], merges: list[tuple[str, str]], **facts: Any) -> dict:
    """Return the JSON of a BPE model."""
    known = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    known |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    known |= {"ignore_merges": False, **facts}
    vocab = {name: at for at, name in enumerate(names)}
    return {"type": "BPE", **known, "vocab": vocab, "merges": [list(pair) for pair in merges]}


@st.composite
def merged(draw: st.DrawFn, symbols: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Draw merges of symbols, several of which may make one token, in any order of ranks."""
    names, merges = list(symbols), []
    for _ in range(draw(st.integers(0, 25))):
        left, right = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        if len(left + right) > 6 or (left, right) in merges:
            continue
        merges.append((left, right))
        names += [left + right] * (left + right not in names)
    return names, draw(st.permutations(merges))


@st.composite
def tokenizers(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """Draw the JSON of a tokenizer of a kind."""
    if kind == "byte-level":
        names, merges = draw(merged([c for c in byte_alphabet() if c in LETTERS] + ["Ġ"]))
        names += [each for each in byte_alphabet() if each not in names]
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        added = [("<eos>", len(names))]
        facts = {"ignore_merges": draw(st.booleans())}
        return spec(bpe(names, merges, **facts), {**step, "use_regex": True}, added)
    if kind in ("BPE", "byte-fallback"):
        back = kind == "byte-fallback"
        start = ["<unk>", *(BYTES if back else ())]
        names, merges = draw(merged([*LETTERS, "▁"]))
        facts = {"unk_token": "<unk>", "byte_fallback": back, "fuse_unk": draw(st.booleans())}
        facts["ignore_merges"] = draw(st.booleans())
        return spec(bpe(start + names, merges, **facts), PLAIN, [("<unk>", 0)])
    words = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=20, unique=True)
    if kind == "WordPiece":
        names = [*LETTERS, *draw(words)]
        names += [f"##{each}" for each in [*LETTERS, *draw(words)]]
        names = ["[UNK]", "[CLS]", *dict.fromkeys(names)]
        vocab = {name: at for at, name in enumerate(names)}
        facts = {"unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        model = {"type": "WordPiece", **facts, "max_input_chars_per_word": 12, "vocab": vocab}
        return spec(model, PLAIN, [("[UNK]", 0), ("[CLS]", 1)])
    back = kind == "Unigram-bytes"
    score = st.floats(-30, 0, allow_nan=False) | st.sampled_from([-1.0, -2.0, -3.0])
    names = dict.fromkeys([*LETTERS, *draw(words)])
    rows = [["<unk>", 0.0], *([each, 0.0] for each in (BYTES if back else ()))]
    rows += [[each, draw(score)] for each in names]
    return spec(
        {"type": "Unigram", "unk_id": 0, "vocab": rows, "byte_fallback": back},
        PLAIN,
        [("<unk>", 0)],
    )


def texts() -> st.SearchStrategy[str]:
    """Draw text of a few letters, so that long tokens occur; and of unknown ones."""
    known = st.text(LETTERS, min_size=1, max_size=12)
    return st.lists(known | st.text(LETTERS + UNKNOWN + " ", max_size=8), max_size=4).map(" ".join)


def load(facts: dict[str, Any]) -> Tokenizer:
    """Return a tokenizer from its JSON."""
    return Tokenizer.from_str(json.dumps(facts))
