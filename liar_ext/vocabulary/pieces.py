"""The tokens of a tokenizer, read from its JSON, which of them need which others, and a choice.

A kept token needs the tokens that are made on the way to it. For byte-pair encoding that is its
*derivation*: every symbol that appears when the merges run on the token's own text. docs/method.md
proves that text whose old tokens all stay is then tokenized exactly as before.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer, decoders, pre_tokenizers

from liar_ext.system.errors import InputError

STEP = 64  # vocabularies are multiples of it: kernels and tensor parallelism divide by it
CHUNK = 256  # documents that are tokenized at once
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # as byte fallback spells them
KINDS = ("BPE", "WordPiece", "Unigram")
MOST_CHARACTERS = 512  # of a token; its derivation takes their square
SHARED = r"[\p{Script=Common}\p{Script=Inherited}]"


@dataclass(frozen=True)
class Pieces:
    """The tokens of a tokenizer."""

    kind: str  # one of KINDS
    ids: dict[str, int]  # tokens of the model itself
    added: dict[str, int]  # special and added tokens, in or beside the model
    falls_back: bool  # whether unknown characters become bytes
    always: frozenset[int]  # tokens that every smaller vocabulary keeps
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)  # merges of BPE, low ones first
    suffix: str = ""  # what ends a word in tokens of BPE
    unknown: int | None = None  # the token of unknown characters
    byte_level: bool = False  # whether text is read as bytes
    _needs: dict[str, set[int]] = field(init=False, default_factory=dict)  # as far as was asked

    @cached_property
    def names(self) -> dict[int, str]:
        """Every token by its id, in order of the ids."""
        both = {**self.ids, **self.added}
        return {at: name for name, at in sorted(both.items(), key=lambda pair: pair[1])}

    @property
    def kind_in_words(self) -> str:
        """The kind, as a report says it."""
        if self.byte_level:
            return "byte-level BPE"
        return self.kind + " with byte fallback" * self.falls_back

    def needs(self, name: str) -> set[int]:
        """Return the ids that have to stay if this token does, its own among them."""
        if name not in self._needs:
            found = self._needs[name] = {self.ids[name] if name in self.ids else self.added[name]}
            derived = self.kind == "BPE" and name in self.ids and name not in self.added
            for symbols in self._beginnings(name) if derived else ():
                made = set(symbols)
                while known := self._merges_of(symbols):
                    at = min(known)[1]
                    symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
                    made.add(symbols[at])
                if symbols == [name]:
                    found |= {self.ids[each] for each in made}
        return self._needs[name]

    def _beginnings(self, name: str) -> Iterator[list[str]]:
        """Yield the symbols that a token may begin as: its characters, or those of a word's end."""
        ends = [name[: -len(self.suffix)]] if self.suffix and name.endswith(self.suffix) else []
        ways = [list(name), *([*end[:-1], end[-1] + self.suffix] for end in ends if end)]
        yield from (way for way in ways if all(each in self.ids for each in way))

    def _merges_of(self, symbols: list[str]) -> list[tuple[int, int]]:
        """Return rank and place of each merge that applies."""
        pairs = enumerate(zip(symbols, symbols[1:], strict=False))
        return [(self.ranks[pair], at) for at, pair in pairs if pair in self.ranks]

    def of_scripts(self, scripts: Sequence[str]) -> set[int]:
        """Return the tokens whose letters are all of one of some Unicode scripts.

        Signs that many scripts share count as any: "don't" is Latin, and "12" is of no script.
        """
        tests = [
            regex.compile(rf"{SHARED}*(\p{{Script={script}}}{SHARED}*)+") for script in scripts
        ]
        texts = {at: self._text_of(name) for name, at in self.ids.items()}
        return {at for at, text in texts.items() if any(test.fullmatch(text) for test in tests)}

    def _text_of(self, name: str) -> str:
        """Return what a token writes, "" if it is a part of a character."""
        if self.byte_level:
            text = decoders.ByteLevel().decode([name])
            return "" if "\ufffd" in text else text
        name = name.removeprefix("##") if self.kind == "WordPiece" else name
        return name.removesuffix(self.suffix) if self.suffix else name


def read_pieces(spec: Mapping[str, Any], rows: int | None = None) -> Pieces:
    """Return the tokens of what ``tokenizer.json`` holds, but for special ones beyond ``rows``.

    The JSON is that of a tokenizer that was loaded, which proves most of it. InputError is raised
    if its kind or its rules are others than those that are known here.
    """
    model = spec["model"]
    kind, prefix = model.get("type"), model.get("continuing_subword_prefix")
    if kind not in KINDS:
        raise _refused(f"must be one of {', '.join(KINDS)}, got {str(kind)[:40]}")
    if model.get("dropout"):
        raise _refused(f"draws merges at random (dropout {model['dropout']}); set it to null")
    if kind == "BPE" and prefix:
        raise _refused("marks tokens inside of words by a prefix, which BPE here must not")
    if kind == "WordPiece" and prefix != "##":
        raise _refused("must mark tokens inside of words by ##")
    vocab = model["vocab"]
    ids = dict(vocab)
    if kind == "Unigram":
        ids = {name: at for at, (name, _) in enumerate(vocab)}
    added = {
        each["content"]: each["id"]
        for each in spec["added_tokens"]
        if rows is None or each["id"] < rows or not each.get("special")  # which may come later
    }
    both = {**ids, **added}
    if len(ids) < len(vocab) or len(set(both.values())) < len(both):
        raise _refused("has a token twice, or two tokens of one id")
    longest = max(ids, key=len, default="")
    if len(longest) > MOST_CHARACTERS:
        raise _refused(f"has a token of {len(longest):,} characters ({longest[:20]!r}...)")
    splits = spec.get("pre_tokenizer") or {}
    splits = splits.get("pretokenizers", [splits])
    level = kind == "BPE" and any(step.get("type") == "ByteLevel" for step in splits)
    falls_back = bool(model.get("byte_fallback"))
    ranks, suffix, always = {}, model.get("end_of_word_suffix") or "", set(added.values())
    if kind == "BPE":  # of a pair that is there twice the last one counts
        ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    if level:
        always |= {ids[each] for each in pre_tokenizers.ByteLevel.alphabet() if each in ids}
    if kind == "Unigram":  # the score of unknown characters depends on the lowest one
        scores = [score for _, score in vocab]
        always |= {scores.index(min(scores))}
        unknown = model.get("unk_id")
    else:
        unknown = both.get(model.get("unk_token"))
    always |= set() if unknown is None else {unknown}
    if falls_back:
        always |= {ids[each] for each in BYTES if each in ids}
        if not set(BYTES).isdisjoint(part for pair in ranks for part in pair):
            raise _refused("merges bytes that unknown characters become")
    else:  # single characters, which keep all text readable without bytes
        inner = "##" if kind == "WordPiece" else ""
        bare = ({name, name.removeprefix(inner), name.removesuffix(suffix)} for name in ids)
        always |= {at for at, some in zip(ids.values(), bare, strict=True) if 1 in map(len, some)}
    return Pieces(kind, ids, added, falls_back, frozenset(always), ranks, suffix, unknown, level)


def _refused(what: str) -> InputError:
    return InputError(
        f"vocabulary: the tokenizer {what}; leave --keep-vocab out, or take another tokenizer"
    )


def spec_of(tokenizer: Any) -> dict[str, Any]:
    """Return what ``tokenizer.json`` holds; InputError if the tokenizer is of another library."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(
            f"vocabulary: {type(inner).__name__} has no tokenizer.json; convert it to a fast "
            "tokenizer, or leave --keep-vocab out"
        )
    return json.loads(backend.to_str())


def tokens_per_byte(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return how many tokens a byte of text takes."""
    return sum(len(ids) for ids in encode(tokenizer, texts)) / size_in_bytes(texts)


def size_in_bytes(texts: Sequence[str]) -> int:
    """Return the bytes of some texts in UTF-8, at least one."""
    return max(sum(len(text.encode(errors="replace")) for text in texts), 1)


def size_of(keep: float | int, tokens: int) -> int:
    """Return how many of ``tokens`` tokens stay: a multiple of 64, unless all do."""
    asked = keep if isinstance(keep, int) and keep > 1 else keep * tokens
    return min(max(STEP, STEP * round(asked / STEP)), tokens)


def plain(spec: str) -> Tokenizer:
    """Return the tokenizer of some JSON, without truncation and padding."""
    found = Tokenizer.from_str(spec)
    found.no_truncation()
    found.no_padding()
    return found


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterable[list[int]]:
    """Yield the ids of each text, without special tokens around it."""
    for at in range(0, len(texts), CHUNK):
        some = list(texts[at : at + CHUNK])
        yield from (each.ids for each in tokenizer.encode_batch(some, add_special_tokens=False))


def check_alike(
    new: Tokenizer, order: Sequence[int], lines: Sequence[tuple[str, list[int]]], pieces: Pieces
) -> int:
    """Prove on lines of text that the smaller tokenizer is exact; return the number of lines.

    The new ids of each line whose old tokens all stay must be the old ones, renumbered. WordPiece
    may read more unknown words than before, so lines with such words don't count for it.
    """
    moved = {at: each for each, at in enumerate(order)}
    if pieces.kind == "WordPiece":
        moved.pop(pieces.unknown, None)
    known = [
        (line, [moved[at] for at in ids]) for line, ids in lines if all(at in moved for at in ids)
    ]
    found = encode(new, [line for line, _ in known])
    for (line, expected), ids in zip(known, found, strict=True):
        if ids != expected:
            raise InputError(
                f"vocabulary: the smaller tokenizer reads {line[:60]!r} otherwise than before, "
                "so its rules are not those of its JSON; leave --keep-vocab out"
            )
    return len(known)


def counts_of(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> np.ndarray:
    """Return how often each token is in some texts; InputError if the model has no row for one."""
    counts = np.zeros(tokens, dtype=np.int64)
    for ids in encode(tokenizer, texts):
        found = np.bincount(ids, minlength=tokens)
        if len(found) > tokens:
            raise InputError(
                f"vocabulary: the text has token {len(found) - 1}, and the tokens of the model "
                f"are 0 to {tokens - 1}; remove it from the text"
            )
        counts += found
    return counts


def choose(pieces: Pieces, counts: np.ndarray, size: int, needed: Collection[int]) -> set[int]:
    """Return ``size`` tokens: what every vocabulary keeps, then the most frequent ones.

    Tokens of equal counts go by their id, as tokenizers number frequent tokens first. A token
    comes with all that it needs, or not at all. InputError if more tokens have to stay than that.
    """
    names, kept = pieces.names, set()
    for at in {*pieces.always, *needed}:
        kept |= pieces.needs(names[at])
    if len(kept) > size:
        raise InputError(
            f"vocabulary: at least {len(kept):,} of {len(names):,} tokens must stay (special "
            f"tokens, bytes, characters), got {size:,}, a multiple of {STEP}; "
            f"keep {-(-len(kept) // STEP) * STEP} or more"
        )
    waiting = sorted(names.keys() - kept, key=lambda at: (-counts[at], at))
    # What doesn't fit with its needs may do so later, when they are there.
    while len(kept) < size:
        before = len(kept)
        for at in waiting:
            if at in kept:
                continue
            needs = pieces.needs(names[at]) - kept
            if len(kept) + len(needs) <= size:
                kept |= needs
            if len(kept) == size:
                break
        if len(kept) == before:
            break
    return kept


def order_of(pieces: Pieces, kept: Collection[int]) -> list[int]:
    """Return the old ids in the order of the new ones.

    Tokens of the model come first, then those that are only added: the library numbers them so.
    """
    own = set(pieces.ids.values())
    return sorted(kept, key=lambda at: (at not in own, at))


def edited(spec: Mapping[str, Any], pieces: Pieces, order: list[int]) -> dict[str, Any]:
    """Return a tokenizer's JSON with the tokens of ``order`` alone, numbered by it.

    A merge stays if both parts and the result do; the ranks keep their order. Normalizer,
    pre-tokenizer, decoder and truncation stay as they are. InputError if a step after the model
    needs a token that goes.
    """
    new = {old: at for at, old in enumerate(order)}
    spec = copy.deepcopy(dict(spec))
    model = spec["model"]
    if pieces.kind == "Unigram":
        model["vocab"] = [row for at, row in enumerate(model["vocab"]) if at in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        found = sorted((new[at], name) for name, at in pieces.ids.items() if at in new)
        model["vocab"] = {name: at for at, name in found}
    if pieces.kind == "BPE":
        known = model["vocab"].keys()
        model["merges"] = [[a, b] for a, b in model["merges"] if known >= {a, b, a + b}]
    for each in spec["added_tokens"]:
        each["id"] = new.setdefault(each["id"], len(new))  # beyond the rows, if it has none
    spec["added_tokens"].sort(key=lambda each: each["id"])
    if spec.get("padding"):
        spec["padding"]["pad_id"] = _moved(spec["padding"]["pad_id"], new, "padding")
    if spec.get("post_processor"):
        _move_step(spec["post_processor"], new)
    return spec


def _move_step(step: dict[str, Any], new: Mapping[int, int]) -> None:
    """Renumber the tokens that a step after the model adds."""
    for inner in step.get("processors", []):
        _move_step(inner, new)
    for name in ("sep", "cls"):
        if name in step:
            token, at = step[name]
            step[name] = [token, _moved(at, new, token)]
    tokens = step.get("special_tokens", {})
    for each in tokens.values() if isinstance(tokens, Mapping) else []:
        each["ids"] = [_moved(at, new, each["id"]) for at in each["ids"]]


def _moved(at: int, new: Mapping[int, int], what: str) -> int:
    if at not in new:
        raise InputError(
            f"vocabulary: the tokenizer adds token {at} ({str(what)[:40]}), which it does not "
            "list as a special token; add it there, or leave --keep-vocab out"
        )
    return new[at]


def pieces_of(backend: Any, texts: Sequence[str], length: int, most: int | None) -> list[str]:
    """Return consecutive pieces of texts, of ``length`` tokens each; every n-th if too many."""
    found = []
    for text in texts:
        spans = backend.encode(text, add_special_tokens=False).offsets
        starts = [start for start, _ in spans[::length]]
        ends = [*starts[1:], len(text)]
        found += [text[start:end] for start, end in zip(starts, ends, strict=False)]
    found = [each for each in found if each.strip()]
    return found if most is None else found[:: len(found) // most or 1][:most]
