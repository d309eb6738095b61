"""The moments of all sites, where they don't fit into memory at once: in several passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from liar_ext.calibration.collect import (
    check_bank_is_of,
    check_finite_weights,
    collect_at,
    owners_of,
)
from liar_ext.calibration.memory import available_memory, bytes_of_sums
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.saved_sums import SUMS, SavedSums
from liar_ext.checkpoint_store import Checkpoint
from liar_ext.data.batches import Batches
from liar_ext.models.sites import Site, teams_of
from liar_ext.ranks import ALONE, Owners, Ranks

# Of the sums of one pass: OPT-1.3B takes 26 GiB, in two folds of float64.
MEMORY = 32 << 30
Item = TypeVar("Item")


class Passes:
    """The moments of all sites, where they don't fit at once: in groups of sites, a pass each.

    Iterating gives the groups, in order and with their moments at hand as :attr:`bank`; going
    :meth:`back` takes them the other way round, and begins with the moments that are there still.

    Parameters
    ----------
    model, batches, at, progress
        As for :func:`calibrate`.
    memory : int, optional
        Bytes that sums may take at a time, but at least those of one site, or of the experts of a
        layer; by default what
        :func:`room_for_sums` says.
    bank : MomentBank, optional
        Moments over these batches that are there already; whatever groups they hold take no pass.
    saved : Checkpoint, optional
        Where the sums of each group are kept; those that are there are not taken again.
    ranks : Ranks
        Processes that share the work; each has the moments of the sites that it owns.

    Attributes
    ----------
    owners : Owners
        Who owns which site of the group that is given.
    summed : list of int
        Numbers of the groups that took a pass, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        at: Sequence[Site],
        memory: int | None = None,
        *,
        bank: MomentBank | None = None,
        saved: Checkpoint | None = None,
        ranks: Ranks = ALONE,
        progress: bool = False,
    ) -> None:
        check_finite_weights(model)
        self.model, self.ranks, self.progress = model, ranks, progress
        if bank is not None:
            check_bank_is_of(bank, model, at)
        room = room_for_sums(model, memory, ranks=ranks)
        self.groups = group_sites(at, room, bins_of(ranks, saved))
        self.owners = Owners(ranks)
        once = len(self.groups) == 1 and saved is None
        self.batches = batches if once else list(batches)
        self.bank = MomentBank({}) if bank is None else bank
        self.saved, self.summed = saved, []

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
        self.owners = owners_of(group, self.ranks)
        here = all(site.name in self.bank for site in group if self.owners.mine(site.name))
        if not all(self.ranks.share(here)):
            self.bank = MomentBank({})  # its memory is for the next
            if self.saved is None or number not in self.summed:
                self.summed.append(number)
            title = f"calibrate, pass {self.taken}" if len(self.groups) > 1 else "calibrate"
            self.bank = collect_at(
                self.model,
                self.batches,
                group,
                saved=self._saved_sums(number),
                owners=self.owners,
                progress=self.progress,
                title=title,
            )
        return group

    def _saved_sums(self, number: int) -> SavedSums | None:
        if self.saved is None:
            return None
        if len(self.groups) == 1:
            return SavedSums(self.saved, of=len(self.batches))
        group = number + 1
        given = f"{SUMS}-{group}", len(self.batches), f" of group {group}"
        return SavedSums(self.saved, *given)


def room_for_sums(
    model: nn.Module, memory: int | None = None, most: int = MEMORY, ranks: Ranks = ALONE
) -> int:
    """Return the bytes that sums may take: ``memory``, if that is given.

    Else ``most``, or half of what is free now on any device in use, the CPU included. Of several
    ranks each may take so many; those of one machine share its memory, and the least counts.
    """
    if memory is not None:
        return memory
    devices = {parameter.device for parameter in model.parameters()}
    free = [torch.cuda.mem_get_info(at)[0] for at in devices if at.type == "cuda"]
    if any(at.type == "cpu" for at in devices):
        free += [count // ranks.here for count in [available_memory()] if count is not None]
    return min(ranks.share(min([most, *(count // 2 for count in free)])))


def bins_of(ranks: Ranks, saved: Checkpoint | None) -> int:
    """Return by how many ranks a group is divided, whose sums are to fit into each.

    With a checkpoint it is one: the first rank gathers the sums there, and any number of ranks is
    to find the same groups.
    """
    return ranks.count if saved is None else 1


def group_sites(at: Sequence[Site], memory: int, ranks: int = 1) -> list[Sequence[Site]]:
    """Return the groups that :class:`Passes` takes; the experts of a layer stay together.

    Of several ranks none owns more than ``memory`` bytes of the sums of a group.
    """
    teams = list(teams_of(at).values())
    sizes = [sum(bytes_of_sums(site.d_in) for site in team) for team in teams]
    return [[site for team in some for site in team] for some in split(teams, sizes, memory, ranks)]


def split(
    items: Sequence[Item], sizes: Sequence[int], limit: int, bins: int = 1
) -> list[Sequence[Item]]:
    """Return runs of ``items``, each as long as no bin of :func:`deal` has more than ``limit``.

    A run has at least one item. With one bin, sizes of a run add up to at most ``limit``.
    """
    starts, loads = [0], [0] * bins
    for index, size in enumerate(sizes):
        if min(loads) + size > limit and index > starts[-1]:
            starts.append(index)
            loads = [0] * bins
        loads[loads.index(min(loads))] += size
    return [items[a:b] for a, b in zip(starts, [*starts[1:], len(items)], strict=True)]
