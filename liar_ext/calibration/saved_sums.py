"""What sums take, in memory, and how a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from liar_ext.calibration.bank import PARTS, Triangles, unpacked
from liar_ext.calibration.bank_source import UNSAID, check_source
from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.moments import Moments
from liar_ext.models.sites import Site, teams_of
from liar_ext.system.checkpoint_store import Checkpoint, reading
from liar_ext.system.distributed import broadcast, gather, is_first, local_world_size
from liar_ext.system.environment import available_memory
from liar_ext.system.errors import InputError

SUMS = "calibration"
# Of the sums of one pass: OPT-1.3B takes 26 GiB, in two folds of float64.
MEMORY = 32 << 30
Item = TypeVar("Item")


def bytes_of_sums(features: int) -> int:
    """Return the bytes of the sums at one site: ``d²`` of float64 for each fold."""
    return FOLDS * 8 * features**2


def check_memory(operation: str, needed: int) -> None:
    """Raise InputError if sums of so many bytes can't be held at once on the CPU."""
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{operation}: the sums of all sites take {needed / 2**30:.3g} GiB at once, and "
            f"{free / 2**30:.3g} are free; free some, or let liar prune --memory sum them in groups"
        )


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
    """Return groups of sites whose sums fit; the experts of a layer stay together."""
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


def packed(moments: Mapping[str, Moments]) -> dict[str, Tensor | Triangles]:
    """Return moments by site name as tensors for a checkpoint."""
    found: dict[str, Tensor | Triangles] = {}
    for name, sums in moments.items():
        found |= {f"gram/{name}": Triangles(sums.gram)}
        found |= {f"total/{name}": sums.total, f"count/{name}": sums.count}
    return found


def restored(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Moments]:
    """Return packed moments of some sites; every rank must call this."""
    found = {}
    for name in names:
        triangles, total, count = (tensors[f"{part}/{name}"] for part in PARTS)
        d = total.shape[-1]
        if triangles.shape != (FOLDS, d * (d + 1) // 2):
            raise ValueError(f"gram/{name} must be triangles of {d} features")
        found[name] = Moments(unpacked(triangles, d), total, count)
    return found


class SavedSums:
    """The sums of one pass over ``of`` batches, under a key of a checkpoint, if there is one.

    ``group`` is the number of the group of sites, if there are several. All ranks must call each
    method.
    """

    def __init__(self, saved: Checkpoint | None, of: int | None = None, group: int = 0) -> None:
        self.saved, self.of, self.group = saved, of, f" of group {group}" if group else ""
        self.key = f"{SUMS}-{group}" if group else SUMS
        self.done = 0  # batches
        self.facts: dict[str, Any] = {}  # of the sums, as a bank has them
        self._at = 0  # batches in the checkpoint
        self._widths: dict[str, int] = {}

    def restore(self, moments: Mapping[str, Moments], facts: Mapping[str, Any]) -> None:
        """Copy saved sums into ``moments``, at the first rank, and note how many batches they are.

        InputError is raised if they are of other sites or, by its ``facts``, another model.
        """
        known = None if self.saved is None else self.saved.get(self.key)
        self._widths = widths = {name: sums.d_in for name, sums in moments.items()}
        if known is None:
            return
        path = self.saved.path(self.key)
        with reading(path):
            source, batches, theirs = (known[1][name] for name in ("source", "batches", "widths"))
            check_source(source)
            unsaid = {name: facts.get(name) for name in UNSAID}  # by older versions
            same = all((unsaid | source).get(name) == value for name, value in facts.items())
            if not same or theirs != widths:
                raise InputError(
                    f"checkpoint: {path} is of another model, or of other sites; name another "
                    "folder, or remove that file"
                )
            for name, width in widths.items():
                (its,) = restored(known[0], [name]).values()
                if its.d_in != width:
                    raise ValueError(f"{name} must have {width} features")
                for part in PARTS if is_first() else ():
                    getattr(moments[name], part).copy_(getattr(its, part))
            self.facts, self.done = source, int(batches)

    def check(self, batches: int, digest: str) -> None:
        """Raise InputError unless the first batches are those of the sums."""
        if batches != self.done or digest != (self.facts.get("data") or [""])[-1]:
            raise InputError(
                f"checkpoint: the sums in {self.saved.path(self.key)} are over {self.done} batches "
                "of other text than was given; give the same text, or remove that file"
            )

    def save(
        self,
        batches: int,
        so_far: Callable[[], tuple[Mapping[str, Moments], dict[str, Any]]],
        *,
        now: bool = False,
    ) -> None:
        """Save the sums of all ranks over so many batches, and their facts, if due or ``now``."""
        if self.saved is None:
            return
        due = batches != self._at and (now or self.saved.due(self.key))
        if not broadcast(due):
            return
        moments, source = so_far()
        of = "" if self.of is None else f" of {self.of}"
        said = f"sums over {batches}{of} batches{self.group}"
        known = {"source": source, "batches": batches, "widths": self._widths, "said": said}
        self.saved.put(self.key, packed(moments), known)
        self._at = batches
