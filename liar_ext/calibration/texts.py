"""Texts: documents are split into two folds and cut into sequences for a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate, cycle, islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from liar_ext.calibration.batches import FOLDS, Sequences, in_turns
from liar_ext.calibration.documents import (
    CHARACTERS,
    Pair,
    cut_pieces,
    digests_for,
    split_documents,
)
from liar_ext.calibration.generated import NO_TEXT, document_prefix, random_sequences
from liar_ext.models.plan import check_fraction
from liar_ext.models.running import positions_of, predicts_next_token
from liar_ext.system.errors import InputError

# Characters to tokenise of a source and a fold, at least; and this many for each one needed.
ENOUGH, TIMES = 1 << 22, 16
# Of what encoders read, every so many tokens are in documents joined to whole sequences, and as
# many in pieces of SHORT tokens. docs/quality.md shows what an encoder loses that saw one length.
OTHER_LENGTHS, SHORT = 16, 16
TYPES = "token_type_ids"


@dataclass(frozen=True)
class Text:
    """How calibration sequences are drawn from text.

    Parameters
    ----------
    samples : int
        Sequences to draw, half of them for each fold, or all there are. Of documents that aren't
        packed as many are drawn as make ``samples · seq_len`` tokens.
    seq_len : int
        Tokens per sequence, special ones included. Documents that aren't packed are cut where
        sentence-transformers cuts them, or after ``model_max_length`` of the tokenizer, if that is
        less.
    seed : int
        Seed of the split and of the draw.
    packed : bool
        True (causal models): documents of a fold are joined and cut into full windows, each of
        which begins as the tokenizer begins a document. False (encoders): one sequence per
        document, with special tokens, truncated and padded; up to an eighth of the tokens is in
        sequences of other lengths. A pair of texts is a sequence, too, and in no other length.
    certify, judge : int
        Sequences of documents that no other sequence comes from, returned as
        :attr:`Sequences.certification` and :attr:`Sequences.judging`.
    lone : {"blocks", "halves"}
        A lone document is cut into blocks of paragraphs, by turns for each fold, or in halves.
    random_tokens : float
        Fraction of all sequences that are of random tokens, in [0, 0.9], beside ``samples``.
    vocab_size : int, optional
        Tokens that the model has embeddings of; by default all of the tokenizer's.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    packed: bool = True
    certify: int = 0
    judge: int = 0
    lone: str = "blocks"
    random_tokens: float = 0.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_fraction("calibration", "random_tokens", self.random_tokens)
        numbers = {"samples": self.samples, "seq_len": self.seq_len, **self.apart}
        if min(numbers.values()) < FOLDS:
            said = ", ".join(f"{name} {number}" for name, number in numbers.items())
            raise InputError(
                f"calibration: samples and seq_len must be at least {FOLDS}, and so must certify "
                f"and judge unless they are 0, got {said}"
            )

    @property
    def apart(self) -> dict[str, int]:
        """Numbers of sequences, by purpose, that share no document with the others."""
        return {name: n for name in ("certify", "judge") if (n := getattr(self, name))}


def calibration_sequences(
    sources: Sequence[Sequence[str]], tokenizer, text: Text | None = None, **choices: Any
) -> Sequences:
    """Draw calibration sequences from several texts, in two folds split by document.

    Each source contributes evenly, as far as it reaches. Documents are drawn first, and what is
    drawn is tokenised: all of a source up to some millions of characters.

    Parameters
    ----------
    sources : sequence of sequences of str
        Documents by source, e.g. ``[read_documents(path) for path in paths]``.
    tokenizer
        A Hugging Face tokenizer.
    text : Text, optional
        How to draw; by default 128 sequences of 512 tokens.
    **choices
        Fields of :class:`liar_ext.calibration.texts.Text` that are otherwise: ``samples``, ...

    Raises
    ------
    InputError
        If a number is out of range, or a part gets no sequence.
    """
    if any(isinstance(documents, str) for documents in sources):
        raise InputError(
            "calibration: a source is a list of documents, got text; give a list of sources, such "
            "as [documents]"
        )
    if not callable(tokenizer):
        raise InputError(
            f"calibration: needs the tokenizer of the model, got {tokenizer!r}; "
            "liar_ext.load_model gives it beside the model"
        )
    text = replace(text or Text(), **choices)
    if not text.packed:  # as long as an encoder reads them, and of as many tokens
        longest = longest_read(tokenizer, text.seq_len)
        counts = {"samples": text.samples, **text.apart}
        more = {name: n * text.seq_len // longest for name, n in counts.items()}
        text = replace(text, seq_len=longest, **more)
    shares = [text.samples // FOLDS] * FOLDS + list(text.apart.values())
    prefix = document_prefix(tokenizer) if text.packed else []
    notes = [note for source in sources for note in getattr(source, "notes", ())]
    home: dict[int, int] = {}  # the part of each text, by its digest
    # Last those of so few documents that they are cut: none may be in another text, too.
    digests = [digests_for(documents, len(shares)) for documents in sources]
    few = [len(set(each)) < len(shares) for each in digests]
    split: list[list[list[str]]] = [[]] * len(sources)
    for index in sorted(range(len(sources)), key=few.__getitem__):
        split[index], note = _split(sources[index], digests[index], shares, text, home)
        notes += [note] * (note != "")
    generator, drawn = torch.Generator().manual_seed(text.seed), []
    for part, share in enumerate(shares):
        queues = [_queue(parts[part], tokenizer, share, text, prefix, generator) for parts in split]
        drawn.append(_take_evenly(queues, share * text.seq_len))
    _check_filled(drawn, sources, text)
    bos, more = tokenizer.decode(prefix) if prefix else "", {}
    for (name, asked), part in zip(text.apart.items(), drawn[FOLDS:], strict=True):
        if len(part) < asked:
            notes.append(f"The text gave {len(part)} of {asked} sequences to {name} with.")
        ids = padded([row for row, _ in part], tokenizer.pad_token_id)
        more[name] = Sequences(ids, in_turns(len(part)), bos=bos)
    folds = [fold for fold in range(FOLDS) for _ in drawn[fold]]
    rows, origins = zip(*(pair for part in drawn[:FOLDS] for pair in part), strict=True)
    if len(rows) < text.samples:
        notes.append(f"The calibration text gave {len(rows)} of {text.samples} sequences.")
    copies = random_sequences(rows, tokenizer, text.random_tokens, text.seed, text.vocab_size)
    folds += [folds[index] for index, _ in copies]
    ids = padded([*rows, *(row for _, row in copies)], tokenizer.pad_token_id)
    origin = torch.tensor([*origins, *len(copies) * [NO_TEXT]])
    apart = more.get("certify"), more.get("judge")
    return Sequences(ids, torch.tensor(folds), origin, bos, *apart, tuple(notes))


def evaluation_sequences(
    documents: Sequence[str],
    tokenizer,
    *,
    seq_len: int = 512,
    samples: int | None = None,
    packed: bool = True,
) -> Sequences:
    """Cut text into consecutive windows of ``seq_len`` tokens; ``samples`` takes every n-th.

    Windows begin as those of :func:`calibration_sequences` do. Not ``packed``, for encoders, each
    document is a sequence, cut as those are, or each such piece of a lone document.

    Raises
    ------
    InputError
        If the text does not fill one window.
    """
    notes = tuple(getattr(documents, "notes", ()))
    if packed:
        if samples is not None:  # of very much text every n-th document is enough
            most = max(4 * ENOUGH, TIMES * samples * seq_len * CHARACTERS)
            documents = documents[:: -(-sum(map(len, documents)) // most) or 1]
        prefix = document_prefix(tokenizer)
        rows = _packed_windows(documents, tokenizer, seq_len, prefix)
        if samples is not None:
            rows = rows[:: len(rows) // samples or 1][:samples]
    else:
        seq_len = longest_read(tokenizer, seq_len)
        documents = unpacked(documents, seq_len, samples)
        prefix, most = [], len(documents) * seq_len
        rows = _single_sequences(iter(documents), tokenizer, seq_len, most)
    if not rows:
        raise InputError(
            f"evaluation: the text does not fill one window of {seq_len} tokens; "
            "give more text or a smaller seq_len"
        )
    bos = tokenizer.decode(prefix) if prefix else ""
    ids = padded(rows, tokenizer.pad_token_id)
    return Sequences(ids, torch.zeros(len(rows), dtype=torch.long), bos=bos, notes=notes)


def unpacked(documents: Sequence[str], seq_len: int, samples: int | None) -> Sequence[str]:
    """Return the documents that are a sequence each, or pieces of a lone one: every n-th."""
    if len(documents) == 1 and not isinstance(documents[0], Pair):
        documents = cut_pieces(documents[0], seq_len * CHARACTERS)
    if samples is None:
        return documents
    return documents[:: len(documents) // samples or 1][:samples]


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a digest of a tokenizer: its vocabulary, how a document begins, how a text is cut."""
    text = (
        " The Quick brown\u00a0fox\n\n  jumped 1,234.5 times: na\u00efve caf\u00e9? \u4f60\u597d!\t"
    )
    vocabulary = sorted(tokenizer.get_vocab().items())
    ids = tokenizer(text, verbose=False)["input_ids"]
    facts = json.dumps([vocabulary, document_prefix(tokenizer), ids])
    return blake2b(facts.encode(), digest_size=16).hexdigest()


def check_seq_len(model: nn.Module, tokenizer, seq_len: int) -> None:
    """Raise InputError if sequences are longer than the positions that a model knows."""
    positions = positions_of(model)
    seq_len = seq_len if predicts_next_token(model) else longest_read(tokenizer, seq_len)
    if positions is not None and seq_len > positions:
        raise InputError(
            f"text: {type(model).__name__} has {positions} positions, got seq_len {seq_len}; "
            f"give a seq_len of at most {positions}"
        )


def longest_read(tokenizer, seq_len: int) -> int:
    """Return the tokens of the longest sequence that an encoder reads, at most ``seq_len``."""
    longest = getattr(tokenizer, "model_max_length", seq_len)
    longest = getattr(tokenizer, "liar_longest", longest)  # of sentence-transformers
    if not isinstance(longest, int | float) or not longest >= 2:
        raise InputError(
            f"text: the tokenizer cuts texts after {str(longest)[:80]!r} tokens; set its "
            "model_max_length, or max_seq_length of sentence-transformers, to 2 or more"
        )
    return int(min(longest, seq_len))


def _split(
    documents: Sequence[str],
    digests: Sequence[int],
    shares: Sequence[int],
    text: Text,
    home: dict[int, int],
) -> tuple[list[list[str]], str]:
    if text.lone == "halves" and len(documents) == 1:
        whole = documents[0]
        middle = whole.find(" ", len(whole) // 2)
        middle = middle if middle >= 0 else len(whole) // 2
        parts = [[whole[:middle]], [whole[middle:]]]
        note = "A calibration text of one document was cut into two halves, one for each fold."
    else:
        most = max(ENOUGH, TIMES * max(shares) * text.seq_len * CHARACTERS)
        parts, note = split_documents(
            documents, digests, shares, text.seed, text.seq_len, most, home
        )
    if note and not text.packed:  # an encoder reads the beginning of a document alone
        size = text.seq_len * CHARACTERS
        parts = [[piece for block in part for piece in cut_pieces(block, size)] for part in parts]
    return parts, note


def _queue(
    pieces: Sequence[str],
    tokenizer,
    share: int,
    text: Text,
    prefix: list[int],
    generator: torch.Generator,
) -> list[list[int]]:
    """Return token rows of one source for one part, at random: enough for all of the part."""
    pool = _packed_windows(pieces, tokenizer, text.seq_len, prefix) if text.packed else pieces
    order = torch.randperm(len(pool), generator=generator).tolist()
    if text.packed:
        return [pool[i] for i in order[:share]]
    chosen, tokens = (pieces[i] for i in order), share * text.seq_len
    size, rows = sum(map(len, pieces)), []
    reach = min(tokens, size // CHARACTERS)
    some = round(reach / OTHER_LENGTHS / text.seq_len) * text.seq_len
    if some and not any(isinstance(piece, Pair) for piece in pieces):
        mean = size / len(pieces) / CHARACTERS  # tokens, about
        if mean < text.seq_len:
            long = _joined(chosen, text.seq_len)
            rows += _single_sequences(long, tokenizer, text.seq_len, some)
        if mean > 2 * SHORT:
            others = islice(cycle(reversed(order)), some)  # not those that are read next
            short = _pieces(pieces[i][: text.seq_len * CHARACTERS] for i in others)
            rows += _single_sequences(short, tokenizer, min(SHORT, text.seq_len), some)
    rows += _single_sequences(chosen, tokenizer, text.seq_len, tokens - sum(map(len, rows)))
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)] if some else rows


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    """Yield one piece of SHORT tokens of each document, from another place in each."""
    for number, document in enumerate(documents):
        if cut := cut_pieces(document, SHORT * CHARACTERS):  # nothing of a blank one
            yield cut[number % len(cut)]


def _joined(documents: Iterator[str], seq_len: int) -> Iterator[str]:
    """Yield documents one after another in texts of ``seq_len`` tokens, which are cut then."""
    for document in documents:
        while len(document) < 2 * seq_len * CHARACTERS and (more := next(documents, None)):
            document = f"{document}\n{more}"
        yield document


def _packed_windows(
    documents: Sequence[str], tokenizer, seq_len: int, prefix: list[int]
) -> list[list[int]]:
    step = seq_len - len(prefix)
    if step < 1:
        raise InputError(f"text: seq_len must exceed {len(prefix)} special tokens, got {seq_len}")
    joined = "\n\n".join(documents)
    tokens = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    return [prefix + tokens[at : at + step] for at in range(0, len(tokens) - step + 1, step)]


def _single_sequences(
    documents: Iterator[str], tokenizer, seq_len: int, tokens: int
) -> list[list[int]]:
    rows, left = [], tokens
    while left > 0 and (some := list(islice(documents, -(-left // seq_len)))):
        more = tokenised(tokenizer, some, seq_len)
        rows, left = rows + more, left - sum(map(len, more))
    return rows


def _take_evenly(queues: list[list[list[int]]], tokens: int) -> list[tuple[list[int], int]]:
    """Take rows from each source in turn until they hold ``tokens``, each with its source."""
    turns = (row for turn in zip_longest(*queues) for row in enumerate(turn))
    rounds = [(row, source) for source, row in turns if row is not None]
    before = accumulate((len(row) for row, _ in rounds), initial=0)
    return [pair for pair, so_far in zip(rounds, before, strict=False) if so_far < tokens]


def _check_filled(drawn: Sequence[Sequence], sources: Sequence[Sequence[str]], text: Text) -> None:
    if all(drawn[:FOLDS]) and all(len(part) >= FOLDS for part in drawn[FOLDS:]):
        return
    sizes = [len(each) for documents in sources for each in documents]
    parts = " and for ".join([f"{FOLDS} folds", *text.apart])
    alone = ", as each goes to one part alone" if len(sizes) > 1 else ""
    raise InputError(
        f"calibration: the text is too short: {sum(sizes)} characters in {len(sizes)} document(s) "
        f"do not fill one sequence of {text.seq_len} tokens in each of {parts}{alone}; give more "
        "text or a smaller seq_len"
    )


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


def padded(rows: Sequence[Sequence[int]], pad: int | None) -> dict[str, Tensor]:
    """Return token ids padded to the longest row, their mask, and their types if some differ."""

    def stacked(some: Iterable[Sequence[int]], value: int = 0) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in some]
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    ones = ([1] * len(row) for row in rows)
    inputs = {"input_ids": stacked(rows, pad or 0), "attention_mask": stacked(ones)}
    types = [getattr(row, "types", ()) or [0] * len(row) for row in rows]
    if any(map(any, types)):
        inputs[TYPES] = stacked(types)
    return inputs
