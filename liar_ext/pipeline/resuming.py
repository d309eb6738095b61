"""Jobs that go on where a process that has ended was: which job it is, and what it decided."""

from __future__ import annotations

from typing import Any

from liar_ext.bars import spare
from liar_ext.calibration.fingerprints import digest_of
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.saved_sums import SUMS
from liar_ext.data.batches import Batches
from liar_ext.errors import InputError
from liar_ext.pipeline.job import Job
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.saved.progress import Progress

PLAN, RESULT = "plan", "result"


def check(recipe: Recipe) -> None:
    """Raise InputError if a job can't go on with the same result."""
    if recipe.of == "latency":
        raise InputError(
            "checkpoint: --of latency decides by seconds, which come out otherwise every time; "
            "leave it or --checkpoint out"
        )


def begin(job: Job, texts: dict[str, Batches | None], **kept: Any) -> dict[str, Any]:
    """Note in its checkpoint which job this is, or check that it is the one that was begun there.

    Parameters
    ----------
    job : Job
        With a checkpoint.
    texts : dict
        What it runs over beside the calibration text, by name.
    **kept
        What is to stay as it is now.

    Returns
    -------
    dict
        What was kept when the job was begun.

    Raises
    ------
    InputError
        If another job was begun there.
    """
    texts = {"calibration text": job.batches, **texts}
    stamp = {
        "weights": job.weights_digest(),
        "dtype": str(job.model.dtype),
        **{name: None if text is None else digest_of(text) for name, text in texts.items()},
        "bank": None if job.bank is None else job.bank.source.get("data"),
        "recipe": job.recipe.to_dict(),
        "judged text": None if job.judged is None else digest_of(job.judged),
    }
    known = job.saved.begin(stamp, **kept)
    return {name: known[name] for name in kept}


def decide(job: Job, passes: Any) -> Plan:
    """Return the plan of a job; what a checkpoint has of it isn't computed again.

    ``passes`` give the sums, in memory or block by block; None where none are needed.
    """
    known = None if job.saved is None or passes is None else job.saved.get(PLAN)
    if known is not None:
        for stage, steps in job.before_plan().items():
            spare(stage, steps)
        facts = known.facts
        passes.summed = facts["summed"]
        if job.bank is None:
            passes.bank = MomentBank(source=facts["source"])
        job.source = facts["source"]
        job.facts |= facts["facts"]
        job.grid |= facts["grid"]
        job.sensitivities |= facts["sensitivities"]
        return Plan.from_json(facts["plan"])
    plan = job.allocate(passes, *job.score(passes))
    if job.saved is not None and passes is not None:
        facts = {"plan": plan.to_json(), "said": "the plan"}
        facts |= {name: getattr(job, name) for name in ("facts", "grid", "sensitivities")}
        source = {name: passes.bank.source[name] for name in ("sequences", "tokens")}
        job.saved.put(PLAN, facts=facts | {"source": source, "summed": passes.summed})
    if job.saved is not None and job.recipe.schedule == "layerwise" and job.judged is None:
        job.saved.drop(SUMS)  # which a walk alone doesn't need
    return plan


def note_result(saved: Progress | None, plan: Plan) -> None:
    """Note the plan of a folder that is written next, so that it is known for the job's."""
    if saved is not None:
        saved.put(RESULT, facts={"plan": plan.to_json()})
