"""Batches: what a model is run over, in one form, and the sequences that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from liar_ext.models.running import DECODER_IDS, DECODER_MASK, complete_inputs
from liar_ext.system.errors import InputError

FOLDS = 2

# Sensitivities scatter more with the sequences that tokens come from than with the tokens compared:
# many beginnings of sequences, for the price of a few whole ones.
PROBE_SEQUENCES, PROBE_TOKENS = 16, 2048
PROBE_LENGTH = PROBE_TOKENS // PROBE_SEQUENCES
PROBE_ROWS = 4  # that are run at a time
# Of a text with fewer tokens fewer are taken, half at least: sums over it scatter as well.
PROBED_TEXT = 8 * PROBE_TOKENS
# What a head computes a loss from; only who asks for a loss gets it.
LABELS = ("labels", "start_positions", "end_positions")
# What is known of sequences, and no input of a model.
FACTS = ("fold", "source", "weight")
# Inputs of diffusion transformers that have no row for each sequence, or are lists.
WHOLE = ("img_ids", "txt_ids", "img_shapes")


@dataclass(frozen=True)
class Batch:
    """One batch: what the model takes, and what is known of its sequences."""

    inputs: dict[str, Tensor]  # of the model's forward, without folds and labels
    fold: Tensor  # (sequences,) int64: 0 or 1
    mask: Tensor | None = None  # (sequences, tokens) bool, False for padding; None if there is none
    labels: dict[str, Tensor] = field(default_factory=dict)  # those of LABELS that it has
    # (sequences,) int64: which of several texts each is of, -1 of none; all of one unless given.
    source: Tensor | None = None
    # (sequences,) what each of their tokens counts in the sums; 1 unless given.
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.fold)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**tree_map_only(Tensor, change, vars(self)))

    def to(self, device: torch.device | None) -> Batch:
        """Return the batch on a device."""
        return self._with_each(lambda value: value.to(device))

    def select(self, rows: Tensor | Sequence[int]) -> Batch:
        """Return some of the sequences; a lone one whole, whose inputs may have other rows."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        if len(self) == 1 and rows.tolist() == [0]:  # patches of its image, for example
            return self
        whole = {name: value for name, value in self.inputs.items() if name in WHOLE}
        some = replace(self, inputs={n: v for n, v in self.inputs.items() if n not in whole})
        some = some._with_each(lambda value: value[rows.to(value.device)])
        whole |= {n: [v[row] for row in rows] for n, v in whole.items() if isinstance(v, list)}
        return replace(some, inputs={name: {**some.inputs, **whole}[name] for name in self.inputs})

    def mask_of(self, name: str) -> Tensor | None:
        """Return the mask that an input of this name is, in the form of :attr:`mask`."""
        return self.mask if name == "attention_mask" else _padding(self.inputs.get(name))

    @property
    def output_mask(self) -> Tensor | None:
        """The mask of what a model puts out for the batch: of its decoder, if it has one."""
        return self.mask_of(DECODER_MASK) if DECODER_IDS in self.inputs else self.mask

    def counting(self, tokens: int, device: torch.device, name: str = "attention_mask") -> Tensor:
        """Return which of all ``tokens`` are not padding by a mask, ``(tokens,)`` bool."""
        mask = self.mask_of(name)
        if mask is None:
            return torch.ones(tokens, dtype=torch.bool, device=device)
        return mask.flatten().to(device)

    def weighing(self, used: Tensor) -> Tensor:
        """Return ``used``, ``(sequences, tokens)``, times what tokens of each sequence count."""
        if self.weight is None:
            return used
        return used * self.weight.to(used.device, torch.float64)[:, None]


Batches = Iterable[Mapping[str, Tensor] | Tensor | Batch]


def read_batches(batches: Batches) -> Iterator[Batch]:
    """Yield batches in their one form; sequences without a ``fold`` alternate from 0.

    A batch is a mapping of keyword arguments of a model, or ``input_ids`` alone. Its
    ``attention_mask`` ``(batch, tokens)`` is zero where a token is padding. One of more dimensions
    says which tokens see which, and all of them count. ``fold``, ``source`` and ``weight``
    ``(batch,)`` are as in :class:`Batch`. Anything else raises InputError.
    """
    check_batches(batches)
    sequences = 0
    for batch in batches:
        read = read_batch(batch, sequences)
        sequences += len(read)
        yield read


def check_batches(batches: object) -> None:
    """Raise InputError for a lone tensor, and for what can't be gone through."""
    listed = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, Tensor) or not listed:
        raise InputError(
            f"batches: must be a list of batches, got {type(batches).__name__}; put a batch into a "
            "list, or call batches() of calibration sequences"
        )


def kept_batches(batches: Batches | None) -> Batches | None:
    """Return batches that are the same when read again: a list, as of an iterator or a loader."""
    if batches is None or isinstance(batches, Sequence):
        return batches
    check_batches(batches)
    return list(batches)


def completed(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch with what the decoder reads where an encoder is there, too."""
    return replace(batch, inputs=complete_inputs(model, batch.inputs, batch.labels))


def one_of_each(batches: Iterable[Batch]) -> list[Batch]:
    """Return a sequence for each set of inputs that there is, such as with an image and without."""
    found: dict[frozenset[str], Batch] = {}
    for batch in batches:
        found.setdefault(frozenset(batch.inputs), batch)
    return [batch.select([0]) for batch in found.values()]


def read_batch(batch: Mapping[str, Tensor] | Tensor | Batch, sequences: int = 0) -> Batch:
    """Return one batch in that form, after ``sequences`` others."""
    if isinstance(batch, Batch):
        return batch
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    for name, value in inputs.items():
        fits = isinstance(value, Tensor) and value.dim()
        if not fits and not (name in WHOLE and isinstance(value, list)):
            raise InputError(
                "batches: a batch is input_ids, or a mapping of names to tensors of one row per "
                f"sequence, got {name} of type {type(value).__name__}; "
                "calibration_sequences([texts], tokenizer).batches() makes them from text"
            )
    for name in inputs.keys() & {"input_ids", DECODER_IDS}:
        ids = inputs[name]
        integral = ids.dtype in (torch.int32, torch.int64)  # which embeddings take
        if not integral or ids.dim() != 2 or not ids.numel():
            raise InputError(
                f"batches: {name} must be int32 or int64 of shape (sequences, tokens), got "
                f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
            )
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if mask is not None and mask.dim() <= 2:  # of padding
        shape = mask.shape if ids is None else ids.shape
        if mask.shape != shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(
                "batches: attention_mask must be 1 for tokens that count and else 0, of shape "
                f"{tuple(shape)} as input_ids, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    fold, source, weight = (inputs.pop(name, None) for name in FACTS)
    labels = {name: inputs.pop(name) for name in LABELS if name in inputs}
    first = next((value for name, value in inputs.items() if name not in WHOLE), None)
    if first is None:
        raise InputError("batches: a batch holds no input of the model; give input_ids, say")
    if fold is None:
        fold = (torch.arange(len(first), device=first.device) + sequences) % FOLDS
    rules = {"fold must be 0 or 1": (fold, (fold == 0) | (fold == 1))}
    if source is not None:
        rules["source must be a whole number"] = source, source % 1 == 0
    if weight is not None:
        rules["weight must be a finite number above 0"] = weight, weight.isfinite() & (weight > 0)
    for rule, (value, holds) in rules.items():
        if value.shape != (len(first),) or not bool(holds.all()):
            raise InputError(
                f"batches: {rule} for each of {len(first)} sequences, got {value.tolist()}"
            )
    return Batch(inputs, fold.long(), _padding(mask), labels, source, weight)


def _padding(mask: Tensor | None) -> Tensor | None:
    """Return which tokens are real, ``(sequences, tokens)`` bool; None if all are."""
    full = mask is None or mask.dim() != 2 or bool(mask.all())
    return None if full else mask.bool()


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
        their own are a batch each.
        """
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


def in_turns(count: int) -> Tensor:
    """Return folds for sequences that share no document with any other."""
    return torch.arange(count) % FOLDS


def probe_batches(
    batches: Batches, *, every: bool = False, rows: int = PROBE_ROWS
) -> list[dict[str, Tensor]]:
    """Return the beginnings of a few sequences, evenly spread, equally many of each source.

    They have some ``PROBE_TOKENS`` tokens; of little text fewer in proportion, but half at least.
    Those without padding are put together, ``rows`` at most. With ``every`` all are as of one
    source, none are fewer, and no batch has more than ``rows``.
    """
    given = list(read_batches(batches))
    given = [replace(batch, source=None) for batch in given] if every else _of_text(given)
    read = [_beginning(batch) for batch in given]
    places: dict[int, list[tuple[int, int]]] = {}
    for index, batch in enumerate(read):
        for row, source in enumerate(_sources(batch)):
            places.setdefault(source, []).append((index, row))
    text, tokens = (sum(map(count_tokens, some)) for some in (given, read))
    count = count_probes(sum(map(len, read)), tokens, PROBED_TEXT if every else text)
    share = -(-count // max(len(places), 1))
    chosen: dict[int, list[int]] = {}
    for found in places.values():
        taken = min(share, len(found))
        for step in range(taken):
            index, row = found[(2 * step + 1) * len(found) // (2 * taken)]
            chosen.setdefault(index, []).append(row)
    most = rows if every else count
    parts = [
        read[index].select(taken[first : first + most])
        for index, taken in sorted(chosen.items())
        for first in range(0, len(taken), most)
    ]
    return _together(parts, rows)


def count_probes(sequences: int, tokens: int, text: int) -> int:
    """Return how many sequences of ``text`` tokens, ``tokens`` in beginnings, to take at most."""
    most = max(PROBE_SEQUENCES, PROBE_TOKENS * sequences / max(tokens, 1))
    return math.ceil(most * min(1.0, max(0.5, text / PROBED_TEXT)))


def _sources(batch: Batch) -> list[int]:
    return [0] * len(batch) if batch.source is None else batch.source.tolist()


def _of_text(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return batches without sequences of no text; as they are if there is none of text."""
    kept = []
    for batch in batches:
        rows = [row for row, source in enumerate(_sources(batch)) if source >= 0]
        if rows:
            kept.append(batch if len(rows) == len(batch) else batch.select(rows))
    return kept or batches


def _beginning(batch: Batch) -> Batch:
    """Return the first tokens of sequences of text; what isn't text, or is padded there, whole."""
    shapes = {getattr(value, "shape", ()) for value in batch.inputs.values()}
    text = "input_ids" in batch.inputs and len(shapes) == 1 and len(min(shapes)) == 2
    if not text or (batch.mask is not None and not bool(batch.mask[:, 0].all())):
        return batch
    inputs = {name: value[:, :PROBE_LENGTH] for name, value in batch.inputs.items()}
    mask = None if batch.mask is None else batch.mask[:, :PROBE_LENGTH]
    return replace(batch, inputs=inputs, mask=mask)


def _together(batches: Sequence[Batch], rows: int) -> list[dict[str, Tensor]]:
    """Return the inputs of batches, with neighbours without padding of one width in one batch."""
    joined: list[dict[str, Tensor]] = []
    plain = False  # whether the last of them takes more
    for batch in batches:
        inputs, last = batch.inputs, joined[-1] if joined else {}
        alike = inputs.keys() == last.keys() and not any(name in WHOLE for name in inputs)
        fits = alike and all(
            value.shape[1:] == last[name].shape[1:] and len(value) + len(last[name]) <= rows
            for name, value in inputs.items()
        )
        if plain and fits and batch.mask is None:
            joined[-1] = {name: torch.cat([last[name], value]) for name, value in inputs.items()}
        else:
            joined.append(inputs)
        plain = batch.mask is None
    return joined


def count_tokens(batch: Batch) -> int:
    """Return the tokens of a batch that are not padding; an image counts as a long sequence."""
    if batch.mask is not None:
        return int(batch.mask.sum())
    ids = batch.inputs.get("input_ids")
    return len(batch) * PROBE_LENGTH if ids is None else ids.numel()


def timestep_weights(
    timestep: Tensor, *, last: float = 1000.0, steps: int = 25, low: float = 0.8, high: float = 1.2
) -> Tensor:
    """Return the weights of samples by their timesteps, for the ``weight`` of a batch.

    The noisier a sample is, the more it counts, as errors of early denoising steps add up::

        w = low + (high - low) · ln(1 + (steps - 1) · timestep / last) / ln(steps)

    Of ``steps`` evenly spread timesteps these are the weights of OBS-Diff, which decrease as the
    logarithm of the steps that are left.

    Parameters
    ----------
    timestep : Tensor
        ``(batch,)``, as the model takes it: 0 is no noise, ``last`` noise alone.
    last : float
        1000 for DiT and SD3, 1 for Flux and Qwen-Image.
    steps : int
        Denoising steps of the pipeline that the model is for, 2 at least.
    low, high : float
        Weights of the last step and of the first.

    Returns
    -------
    Tensor
        ``(batch,)`` float64.

    Raises
    ------
    InputError
        If a timestep isn't in [0, last].

    Notes
    -----
    Source: OBS-Diff (arXiv 2510.06751), logarithmic-decrease weighting, with its defaults.
    """
    part = timestep.double() / last
    if not bool(((part >= 0) & (part <= 1)).all()):
        raise InputError(
            f"timestep_weights: timesteps must be in [0, {last:g}], got {timestep.tolist()}; give "
            "last=1 for Flux and Qwen-Image, 1000 for DiT and SD3"
        )
    return low + (high - low) * torch.log1p((steps - 1) * part) / math.log(steps)
