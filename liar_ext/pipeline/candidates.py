"""Whole candidates: models by several recipes, judged on text that none of them has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liar_ext.calibration.passes import Passes
from liar_ext.errors import InputError
from liar_ext.pipeline.job import Job, Weights
from liar_ext.pipeline.resuming import decide
from liar_ext.pipeline.several import work_of
from liar_ext.plan import Plan
from liar_ext.recipe.candidates import candidates_of
from liar_ext.selection.divergence import Divergence
from liar_ext.selection.sensitivity import pruned_site

Text = Sequence[Mapping[str, Tensor]]


@dataclass
class Solved:
    """A job whose plan is decided and solved; its model is still whole."""

    job: Job
    passes: Passes | None
    plan: Plan
    weights: Weights

    @classmethod
    def of(cls, job: Job, fresh: Text | None = None) -> Solved:
        """Calibrate, score, allocate and reconstruct; sites are certified on fresh text."""
        passes = job.calibrate(job.narrow())
        plan = decide(job, passes)
        return cls(job, passes, plan, job.reconstruct(passes, plan, fresh))

    @torch.no_grad()
    def divergence(self, judge: Divergence) -> float:
        """Return how far the pruned model is from the one that ``judge`` holds the outputs of."""
        if self.passes is None:
            return judge.of(self.job.model)["divergence"]
        model = self.passes.model
        with ExitStack() as pruned:
            for site in self.job.sites(model):
                given = self.plan, self.weights[site.name]
                pruned.enter_context(pruned_site(model, site, *given))
            return judge.of(model)["divergence"]


def check_candidates(job: Job, judge_on: Text | None) -> None:
    """Raise InputError where a job has candidates or text to judge them by, and not the other."""
    if bool(job.recipe.candidates) != (judge_on is not None):
        raise InputError(
            "prune: candidates and judge_on go together: whole models are judged by text that none "
            f"of them has seen, got candidates={list(job.recipe.candidates)} "
            f"{'without' if judge_on is None else 'and'} judge_on; give both or neither"
        )


def solve_best(job: Job, judge_on: Text | None, fresh: Text | None = None) -> Solved:
    """Return a job solved; of one with candidates that which diverges least.

    ``KL(dense ‖ pruned)`` per token of ``judge_on`` decides, see :class:`Divergence`; the first of
    equal ones is kept. Candidates share sums, scores, error curves and sensitivities as far as they
    would compute the same. Of several ranks all solve each candidate together, and share the text
    that it is judged on.
    """
    if not job.recipe.candidates:
        return Solved.of(job, fresh)
    with job.clock("judge"):
        judge = Divergence(job.model, judge_on, job.ranks)
    found, best, passes = {}, None, 0
    for name, recipe in candidates_of(job.asked).items():
        own = {"rows": [], "sensitivities": {}, "facts": {}, "grid": {}, "notes": []}
        other = replace(job, recipe=recipe, **own)
        other.check()
        solved = Solved.of(other, fresh)
        with job.clock("judge"):
            found[name] = solved.divergence(judge)
        if best is None or found[name] < best[0]:
            best = found[name], solved
        passes += other.facts.get("calibrate_passes", 0)
        job.speed = other.speed
        sums = solved.passes
        if sums is not None and sums.model is job.model and len(sums.groups) == 1:
            job.left = sums.bank  # the next ones take no pass
    kept = best[1].job
    kept.facts |= {"calibrate_passes": passes, "candidates": found, **work_of(job.ranks)}
    kept.notes.append(_said(found))
    return best[1]


def _said(found: Mapping[str, float]) -> str:
    """Return what became of the candidates."""
    ranked = sorted(found, key=found.get)
    values = ", ".join(f"{name} {found[name]:.3g}" for name in ranked)
    return (
        f"Of {len(found)} candidates the one is kept that diverges least from the dense model on "
        f"text that none of them saw, in nats per token: {values}."
    )
