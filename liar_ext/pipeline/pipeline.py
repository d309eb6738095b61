"""The whole job, in the order of its steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from liar_ext.bars import Stage, Timeline
from liar_ext.calibration.moments import MomentBank
from liar_ext.data.batches import Batches
from liar_ext.errors import InputError
from liar_ext.pipeline.expected import stages_of
from liar_ext.pipeline.job import Job
from liar_ext.pipeline.resuming import begin, check, decide
from liar_ext.plan import Budget, Plan
from liar_ext.ranks import ALONE, Ranks
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields
from liar_ext.report.report import Report
from liar_ext.rescaling import Rescaling, rescale_batches
from liar_ext.saved.progress import Progress, opened

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
    checkpoint: str | os.PathLike[str] | Progress | None = None,
    ranks: Ranks = ALONE,
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
        Batches of held-out text; the report then has dense and pruned perplexity.
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
    ranks : Ranks
        Processes that share the work, from :meth:`liar_ext.ranks.Ranks.join`: each calls this with
        the same model, text and choices, and has the same pruned model then. The first one alone
        evaluates and certifies, and has that in its report.
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
    FLAP is ``criterion="wifv", allocation="global", reconstruct="bias", tile=1``; Wanda-sp's
    score and ratios are ``criterion="wanda", allocation="uniform", reconstruct="none", tile=1``, on
    the dense model's activations.
    """
    if batches is None and bank is None:
        raise InputError("prune: needs batches or a bank, got neither; give one of them")
    check_choices(choices)
    job = Job(model, batches, Recipe.build(recipe, **choices), progress, bank, ranks=ranks)
    job.judged = judge_on
    with opened(checkpoint, ranks) as job.saved:
        return run(job, evaluate_on, certify_on)


def run(
    job: Job,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None = None,
    certify_on: Sequence[Mapping[str, Tensor]] | None = None,
) -> Report:
    """Run the steps of a job in their order."""
    job.ranks.work.clear()
    if job.saved is not None:
        check(job.recipe)
    job.check()
    if job.saved is not None:
        # What is free changes, and other groups of sites would have other sums.
        job.room = begin(job, {"fresh text": certify_on}, room=job.room)["room"]
    with Timeline("prune", expected(job, evaluate_on)).shown():
        return _steps(job, evaluate_on, certify_on)


def expected(
    job: Job, evaluate_on: Sequence[Mapping[str, Tensor]] | None = None
) -> dict[str, Stage]:
    """Return the stages of a job that has been checked; none where nobody looks on."""
    room = job.room  # which ranks find out together, whoever of them shows progress
    if not job.progress:
        return {}
    at, both = job.sites(job.model), job.judged is not None
    return stages_of(job.model, at, job.batches, job.recipe, room, evaluate_on, both=both)


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


def _outputs(job: Job) -> Rescaling | None:
    """Note what the dense model gives, where scales are to bring the pruned one nearer to it."""
    if not job.recipe.rescale:
        return None
    with job.clock("rescale"):
        return Rescaling(job.model, rescale_batches(job.batches), job.ranks)


def _rescale(job: Job, dense: Rescaling | None, plan: Plan) -> None:
    """Scale what the layers of the sliced model give, where that brings it nearer."""
    if dense is None:
        return
    with job.clock("rescale"):
        found = dense.fit(job.model, plan.attn_unit, progress=job.progress)
    job.facts |= found.facts()
    if not found.scales:
        job.notes.append("Nothing was rescaled: no scales bring held-out outputs nearer.")
