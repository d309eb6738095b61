"""Sequences for calibration: packed from documents, in folds, or of random tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from liar_ext.calibration.batches import FOLDS
from liar_ext.errors import InputError

# A lone text is cut into blocks of this many sequences or more, at most so many for each part; of
# a block an eighth at most is left out, so that neighbours in different folds do not touch.
BLOCK_SEQUENCES, MOST_BLOCKS, GAP = 16, 8, 8
CHARACTERS = 4  # per token, about, in English
_BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"\s"))


def split_documents(
    documents: Sequence[str], shares: Sequence[int], seed: int, seq_len: int, most: int
) -> tuple[list[list[str]], str]:
    """Split the documents of one source into parts, none of them in two parts.

    Documents, in an order drawn with ``seed``, go to the part that has least of its share. Where
    there are fewer documents than parts, they are cut into blocks first, see :func:`cut_blocks`.

    Parameters
    ----------
    documents : sequence of str
        The source.
    shares : sequence of int
        Sequences wanted of each part.
    seed : int
        Of the draw.
    seq_len : int
        Tokens per sequence.
    most : int
        Characters of a part to return, about; which of them is drawn with ``seed``.

    Returns
    -------
    parts : list of list of str
        Documents, or blocks, by part.
    note : str
        What was done to a source of few documents; empty otherwise.
    """
    if len(documents) < len(shares):
        parts = cut_blocks("\n\n".join(documents), len(shares), seq_len, most)
        blocks = sum(map(len, parts))
        return parts, (
            f"A calibration text of {len(documents)} document(s) was cut into {blocks} blocks of "
            f"consecutive paragraphs, {blocks // len(shares)} for each of {len(shares)} parts, "
            "with a gap between them: held-out errors are those on the same document. Give more "
            "documents."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    sizes, parts = [0] * len(shares), [[] for _ in shares]
    for index in order:
        filled = [size / share for size, share in zip(sizes, shares, strict=True)]
        least = filled.index(min(filled))
        if sizes[least] < most:
            parts[least].append(documents[index])
        sizes[least] += len(documents[index])
    return parts, ""


def cut_blocks(text: str, parts: int, seq_len: int, most: int) -> list[list[str]]:
    """Cut a text into blocks of consecutive paragraphs that take turns in going to the parts.

    A block begins at a paragraph, or line or word where there is none near, and the paragraph
    before it, or an eighth of a block if that is less, belongs to no block. So what one part holds
    is never the next sentence of another.

    Returns
    -------
    list of list of str
        Blocks by part.
    """
    spans = block_spans(text, parts, seq_len)
    each = max(most * parts // len(spans), 1)
    result: list[list[str]] = [[] for _ in range(parts)]
    for index, (start, end) in enumerate(spans):
        result[index % parts].append(text[start : min(end, start + each)])
    return result


def block_spans(text: str, parts: int, seq_len: int) -> list[tuple[int, int]]:
    """Return where the blocks of a text begin and end, a multiple of ``parts`` of them."""
    long = parts * BLOCK_SEQUENCES * seq_len * CHARACTERS
    blocks = parts * min(max(len(text) // long, 1), MOST_BLOCKS)
    size, gap = len(text) / blocks, max(int(len(text) / blocks / GAP), 1)
    spans = []
    for index in range(blocks):
        start = 0 if index == 0 else _break_after(text, int(index * size), gap)
        end = int((index + 1) * size)
        if index + 1 < blocks:
            end = _gap_before(text, _break_after(text, end, gap), gap)
        spans.append((start, end))
    return spans


def cut_pieces(text: str, characters: int) -> list[str]:
    """Return the consecutive pieces of a text of that many characters, cut at spaces."""
    pieces, start = [], 0
    while start < len(text):
        end = start + characters
        space = text.rfind(" ", start, end + 1) if end < len(text) else -1
        end = space if space > start else end
        pieces.append(text[start:end].strip())
        start = end
    return [piece for piece in pieces if piece]


def halve(text: str) -> list[str]:
    """Return the two halves of a text, cut at a white space."""
    middle = text.find(" ", len(text) // 2)
    middle = middle if middle >= 0 else len(text) // 2
    return [text[:middle], text[middle:]]


def _break_after(text: str, at: int, reach: int) -> int:
    """Return where the first paragraph, line or word after ``at`` begins, or ``at``."""
    for pattern in _BREAKS:
        found = pattern.search(text, at, at + reach)
        if found:
            return found.end()
    return at


def _gap_before(text: str, at: int, reach: int) -> int:
    """Return where the paragraph that ends at ``at`` begins, or what begins within ``reach``."""
    low = max(at - reach, 0)
    for pattern in _BREAKS:
        # The break right before ``at`` is the one that ends the paragraph.
        found = [match.start() for match in pattern.finditer(text, low, at) if match.end() < at]
        if found:
            return found[-1] if pattern is _BREAKS[0] else found[0]
    return low


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


RANDOM_TOKENS = 0.25  # of all sequences; what it buys stands in docs/quality.md


def fraction_of(asked: float | str, causal: bool, written: bool) -> float:
    """Return the fraction of random tokens: of "auto" a quarter for language models.

    Those that write text of their own need none, and encoders gain nothing by them.
    """
    if asked != "auto":
        return float(asked)
    return RANDOM_TOKENS if causal and not written else 0.0


def random_sequences(
    rows: Sequence[Sequence[int]],
    tokenizer,
    fraction: float,
    seed: int,
    vocab_size: int | None = None,
) -> list[tuple[int, list[int]]]:
    """Return copies of some rows, evenly spread, with random tokens, and which each is of.

    Special tokens stay where they are; every other one is drawn evenly from those of the vocabulary
    that aren't special. The draw depends on the rows, so that other text has other ones beside it.

    Parameters
    ----------
    rows : sequence of sequence of int
        Token ids of each sequence of text.
    tokenizer
        A Hugging Face tokenizer.
    fraction : float
        What they are of these and those of text.
    seed : int
        Of the draw.
    vocab_size : int, optional
        Ids from there on aren't drawn, as the model has no embedding of them.

    Returns
    -------
    list of (int, list of int)
        The row that a copy is of, and its token ids.

    Raises
    ------
    InputError
        If no token of the vocabulary can be drawn.
    """
    count = count_beside(len(rows), fraction)
    if not count:
        return []
    special, plain = _vocabulary(tokenizer, vocab_size)
    generator = torch.Generator().manual_seed(seed_of(rows, seed))
    copies = []
    for step in range(count):
        index = (2 * step + 1) * len(rows) // (2 * count)
        ids = torch.tensor(rows[index])
        drawn = plain[torch.randint(len(plain), ids.shape, generator=generator)]
        copies.append((index, torch.where(torch.isin(ids, special), ids, drawn).tolist()))
    return copies


def _vocabulary(tokenizer, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the ids of special tokens, all that were added to a vocabulary, and the others."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    plain = sorted({*tokenizer.get_vocab().values()} - special)
    if vocab_size is not None:
        plain = [token for token in plain if token < vocab_size]
    if not plain:
        raise InputError(
            "calibration: random_tokens draws tokens that aren't special, and the tokenizer has "
            "none; give random_tokens=0"
        )
    return torch.tensor(sorted(special), dtype=torch.long), torch.tensor(plain)
