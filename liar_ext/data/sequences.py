"""Token sequences of one length, and how many may come beside those of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from liar_ext.data.batches import FOLDS
from liar_ext.errors import InputError

MOST_BESIDE = 0.9  # nine sequences for each of text
NO_TEXT = -1  # the source of what comes beside, where texts count from 0


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one length, ready for a model.

    Parameters
    ----------
    input_ids, attention_mask : Tensor
        ``(sequences, seq_len)`` int64.
    fold : Tensor
        ``(sequences,)`` int64: 0 or 1. Sequences of one document share a fold.
    bos : str
        Special tokens that every packed window begins with, as the tokenizer begins a document;
        empty where it adds none.
    certification, judging : Sequences, optional
        Sequences of documents that none of these come from: for a figure that no decision has
        seen, and for a choice among whole models. Their fold only takes turns.
    notes : tuple of str
        What a user has to know of the draw.
    source : Tensor, optional
        ``(sequences,)`` int64: which of several texts each is of; -1 of what comes beside them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    fold: Tensor
    bos: str = ""
    certification: Sequences | None = None
    judging: Sequences | None = None
    notes: tuple[str, ...] = ()
    source: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def batches(self, batch_size: int = 4) -> list[dict[str, Tensor]]:
        """Return batches for :func:`liar_ext.calibrate`; no batch mixes the folds.

        Sequences of like length share a batch, which is cut after the longest: little is padding.

        Raises
        ------
        InputError
            If ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise InputError(f"batches: batch_size must be at least 1, got {batch_size}")
        batches = []
        lengths = self.attention_mask.sum(1)
        for fold in self.fold.unique():
            rows = (self.fold == fold).nonzero().flatten()
            rows = rows[lengths[rows].argsort(stable=True)]
            for some in rows.split(batch_size):
                longest = int(lengths[some].max())
                batch = {
                    "input_ids": self.input_ids[some, :longest],
                    "attention_mask": self.attention_mask[some, :longest],
                    "fold": self.fold[some],
                }
                if self.source is not None:
                    batch["source"] = self.source[some]
                batches.append(batch)
        return batches

    def beside(self, more: Sequences) -> Sequences:
        """Return these sequences and others that are as long, each with its source."""
        both = {
            name: torch.cat([getattr(self, name), getattr(more, name)])
            for name in ("input_ids", "attention_mask", "fold", "source")
        }
        return replace(self, **both)


def check_fraction(operation: str, name: str, fraction: float) -> None:
    """Raise InputError unless a fraction of all sequences can come beside those of text."""
    if not 0.0 <= fraction <= MOST_BESIDE:
        raise InputError(
            f"{operation}: {name} must be in [0, {MOST_BESIDE}], got {fraction}; 0.25 is a third "
            "as many as there are of text, and 0 none"
        )


def count_beside(sequences: int, fraction: float) -> int:
    """Return how many sequences make a fraction of all beside that many of text.

    ``sequences · fraction / (1 − fraction)``, rounded.
    """
    return round(sequences * fraction / (1 - fraction))


def of_no_text(input_ids: Tensor) -> Sequences:
    """Return full sequences that come beside those of text, and take turns in going to folds."""
    fold = torch.arange(len(input_ids)) % FOLDS
    source = torch.full((len(input_ids),), NO_TEXT)
    return Sequences(input_ids, torch.ones_like(input_ids), fold, source=source)


def seed_of(rows: Iterable[Sequence[int] | Tensor], seed: int) -> int:
    """Return a seed for what comes beside sequences, so that other ones have something else."""
    digest = blake2b(str(seed).encode(), digest_size=7)
    for row in rows:
        digest.update(torch.as_tensor(row).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")
