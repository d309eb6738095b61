"""Calibration: run batches through the dense model and collect moments at every site."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence, Sized
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from liar_ext.bars import Bar
from liar_ext.calibration.fingerprints import Seen, fingerprint_of
from liar_ext.calibration.hooks import Ended, watched
from liar_ext.calibration.moments import MomentBank, Moments, Squares, check_finite
from liar_ext.calibration.saved_sums import SavedSums
from liar_ext.data.batches import FOLDS, Batch, Batches, read_batches
from liar_ext.errors import InputError
from liar_ext.models.experts import Routed, called_at, routed_input
from liar_ext.models.inputs import complete_inputs
from liar_ext.models.reading import body_of
from liar_ext.models.running import device_of, evaluating
from liar_ext.models.sites import Site, sites
from liar_ext.saved.progress import Progress, opened


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Batches,
    at: Sequence[Site] | None = None,
    *,
    keep_text: bool = True,
    checkpoint: str | os.PathLike[str] | Progress | None = None,
    progress: bool = False,
) -> MomentBank:
    """Collect the moments of every site's consumer input in one pass over ``batches``.

    For each site and each fold, ``G = Σ_t w_t x_t x_tᵀ``, ``s = Σ_t w_t x_t`` and ``n = Σ_t w_t``,
    where ``w_t`` is 0 for padding and 1 otherwise. An expert has sums over the tokens that the
    router sends there, with ``w_t`` times the square of the weight that their output gets. A task
    head on top of the model is not run.

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
    keep_text : bool
        Keep the batches in the bank, where they are token ids alone, and in the file that it is
        saved to: what runs the model over them later needs no other text then.
    checkpoint : path, optional
        A folder to save the sums so far in, and to go on from where it has some, of the same
        model and batches: with the same result, bit for bit, as without. It stays when all is
        done. A :class:`liar_ext.saved.progress.Progress` is one that is open already.
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
    check_finite_weights(model)
    at = at if at is not None else sites(model)
    with opened(checkpoint) as room:
        of = len(batches) if isinstance(batches, Sized) else None
        saved = None if room is None else SavedSums(room, of=of)
        bank = collect_at(model, batches, at, keep_text=keep_text, saved=saved, progress=progress)
    bank.source["sites"] = {
        site.name: {n: getattr(site, n) for n in ("unit", "units", "width", "groups")}
        for site in at
    }
    return bank


def collect_at(model: nn.Module, batches: Batches, at: Sequence[Site], **bar) -> MomentBank:
    """Return the moments of what the consumers of sites read."""
    taps = [tap_at(model, site) for site in at]
    return collect(model, body_of(model), batches, taps, **bar)


def tap_at(model: nn.Module, site: Site) -> Tap:
    """Return where what the consumer of a site reads is to be had."""
    mask, repeats = site.part.mask, site.part.repeats
    if site.expert is None:
        take = lambda args, _: args[0]  # noqa: E731
    else:  # the module of all experts computes what each reads
        take = lambda args, _: routed_input(model, site, args)  # noqa: E731
    return Tap(site.name, called_at(site), site.d_in, take, mask=mask, repeats=repeats)


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
        Gives the tensor, ``(batch, tokens, d_in)``, from the module's arguments and output; or
        those tokens alone that reach an expert.
    first : bool
        Only the first token counts.
    sums : type
        What is summed: moments, or the squares alone.
    mask : str
        The input of the model that says which tokens of the tensor are padding; empty if none are.
    repeats : bool
        The module runs several times in one forward pass, and every run counts.
    """

    name: str
    module: str
    d_in: int
    take: Callable[[tuple, Tensor], Tensor | Routed]
    first: bool = False
    sums: type[Moments] | type[Squares] = Moments
    mask: str = "attention_mask"
    repeats: bool = False


@torch.no_grad()
def collect(
    model: nn.Module,
    body: nn.Module,
    batches: Batches,
    taps: Sequence[Tap],
    *,
    keep_text: bool = False,
    saved: SavedSums | None = None,
    progress: bool = False,
    title: str = "calibrate",
) -> MomentBank:
    """Run ``body``, the model or its base model, over ``batches``; return the sums of ``taps``.

    Batches, and what is raised, are as for :func:`calibrate`; ``title`` is of the progress bar. A
    forward pass ends where all taps have got their tensor. Moments go on where ``saved`` has them.
    """
    device = device_of(model)
    bank = MomentBank()
    for tap in taps:
        here = device_of(model.get_submodule(tap.module), device)
        bank.moments[tap.name] = tap.sums.zeros(tap.d_in, device=here)
    current, seen, tokens = InFlight(), Seen(keep_text), 0
    # A module that repeats has more to come, whatever has run.
    ends = len(taps) if not any(tap.repeats for tap in taps) else math.inf
    facts = {
        "model_type": model.config.model_type,
        "model": fingerprint_of(model.state_dict().items()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    done = 0 if saved is None else saved.restore(bank, facts)
    if done:
        tokens, current.routed = saved.facts.get("tokens", 0), saved.facts.get("routed", {})

    def facts_so_far() -> dict[str, object]:
        return facts | seen.facts(tokens, current.routed)

    bar = Bar(batches, desc=title, disable=not progress)
    with ExitStack() as stack:
        for tap in taps:
            callback = adding(tap, bank[tap.name], current, ends)
            stack.enter_context(watched(model.get_submodule(tap.module), callback))
        stack.enter_context(evaluating(model))
        for index, batch in enumerate(read_batches(bar)):
            if batch.mask is not None and not batch.mask.any():
                raise InputError(f"calibrate: batch {index} holds only padding; leave it out")
            seen.add(batch)
            if index < done:
                if index + 1 == done:
                    saved.check(index + 1, seen.digest.hexdigest())
                continue
            batch = replace(batch, inputs=complete_inputs(model, batch.inputs, batch.labels))
            batch = batch.to(device)
            current.set(batch)
            with suppress(Ended):
                body(**batch.inputs)
            tokens += current.counted
            if saved is not None:
                saved.save(index + 1, bank, facts_so_far)
    if seen.batches < done:
        saved.check(seen.batches, seen.digest.hexdigest())
    if saved is not None and seen.batches > done:
        saved.save(seen.batches, bank, facts_so_far, now=True)
    sequences = len(seen.sequences)
    check_sums(bank, sequences, current.routed)
    every = [sums.tokens for name, sums in bank.items() if name not in current.routed]
    tokens = int(every[0].sum()) if every else tokens
    bank.source = facts | seen.facts(tokens, current.routed)
    bank.text, bank.sequences = seen.text, torch.tensor(seen.sequences)
    return bank


def check_sums(bank: MomentBank, sequences: int, routed: Collection[str] = ()) -> None:
    """Raise InputError unless sums over ``sequences`` are finite, and each fold has tokens.

    Sites that tokens are ``routed`` to may have none.
    """
    every = [sums.tokens for name, sums in bank.items() if name not in routed]
    if not sequences or any((each == 0).any() for each in every):
        raise InputError(
            f"calibrate: each of the {FOLDS} folds needs tokens, got {sequences} sequence(s); "
            "give at least 2 sequences"
        )
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
    dtype = str(model.dtype).removeprefix("torch.")
    if bank.source.get("dtype", dtype) != dtype:
        raise InputError(
            f"calibrate: the bank is of the model in {bank.source['dtype']}, got {dtype}; load "
            "the model as it was calibrated, or calibrate it anew"
        )
    known = bank.source.get("model")
    if known is not None and known != fingerprint_of(model.state_dict().items()):
        raise InputError(
            "calibrate: the bank is of other weights than the model's, or keep_hidden changes "
            "them; calibrate the model that is pruned, or leave the bank out"
        )


def check_finite_weights(model: nn.Module) -> None:
    """Raise InputError if a parameter of ``model`` is offloaded, or holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"calibrate: weights must be in memory, got {name} on the meta device; load the "
                "model without offloading, on more devices or on the CPU, or give liar prune "
                "--max-memory"
            )
    check_finite_tensors(model.named_parameters())


def check_finite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise InputError if one of the tensors, with their names, holds a NaN or an infinity."""
    for name, tensor in tensors:
        if not torch.isfinite(tensor.detach()).all():
            raise InputError(
                f"calibrate: weights must be finite, got NaN or infinity in {name}; "
                "the checkpoint is damaged or was converted wrongly"
            )


@dataclass
class InFlight:
    """What the taps need to know of the batch that is run."""

    rows: tuple[Tensor, ...] = ()  # sequences by fold
    whole: int | None = None  # the fold, when all sequences belong to one
    batch: Batch | None = None
    seen: set[str] = field(default_factory=set)  # taps that have got their tensor
    fold: Tensor | None = None  # (batch,)
    counted: int = 0  # tokens of the batch that aren't padding, where experts were tapped
    routed: dict[str, list[int]] = field(default_factory=dict)  # tokens by expert and fold

    def set(self, batch: Batch) -> None:
        """Note the folds and the mask of the batch that is run next."""
        self.fold = fold = batch.fold
        self.batch = batch
        self.whole = int(fold[0]) if bool((fold == fold[0]).all()) else None
        self.seen.clear()
        self.rows = tuple((fold == f).nonzero().flatten() for f in range(FOLDS))


def adding(tap: Tap, moments: Moments | Squares, current: InFlight, ends: float) -> Callable:
    """Return what adds a tapped tensor to its moments, and ends the run after ``ends`` taps."""

    def add(arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight = tap.take(arguments, output), current.batch.mask_of(tap.mask)
        if isinstance(x, Routed):
            _add_routed(tap.name, moments, x, current)
            return finish()
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
        finish()

    def finish() -> None:
        current.seen.add(tap.name)
        if len(current.seen) == ends:
            raise Ended

    return add


def _add_routed(name: str, moments: Moments, routed: Routed, current: InFlight) -> None:
    """Add the tokens that reach an expert: ``Σ r² x xᵀ`` over those that aren't padding."""
    device = routed.x.device
    each = routed.tokens // len(current.fold)
    fold = current.fold.to(device).repeat_interleave(each)[routed.token]
    used = torch.ones_like(fold, dtype=torch.bool)
    current.counted = routed.tokens
    if current.batch.mask is not None:
        used = current.batch.mask.flatten().to(device)[routed.token]
        current.counted = int(current.batch.mask.sum())
    weight = routed.weight.double().square()
    found = current.routed.setdefault(name, [0] * FOLDS)
    for index in range(FOLDS):
        here = used & (fold == index)
        found[index] += int(here.sum())
        moments.update(routed.x[here], index, weight[here])
