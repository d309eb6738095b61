"""The moments of all sites, where they don't fit into memory at once: in several passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from liar_ext.calibration.batches import Batches
from liar_ext.calibration.collect import check_bank_is_of, check_finite_weights, collect_at
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.saved_sums import SUMS, SavedSums, bytes_of_sums
from liar_ext.checkpoint_store import Checkpoint
from liar_ext.distributed import gather, local_world_size
from liar_ext.environment import available_memory
from liar_ext.models.sites import Site, teams_of

# Of the sums of one pass: OPT-1.3B takes 26 GiB, in two folds of float64.
MEMORY = 32 << 30
Item = TypeVar("Item")


class Passes:
    """The moments of all sites, where they don't fit at once: in groups of sites, a pass each.

    Iterating gives the groups, in order and with their moments at hand as :attr:`bank`; going
    :meth:`back` takes them the other way round, and begins with the moments that are there still.

    Sums may take ``memory`` bytes at a time, but at least those of one site, or of the experts of a
    layer; by default what :func:`room_for_sums` says. Groups that a ``bank`` over these batches
    holds take no pass, and those that are ``saved`` in a checkpoint are not taken again. All else
    is as for :func:`liar_ext.calibrate`. ``summed`` are the numbers of the groups that took a pass.
    """

    probes: Any = None  # what is measured on the way, see :class:`ProbeStreams`

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        at: Sequence[Site],
        memory: int | None = None,
        *,
        bank: MomentBank | None = None,
        saved: Checkpoint | None = None,
        progress: bool = False,
    ) -> None:
        check_finite_weights(model)
        self.model, self.progress = model, progress
        if bank is not None:
            check_bank_is_of(bank, model, at)
        self.groups = group_sites(at, room_for_sums(model, memory))
        once = len(self.groups) == 1 and saved is None
        self.batches = batches if once else list(batches)
        self.bank = MomentBank({}) if bank is None else bank
        self.saved, self.summed = saved, []

    def restore(self, found: Mapping[str, dict]) -> None:
        """Go on where a checkpoint ends; here each group does, and ``found`` isn't kept."""

    def finish(self, found: Mapping[str, dict]) -> None:
        """Save what is known of a group beside its sums: nothing here."""

    @property
    def taken(self) -> int:
        """How many passes it took."""
        return len(self.summed)

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
            title = f"calibrate, pass {self.taken}" if len(self.groups) > 1 else "calibrate"
            settings = {"saved": self._saved_sums(number), "title": title}
            settings["progress"] = self.progress
            self.bank = collect_at(self.model, self.batches, group, **settings)
        return group

    def _saved_sums(self, number: int) -> SavedSums | None:
        if self.saved is None:
            return None
        of, group = len(self.batches), number + 1
        named = (f"{SUMS}-{group}", of, f" of group {group}")
        return SavedSums(self.saved, *(named if len(self.groups) > 1 else (SUMS, of)))


def room_for_sums(model: nn.Module, memory: int | None = None) -> int:
    """Return the bytes that sums may take: ``memory``, if that is given.

    Else ``MEMORY``, or half of what is free now on any device in use, the CPU included. Of several
    ranks each may take so many; those of one machine share its memory, and the least counts.
    """
    if memory is not None:
        return memory
    devices = {parameter.device for parameter in model.parameters()}
    free = [torch.cuda.mem_get_info(at)[0] for at in devices if at.type == "cuda"]
    if any(at.type == "cpu" for at in devices):
        free += [count // local_world_size() for count in [available_memory()] if count is not None]
    return min(gather(min([MEMORY, *(count // 2 for count in free)])))


def group_sites(at: Sequence[Site], memory: int) -> list[Sequence[Site]]:
    """Return the groups that :class:`Passes` takes; the experts of a layer stay together."""
    teams = list(teams_of(at).values())
    sizes = [sum(bytes_of_sums(site.d_in) for site in team) for team in teams]
    return [[site for team in some for site in team] for some in split(teams, sizes, memory)]


def split(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[Sequence[Item]]:
    """Return runs of ``items`` whose sizes add up to at most ``limit``, or that are of one item."""
    starts, total = [0], 0
    for index, size in enumerate(sizes):
        if total + size > limit and index > starts[-1]:
            starts.append(index)
            total = 0
        total += size
    return [items[a:b] for a, b in zip(starts, [*starts[1:], len(items)], strict=True)]
