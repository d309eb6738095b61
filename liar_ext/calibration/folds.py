"""Sequences for calibration: parts of documents that share nothing, and random tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.documents import Pair, document_digest
from liar_ext.system.errors import InputError

# A lone text is cut into blocks of this many sequences or more, at most so many for each part; of
# a block an eighth at most is left out, so that neighbours in different folds do not touch.
BLOCK_SEQUENCES, MOST_BLOCKS, GAP = 16, 8, 8
CHARACTERS = 4  # per token, about, in English
TYPES = "token_type_ids"
NO_TEXT = -1  # the source of what comes beside, where texts count from 0
RANDOM_TOKENS = 0.25  # of all sequences; docs/quality.md shows the effect
Part = list[tuple[Any, int]]  # files, and the source of each
_BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"\s"))


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length, recordings or pictures, ready for a model."""

    # By their names, a row each; of text input_ids and attention_mask, (sequences, seq_len) int64.
    # Those of each sequence, if they are of sizes of their own.
    inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
    fold: Tensor  # (sequences,) int64: 0 or 1; sequences of one document share it
    source: Tensor | None = None  # (sequences,) int64: which of several texts; -1 of no text
    bos: str = ""  # special tokens that every packed window begins with
    # Of documents that none of these come from, for a figure that no decision has seen, and for a
    # choice among whole models; their folds only take turns.
    certification: Sequences | None = None
    judging: Sequences | None = None
    notes: tuple[str, ...] = ()  # what a user has to know of the draw

    def __len__(self) -> int:
        return len(self.fold)

    @property
    def input_ids(self) -> Tensor:
        """Token ids of text, ``(sequences, seq_len)`` int64."""
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        """1 for tokens of text, 0 for padding."""
        return self.inputs["attention_mask"]

    @property
    def tokens(self) -> int:
        """Tokens of text that are not padding."""
        return int(self.attention_mask.sum())

    def batches(self, batch_size: int = 4) -> list[dict[str, Tensor]]:
        """Return batches for :func:`liar_ext.calibrate`; no batch mixes the folds.

        Texts of similar length share a batch, which is cut after the longest. Inputs of sizes of
        their own are a batch each. A ``batch_size`` below 1 raises InputError.
        """
        if batch_size < 1:
            raise InputError(f"batches: batch_size must be at least 1, got {batch_size}")
        facts = {"fold": self.fold} | ({} if self.source is None else {"source": self.source})
        if not isinstance(self.inputs, Mapping):
            return [
                {**inputs, **{name: value[at : at + 1] for name, value in facts.items()}}
                for at, inputs in enumerate(self.inputs)
            ]
        text, batches = "attention_mask" in self.inputs, []
        lengths = self.attention_mask.sum(1) if text else torch.zeros(len(self))
        for fold in self.fold.unique():
            rows = (self.fold == fold).nonzero().flatten()
            for some in rows[lengths[rows].argsort(stable=True)].split(batch_size):
                longest = int(lengths[some].max()) if text else None
                batch = {name: value[some, :longest] for name, value in self.inputs.items()}
                batches.append(batch | {name: value[some] for name, value in facts.items()})
        return batches

    def beside(self, more: Sequences) -> Sequences:
        """Return these sequences and others that are as long, each with its source."""
        inputs = {name: torch.cat([self.inputs[name], more.inputs[name]]) for name in self.inputs}
        fold, source = torch.cat([self.fold, more.fold]), torch.cat([self.source, more.source])
        return replace(self, inputs=inputs, fold=fold, source=source)


class OfPair(list):
    """The token ids of a pair of texts, with their ``types``: 0 of the first, 1 of the second."""

    types: Sequence[int] = ()  # where the model reads none


def tokenised(tokenizer: Any, documents: Sequence[str], seq_len: int) -> list[list[int]]:
    """Return the token ids of documents as an encoder reads them, cut after ``seq_len`` tokens."""
    how = {"truncation": True, "max_length": seq_len}
    if not any(isinstance(each, Pair) for each in documents):
        return tokenizer(list(documents), **how)["input_ids"]
    rows = []
    for document in documents:
        found = tokenizer(*getattr(document, "texts", (document,)), **how)
        rows.append(OfPair(found["input_ids"]))
        rows[-1].types = found.get(TYPES, ())
    return rows


def padded(rows: Iterable[Sequence[int]], pad: int | None) -> dict[str, Tensor]:
    """Return token ids padded to the longest row, their mask, and their types if some differ."""
    rows = list(rows)
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad or 0)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = [getattr(row, "types", ()) for row in rows]
    if any(map(any, types)):
        inputs[TYPES] = torch.zeros_like(ids)
        for into, some in zip(inputs[TYPES], types, strict=True):
            into[: len(some)] = torch.tensor(some, dtype=torch.long)
    return inputs


def in_turns(count: int) -> Tensor:
    """Return folds for sequences that share no document with any other."""
    return torch.arange(count) % FOLDS


def split_documents(
    documents: Sequence[str],
    shares: Sequence[int],
    seed: int,
    seq_len: int,
    most: int,
    home: dict[int, int],
) -> tuple[list[list[str]], str]:
    """Split the documents of one source into parts, and say what was done to few documents.

    In an order drawn with ``seed`` each goes to the part that has least of its share, the number
    of sequences wanted, until a part has ``most`` characters, about. Copies go together, by their
    :func:`document_digest`, and pairs with one first text, such as a question, if there are
    several: ``home`` is the part of each digest, those of other sources included. Fewer texts than
    parts are cut into blocks first, see :func:`cut_blocks`.
    """
    firsts = (each.texts[0] if isinstance(each, Pair) else each for each in documents)
    texts = list(map(document_digest, firsts))
    if len(set(texts)) < len(shares):
        texts = list(map(document_digest, documents))
    if (few := len(set(texts))) < len(shares):
        if any(isinstance(document, Pair) for document in documents):
            raise InputError(
                f"calibration: {few} pair(s) of texts are too few for {len(shares)} parts that "
                "share none; give more lines with a text and a text_pair"
            )
        unlike = dict(zip(texts, documents, strict=True)).values()
        parts = cut_blocks("\n\n".join(unlike), len(shares), seq_len, most)
        blocks = sum(map(len, parts))
        return parts, (
            f"A calibration text of {few} document{'s' * (few > 1)} was cut into {blocks} blocks "
            f"of consecutive paragraphs, {blocks // len(shares)} for each of {len(shares)} parts, "
            "with a gap between them: held-out errors are those on the same document. Give more "
            "documents."
        )
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    sizes, parts = [0] * len(shares), [[] for _ in shares]
    for index in order.tolist():
        filled = [size / share for size, share in zip(sizes, shares, strict=True)]
        part = home.setdefault(texts[index], filled.index(min(filled)))
        if sizes[part] < most:
            parts[part].append(documents[index])
        sizes[part] += len(documents[index])
    return parts, ""


def split_files(
    sources: Sequence[Any], shares: Sequence[int], first: Sequence[int], seed: int, *, pooled: bool
) -> list[Part]:
    """Split recordings or pictures, each with its source, into two folds and parts kept apart.

    Each source contributes evenly, or as it comes if they are ``pooled``. ``first`` is the least of
    each part kept apart, which gets that before the rest is shared.
    """
    parts: list[Part] = [[] for _ in shares]
    generator = torch.Generator().manual_seed(seed)
    pools = [
        [(digest, (item, place)) for digest, item in zip(files, files.items, strict=True)]
        for place, files in enumerate(sources)
    ]
    for pool in [[each for some in pools for each in some]] if pooled else pools:
        alike: dict[str, Part] = {}  # copies of a file go to one part
        for digest, item in pool:
            alike.setdefault(digest, []).append(item)
        groups, count = list(alike.values()), 1 if pooled else len(pools)
        order = torch.randperm(len(groups), generator=generator).tolist()
        wanted = [-(-share // count) for share in shares]
        if sum(wanted) > len(pool):  # as many of each part as there are
            wanted = [share * len(pool) // sum(wanted) for share in wanted]
        if any(first):
            few = [-(-each // count) for each in first]
            apart = [max(pair) for pair in zip(few, wanted[FOLDS:], strict=True)]
            most = max(len(pool) - sum(apart), 0) // FOLDS
            wanted = [*(min(share, most) for share in wanted[:FOLDS]), *apart]
        pairs = [*zip(parts, wanted, strict=True)]
        for part, share in reversed(pairs) if any(first) else pairs:
            taken: Part = []
            while order and len(taken) < share:
                taken += groups[order.pop(0)]
            part += taken[:share]
    return parts


def cut_blocks(text: str, parts: int, seq_len: int, most: int) -> list[list[str]]:
    """Cut a text into blocks of consecutive paragraphs, and return them by part, in turns.

    A block begins at a paragraph, line or word. The paragraph before it, or an eighth of a block if
    that is less, belongs to no block, so that no part holds the next sentence of another.
    """
    spans = block_spans(text, parts, seq_len)
    each = max(most * parts // len(spans), 1)
    blocks = [text[start : min(end, start + each)] for start, end in spans]
    return [blocks[part::parts] for part in range(parts)]


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


def _break_after(text: str, at: int, reach: int) -> int:
    """Return where the first paragraph, line or word after ``at`` begins, or ``at``."""
    found = (pattern.search(text, at, at + reach) for pattern in _BREAKS)
    return next((match.end() for match in found if match), at)


def _gap_before(text: str, at: int, reach: int) -> int:
    """Return where the paragraph that ends at ``at`` begins, or what begins within ``reach``."""
    low = max(at - reach, 0)
    for pattern in _BREAKS:
        # The break right before ``at`` is the one that ends the paragraph.
        found = [match.start() for match in pattern.finditer(text, low, at) if match.end() < at]
        if found:
            return found[-1] if pattern is _BREAKS[0] else found[0]
    return low


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


def count_beside(sequences: int, fraction: float) -> int:
    """Return how many sequences make a fraction of all beside that many of text, rounded."""
    return round(sequences * fraction / (1 - fraction))


def of_no_text(input_ids: Tensor) -> Sequences:
    """Return full sequences that come beside those of text, and take turns in going to folds."""
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return Sequences(inputs, in_turns(len(input_ids)), torch.full((len(input_ids),), NO_TEXT))


def seed_of(rows: Iterable[Sequence[int] | Tensor], seed: int) -> int:
    """Return a seed for what comes beside sequences, so that other ones have something else."""
    digest = blake2b(str(seed).encode(), digest_size=7)
    for row in rows:
        digest.update(torch.as_tensor(row).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def fraction_of(asked: float | str, causal: bool, written: bool) -> float:
    """Return the fraction of random tokens: of "auto" a quarter for models that write no text."""
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
    """Return copies of some rows, evenly spread, with random tokens, after the row each is of.

    They are ``fraction`` of all. Special tokens stay; every other one is drawn evenly from those
    below ``vocab_size`` that aren't special. The draw depends on the rows, so that other text has
    other ones beside it.
    """
    count = count_beside(len(rows), fraction)
    if not count:
        return []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    known = sorted({*tokenizer.get_vocab().values()} - special)
    plain = torch.tensor([each for each in known if vocab_size is None or each < vocab_size])
    if not len(plain):
        raise InputError(
            "calibration: random_tokens draws tokens that aren't special, and the tokenizer has "
            "none; give random_tokens=0"
        )
    fixed = torch.tensor(sorted(special), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed_of(rows, seed))
    copies = []
    for step in range(count):
        index = (2 * step + 1) * len(rows) // (2 * count)
        ids = torch.tensor(rows[index])
        drawn = plain[torch.randint(len(plain), ids.shape, generator=generator)]
        copies.append((index, torch.where(torch.isin(ids, fixed), ids, drawn).tolist()))
    return copies
