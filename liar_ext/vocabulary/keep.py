"""Keep a part of the vocabulary: choose tokens, edit the tokenizer, slice the model, check."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from liar_ext.calibration.texts import evaluation_sequences
from liar_ext.checkpoint.folder import count_params
from liar_ext.models.running import device_of, evaluating, positions_of, predicts_next_token
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar
from liar_ext.vocabulary.pieces import Pieces, read_pieces
from liar_ext.vocabulary.slicing import (
    check_rows,
    needed_tokens,
    rows_of,
    slice_tokens,
    token_parameters,
)

# Read by old and new tokenizers, and stored to be read again: words, code, scripts, white space.
SAMPLES = (
    "The weather was fine, so 12 of them walked 3.5 km to the sea.",
    "def double(x):\n    return 2 * x  # twice",
    "Ein schöner Tag, n'est-ce pas? Доброе утро. 你好，世界。",
    "  two  spaces\tand a tab\n\nE=mc² ≈ 9·10¹⁶ J/kg 🙂",
)
STEP = 64  # vocabularies are multiples of it: kernels and tensor parallelism divide by it
CHUNK = 256  # documents that are tokenized at once
LINES = 20_000  # that are read by both tokenizers, to prove that they agree
STARTS, START = 64, 128  # beginnings of documents that a model goes on from, and their tokens


@dataclass(frozen=True)
class Choice:
    """The tokens that stay, by new id; their ``tokenizer.json``; and what the text says of them."""

    order: list[int]
    tokenizer_json: str
    facts: dict[str, Any]


class Counted:
    """A tokenizer, read once, with the counts of its tokens in some texts.

    Parameters are those of :func:`choose_tokens`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[str],
        scripts: Sequence[str] = (),
    ) -> None:
        token_parameters(model)  # refuses what can't be sliced, before any text is read
        self.model, self.tokenizer = model, tokenizer
        self.texts, self.spec = texts, spec_of(tokenizer)
        self.pieces = read_pieces(self.spec, rows_of(model))
        self.size = len(self.pieces.names)
        check_rows(model, max(self.pieces.names))
        known = needed_tokens(model)
        lost = sorted(known - self.pieces.names.keys())
        if lost:
            raise InputError(
                f"vocabulary: the config names token {lost[0]}, which the tokenizer lacks; correct "
                "the config, or leave --keep-vocab out"
            )
        self.needed = known | self.pieces.of_scripts(scripts)
        self.old = plain(json.dumps(self.spec))
        self.counts = counts_of(self.old, texts, max(self.pieces.names) + 1)

    @cached_property
    def lines(self) -> list[tuple[str, list[int]]]:
        """The first lines of the texts and their tokens, which each size is compared with."""
        lines = [line for text in self.texts for line in text.splitlines() if line.strip()]
        return list(zip(lines[:LINES], encode(self.old, lines[:LINES]), strict=True))

    @cached_property
    def expected(self) -> np.ndarray:
        """``mean_t p(token | text before t)`` by token, over beginnings of documents.

        Zeros if the model predicts no next token, or the texts have none.
        """
        model, found = self.model, np.zeros(len(self.counts))
        if not predicts_next_token(model) or not self.counts.any():
            return found
        length = min(START, positions_of(model) or START)
        how = {"seq_len": length, "samples": STARTS, "packed": False}
        texts = [each for each in self.texts if each.strip()]
        drawn, total, positions = evaluation_sequences(texts, self.tokenizer, **how), 0.0, 0
        bar = Bar(total=len(drawn), desc="tokens")
        with torch.no_grad(), evaluating(model), bar:
            for batch in drawn.batches(1):  # the logits of one sequence are many
                logits = model(input_ids=batch["input_ids"].to(device_of(model))).logits[0]
                logits = logits[:, : len(found)]
                total = total + logits.float().softmax(-1).sum(0, dtype=torch.float64)
                positions += len(logits)
                bar.update()
        if not torch.isfinite(total).all():
            raise InputError(
                "vocabulary: the model's predictions on the text are not finite; load it with "
                "--dtype float32, or keep fewer tokens than the text has"
            )
        found[: len(total)] = (total / positions).cpu()
        return found

    def choose(self, keep: float | int) -> Choice | None:
        """Return the most frequent tokens with all that they need; None if that is all of them.

        If more tokens stay than the texts have, a language model says which.
        """
        size = size_of(keep, self.size)
        if size >= self.size:
            return None
        unseen = size > (self.counts > 0).sum()
        scores = self.counts + self.expected if unseen else self.counts
        order = order_of(self.pieces, choose(self.pieces, scores, size, self.needed))
        spec = json.dumps(edited(self.spec, self.pieces, order))
        new, total = plain(spec), int(self.counts.sum())
        rates = [total / size_in_bytes(self.texts), tokens_per_byte(new, self.texts)]
        facts = {
            "before": self.size,
            "after": len(order),
            "kind": self.pieces.kind_in_words,
            "kept_of_text": float(self.counts[order].sum() / max(total, 1)),
            "alike_lines": check_alike(new, order, self.lines, self.pieces),
            "tokens_per_byte": rates,
        }
        return Choice(order, spec, facts)


def choose_tokens(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    keep: float | int,
    scripts: Sequence[str] = (),
) -> Choice | None:
    """Choose the tokens of a smaller vocabulary by their counts in some texts.

    A language model adds each token's mean probability as the next one, ``mean_t p(token | text
    before t)``, where tokens that the texts lack are to stay.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model; it stays as it is.
    tokenizer : transformers tokenizer or processor
        Its tokenizer; it stays as it is.
    texts : sequence of str
        Text of the kind that the model will read.
    keep : float or int
        A fraction of the tokens, at most 1, or their number. It is rounded to a multiple of 64.
    scripts : sequence of str
        Unicode scripts, such as ``latin``, all of whose tokens stay.

    Returns
    -------
    Choice or None
        None if all tokens stay.

    Raises
    ------
    InputError
        If the tokenizer or the model can't be cut, or too few tokens would stay.
    """
    return Counted(model, tokenizer, texts, scripts).choose(keep)


def keep_tokens(model: nn.Module, tokenizer: Any, chosen: Choice | Sequence[int]) -> Any:
    """Slice a model in place to the tokens of a choice, and return the tokenizer that has them.

    ``chosen`` may be the old ids of all tokens that stay, in their new order.

    Raises
    ------
    InputError
        If the model or the tokenizer can't be cut.
    """
    if not isinstance(chosen, Choice):
        spec = spec_of(tokenizer)
        new = json.dumps(edited(spec, read_pieces(spec), list(chosen)))
        chosen = Choice(list(chosen), new, {})
    before = count_params(model)
    slice_tokens(model, chosen.order)
    gone = before - count_params(model)
    smaller = copy.deepcopy(tokenizer)
    inner = getattr(smaller, "tokenizer", smaller)
    inner._tokenizer = Tokenizer.from_str(chosen.tokenizer_json)
    if smaller is not inner:  # a processor, which keeps tokens of images
        moved = {old: at for at, old in enumerate(chosen.order)}
        for name, value in list(vars(smaller).items()):
            if name.endswith("_token_id") and type(value) is int:
                setattr(smaller, name, moved.get(value, value))
    for name in ("_vocab", "_merges"):  # copies from which some classes were built
        vars(inner).pop(name, None)
    checks = [{"text": text, "ids": inner.encode(text)} for text in SAMPLES]
    facts = {"version": 1, "params_gone": gone, "kept": chosen.order, "checks": checks}
    model.liar_vocabulary = facts
    return smaller


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


def check_alike(
    new: Tokenizer, order: Sequence[int], lines: Sequence[tuple[str, list[int]]], pieces: Pieces
) -> int:
    """Prove on lines of text that the smaller tokenizer is exact; return the number of lines.

    Of all lines whose old tokens stay the new ids must be the old ones, renumbered. Lines with
    unknown words count for no WordPiece tokenizer, which may read more of them than before.
    InputError if one differs: then the tokenizer follows other rules than its JSON says.
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
    names = pieces.names
    kept = set()
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
        if len(kept) == before:  # no token without needs is left, which derivations forbid
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
        model["merges"] = [merge for merge in model["merges"] if _stays(merge, model["vocab"])]
    for each in spec.get("added_tokens") or []:
        each["id"] = new.setdefault(each["id"], len(new))  # beyond the rows, if it has none
    spec["added_tokens"] = sorted(spec.get("added_tokens") or [], key=lambda each: each["id"])
    if spec.get("padding"):
        spec["padding"]["pad_id"] = _moved(spec["padding"]["pad_id"], new, "padding")
    if spec.get("post_processor"):
        _move_step(spec["post_processor"], new)
    return spec


def _stays(merge: Any, vocab: Mapping[str, int]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in vocab and right in vocab and left + right in vocab


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
