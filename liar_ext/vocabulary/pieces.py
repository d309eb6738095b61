"""The tokens of a tokenizer, read from its JSON, and which tokens need which others.

A kept token needs the tokens that are made on the way to it. For byte-pair encoding that is its
*derivation*: every symbol that appears when the merges run on the token's own text. docs/method.md
proves that text whose old tokens all stay is then tokenized exactly as before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import regex

from liar_ext.system.errors import InputError

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # as byte fallback spells them
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
# Bytes that text is made of. Real tokenizers lack control characters, and leads of empty planes.
NEEDED = (9, 10, *range(32, 127), *range(128, 192), *range(194, 241))
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
            try:
                return bytes(map(_BYTE_OF.__getitem__, name)).decode()
            except (KeyError, UnicodeDecodeError):
                return ""
        name = name.removeprefix("##") if self.kind == "WordPiece" else name
        return name.removesuffix(self.suffix) if self.suffix else name


def read_pieces(spec: Mapping[str, Any], rows: int | None = None) -> Pieces:
    """Return the tokens of what ``tokenizer.json`` holds, but for special ones beyond ``rows``.

    InputError is raised if it is of another kind, or contradicts itself.
    """
    model = spec["model"]
    kind = model.get("type")
    if kind not in KINDS:
        raise _refused(f"must be one of {', '.join(KINDS)}, got {str(kind)[:40]}")
    if model.get("dropout"):
        raise _refused(f"draws merges at random (dropout {model['dropout']}); set it to null")
    ids = _ids(model)
    added = {
        each["content"]: each["id"]
        for each in spec.get("added_tokens") or []
        if rows is None or each["id"] < rows or not each.get("special")  # which may come later
    }
    _check_ids(ids, added)
    splits = spec.get("pre_tokenizer") or {}
    splits = splits.get("pretokenizers", [splits])
    level = kind == "BPE" and any(step.get("type") == "ByteLevel" for step in splits)
    falls_back = bool(model.get("byte_fallback"))
    ranks, suffix, always = {}, "", set(added.values())
    if kind == "BPE":
        if model.get("continuing_subword_prefix"):
            raise _refused("marks tokens inside of words by a prefix, which BPE here must not")
        ranks, suffix = _merges(model, ids), model.get("end_of_word_suffix") or ""
        if level:
            alphabet = byte_alphabet()
            _check_there([alphabet[byte] for byte in NEEDED], ids)
            always |= {ids[each] for each in alphabet if each in ids}
    if kind == "WordPiece" and model.get("continuing_subword_prefix") != "##":
        raise _refused("must mark tokens inside of words by ##")
    if kind == "Unigram":  # the score of unknown characters depends on the lowest one
        scores = [score for _, score in model["vocab"]]
        always |= {scores.index(min(scores))}
    if falls_back:
        _check_there(BYTES, ids)
        always |= {ids[each] for each in BYTES}
        if not set(BYTES).isdisjoint(part for pair in ranks for part in pair):
            raise _refused("merges bytes that unknown characters become")
    unknown = model.get("unk_id" if kind == "Unigram" else "unk_token")
    if kind != "Unigram" and unknown is not None:
        _check_there([unknown], {**ids, **added})
        unknown = {**ids, **added}[unknown]
    elif unknown is not None and not 0 <= unknown < len(ids):
        raise _refused(f"has {len(ids)} tokens, and {unknown} for unknown characters")
    always |= set() if unknown is None else {unknown}
    if not falls_back:  # single characters, which keep all text readable without bytes
        prefix = "##" if kind == "WordPiece" else ""
        bare = ({name, name.removeprefix(prefix), name.removesuffix(suffix)} for name in ids)
        always |= {at for at, some in zip(ids.values(), bare, strict=True) if 1 in map(len, some)}
    return Pieces(kind, ids, added, falls_back, frozenset(always), ranks, suffix, unknown, level)


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] != "Unigram":
        return dict(model["vocab"])
    names = [name for name, _ in model["vocab"]]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise _refused(f"has the token {twice[0]!r:.40} twice")
    if not all(math.isfinite(score) for _, score in model["vocab"]):
        raise _refused("has a score that is not finite")
    return {name: at for at, name in enumerate(names)}


def _check_ids(ids: Mapping[str, int], added: Mapping[str, int]) -> None:
    """Raise InputError unless each token has an id of its own."""
    if not ids:
        raise _refused("has no tokens")
    if "" in ids:
        raise _refused("has an empty token")
    longest = max(ids, key=len)
    if len(longest) > MOST_CHARACTERS:
        raise _refused(f"has a token of {len(longest):,} characters ({longest[:20]!r}...)")
    for name, at in added.items():
        if ids.get(name, at) != at:
            raise _refused(f"gives the added token {name!r:.40} two ids, {ids[name]} and {at}")
    both = Counter({**ids, **added}.values())
    if min(both) < 0:
        raise _refused("has a negative id")
    twice = [at for at, count in both.items() if count > 1]
    if twice:
        raise _refused(f"has two tokens of id {twice[0]}")


def _merges(model: Mapping[str, Any], ids: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Return the rank of each pair; of a pair that is there twice the last one counts."""
    ranks = {}
    for rank, merge in enumerate(model["merges"]):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or not all(pair):
            raise _refused(f"has a merge that joins no two tokens: {merge!r:.60}")
        _check_there([*pair, "".join(pair)], ids)
        ranks[pair] = rank
    return ranks


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in byte-level tokenizers."""
    others = iter(range(256, 512))
    return [chr(byte) if byte in PRINTED else chr(next(others)) for byte in range(256)]


_BYTE_OF = {sign: byte for byte, sign in enumerate(byte_alphabet())}


def _check_there(names: Iterable[str], ids: Mapping[str, int]) -> None:
    missing = [name for name in names if name not in ids]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _refused(f"lacks the token {missing[0]!r:.40}{more}, which it needs")


def _refused(what: str) -> InputError:
    return InputError(
        f"vocabulary: the tokenizer {what}; leave --keep-vocab out, or take another tokenizer"
    )
