"""Texts: read documents, split them into two folds, cut them into sequences for a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liar_ext.data.batches import FOLDS
from liar_ext.errors import InputError

JSON_LINES = (".jsonl", ".ndjson")


def read_documents(source: str) -> list[str]:
    """Return the documents of a text file, a JSON-lines file, a folder or a dataset.

    A file is one document; each line of a ``.jsonl`` file is one (its field ``text``); a folder
    holds one per file; a dataset of the ``datasets`` library, written ``NAME[:CONFIG[:SPLIT]]``
    (split ``train`` if not given), holds one per row (its column ``text``).

    Raises
    ------
    InputError
        If the source does not exist, is not UTF-8, lacks the field or holds no text.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        documents = [text for file in files for text in _read_file(file)]
    elif path.exists():
        documents = _read_file(path)
    elif path.is_absolute() or source.startswith(".") or path.suffix in (".txt", *JSON_LINES):
        raise InputError(f"text: {source} does not exist; give a text file, a folder or a dataset")
    else:
        documents = _read_dataset(source)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise InputError(f"text: {source} holds no text; give a file with text in it")
    return documents


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text: {path} must be UTF-8, got byte {error.object[error.start]:#04x} at position "
            f"{error.start}; convert it first, e.g. iconv -f latin1 -t utf-8"
        ) from None
    if path.suffix not in JSON_LINES:
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            documents.append(str(json.loads(line)["text"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(
                f'text: {path} line {number} must be a JSON object with a field "text"'
            ) from None
    return documents


def _read_dataset(source: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"text: no file {source}, and dataset names need the package datasets; "
            "pip install 'liar_ext[eval]' or give a text file"
        ) from None
    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds for a name it cannot serve
        raise InputError(f"text: neither a file nor a dataset: {source} ({error})") from error
    if "text" not in rows.column_names:
        raise InputError(
            f"text: dataset {source} must have a column text, got {', '.join(rows.column_names)}"
        )
    return list(rows["text"])


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one length, ready for a model.

    Parameters
    ----------
    input_ids, attention_mask : Tensor
        ``(sequences, seq_len)`` int64.
    fold : Tensor
        ``(sequences,)`` int64: 0 or 1. Sequences of one document share a fold.
    """

    input_ids: Tensor
    attention_mask: Tensor
    fold: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def batches(self, batch_size: int = 4) -> list[dict[str, Tensor]]:
        """Return batches for :func:`liar_ext.calibrate`; no batch mixes the folds."""
        batches = []
        for fold in self.fold.unique():
            for rows in (self.fold == fold).nonzero().flatten().split(batch_size):
                batches.append(
                    {
                        "input_ids": self.input_ids[rows],
                        "attention_mask": self.attention_mask[rows],
                        "fold": self.fold[rows],
                    }
                )
        return batches


def calibration_sequences(
    sources: Sequence[Sequence[str]],
    tokenizer,
    *,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    packed: bool = True,
) -> Sequences:
    """Draw calibration sequences from several texts, in two folds split by document.

    Each source (a list of documents) contributes evenly, as far as it reaches. A source that is a
    single document is cut in two halves, one for each fold.

    Parameters
    ----------
    sources : sequence of sequences of str
        Documents by source, e.g. ``[read_documents(path) for path in paths]``.
    tokenizer
        A Hugging Face tokenizer.
    samples : int
        Sequences to draw, half of them for each fold; all there are if the text holds fewer.
    seq_len : int
        Tokens per sequence.
    seed : int
        Seed of the split and of the draw.
    packed : bool
        True (causal models): documents of a fold are joined and cut into full windows without
        special tokens. False (encoders): one sequence per document, with special tokens, truncated
        and padded.

    Raises
    ------
    InputError
        If a fold gets no sequence.
    """
    if samples < FOLDS or seq_len < 2:
        raise InputError(
            f"calibration: samples and seq_len must be at least 2, got {samples} and {seq_len}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn: list[tuple[list[int], int]] = []
    for fold in range(FOLDS):
        queues = []
        for documents in sources:
            pieces = _fold_documents(documents, fold, seed)
            cut = _packed_windows if packed else _single_sequences
            windows = cut(pieces, tokenizer, seq_len)
            order = torch.randperm(len(windows), generator=generator).tolist()
            queues.append([windows[i] for i in order])
        drawn += [(window, fold) for window in _take_evenly(queues, samples // FOLDS)]
    if {fold for _, fold in drawn} != set(range(FOLDS)):
        characters = sum(len(text) for documents in sources for text in documents)
        raise InputError(
            f"calibration: the text is too short: {characters} characters do not fill one sequence "
            f"of {seq_len} tokens in each of {FOLDS} folds; give more text or a smaller seq_len"
        )
    return _pad(drawn, tokenizer)


def evaluation_sequences(
    documents: Sequence[str], tokenizer, *, seq_len: int = 512, samples: int | None = None
) -> Sequences:
    """Cut text into consecutive windows of ``seq_len`` tokens; ``samples`` takes every n-th.

    Raises
    ------
    InputError
        If the text does not fill one window.
    """
    windows = _packed_windows(documents, tokenizer, seq_len)
    if not windows:
        raise InputError(
            f"evaluation: the text does not fill one window of {seq_len} tokens; "
            "give more text or a smaller seq_len"
        )
    if samples is not None and samples < len(windows):
        stride = len(windows) // samples
        windows = windows[::stride][:samples]
    return _pad([(window, 0) for window in windows], tokenizer)


def _fold_documents(documents: Sequence[str], fold: int, seed: int) -> list[str]:
    """Return the documents of one fold; a lone document is halved at a white space."""
    if len(documents) == 1:
        text = documents[0]
        middle = text.find(" ", len(text) // 2)
        middle = middle if middle >= 0 else len(text) // 2
        return [text[:middle] if fold == 0 else text[middle:]]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    sizes, mine = [0] * FOLDS, []
    for index in order:
        smaller = sizes.index(min(sizes))
        sizes[smaller] += len(documents[index])
        if smaller == fold:
            mine.append(documents[index])
    return mine


def _packed_windows(documents: Sequence[str], tokenizer, seq_len: int) -> list[list[int]]:
    text = "\n\n".join(documents)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [tokens[at : at + seq_len] for at in range(0, len(tokens) - seq_len + 1, seq_len)]


def _single_sequences(documents: Sequence[str], tokenizer, seq_len: int) -> list[list[int]]:
    encoded = tokenizer(list(documents), truncation=True, max_length=seq_len)
    return encoded["input_ids"]


def _take_evenly(queues: list[list[list[int]]], number: int) -> list[list[int]]:
    """Take ``number`` items round-robin, so that no source dominates."""
    longest = max((len(queue) for queue in queues), default=0)
    rounds = (queue[turn] for turn in range(longest) for queue in queues if turn < len(queue))
    return [window for window, _ in zip(rounds, range(number), strict=False)]


def _pad(drawn: list[tuple[list[int], int]], tokenizer) -> Sequences:
    longest = max(len(window) for window, _ in drawn)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(drawn), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (window, _) in enumerate(drawn):
        ids[row, : len(window)] = torch.tensor(window)
        mask[row, : len(window)] = 1
    return Sequences(ids, mask, torch.tensor([fold for _, fold in drawn]))
