"""Calibration: run batches through the dense model and collect moments at every site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar_ext.data.batches import FOLDS
from liar_ext.errors import InputError
from liar_ext.models.running import device_of, evaluating
from liar_ext.models.sites import Site, sites
from liar_ext.moments import MomentBank, Moments, Squares

# Of the sums of one pass: OPT-1.3B takes 26 GiB, in two folds of float64.
MEMORY = 32 << 30
Item = TypeVar("Item")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    at: Sequence[Site] | None = None,
    *,
    progress: bool = False,
) -> MomentBank:
    """Collect the moments of every site's consumer input in one pass over ``batches``.

    For each site and each fold, ``G = Σ_t w_t x_t x_tᵀ``, ``s = Σ_t w_t x_t`` and ``n = Σ_t w_t``,
    where ``w_t`` is 0 for padding and 1 otherwise. A task head on top of the model is not run.

    Parameters
    ----------
    model : nn.Module
        A transformers model of a known family (see :func:`liar_ext.register_family`).
    batches : iterable of mapping or Tensor
        Keyword inputs of the model, or ``input_ids`` alone. ``attention_mask`` ``(batch, tokens)``
        says what is padding. ``fold`` ``(batch,)``, 0 or 1, assigns sequences to folds and must
        keep sequences of one document together; without it sequences alternate.
    at : sequence of Site, optional
        Sites to collect; all of the model's by default.
    progress : bool
        Show a progress bar.

    Returns
    -------
    MomentBank
        Float64 sums by site name, ``16 d_in²`` bytes each. A pass ends at the last site.

    Raises
    ------
    InputError
        If a weight is not finite, a batch holds only padding, or a fold gets no token.
    """
    check_finite_weights(model)
    at = at if at is not None else sites(model)
    return _collect_at(model, batches, at, progress=progress)


def _collect_at(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor] | Tensor], at: Sequence[Site], **bar
) -> MomentBank:
    """Return the moments of what the consumers of sites read."""
    taps = [Tap(site.name, site.consumer, site.d_in, lambda args, _: args[0]) for site in at]
    return collect(model, getattr(model, "base_model", model), batches, taps, **bar)


class Passes:
    """The moments of all sites, where they don't fit at once: in groups of sites, a pass each.

    Iterating gives the groups, in order and with their moments at hand as :attr:`bank`; going
    :meth:`back` takes them the other way round, and begins with the moments that are there still.

    Parameters
    ----------
    model, batches, at, progress
        As for :func:`calibrate`.
    memory : int, optional
        Bytes that sums may take at a time, but at least those of one site; by default what
        :func:`room_for_sums` says.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor] | Tensor],
        at: Sequence[Site],
        memory: int | None = None,
        *,
        progress: bool = False,
    ) -> None:
        check_finite_weights(model)
        self.model, self.progress = model, progress
        self.groups = group_sites(at, room_for_sums(model, memory))
        self.batches = batches if len(self.groups) == 1 else list(batches)
        self.bank = MomentBank({})
        self.taken = 0

    def __iter__(self) -> Iterator[Sequence[Site]]:
        return map(self._load, self.groups)

    def back(self) -> Iterator[Sequence[Site]]:
        """Return the groups, last first."""
        return map(self._load, reversed(self.groups))

    def _load(self, group: Sequence[Site]) -> Sequence[Site]:
        if self.bank.keys() != {site.name for site in group}:
            self.bank = MomentBank({})  # its memory is for the next
            self.taken += 1
            title = f"calibrate, pass {self.taken}" if len(self.groups) > 1 else "calibrate"
            self.bank = _collect_at(
                self.model, self.batches, group, progress=self.progress, title=title
            )
        return group


def room_for_sums(model: nn.Module, memory: int | None = None, most: int = MEMORY) -> int:
    """Return the bytes that sums may take: ``memory``, if that is given.

    Else ``most``, or half of what is free on any GPU in use.
    """
    if memory is not None:
        return memory
    devices = {parameter.device for parameter in model.parameters()}
    free = [torch.cuda.mem_get_info(at)[0] for at in devices if at.type == "cuda"]
    return min([most, *(count // 2 for count in free)])


def group_sites(at: Sequence[Site], memory: int) -> list[Sequence[Site]]:
    """Return the groups that :class:`Passes` takes."""
    return split(at, [FOLDS * 8 * site.d_in**2 for site in at], memory)


def split(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[Sequence[Item]]:
    """Return runs of ``items`` whose sizes add up to at most ``limit``, or of one item."""
    starts, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled + size > limit and index > starts[-1]:
            starts.append(index)
            filled = 0
        filled += size
    return [items[a:b] for a, b in zip(starts, [*starts[1:], len(items)], strict=True)]


@dataclass(frozen=True)
class Tap:
    """A tensor to take the moments of.

    Parameters
    ----------
    name : str
        What the bank calls it.
    module : str
        Path of the module that is watched.
    d_in : int
        Number of features.
    take : callable
        Gives the tensor, ``(batch, tokens, d_in)``, from the module's arguments and output.
    first : bool
        Only the first token counts.
    sums : type
        What is summed: moments, or the squares alone.
    """

    name: str
    module: str
    d_in: int
    take: Callable[[tuple, Tensor], Tensor]
    first: bool = False
    sums: type[Moments] | type[Squares] = Moments


@torch.no_grad()
def collect(
    model: nn.Module,
    body: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    taps: Sequence[Tap],
    *,
    progress: bool = False,
    title: str = "calibrate",
) -> MomentBank:
    """Run ``body``, the model or its base model, over ``batches``; return the sums of ``taps``.

    Batches, and what is raised, are as for :func:`calibrate`; ``title`` is of the progress bar. A
    forward pass ends where all taps have got their tensor.
    """
    device = device_of(model)
    bank = MomentBank()
    for tap in taps:
        here = device_of(model.get_submodule(tap.module), device)
        bank.moments[tap.name] = tap.sums.zeros(tap.d_in, device=here)
    current = _Batch()
    sequences = 0
    with _collecting(model, taps, bank, current), evaluating(model):
        for index, batch in enumerate(tqdm(batches, desc=title, disable=not progress)):
            inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
            inputs = {name: value.to(device) for name, value in inputs.items()}
            fold = inputs.pop("fold", None)
            first = next(iter(inputs.values()))
            if fold is None:
                fold = (torch.arange(len(first), device=device) + sequences) % FOLDS
            current.set(fold, inputs.get("attention_mask"), index)
            with suppress(_Collected):
                body(**inputs)
            sequences += len(first)
    if not sequences or any((moments.tokens == 0).any() for moments in bank.values()):
        raise InputError(
            f"calibrate: each of the {FOLDS} folds needs tokens, got {sequences} sequence(s); "
            "give at least 2 sequences"
        )
    tokens = int(next(iter(bank.values())).tokens.sum()) if bank else 0
    bank.source = {
        "model_type": model.config.model_type,
        "sequences": sequences,
        "tokens": tokens,
    }
    return bank


def check_finite_weights(model: nn.Module) -> None:
    """Raise InputError if a parameter of ``model`` is offloaded, or holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"calibrate: weights must be in memory, got {name} on the meta device; load the "
                "model without offloading, on more devices or on the CPU"
            )
        if not torch.isfinite(parameter.detach()).all():
            raise InputError(
                f"calibrate: weights must be finite, got NaN or infinity in {name}; "
                "the checkpoint is damaged or was converted wrongly"
            )


class _Collected(Exception):
    """Raised to leave a forward pass that no tap waits for any more."""


@dataclass
class _Batch:
    """What the hooks need to know of the batch in flight."""

    rows: tuple[Tensor | None, ...] = (None,) * FOLDS  # sequences per fold; None: not one
    whole: int | None = None  # the fold, when all sequences belong to one
    weight: Tensor | None = None  # (batch, tokens) bool; None: every token counts
    seen: set[str] = field(default_factory=set)  # taps that have got their tensor

    def set(self, fold: Tensor, mask: Tensor | None, index: int) -> None:
        if mask is not None and not mask.any():
            raise InputError(f"calibrate: batch {index} holds only padding; leave it out")
        if fold.min() < 0 or fold.max() >= FOLDS:
            raise InputError(f"calibrate: fold must be 0 or 1, got {fold.tolist()}")
        full = mask is None or mask.dim() != 2 or bool(mask.all())
        self.weight = None if full else mask.bool()
        self.whole = int(fold[0]) if bool((fold == fold[0]).all()) else None
        self.seen.clear()
        self.rows = tuple((fold == f).nonzero().flatten() for f in range(FOLDS))


@contextmanager
def _collecting(model: nn.Module, taps: Sequence[Tap], bank: MomentBank, current: _Batch):
    """Feed each tapped tensor to its moments while the context is open."""

    def hook(tap: Tap):
        moments = bank[tap.name]

        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x, weight = tap.take(arguments, output), current.weight
            sequences = sum(map(len, current.rows))
            # OPT flattens sequences and tokens before its MLP; a head may see one token of each.
            if x.dim() == 2:
                x = x.unflatten(0, (sequences, -1))
            weight = None if weight is None else weight.to(x.device)
            if tap.first or x.shape[1] == 1:
                x, weight = x[:, :1], None if weight is None else weight[:, :1]
            if current.whole is not None:
                folds = [(current.whole, x, weight)]
            else:
                folds = [
                    (fold, x[rows], None if weight is None else weight[rows])
                    for fold, rows in enumerate(rows.to(x.device) for rows in current.rows)
                    if len(rows)
                ]
            for fold, part, part_weight in folds:
                flat = None if part_weight is None else part_weight.flatten()
                moments.update(part.flatten(0, -2), fold, flat)
            current.seen.add(tap.name)
            if len(current.seen) == len(taps):
                raise _Collected

        return add

    handles = [model.get_submodule(tap.module).register_forward_hook(hook(tap)) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
