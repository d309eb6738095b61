"""Texts: documents are split into two folds and cut into sequences for a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice

import torch
from torch import nn

from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.documents import (
    Documents,
    check_apart,
    check_unchanged,
    read_documents,
    text_digest,
)
from liar_ext.calibration.folds import (
    CHARACTERS,
    NO_TEXT,
    Sequences,
    check_fraction,
    cut_pieces,
    halve,
    random_sequences,
    split_documents,
)
from liar_ext.errors import InputError

__all__ = [
    "Documents",
    "Sequences",
    "calibration_sequences",
    "check_apart",
    "check_seq_len",
    "check_unchanged",
    "document_prefix",
    "evaluation_sequences",
    "read_documents",
    "text_digest",
    "tokenizer_fingerprint",
]

# Characters to tokenise of a source and a fold, at least; and this many for each one needed.
ENOUGH, TIMES = 1 << 22, 16


def calibration_sequences(
    sources: Sequence[Sequence[str]],
    tokenizer,
    *,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    packed: bool = True,
    certify: int = 0,
    judge: int = 0,
    lone: str = "blocks",
    random_tokens: float = 0.0,
    vocab_size: int | None = None,
) -> Sequences:
    """Draw calibration sequences from several texts, in two folds split by document.

    Each source (a list of documents) contributes evenly, as far as it reaches. Documents are drawn
    first, and what is drawn is tokenised: all of a source up to some millions of characters.
    Sequences of random tokens come beside them.

    Parameters
    ----------
    sources : sequence of sequences of str
        Documents by source, e.g. ``[read_documents(path) for path in paths]``.
    tokenizer
        A Hugging Face tokenizer.
    samples : int
        Sequences to draw, half of them for each fold; all there are if the text holds fewer. Of
        documents that aren't packed as many are drawn as make ``samples · seq_len`` tokens.
    seq_len : int
        Tokens per sequence, special ones included.
    seed : int
        Seed of the split and of the draw.
    packed : bool
        True (causal models): documents of a fold are joined and cut into full windows, each of
        which begins as the tokenizer begins a document, with a BOS token or without. False
        (encoders): one sequence per document, with special tokens, truncated and padded; short
        ones count by their tokens, see ``samples``.
    certify, judge : int
        Sequences of documents that no other sequence comes from, returned as
        :attr:`Sequences.certification` and :attr:`Sequences.judging`.
    lone : {"blocks", "halves"}
        A source that is a single document is cut into blocks of paragraphs, which take turns in
        going to the folds, or into two halves, one for each.
    random_tokens : float
        Fraction of all sequences that are of random tokens, in [0, 0.9], beside ``samples``. See
        :func:`liar_ext.calibration.folds.random_sequences`.
    vocab_size : int, optional
        Tokens that the model has embeddings of; by default all of the tokenizer's.

    Raises
    ------
    InputError
        If a number is out of range, or a part gets no sequence.
    """
    check_fraction("calibration", "random_tokens", random_tokens)
    apart = {name: n for name, n in (("certify", certify), ("judge", judge)) if n}
    _check_draw(samples, seq_len, seed, apart, lone)
    generator = torch.Generator().manual_seed(seed)
    shares = [samples // FOLDS] * FOLDS + list(apart.values())
    prefix = document_prefix(tokenizer) if packed else []
    split, notes = [], [note for source in sources for note in getattr(source, "notes", ())]
    for documents in sources:
        if lone == "halves" and len(documents) == 1:
            documents_by_part = [[half] for half in halve(documents[0])]
            note = "A calibration text of one document was cut into two halves, one for each fold."
        else:
            most = max(ENOUGH, TIMES * max(shares) * seq_len * CHARACTERS)
            documents_by_part, note = split_documents(documents, shares, seed, seq_len, most)
        notes += [note] * (note != "")
        if note and not packed:  # an encoder reads the beginning of a document alone
            documents_by_part = [
                [piece for block in part for piece in cut_pieces(block, seq_len * CHARACTERS)]
                for part in documents_by_part
            ]
        split.append(documents_by_part)
    drawn = []
    for part, share in enumerate(shares):
        queues = []
        for documents_by_part in split:
            pieces = documents_by_part[part]
            if packed:
                windows = _packed_windows(pieces, tokenizer, seq_len, prefix)
                order = torch.randperm(len(windows), generator=generator).tolist()
                queues.append([windows[i] for i in order[:share]])
            else:
                order = torch.randperm(len(pieces), generator=generator).tolist()
                chosen = (pieces[i] for i in order)
                queues.append(_single_sequences(chosen, tokenizer, seq_len, share * seq_len))
        drawn.append(_take_evenly(queues, share, None if packed else share * seq_len))
    _check_filled(drawn, sources, seq_len, apart)
    bos = tokenizer.decode(prefix) if prefix else ""
    more = {}
    for (name, asked), part in zip(apart.items(), drawn[FOLDS:], strict=True):
        if len(part) < asked:
            notes.append(f"The text gave {len(part)} of {asked} sequences to {name} with.")
        turns = [index % FOLDS for index in range(len(part))]
        more[name] = _pad([window for window, _ in part], turns, tokenizer, bos)
    folds = [fold for fold in range(FOLDS) for _ in drawn[fold]]
    rows, origins = zip(*(pair for fold in range(FOLDS) for pair in drawn[fold]), strict=True)
    if len(rows) < samples:
        notes.append(f"The calibration text gave {len(rows)} of {samples} sequences.")
    copies = random_sequences(rows, tokenizer, random_tokens, seed, vocab_size)
    folds += [folds[index] for index, _ in copies]
    rows = [*rows, *(row for _, row in copies)]
    origin = torch.tensor([*origins, *len(copies) * [NO_TEXT]])
    apart = more.get("certify"), more.get("judge")
    return _pad(rows, folds, tokenizer, bos, *apart, tuple(notes), source=origin)


def evaluation_sequences(
    documents: Sequence[str],
    tokenizer,
    *,
    seq_len: int = 512,
    samples: int | None = None,
    packed: bool = True,
) -> Sequences:
    """Cut text into consecutive windows of ``seq_len`` tokens; ``samples`` takes every n-th.

    Windows begin as those of :func:`calibration_sequences` do. If a few windows are asked for of
    very much text, every n-th document is read. Not ``packed``, for encoders, each document is a
    sequence, cut after ``seq_len`` tokens, or each piece of such a length of a lone document.

    Raises
    ------
    InputError
        If a number is out of range, or the text does not fill one window.
    """
    if seq_len < 2 or (samples is not None and samples < 1):
        raise InputError(
            "evaluation: seq_len must be at least 2 and samples at least 1, got "
            f"{seq_len} and {samples}"
        )
    notes = tuple(getattr(documents, "notes", ()))
    if not packed:
        if len(documents) == 1:
            documents = cut_pieces(documents[0], seq_len * CHARACTERS)
        if samples is not None:
            documents = documents[:: len(documents) // samples or 1][:samples]
        rows = _single_sequences(iter(documents), tokenizer, seq_len, len(documents) * seq_len)
        return _pad(rows, [0] * len(rows), tokenizer, "", notes=notes)
    if samples is not None:
        most = max(4 * ENOUGH, TIMES * samples * seq_len * CHARACTERS)
        documents = documents[:: -(-sum(map(len, documents)) // most) or 1]
    prefix = document_prefix(tokenizer)
    windows = _packed_windows(documents, tokenizer, seq_len, prefix)
    if not windows:
        raise InputError(
            f"evaluation: the text does not fill one window of {seq_len} tokens; "
            "give more text or a smaller seq_len"
        )
    if samples is not None and samples < len(windows):
        stride = len(windows) // samples
        windows = windows[::stride][:samples]
    bos = tokenizer.decode(prefix) if prefix else ""
    return _pad(windows, [0] * len(windows), tokenizer, bos, notes=notes)


def document_prefix(tokenizer) -> list[int]:
    """Return the special tokens with which the tokenizer begins a document, such as BOS."""
    text = "a"
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(text, verbose=False)["input_ids"]
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at]
    return []


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a digest of a tokenizer: its vocabulary, how a document begins, how a text is cut."""
    text = (
        " The Quick brown\u00a0fox\n\n  jumped 1,234.5 times: na\u00efve caf\u00e9? \u4f60\u597d!\t"
    )
    facts = [
        sorted(tokenizer.get_vocab().items()),
        document_prefix(tokenizer),
        tokenizer(text, verbose=False)["input_ids"],
    ]
    return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def check_seq_len(model: nn.Module, seq_len: int) -> None:
    """Raise InputError if sequences are longer than the positions that a model knows."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    embeddings = [module for name, module in model.named_modules() if "position_emb" in name]
    if any(getattr(module, "padding_idx", None) is not None for module in embeddings):
        positions -= config.pad_token_id + 1  # RoBERTa's and MPNet's tables begin with padding's
    if seq_len > positions:
        raise InputError(
            f"text: {type(model).__name__} has {positions} positions, got seq_len {seq_len}; "
            f"give a seq_len of at most {positions}"
        )


def _check_draw(samples: int, seq_len: int, seed: int, apart: Mapping[str, int], lone: str) -> None:
    """Raise InputError unless sequences can be drawn by these numbers."""
    if samples < FOLDS or seq_len < 2:
        raise InputError(
            f"calibration: samples and seq_len must be at least 2, got {samples} and {seq_len}"
        )
    for name, count in apart.items():
        if count < FOLDS:
            raise InputError(f"calibration: {name} must be 0, or at least {FOLDS}, got {count}")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"calibration: seed must be at least 0 and less than 2^63, got {seed}")
    if lone not in ("blocks", "halves") or (apart and lone == "halves"):
        raise InputError(
            'calibration: lone must be "blocks", or "halves" without certify and judge, got '
            f"{lone!r}"
        )


def _check_filled(
    drawn: Sequence[Sequence],
    sources: Sequence[Sequence[str]],
    seq_len: int,
    apart: Mapping[str, int],
) -> None:
    """Raise InputError unless every part got the sequences that it cannot do without."""
    if all(drawn[:FOLDS]) and all(len(part) >= FOLDS for part in drawn[FOLDS:]):
        return
    characters = sum(len(text) for documents in sources for text in documents)
    parts = " and for ".join([f"{FOLDS} folds", *apart])
    raise InputError(
        f"calibration: the text is too short: {characters} characters do not fill one sequence "
        f"of {seq_len} tokens in each of {parts}; give more text or a smaller seq_len"
    )


def _packed_windows(
    documents: Sequence[str], tokenizer, seq_len: int, prefix: list[int]
) -> list[list[int]]:
    text = "\n\n".join(documents)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = seq_len - len(prefix)
    if step < 1:
        raise InputError(
            f"text: seq_len must be more than the {len(prefix)} special tokens that a document "
            f"begins with, got {seq_len}"
        )
    return [prefix + tokens[at : at + step] for at in range(0, len(tokens) - step + 1, step)]


def _single_sequences(
    documents: Iterator[str], tokenizer, seq_len: int, tokens: int
) -> list[list[int]]:
    """Return a sequence for each document, until they hold that many tokens."""
    rows, left = [], tokens
    while left > 0:
        some = list(islice(documents, -(-left // seq_len)))
        if not some:
            break
        more = tokenizer(some, truncation=True, max_length=seq_len)["input_ids"]
        rows, left = rows + more, left - sum(map(len, more))
    return rows


def _take_evenly(
    queues: list[list[list[int]]], number: int, tokens: int | None = None
) -> list[tuple[list[int], int]]:
    """Take ``number`` items round-robin, or as many as hold ``tokens``, each with its source.

    So no source dominates.
    """
    longest = max((len(queue) for queue in queues), default=0)
    rounds = (
        (queue[turn], source)
        for turn in range(longest)
        for source, queue in enumerate(queues)
        if turn < len(queue)
    )
    if tokens is None:
        return list(islice(rounds, number))
    taken: list[tuple[list[int], int]] = []
    for row, source in rounds:
        if tokens <= 0:
            break
        taken.append((row, source))
        tokens -= len(row)
    return taken


def _pad(rows: Sequence[list[int]], fold: list[int], tokenizer, *more, **facts) -> Sequences:
    """Return sequences padded to the longest."""
    longest = max(len(window) for window in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(rows):
        ids[row, : len(window)] = torch.tensor(window)
        mask[row, : len(window)] = 1
    return Sequences(ids, mask, torch.tensor(fold), *more, **facts)
