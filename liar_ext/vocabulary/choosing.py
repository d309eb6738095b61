"""Which tokens stay: those that a text has most often, with all that they need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer

from liar_ext.errors import InputError
from liar_ext.vocabulary.pieces import Pieces

STEP = 64  # vocabularies are multiples of it: kernels and tensor parallelism divide by it
CHUNK = 256  # documents that are tokenized at once


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
    """Return how often each token is in some texts."""
    counts = np.zeros(tokens, dtype=np.int64)
    for ids in encode(tokenizer, texts):
        counts += np.bincount(ids, minlength=tokens)
    return counts


def choose(pieces: Pieces, counts: np.ndarray, size: int, needed: Collection[int]) -> set[int]:
    """Return ``size`` tokens: what every vocabulary keeps, then the most frequent ones.

    Tokens of equal counts go by their id, as tokenizers number frequent tokens first. A token
    comes with all that it needs, or not at all.

    Raises
    ------
    InputError
        If more tokens have to stay than that.
    """
    names = pieces.names
    kept = set()
    for at in {*pieces.always, *needed}:
        kept |= pieces.needs(names[at])
    if len(kept) > size:
        raise InputError(
            f"vocabulary: at least {len(kept):,} of {len(names):,} tokens must stay (special "
            f"tokens, bytes, characters), got {size:,}; keep more"
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
