"""Calibration: run batches through the dense model and collect moments at every site."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import (
    FOLDS,
    Batch,
    Batches,
    check_batches,
    completed,
    read_batches,
)
from liar_ext.calibration.saved_sums import SavedSums, Seen, added, fingerprint_of, group_sites
from liar_ext.calibration.taps import (
    Ended,
    InFlight,
    Moments,
    Squares,
    Tap,
    adding,
    all_finite,
    check_finite,
    is_relative,
    tap_at,
    watched,
)
from liar_ext.models.registry import config_digest, type_of
from liar_ext.models.running import body_of, device_of, evaluating
from liar_ext.models.sites import Site, sites
from liar_ext.system import distributed
from liar_ext.system.checkpoint_store import Checkpoint, opened
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar, showing_bars, spare


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Batches,
    at: Sequence[Site] | None = None,
    *,
    keep_text: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool = False,
) -> MomentBank:
    """Collect the moments of every site's consumer input in one pass over ``batches``.

    For each site and each fold, ``G = Σ_t w_t x_t x_tᵀ``, ``s = Σ_t w_t x_t`` and ``n = Σ_t w_t``,
    where ``w_t`` is 0 for padding and 1 otherwise, or where a norm reads the output what
    :func:`liar_ext.calibration.taps.relative_weights` says; times the ``weight`` of the sequence,
    if batches have one. An expert has sums over the tokens that
    the router sends there, with ``w_t`` times the square of the weight that their output gets. A
    task head on top of the model is not run. Ranks that have met (:mod:`liar_ext.distributed`) call
    this with the same model and batches, and each runs its share of them.

    Parameters
    ----------
    model : nn.Module
        A transformers model of a known family (see :func:`liar_ext.register_family`).
    batches : iterable of mapping or Tensor
        Keyword inputs of the model, or ``input_ids`` alone. ``attention_mask`` ``(batch, tokens)``
        says what is padding. ``fold`` ``(batch,)``, 0 or 1, assigns sequences to folds and must
        keep sequences of one document together; without it sequences alternate. ``weight``
        ``(batch,)``, such as :func:`liar_ext.timestep_weights`, says what their tokens count.
    at : sequence of Site, optional
        Sites to collect; all of the model's by default.
    keep_text : bool
        Keep the batches in the bank and its file, where they are token ids alone.
    checkpoint : path or Checkpoint, optional
        A folder to save the sums so far in, and to go on from if it has some, of the same model
        and batches, to the same bits. It stays when all is done.
    progress : bool
        Show a progress bar.

    Returns
    -------
    MomentBank
        Float64 sums by site name, ``16 d_in²`` bytes each. A pass ends at the last site.

    Raises
    ------
    InputError
        If a weight or a sum is not finite, a batch holds only padding, or a fold gets no token;
        an expert may get none. If the checkpoint is of something else.
    """
    check_batches(batches)
    at = at if at is not None else sites(model)
    check_finite_weights(model)
    with opened(checkpoint) as room:
        saved = SavedSums(room, of=len(batches) if isinstance(batches, Sized) else None)
        taps = [tap_at(model, site) for site in at]
        with showing_bars(progress):
            bank = collect(model, batches, taps, keep_text=keep_text, saved=saved)
    facts = ("unit", "units", "width", "groups")
    bank.source["sites"] = {site.name: {n: getattr(site, n) for n in facts} for site in at}
    return bank


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Batches,
    taps: Sequence[Tap],
    *,
    keep_text: bool = False,
    saved: SavedSums | None = None,
    title: str = "calibrate",
) -> MomentBank:
    """Run a model over ``batches``, without its head if it can; return the sums of ``taps``.

    A forward pass ends where all taps have got their tensor. Sums go on where ``saved`` has them.
    Batches are split round robin among ranks; in the end each has the sums over all of them.
    """
    count, seen, saved = distributed.world_size(), Seen(keep_text), saved or SavedSums(None)
    base = body_of(model)
    inside = set(base.modules())
    body = base if all(model.get_submodule(tap.module) in inside for tap in taps) else model
    # A module that repeats has more to come, whatever has run.
    ends = sum(len(t.all) for t in taps) if not any(t.repeats for t in taps) else math.inf
    facts = _facts_of(model, taps)

    def so_far() -> tuple[Mapping[str, Moments], dict[str, object]]:
        sums = moments if count == 1 else _added(deepcopy(moments))
        return sums, facts | seen.facts(*counted(current))

    # Before the hooks: the model may write the last batches when their number is asked for.
    bar = Bar(batches, desc=title)
    with evaluating(model), summing(model, taps, ends) as (moments, current):
        saved.restore(moments, facts)
        if distributed.is_first():
            current.tokens = saved.facts.get("tokens", 0)
            current.routed = saved.facts.get("routed", {})
        spare(title, saved.done)
        for index, batch in enumerate(read_batches(bar)):
            check_not_padding(index, batch)
            seen.add(batch)
            if index >= saved.done:
                if index % count == distributed.rank():
                    batch = completed(model, batch).to(device_of(model))
                    current.set(batch)
                    with suppress(Ended):
                        body(**batch.inputs)
                    current.tokens += current.counted
                if seen.batches % count == 0:
                    saved.save(seen.batches, so_far)
            elif seen.batches == saved.done:
                saved.check(seen.batches, seen.digest.hexdigest())
        if seen.batches < saved.done:
            saved.check(seen.batches, seen.digest.hexdigest())
        elif seen.batches > saved.done:
            saved.save(seen.batches, so_far, now=True)
        _check_alike(facts["model"] + facts["config"], seen.digest.hexdigest())
    tokens, routed = counted(current)
    check_sums(moments, len(seen.sequences), routed)
    # A site that sees all tokens, and counts each as one, says how many there are.
    weighed = {*facts.get("relative", ()), *routed}
    plain = [sums for name, sums in moments.items() if name not in weighed and not current.weighted]
    facts |= seen.facts(int(plain[0].tokens.sum()) if plain else tokens, routed)
    return MomentBank(moments, facts, seen.text, torch.tensor(seen.sequences))


def _facts_of(model: nn.Module, taps: Sequence[Tap] = ()) -> dict[str, object]:
    relative = sorted(tap.name for tap in taps if tap.relative)
    return {
        "model_type": type_of(model),
        "model": fingerprint_of(model.state_dict().items()),
        "config": config_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"relative": relative} if relative else {}),
    }


class Passes:
    """The moments of all sites, in groups that fit into memory at once: a pass for each.

    Iterating gives the groups with their moments at hand as :attr:`bank`; :meth:`back` gives them
    the other way round, and begins with the moments that are there still. Sums may take ``room``
    bytes at a time. ``summed`` are the numbers of the groups that took a pass.
    """

    probes: Any = None  # what is measured on the way, see :class:`ProbeStreams`

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        at: Sequence[Site],
        room: int,
        *,
        bank: MomentBank | None = None,
        saved: Checkpoint | None = None,
    ) -> None:
        check_finite_weights(model)
        self.model, self.groups = model, group_sites(at, room)
        once = len(self.groups) == 1 and saved is None
        self.batches = batches if once else list(batches)
        self.bank = MomentBank({}) if bank is None else bank
        self.saved, self.summed = saved, []

    def restore(self, found: Mapping[str, dict]) -> None:
        """Go on where a checkpoint ends; here each group does so by itself."""

    def finish(self, found: Mapping[str, dict]) -> None:
        """Save what is known of a group beside its sums: nothing here."""

    def __iter__(self) -> Iterator[Sequence[Site]]:
        return map(self._load, range(len(self.groups)))

    def back(self) -> Iterator[Sequence[Site]]:
        """Return the groups, last first."""
        return map(self._load, reversed(range(len(self.groups))))

    def _load(self, number: int) -> Sequence[Site]:
        group = self.groups[number]
        if not all(site.name in self.bank for site in group):
            self.bank = MomentBank({})  # its memory is for the next
            if self.saved is None or number not in self.summed:
                self.summed.append(number)
            title, part = "calibrate", 0
            if len(self.groups) > 1:
                title, part = f"calibrate, pass {len(self.summed)}", number + 1
            of = None if self.saved is None else len(self.batches)
            saved = SavedSums(self.saved, of, part)
            taps = [tap_at(self.model, site) for site in group]
            self.bank = collect(self.model, self.batches, taps, title=title, saved=saved)
        return group


def check_not_padding(index: int, batch: Batch, operation: str = "calibrate") -> None:
    """Raise InputError if a batch holds only padding."""
    if batch.mask is not None and not batch.mask.any():
        raise InputError(f"{operation}: batch {index} holds only padding; leave it out")


@contextmanager
def summing(
    model: nn.Module, taps: Sequence[Tap], ends: float = math.inf
) -> Iterator[tuple[dict[str, Moments | Squares], InFlight]]:
    """Give the sums of taps, and the batch that adds to them; a run ends after ``ends`` taps."""
    moments, current = {}, InFlight()
    with ExitStack() as stack:
        for tap in taps:
            module = model.get_submodule(tap.module)
            sums = tap.sums.zeros(tap.d_in, device=device_of(module, device_of(model)))
            moments[tap.name] = sums
            for each in tap.all:
                add = adding(each, sums, current, ends)
                stack.enter_context(watched(model.get_submodule(each.module), add))
        yield moments, current
    _added(moments)


def _added(moments: dict[str, Moments | Squares]) -> dict[str, Moments | Squares]:
    for sums in moments.values():
        distributed.all_reduce(*vars(sums).values())
    return moments


def counted(current: InFlight) -> tuple[int, dict[str, list[int]]]:
    """Return what all ranks have counted: tokens, and those of each fold by the expert's name."""
    shares = distributed.gather((current.tokens, current.routed))
    return sum(tokens for tokens, _ in shares), added(routed for _, routed in shares)


def _check_alike(*digests: str) -> None:
    first, *others = distributed.gather(digests)
    for rank, each in enumerate(others, 1):
        for what, own, other in zip(("model", "text"), first, each, strict=True):
            if own != other:
                raise InputError(
                    f"calibrate: every rank must have the same {what}, and that of rank {rank} is "
                    "other than that of rank 0; give all the same files, and one kind of device"
                )


def check_sums(
    bank: Mapping[str, Moments | Squares], sequences: int, routed: Collection[str] = ()
) -> None:
    """Raise InputError unless sums are finite, and folds have tokens, but of ``routed`` sites."""
    every = {name: sums for name, sums in bank.items() if name not in routed}
    empty = [name for name, sums in every.items() if (sums.tokens == 0).any()]
    if not sequences or empty:
        found, hint = f"{sequences} sequence(s)", f"give at least {FOLDS} sequences"
        if dropped := [name for name in empty if every[name].count[:, 1].any()]:
            found += f", and at {dropped[0]} tokens with values that are not finite or too large"
            hint = "load the model in a wider dtype"
        raise InputError(f"calibrate: each of the {FOLDS} folds needs tokens, got {found}; {hint}")
    for name, sums in bank.items():
        check_finite(sums.total, *([sums.gram] if isinstance(sums, Moments) else []), at=name)


def check_bank_is_of(bank: MomentBank, model: nn.Module, at: Sequence[Site]) -> None:
    """Raise InputError unless a bank holds the moments of ``at``, sites of this very model."""
    missing = [s.name for s in at if s.name not in bank or bank[s.name].d_in != s.d_in]
    if missing:
        raise InputError(
            f"calibrate: the bank must hold every site, with its features; {missing[0]} is "
            "missing or of another size; calibrate the model that is pruned, without keep_hidden"
        )
    here = _facts_of(model)
    there, relative = here | bank.source, set(bank.source.get("relative", ()))
    alike = {
        f"of the model in {there['dtype']}, got {here['dtype']}": there["dtype"] == here["dtype"],
        "of other weights": there["model"] == here["model"],
        "of a model with another config, such as another activation": (
            there["config"] == here["config"]
        ),
        "without weights for tokens where a norm reads the output": all(
            is_relative(site) == (site.name in relative) for site in at
        ),
    }
    for what, holds in alike.items():
        if not holds:
            raise InputError(
                f"calibrate: the bank is {what}; calibrate the model that is pruned, as it is "
                "loaded and without keep_hidden"
            )


def check_finite_weights(model: nn.Module) -> None:
    """Raise InputError if a parameter of ``model`` is offloaded, or holds a NaN or an infinity."""
    if offloaded := [name for name, each in model.named_parameters() if each.is_meta]:
        raise InputError(
            f"calibrate: weights must be in memory, got {offloaded[0]} on the meta device; load "
            "the model without offloading, or give liar prune --max-memory"
        )
    check_finite_tensors(model.named_parameters())


def check_finite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise InputError if one of the tensors, with their names, holds a NaN or an infinity."""
    for name, tensor in tensors:
        if not all_finite(tensor):
            raise InputError(
                f"calibrate: weights must be finite, got NaN or infinity in {name}; "
                "the checkpoint is damaged or was converted wrongly"
            )
