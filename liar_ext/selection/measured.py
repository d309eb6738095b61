"""Divergences of probes as they are measured, in the checkpoint of a job."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from liar_ext.distributed import gather, world_size
from liar_ext.saved.progress import Progress

Names = Sequence[str]


class Measured:
    """Sums of divergences by probe and batch, kept as they are found.

    Of several ranks each measures probes of its own, and the first one writes; it knows what others
    have found by :meth:`gather`.

    Parameters
    ----------
    saved : Progress, optional
        Where they are kept.
    name : str
        What tells these probes from others: sites whose sums don't fit at once come in groups.

    Attributes
    ----------
    found : dict of tuple of str to list of float
        By the names of the sites that a probe prunes, and by batch; NaN where it isn't known.
    rows : list of float
        The number of rows compared, by batch.
    """

    def __init__(self, saved: Progress | None = None, name: str = "") -> None:
        self.saved, self.name = saved, f"sensitivities-{name}"
        self.found: dict[tuple[str, ...], list[float]] = {}
        self.rows: list[float] = []
        known = None if saved is None else saved.get(self.name)
        if known is not None:
            *columns, self.rows = known.tensor("values").T.tolist()
            names = map(tuple, known.facts["probes"])
            self.found = dict(zip(names, columns, strict=True))

    def begin(self, batches: int, probes: Sequence[Names]) -> None:
        """Say what is measured here; what is known of other batches is measured anew."""
        if len(self.rows) != batches:
            self.rows, self.found = [math.nan] * batches, {}
        for names in probes:
            self.found.setdefault(tuple(names), [math.nan] * batches)

    def has(self, batch: int, names: Names) -> bool:
        """Tell whether a divergence is there."""
        return not math.isnan(self.found[tuple(names)][batch])

    def has_all(self, batch: int, probes: Sequence[Names]) -> bool:
        """Tell whether the divergences of a batch are there, and its number of rows."""
        return not math.isnan(self.rows[batch]) and all(self.has(batch, each) for each in probes)

    def put(self, batch: int, names: Names, value: float) -> None:
        """Keep a divergence."""
        self.found[tuple(names)][batch] = value
        self._keep()

    def gather(self, batch: int) -> None:
        """Let all ranks know what each has found on a batch."""
        for theirs in gather({names: values[batch] for names, values in self.found.items()}):
            for names, value in theirs.items():
                if not self.has(batch, names):
                    self.found[names][batch] = value
        if world_size() > 1:
            self._keep()

    def totals(self, probes: Sequence[Names]) -> list[float]:
        """Return the sum over batches by probe, added in their order."""
        totals = [0.0] * len(probes)
        for batch in range(len(self.rows)):  # not sum(), which rounds otherwise from Python 3.12 on
            for index, names in enumerate(probes):
                totals[index] += self.found[tuple(names)][batch]
        return totals

    def _is_whole(self) -> bool:
        return not any(math.isnan(value) for values in self.found.values() for value in values)

    def _keep(self) -> None:
        if self.saved is None or not (self._is_whole() or self.saved.due(self.name)):
            return
        columns = list(self.found.values())
        done = sum(not math.isnan(value) for values in columns for value in values)
        of = len(columns) * len(self.rows)
        said = f"{done} of {of} divergences of {len(columns)} sensitivities"
        values = torch.tensor([*columns, self.rows], dtype=torch.float64).T
        facts = {"probes": [list(names) for names in self.found], "said": said}
        self.saved.put(self.name, {"values": values}, facts)
