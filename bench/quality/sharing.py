"""Prune by methods that share what they have in common: moments, scores and losses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from liar_ext import Recipe
from liar_ext.job.sweeping import Sweep
from liar_ext.report.report import Report


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
        self.calibrating = self.drawing + time.process_time() - start

    def prune(self, recipe: Recipe) -> tuple[nn.Module, Report, float]:
        """Return a pruned copy, its report, and the CPU seconds that the method takes by itself."""
        start, spared = time.process_time(), self.sweep.known.spared
        pruned, point = self.sweep.prune(recipe)
        seconds = time.process_time() - start + self.sweep.known.spared - spared
        return pruned, point.report, seconds + self.calibrating
