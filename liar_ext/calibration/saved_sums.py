"""What sums take, in memory, and how a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from liar_ext.calibration.bank_file import PARTS, Triangles, unpacked
from liar_ext.calibration.bank_source import check_source
from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.moments import Moments
from liar_ext.checkpoint_store import Checkpoint, reading
from liar_ext.distributed import broadcast, is_first
from liar_ext.environment import available_memory
from liar_ext.errors import InputError

SUMS = "calibration"


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
    """The sums of one pass over ``of`` batches, under a key; all ranks must call each method.

    Without a checkpoint nothing is saved.
    """

    def __init__(
        self, saved: Checkpoint | None, key: str = SUMS, of: int | None = None, group: str = ""
    ) -> None:
        self.saved, self.key, self.of, self.group = saved, key, of, group
        self.done = 0  # batches
        self.facts: dict[str, Any] = {}  # of the sums, as a bank has them
        self._at = 0  # batches in the checkpoint
        self._widths: dict[str, int] = {}

    def restore(self, moments: Mapping[str, Moments], facts: Mapping[str, Any]) -> None:
        """Copy saved sums into ``moments``, and note how many batches they include.

        The first rank has them, and the others begin with none, as sums of ranks are added up.
        ``facts`` are those of the model. InputError is raised if the sums belong to other sites or
        another model, or are damaged.
        """
        known = None if self.saved is None else self.saved.get(self.key)
        self._widths = widths = {name: sums.d_in for name, sums in moments.items()}
        if known is None:
            return
        path = self.saved.path(self.key)
        with reading(path):
            source, batches, theirs = (known[1][name] for name in ("source", "batches", "widths"))
            check_source(source)
            same = all(source.get(name) == value for name, value in facts.items())
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
