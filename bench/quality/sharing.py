"""Prune by methods that share what they have in common: moments, scores and losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from liar_ext import Recipe
from liar_ext.job.planning import Sweep
from liar_ext.job.state import Known
from liar_ext.models.sites import Site
from liar_ext.report.report import Report


@dataclass
class Timed(Known):
    """What a sweep has found, and the CPU seconds that it took.

    ``spared`` counts those of values that were not computed again.
    """

    took: dict[tuple[str, ...], float] = field(default_factory=dict)
    spared: float = 0.0

    @classmethod
    def of(cls, sweep: Sweep) -> Timed:
        """Let a sweep that has pruned nothing yet note the seconds from now on."""
        sweep.known = cls.of_bank(sweep.bank, sweep.probe_keep)
        return sweep.known

    def get(
        self, what: str, key: str, at: Sequence[Site], compute: Callable[[Sequence[Site]], Mapping]
    ) -> dict[str, Any]:
        """Return the values of sites by name; ``compute`` gives those that aren't there."""

        def timed(missing: Sequence[Site]) -> Mapping:
            start, values = time.process_time(), compute(missing)
            seconds = (time.process_time() - start) / len(missing)
            self.took |= {(what, key, *_shape(site)): seconds for site in missing}
            return values

        self.spared += sum(self.took.get((what, key, *_shape(site)), 0.0) for site in at)
        return super().get(what, key, at, timed)


def _shape(site: Site) -> tuple[str, ...]:
    return site.name, site.unit, str(site.units)


@dataclass
class Case:
    """What all methods of one model and one seed share, with what each takes by itself."""

    model: nn.Module  # the dense one, which stays as it is
    batches: Sequence[Mapping[str, Tensor]]  # the calibration set
    judging: Sequence[Mapping[str, Tensor]] | None = None  # what decides the schedule auto
    drawing: float = 0.0  # CPU seconds that the calibration set took, which each method needs

    def __post_init__(self) -> None:
        start = time.process_time()
        self.sweep = Sweep(self.model, self.batches, judge_on=self.judging)
        self.known = Timed.of(self.sweep)
        self.calibrating = self.drawing + time.process_time() - start

    def prune(self, recipe: Recipe) -> tuple[nn.Module, Report, float]:
        """Return a pruned copy, its report, and the CPU seconds that the method takes by itself."""
        start, spared = time.process_time(), self.known.spared
        pruned, point = self.sweep.prune(recipe)
        seconds = time.process_time() - start + self.known.spared - spared
        return pruned, point.report, seconds + self.calibrating
