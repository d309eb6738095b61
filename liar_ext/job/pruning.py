"""The whole job, in the order of its steps; on a model in memory, or from folder to folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import Batches, kept_batches, read_batches
from liar_ext.calibration.divergence import Divergence
from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.placing import nearest_folder
from liar_ext.checkpoint.saving import fill_folder, writing
from liar_ext.job.analysis import Base, Decision, decide, narrowed, passes_of
from liar_ext.job.estimate import bars_of, by_blocks, stages_of
from liar_ext.job.preparing import prepare, recorded
from liar_ext.job.solving import Solved, reconstruct, rescale, rescale_batches
from liar_ext.job.state import Evaluation, Folder, Job
from liar_ext.models.plan import Budget, Plan
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_checks import PruneOptions, TextOptions, check_keywords
from liar_ext.models.recipe_fields import DTYPES, recipe_fields
from liar_ext.models.registry import source_of
from liar_ext.models.running import device_of
from liar_ext.models.slicing import apply_plan
from liar_ext.reconstruction.solve import SiteRow, what_to_know
from liar_ext.reconstruction.streams import HiddenStates, Walk, features_once
from liar_ext.report.report import Report, versions
from liar_ext.selection.sensitivity import POSITIONS
from liar_ext.system.checkpoint_store import RESULT, Checkpoint, opened
from liar_ext.system.distributed import is_first
from liar_ext.system.errors import InputError, naming_memory
from liar_ext.system.progress import OnProgress, Stage, Timeline, showing_bars, shows_bars

# What the command does around prune, and what does it in Python.
AROUND_ALL = (
    "liar_ext.compress takes it; prune takes a model and batches, made by load_model and "
    "calibration_sequences(...).batches()"
)
AROUND: dict[str, str] = {
    **dict.fromkeys((each.name for each in recipe_fields(in_python=False)), AROUND_ALL),
    "certify": "give certify_on the batches",
    "eval": "give evaluate_on the batches",
    "judge": "give judge_on the batches; calibration_sequences(judge=...) draws them",
    "max_memory": "liar_ext.compress takes it, and a folder as the model",
    "out": "liar_ext.save_pruned writes the folder",
    "overwrite": "liar_ext.save_pruned takes it",
    "text": "calibration_sequences([read_documents(text)], tokenizer).batches() makes the batches",
}


def prune(
    model: nn.Module,
    batches: Batches | None = None,
    recipe: Recipe | Budget | float | None = None,
    *,
    bank: MomentBank | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool | OnProgress = False,
    **choices: Unpack[PruneOptions],
) -> Report:
    """Prune ``model`` in place to a budget and reconstruct the outputs, without retraining.

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
        A transformers model of a known family, dense or pruned before; it is changed, with its
        config, in the last step only.
    batches : iterable of mapping, optional
        The calibration set; see :func:`liar_ext.calibrate`. The text of ``bank`` if not given.
    recipe : Recipe, Budget or float, optional
        Every choice, see :class:`liar_ext.Recipe`; or ``keep`` alone, the fraction of the prunable
        parameters that may stay, or a :class:`liar_ext.Budget`.
    bank : MomentBank, optional
        The moments of this model over ``batches``, from :func:`liar_ext.calibrate`. Sensitivities,
        unless the bank has them, gradients and walks still run over ``batches``.
    checkpoint : path, optional
        A folder to save progress in, and to resume the same job from, with any number of ranks.
        The result has the same bits. The folder stays.
    progress : bool or callable
        Show progress bars; or call ``progress(stage, done, total, seconds_left)`` after each step
        instead, the last two None if unknown. An exception of the callable ends the job.
    **choices
        Fields of the recipe that differ from ``recipe`` or the default: ``keep``, ``criterion``,
        ``schedule``, ...; ``preset``, such as ``"fast"``; ``sites``, such as ``"mlp"``. Those that
        load the model and draw the text are of :func:`liar_ext.compress`.

    Returns
    -------
    Report
        With the recipe as ``report.recipe`` and the plan, of the dense model, as ``report.plan``.
        If the model was pruned before, ``report.earlier`` tells of it.

    Other Parameters
    ----------------
    evaluate_on : sequence of mapping, optional
        Batches of held-out text, or of other inputs of an encoder. The report then has dense and
        pruned perplexity, or what :func:`liar_ext.encoder_similarity` measures.
    certify_on : sequence of mapping, optional
        Fresh batches of the calibration set's kind, at least two sequences. No decision sees them;
        the report then has errors on them, of each site's new weights and of the whole model.
    judge_on : sequence of mapping, optional
        Fresh batches of the calibration set's kind. They decide ``schedule="auto"``: layers are
        solved in one pass and layer by layer, and the model is kept that diverges less from the
        dense one on them. By default every eighth sequence of ``batches`` is held out for it, if
        there are 32 or more; with fewer, or a ``bank``, see :meth:`liar_ext.Recipe.settled`.

    Raises
    ------
    InputError
        If a choice, the model, the data or the budget cannot be used; the model is then as it was.

    Notes
    -----
    Each of ``report.warnings`` is a UserWarning, too. Processes that have met by
    :func:`liar_ext.distributed.join` share the work: each calls this with the same model, text and
    choices, and has the same pruned model then. The first one alone evaluates.

    ``preset="flap"`` is FLAP: ``criterion="wifv", allocation="global", reconstruct="bias",
    tile=1``; ``preset="wanda-sp"`` is Wanda-sp's score and ratios, ``criterion="wanda",
    allocation="uniform", reconstruct="none", tile=1``, on the dense model's activations.
    """
    if batches is None and bank is None:
        raise InputError("prune: needs batches or a bank, got neither; give one of them")
    own = "bank", "checkpoint", "progress"
    check_keywords("prune", choices, [*PruneOptions.__annotations__, *own], AROUND)
    texts = {name: kept_batches(choices.pop(name, None)) for name in TextOptions.__annotations__}
    texts["judged"] = texts.pop("judge_on")
    built = Recipe.build(recipe, **choices)
    with naming_memory("prune: out of memory"), showing_bars(progress), opened(checkpoint) as saved:
        report = run(Job(model, batches, built, bank, saved=saved, **texts))
    for note in report.warnings if is_first() else ():
        warnings.warn(note, stacklevel=2)
    return report


def prune_folder(
    store: BlockStore | None,
    job: Job,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    annotate: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Prune a model and save it, as :func:`liar_ext.prune` and :func:`liar_ext.save_pruned` do.

    With a ``store`` the model is read block by block and written as it is solved, within the
    ``limit`` of the job for each process. ``annotate`` adds to the report before it is written.
    """
    with ExitStack() as stack:
        begin = partial(stack.enter_context, writing(folder, overwrite))
        if store is not None:
            walk = Walk(store, job.recipe.attn_unit, job.saved)
            stack.callback(store.close)
            stack.callback(walk.states.close)
            walk.states.folder = nearest_folder(folder)
            batches, tokenizer = list(read_batches(job.batches)), store.tokenizer
            job = replace(job, batches=batches, walk=walk, out=Folder(walk, begin))
        report = run(job)
        if is_first():
            annotate(report)
            if job.saved is not None:
                job.saved.put(RESULT, facts={"plan": report.plan.to_json()})
            if job.out is not None:
                job.out.complete(job.model, report, tokenizer)
            else:
                fill_folder(job.model, begin(), report.plan, report=report, tokenizer=tokenizer)
    return report


def run(job: Job) -> Report:
    """Do a job, and return every number that a user needs to trust the result."""
    if job.saved is not None:
        check_resumable(job.recipe)
    job = recorded(prepare(job))  # refuses whatever can't work
    with _running(job):
        evaluation = Evaluation(job)  # of the dense model
        base = narrowed(job, evaluation)  # fewer blocks, experts or hidden features, on a copy
        passes = passes_of(job, base, evaluation)  # moments of all sites, group by group
        decision = decide(job, passes)  # scores, error curves and sensitivities; the plan
        solved = reconstruct(job, passes, decision.plan, evaluation)  # new weights
        plan, rows = slice_modules(job, base, decision.plan, solved)
        return report_of(job, base, replace(decision, plan=plan), solved, rows, evaluation.result())


@contextmanager
def _running(job: Job) -> Iterator[None]:
    """Show the progress of a job, and run the features of its text once."""
    states = HiddenStates() if job.walk is None else job.walk.states
    bars = bars_of(job) if shows_bars() else []
    if job.walk is not None:
        states.memory = job.shares.states
        bars = by_blocks(bars, len(job.walk.blocks), job.shares.keep_sums)
    stages = {n: Stage(each.steps, each.seconds) for n, each in stages_of(bars).items()}
    timeline = Timeline(stages, [each.name for each in bars])
    # New parameters are of the kind of the old ones, in whatever mode the caller is.
    mode = torch.inference_mode(any(each.is_inference() for each in job.model.parameters()))
    with mode, timeline.shown(), features_once(job.model, states):
        yield


def check_resumable(recipe: Recipe) -> None:
    """Raise InputError if a job can't be resumed with the same result."""
    if recipe.of == "latency":
        raise InputError(
            "checkpoint: --of latency decides by seconds, which come out otherwise every time; "
            "leave it or --checkpoint out"
        )


def slice_modules(job: Job, base: Base, plan: Plan, solved: Solved) -> tuple[Plan, list[SiteRow]]:
    """Slice the model, and rescale it if asked; return the plan of the dense model, and rows."""
    model, out, dense, rows = job.model, job.out, None, {}
    if job.recipe.rescale:
        with job.clock("rescale"):
            dense = Divergence(model, rescale_batches(job.batches), POSITIONS)
    full, missing = replace(plan, **base.gone), base.weights
    whole = stock_config.from_dense(model, full)
    if base.model is model:  # it lacks nothing, or has lost its experts already
        full, missing = plan, {}
    for index, weights, found in solved.blocks:
        rows |= found
        with job.clock("surgery"):
            some = None if index is None else [index]
            apply_plan(model, full, {**missing, **weights}, blocks=some)
            if out is not None:
                out.add(index, job.shares.shard)
    with job.clock("surgery"):
        if out is not None:
            out.add(None, job.shares.shard)
        done = {"params": [job.params["before"], count_params(model)]}
        stock_config.describe(model, {"budget": job.recipe.budget.to_dict(), **done})
    model.liar_plan = whole
    if dense is not None:
        with job.clock("rescale"):
            fitted = rescale(dense, model, plan.attn_unit)
        solved.facts |= fitted.facts()
        if not fitted.scales:
            solved.notes.append("Nothing was rescaled: no scales bring held-out outputs nearer.")
    return whole, [rows[name] for name in plan.sites]


def report_of(
    job: Job,
    base: Base,
    decision: Decision,
    solved: Solved,
    rows: Sequence[SiteRow],
    evaluation: Mapping[str, Mapping[str, float]],
) -> Report:
    """Return every number that a user needs to trust the result."""
    model, recipe, plan, speed = job.model, job.recipe, decision.plan, decision.speed
    source = solved.source or base.source
    left = sum(each.params_after for each in rows) if rows else sum(s.params for s in base.at)
    said = [*job.notes, *solved.notes, *decision.grid.get("warnings", [])]
    if rows or base.hidden:
        given = [*rows, *base.hidden], recipe.reconstruct, source["tokens"]
        said = what_to_know(*given, max(site.d_in for site in base.at)) + said
    # The recipe is resolved, but for a schedule that was chosen by measuring.
    asked = recipe if job.judged is None else replace(recipe, schedule="auto")
    devices = {str(each.device) for each in model.parameters() if not each.is_meta}
    return Report(
        model=recipe.model or source_of(model) or type(model).__name__,
        plan=plan,
        recipe=as_run(asked, model, source),
        budget=recipe.budget.to_dict(),
        earlier=list(job.earlier),
        settings={
            "schedule": solved.schedule,
            "attn_unit": plan.attn_unit,
            "calibration_sequences": source["sequences"],
            "calibration_tokens": source["tokens"],
            "dtype": _dtype(model),
            "device": ", ".join(sorted(devices)),
            "threads": torch.get_num_threads(),
            **decision.facts,
            **solved.facts,
            **base.settings,
        },
        versions=versions(),
        sites=[
            *base.rows,
            *(replace(row, sensitivity=decision.sensitivities.get(row.name)) for row in rows),
        ],
        hidden=list(base.hidden),
        grid={**decision.grid, **base.grid},
        params={**job.params, "prunable_after": left, "after": count_params(model)},
        latency={} if speed is None else speed.facts(),
        evaluation=evaluation,
        seconds=job.clock.seconds,
        warnings=said + ([] if speed is None else speed.warnings()),
        loading=stock_config.how_to_load(model, plan),
    )


def as_run(recipe: Recipe, model: nn.Module, source: Mapping[str, int]) -> Recipe:
    """Return a recipe with the dtype, device and text of the job, if it doesn't name them."""
    changes: dict[str, object] = {"text_digests": {}}  # of batches there are no names
    if _dtype(model) in DTYPES:
        changes["dtype"] = _dtype(model)
    if recipe.device != "auto":
        changes["device"] = str(device_of(model))
    if not recipe.calibration:  # the batches were drawn elsewhere
        count = max(source["sequences"], 2)
        changes |= {"samples": count, "self_text": 0.0, "random_tokens": 0.0}
        if recipe.of not in ("flops", "latency"):  # whose budgets are of another length
            changes["seq_len"] = max(source["tokens"] // count, 1)
    return replace(recipe, **changes)


def _dtype(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")
