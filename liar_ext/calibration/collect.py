"""Calibration: run batches through the dense model and collect moments at every site."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from liar_ext.bars import Bar, spare
from liar_ext.calibration.fingerprints import Seen, fingerprint_of
from liar_ext.calibration.finite import all_finite
from liar_ext.calibration.hooks import Ended, watched
from liar_ext.calibration.memory import bytes_of_sums
from liar_ext.calibration.moments import MomentBank, Moments, check_finite, whole
from liar_ext.calibration.saved_sums import SavedSums
from liar_ext.calibration.taps import InFlight, Piece, Tap, adding, is_relative, tap_at
from liar_ext.checkpoint_store import Checkpoint, opened
from liar_ext.data.batches import FOLDS, Batch, Batches, count_tokens, read_batches
from liar_ext.errors import InputError
from liar_ext.models.inputs import complete_inputs
from liar_ext.models.reading import body_of
from liar_ext.models.running import device_of, evaluating
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.ranks import ALONE, Owners, Ranks, deal


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Batches,
    at: Sequence[Site] | None = None,
    *,
    keep_text: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> MomentBank:
    """Collect the moments of every site's consumer input in one pass over ``batches``.

    For each site and each fold, ``G = Σ_t w_t x_t x_tᵀ``, ``s = Σ_t w_t x_t`` and ``n = Σ_t w_t``,
    where ``w_t`` is 0 for padding and 1 otherwise, or where a norm reads the output what
    :func:`liar_ext.calibration.taps.relative_weights` says. An expert has sums over the tokens that
    the router sends there, with ``w_t`` times the square of the weight that their output gets. A
    task head on top of the model is not run.

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
        done. A :class:`liar_ext.checkpoint_store.Checkpoint` is one that is open already. Of
        several ranks the first one alone works in it.
    ranks : Ranks
        Processes that share the work, from :meth:`liar_ext.ranks.Ranks.join`; each gives the same
        model and batches.
    progress : bool
        Show a progress bar.

    Returns
    -------
    MomentBank
        Float64 sums by site name, ``16 d_in²`` bytes each. A pass ends at the last site. With
        several ranks the first one has all sites, and the others those that they summed.

    Raises
    ------
    InputError
        If a weight or a sum is not finite, a batch holds only padding, or a fold gets no token;
        an expert may get none. If the checkpoint is of something else.
    """
    check_finite_weights(model)
    at = at if at is not None else sites(model)
    owners = owners_of(at, ranks)
    with opened(checkpoint, ranks) as room:
        of = len(batches) if isinstance(batches, Sized) else None
        saved = None if room is None else SavedSums(room, of=of)
        bank = collect_at(
            model, batches, at, keep_text=keep_text, saved=saved, owners=owners, progress=progress
        )
    if ranks.count > 1:
        bank.moments = whole(bank.moments, [site.name for site in at], owners) or bank.moments
    bank.source["sites"] = {
        site.name: {n: getattr(site, n) for n in ("unit", "units", "width", "groups")}
        for site in at
    }
    return bank


def collect_at(model: nn.Module, batches: Batches, at: Sequence[Site], **bar) -> MomentBank:
    """Return the moments of what the consumers of sites read."""
    taps = [tap_at(model, site) for site in at]
    return collect(model, body_of(model), batches, taps, **bar)


def owners_of(at: Sequence[Site], ranks: Ranks) -> Owners:
    """Return which rank owns which site, by bytes of sums; the experts of a layer stay together."""
    if ranks.count == 1:
        return Owners(ranks)
    teams = list(teams_of(at).values())
    dealt = deal([sum(bytes_of_sums(site.d_in) for site in team) for team in teams], ranks.count)
    pairs = zip(teams, dealt, strict=True)
    return Owners(ranks, {site.name: rank for team, rank in pairs for site in team})


@torch.no_grad()
def collect(
    model: nn.Module,
    body: nn.Module,
    batches: Batches,
    taps: Sequence[Tap],
    *,
    keep_text: bool = False,
    saved: SavedSums | None = None,
    owners: Owners = Owners(),  # noqa: B008  (holds nothing that changes)
    progress: bool = False,
    title: str = "calibrate",
) -> MomentBank:
    """Run ``body``, the model or its base model, over ``batches``; return the sums of ``taps``.

    Batches, and what is raised, are as for :func:`calibrate`; ``title`` is of the progress bar. A
    forward pass ends where all taps have got their tensor. Moments go on where ``saved`` has them.

    Of several ranks each runs every so manieth batch. What a tap gets goes to the owner of its
    site, which adds it in the order of batches: sums are those of one rank, to the last bit.
    """
    device, ranks = device_of(model), owners.ranks
    bank = MomentBank()
    for tap in taps:
        if owners.mine(tap.name):
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
    relative = sorted(tap.name for tap in taps if tap.relative)
    facts |= {"relative": relative} if relative else {}
    widths = {tap.name: tap.d_in for tap in taps}
    done = 0 if saved is None else saved.restore(bank.moments, widths, facts, owners)
    if done and ranks.first:
        tokens, current.routed = saved.facts.get("tokens", 0), saved.facts.get("routed", {})

    def facts_so_far() -> dict[str, object]:
        return facts | seen.facts(*_added(ranks.share((tokens, current.routed))))

    spare(title, done)
    bar = Bar(batches, desc=title, disable=not progress)
    with ExitStack() as stack:
        for tap in taps:
            hand = _handing(tap.name, current, owners)
            callback = adding(tap, bank.moments.get(tap.name), current, ends, hand)
            stack.enter_context(watched(model.get_submodule(tap.module), callback))
        stack.enter_context(evaluating(model))
        for some in _rounds(read_batches(bar), ranks.count, done):
            for batch in some:
                if batch.mask is not None and not batch.mask.any():
                    at = f"batch {seen.batches}"
                    raise InputError(f"calibrate: {at} holds only padding; leave it out")
                seen.add(batch)
            if seen.batches <= done:
                if seen.batches == done:
                    saved.check(done, seen.digest.hexdigest())
                continue
            # A rank that has no batch left runs the last one again, for nothing.
            current.spare = ranks.rank >= len(some)
            batch = some[min(ranks.rank, len(some) - 1)]
            batch = replace(batch, inputs=complete_inputs(model, batch.inputs, batch.labels))
            batch = batch.to(device)
            current.set(batch)
            with suppress(Ended):
                body(**batch.inputs)
            if not current.spare:
                tokens += current.counted
                ranks.work["sequences"] += len(batch)
                ranks.work["tokens"] += count_tokens(batch)
            if saved is not None:
                saved.save(seen.batches, bank.moments, facts_so_far)
    if saved is not None and seen.batches < done:
        saved.check(seen.batches, seen.digest.hexdigest())
    if saved is not None and seen.batches > done:
        saved.save(seen.batches, bank.moments, facts_so_far, now=True)
    check_sums(bank, len(seen.sequences), current.routed)
    summed = _tokens_of(bank, {*relative, *current.routed})
    bank.source = _agreed(ranks, facts, seen, tokens, current.routed, summed)
    bank.text, bank.sequences = seen.text, torch.tensor(seen.sequences)
    return bank


def _rounds(batches: Iterator[Batch], count: int, done: int) -> Iterator[list[Batch]]:
    """Yield the batches that are done one by one, and then as many as there are ranks."""
    seen = 0
    while some := list(islice(batches, 1 if seen < done else count)):
        seen += len(some)
        yield some


def _handing(name: str, current: InFlight, owners: Owners) -> Callable:
    """Return what gives the owner of a site what all ranks have tapped, in their order."""
    if owners.ranks.count == 1 or not owners.of:
        return iter

    def hand(pieces: list[Piece]) -> Iterator[Piece]:
        given = owners.ranks.each([] if current.spare else pieces, owners.rank_of(name))
        return (piece for each in given for piece in each)

    return hand


def _tokens_of(bank: MomentBank, weighed: Collection[str]) -> int | None:
    """Return the tokens of a site that sees all of them and counts each as one, if there is one."""
    plain = next((sums.tokens for name, sums in bank.items() if name not in weighed), None)
    return None if plain is None else int(plain.sum())


def _added(shares: Sequence[tuple[int, dict[str, list[int]]]]) -> tuple[int, dict[str, list[int]]]:
    """Return the sum of what ranks have counted: tokens, and tokens by expert and fold."""
    routed: dict[str, list[int]] = {}
    for _, each in shares:
        for name, counts in each.items():
            before = routed.get(name, [0] * FOLDS)
            routed[name] = [a + b for a, b in zip(before, counts, strict=True)]
    return sum(tokens for tokens, _ in shares), routed


def _agreed(
    ranks: Ranks,
    facts: dict[str, object],
    seen: Seen,
    tokens: int,
    routed: dict[str, list[int]],
    summed: int | None,
) -> dict[str, object]:
    """Return the facts of a bank, which are the same for all ranks.

    ``tokens`` and ``routed`` are what this rank has counted, ``summed`` the tokens of a site that
    it owns and that sees all of them, if it has one.
    """
    shares = ranks.share((facts["model"], seen.digest.hexdigest(), tokens, routed, summed))
    for rank, (model, text, *_) in enumerate(shares):
        for what, own, other in (
            ("model", shares[0][0], model),
            ("text", shares[0][1], text),
        ):
            if own != other:
                raise InputError(
                    f"calibrate: every rank must have the same {what}, and that of rank {rank} is "
                    "other than that of rank 0; give all the same files, and one kind of device"
                )
    tokens, routed = _added([(tokens, routed) for *_, tokens, routed, _ in shares])
    known = [summed for *_, summed in shares if summed is not None]
    return facts | seen.facts(known[0] if known else tokens, routed)


def check_sums(bank: MomentBank, sequences: int, routed: Collection[str] = ()) -> None:
    """Raise InputError unless sums over ``sequences`` are finite, and each fold has tokens.

    Sites that tokens are ``routed`` to may have none.
    """
    every = {name: sums for name, sums in bank.items() if name not in routed}
    empty = [name for name, sums in every.items() if (sums.tokens == 0).any()]
    dropped = [name for name in empty if sequences and every[name].count[:, 1].any()]
    if dropped:
        raise InputError(
            f"calibrate: every token has values at {dropped[0]} that are not finite, or too large "
            "to be summed; look for damaged weights before it, or load the model in a wider dtype"
        )
    if not sequences or empty:
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
    relative = set(bank.source.get("relative", ()))
    for site in at:
        if is_relative(site) != (site.name in relative):
            raise InputError(
                f"calibrate: tokens must count relative to what {site.consumer} gives where a norm "
                f"reads it, and else alike; at {site.name} the bank has it otherwise; calibrate "
                "the model anew"
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
        if not all_finite(tensor):
            raise InputError(
                f"calibrate: weights must be finite, got NaN or infinity in {name}; "
                "the checkpoint is damaged or was converted wrongly"
            )
