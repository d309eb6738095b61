"""Prune by methods that share what they have in common: moments, scores and losses."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

from torch import Tensor, nn

from bench.quality.texts import digest_of
from liar_ext import Recipe, calibrate, sites
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.passes import Passes
from liar_ext.models.sites import get_consumer_bias
from liar_ext.pipeline import pipeline
from liar_ext.pipeline.job import Job
from liar_ext.reconstruction.settings import form_at
from liar_ext.report.report import Report

# Fields of a recipe that neither scores nor losses depend on. A field that isn't here is taken to
# change them, so that a new one costs time and never a wrong row.
LATER = ("tile", "refine", "damp", "schedule", "target", "refit", "memory", "batch_size")

Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], float]


@dataclass
class SharingJob(Job):
    """A job that looks up the scores and losses which another one has computed."""

    known: dict[str, Found] = field(default_factory=dict)
    spared: list[float] = field(default_factory=list)

    def score(self, passes: Passes | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return scores and losses, as :meth:`liar_ext.pipeline.job.Job.score` does."""
        if passes is None:
            return super().score(passes)
        key = self._key(passes.model)
        if key not in self.known:
            start, before = time.process_time(), dict(self.sensitivities)
            scores, losses = super().score(passes)
            new = {n: v for n, v in self.sensitivities.items() if before.get(n) != v}
            self.known[key] = scores, losses, new, time.process_time() - start
        else:
            self.spared.append(self.known[key][3])
        scores, losses, sensitivities, _ = self.known[key]
        self.sensitivities |= sensitivities
        return dict(scores), dict(losses)

    def _key(self, model: nn.Module) -> str:
        biased = any(get_consumer_bias(model, site) is not None for site in self.sites(model))
        chosen = {n: v for n, v in self.recipe.to_dict().items() if n not in LATER}
        chosen["reconstruct"] = form_at(self.recipe.reconstruct, biased)
        some = {
            name: [*value.shape, float(value.sum())] for name, value in model.state_dict().items()
        }
        return json.dumps([chosen, digest_of(some)], sort_keys=True)


@dataclass
class Case:
    """What all methods of one model and one seed share.

    Parameters
    ----------
    model : nn.Module
        The dense model; it stays as it is.
    batches : sequence of mapping
        The calibration set.
    """

    model: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    known: dict[str, Found] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start = time.process_time()
        self.bank: MomentBank = calibrate(self.model, self.batches, sites(self.model))
        self.calibrating = time.process_time() - start

    def prune(self, recipe: Recipe) -> tuple[nn.Module, Report, float]:
        """Return a pruned copy, its report, and the CPU seconds that the method takes by itself."""
        pruned, spared = copy.deepcopy(self.model), [self.calibrating]
        start = time.process_time()
        sharing = partial(SharingJob, known=self.known, spared=spared)
        # All steps and their order are liar_ext.prune's own, whatever they come to be.
        with mock.patch.object(pipeline, "Job", sharing):
            report = pipeline.prune(pruned, self.batches, recipe, bank=self._bank(recipe))
        return pruned, report, time.process_time() - start + sum(spared)

    def _bank(self, recipe: Recipe) -> MomentBank | None:
        """Return the moments, unless the recipe changes what is calibrated."""
        return None if recipe.keep_hidden != 1.0 else self.bank
