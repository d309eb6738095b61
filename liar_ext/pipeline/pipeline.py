"""The whole job, in the order of its steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from liar_ext.bars import Timeline, spare
from liar_ext.calibration.fingerprints import digest_of
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.saved_sums import SUMS
from liar_ext.checkpoint_store import Checkpoint, opened, reading
from liar_ext.data.batches import Batches
from liar_ext.errors import InputError
from liar_ext.pipeline.estimate import Estimate, bars_of, stages_of
from liar_ext.pipeline.job import Job
from liar_ext.pipeline.rescaling import Rescaling, rescale_batches
from liar_ext.plan import Budget, Plan
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields
from liar_ext.report.report import Report

PLAN = "plan"  # its key in a checkpoint
# What the command does around prune, and what does it in Python.
AROUND: dict[str, str] = {
    **{each.name: each.metadata["in_python"] for each in recipe_fields()},
    "judge": "give judge_on the batches; calibration_sequences(judge=...) draws them",
    "preset": "give liar_ext.Recipe.preset(NAME) as the recipe",
}


def check_choices(choices: Mapping[str, object]) -> None:
    """Raise InputError for a choice of the command that :func:`prune` itself can't heed."""
    for name in choices:
        if AROUND.get(name):
            raise InputError(f"prune: {name} is no keyword of prune in Python: {AROUND[name]}")


def prune(
    model: nn.Module,
    batches: Batches | None = None,
    recipe: Recipe | Budget | float | None = None,
    *,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None = None,
    certify_on: Sequence[Mapping[str, Tensor]] | None = None,
    judge_on: Sequence[Mapping[str, Tensor]] | None = None,
    bank: MomentBank | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool = False,
    **choices: object,
) -> Report:
    """Prune ``model`` in place to a budget and reconstruct what was removed, without retraining.

    Calibrate (one pass of the dense model over ``batches``), score every unit, allocate the budget,
    solve every consumer ``W' = W_K + W_P G_PK (G_KK + Λ)⁻¹`` with λ chosen by cross-validation,
    then slice the modules::

        prune(model, batches, keep=0.8)
        prune(model, batches, keep=0.5, schedule="layerwise", uniform_layers=True)
        prune(model, batches, Recipe.load("pruned/liar/recipe.yaml"))
        prune(model, bank=MomentBank.load("moments.safetensors"), keep=0.8)

    Parameters
    ----------
    model : nn.Module
        A transformers model of a known family, dense or pruned before; it is changed only in the
        last step. Its config then says the new sizes, so that ``model.save_pretrained`` works.
    batches : iterable of mapping, optional
        The calibration set; see :func:`liar_ext.calibrate`. The text of ``bank`` if not given.
    recipe : Recipe, Budget or float, optional
        Every choice, see :class:`liar_ext.Recipe`; or ``keep`` alone, the fraction of the prunable
        parameters that may stay, or a :class:`liar_ext.Budget`.
    evaluate_on : sequence of mapping, optional
        Batches of held-out text, or of other inputs of an encoder. The report then has dense and
        pruned perplexity, or what :func:`liar_ext.encoder_similarity` measures.
    certify_on : sequence of mapping, optional
        Batches of the calibration set's kind, at least two sequences, that ``batches`` lacks. No
        decision sees them; the report then has errors on them: of each site's new weights, on the
        input and for the target that they were solved for, and the divergence of the whole model.
    judge_on : sequence of mapping, optional
        Batches of the calibration set's kind, that ``batches`` lacks. They decide
        ``schedule="auto"``: layers are solved in one pass and layer by layer, and the whole model
        is kept that diverges less from the dense one on them. By default every eighth sequence of
        ``batches`` is held out for it, if there are 32 or more; with fewer, and with a ``bank``,
        ``auto`` is as :meth:`liar_ext.Recipe.settled` says.
    bank : MomentBank, optional
        The moments of this model over ``batches``, from :func:`liar_ext.calibrate`: then they are
        not summed again. ``batches`` is still what sensitivities, gradients and walks run over;
        where the bank has the sensitivities that the recipe asks for, those aren't measured.
    checkpoint : path, optional
        A folder to keep what is done in, and to go on from where it has something of this very
        job: sums over the first batches, divergences that sensitivities are made of, the plan,
        and layerwise the blocks that are done. The result has the same bits. The folder stays
        when all is done. Of several ranks the first one alone works in it, and any number of them
        can go on from it.
    progress : bool
        Show progress bars.
    **choices
        Fields of the recipe that are other than in ``recipe``, or than by default: ``keep``,
        ``criterion``, ``allocation``, ``reconstruct``, ``schedule``, ... Those by which the command
        loads the model and draws the text are refused.

    Returns
    -------
    Report
        With the recipe as ``report.recipe`` and the plan as ``report.plan``: of the dense model,
        also where the model was pruned before, if that is known (``report.earlier`` tells of it).

    Raises
    ------
    InputError
        If a choice, the model, the data or the budget cannot be used; the model is then as it was.

    Notes
    -----
    Processes that have met by :func:`liar_ext.distributed.join` share the work: each calls this
    with the same model, text and choices, and has the same pruned model then. The first one alone
    evaluates, and has that in its report.

    FLAP is ``criterion="wifv", allocation="global", reconstruct="bias", tile=1``; Wanda-sp's
    score and ratios are ``criterion="wanda", allocation="uniform", reconstruct="none", tile=1``, on
    the dense model's activations.
    """
    if batches is None and bank is None:
        raise InputError("prune: needs batches or a bank, got neither; give one of them")
    check_choices(choices)
    job = Job(model, batches, Recipe.build(recipe, **choices), progress, bank)
    job.judged = judge_on
    with opened(checkpoint) as job.saved:
        return run(job, evaluate_on, certify_on)


def run(
    job: Job,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None = None,
    certify_on: Sequence[Mapping[str, Tensor]] | None = None,
) -> Report:
    """Run the steps of a job in their order."""
    if job.saved is not None:
        check_resumable(job.recipe)
    job.check()
    if job.saved is not None:
        # What is free changes, and other groups of sites would have other sums.
        job.room = begin(job, {"fresh text": certify_on}, room=job.room)["room"]
    with Timeline("prune", bars_of(expected(job, evaluate_on))).shown():
        return _steps(job, evaluate_on, certify_on)


def expected(
    job: Job, evaluate_on: Sequence[Mapping[str, Tensor]] | None = None
) -> dict[str, Estimate]:
    """Return the stages of a job that has been checked; none if no progress is shown."""
    _ = job.room  # which ranks find out together, whoever of them shows progress
    return stages_of(job, evaluate_on) if job.progress else {}


def _steps(
    job: Job,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None,
    certify_on: Sequence[Mapping[str, Tensor]] | None,
) -> Report:
    dense = job.evaluate(evaluate_on)
    passes = job.calibrate(job.narrow())
    plan = decide(job, passes)
    weights = job.reconstruct(passes, plan, certify_on)
    job.certify(certify_on, passes, plan, weights)
    dense_outputs = _outputs(job)
    plan = job.slice(plan, weights)
    _rescale(job, dense_outputs, plan)
    return job.report(plan, dense, job.evaluate(evaluate_on))


def check_resumable(recipe: Recipe) -> None:
    """Raise InputError if a job can't be resumed with the same result."""
    if recipe.of == "latency":
        raise InputError(
            "checkpoint: --of latency decides by seconds, which come out otherwise every time; "
            "leave it or --checkpoint out"
        )


def begin(job: Job, texts: Mapping[str, Batches | None], **kept: Any) -> dict[str, Any]:
    """Record the job in its checkpoint, or raise InputError if that is of another one.

    Parameters
    ----------
    job : Job
        With a checkpoint.
    texts : mapping
        All text but the calibration text, by name.
    **kept
        See :meth:`liar_ext.checkpoint_store.Checkpoint.begin`, which returns the facts.
    """
    texts = {"calibration text": job.batches, **texts, "judged text": job.judged}
    facts = {
        "weights": job.weights_digest(),
        "dtype": str(job.model.dtype),
        **{name: None if text is None else digest_of(text) for name, text in texts.items()},
        "bank": None if job.bank is None else job.bank.source.get("data"),
        "settings": job.recipe.to_dict(),
    }
    return job.saved.begin(facts, **kept)


def decide(job: Job, passes: Any) -> Plan:
    """Return the plan of a job, from its checkpoint if it is there.

    ``passes`` give the sums, in memory or block by block; None where none are needed.
    """
    saved = None if passes is None else job.saved
    known = None if saved is None else saved.get(PLAN)
    if known is not None:
        facts = known[1]
        with reading(saved.path(PLAN)):
            plan, passes.summed, job.source = (facts[n] for n in ("plan", "summed", "source"))
            plan = Plan.from_json(plan)
            for name in ("facts", "grid", "sensitivities"):
                setattr(job, name, getattr(job, name) | facts[name])
        if job.bank is None:
            passes.bank = MomentBank(source=job.source)
        for stage, steps in job.before_plan().items():
            spare(stage, steps)
        return plan
    plan = job.allocate(passes, *job.score(passes))
    if saved is not None:
        facts = {name: getattr(job, name) for name in ("facts", "grid", "sensitivities")}
        source = {name: passes.bank.source[name] for name in ("sequences", "tokens")}
        facts |= {"plan": plan.to_json(), "source": source, "summed": passes.summed}
        saved.put(PLAN, facts=facts | {"said": "the plan"})
    if job.saved is not None and job.recipe.schedule == "layerwise" and job.judged is None:
        job.saved.drop(SUMS)  # which a walk alone doesn't need
    return plan


def _outputs(job: Job) -> Rescaling | None:
    """Note what the dense model gives, where scales are to bring the pruned one nearer to it."""
    if not job.recipe.rescale:
        return None
    with job.clock("rescale"):
        return Rescaling(job.model, rescale_batches(job.batches))


def _rescale(job: Job, dense: Rescaling | None, plan: Plan) -> None:
    """Scale what the layers of the sliced model give, where that brings it nearer."""
    if dense is None:
        return
    with job.clock("rescale"):
        found = dense.fit(job.model, plan.attn_unit, progress=job.progress)
    job.facts |= found.facts()
    if not found.scales:
        job.notes.append("Nothing was rescaled: no scales bring held-out outputs nearer.")
