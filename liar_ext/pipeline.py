"""The whole job: calibrate, score, allocate, reconstruct, slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from liar_ext.calibration.gradients import check_loss
from liar_ext.calibration.passes import Passes, group_sites, room_for_sums
from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.checkpoint.stock_config import how_to_load
from liar_ext.data.batches import Batches, probe_batches
from liar_ext.errors import InputError
from liar_ext.evaluation import perplexity
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import sites
from liar_ext.narrowing.narrowing import count_kept, narrow
from liar_ext.plan import Budget, Plan
from liar_ext.reconstruction.layerwise import check_target, reconstruct_layerwise
from liar_ext.reconstruction.one_pass import reconstruct as solve_sites
from liar_ext.reconstruction.settings import check_settings
from liar_ext.report.clock import Clock
from liar_ext.report.report import Report, versions, what_to_know
from liar_ext.report.rows import SiteRow
from liar_ext.selection.allocation import check_budget, total_cost
from liar_ext.selection.criteria import get_criterion, score
from liar_ext.selection.curve_allocation import decide, measure_losses
from liar_ext.selection.refine import check_refine
from liar_ext.surgery.units import apply_plan, is_pruned

SCHEDULES = ("one-pass", "layerwise")


def prune(
    model: nn.Module,
    batches: Batches,
    keep: float | Budget = 0.8,
    *,
    criterion: str = "wifv",
    allocation: str = "curve",
    refine: int = 0,
    reconstruct: str = "auto",
    damp: float | str = "auto",
    schedule: str = "one-pass",
    target: str | None = None,
    refit: bool = False,
    keep_hidden: float = 1.0,
    kinds: Sequence[str] = ("attn", "mlp"),
    attn_unit: str = "auto",
    seed: int = 0,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> Report:
    """Prune ``model`` in place to a budget and reconstruct what was removed, without retraining.

    Calibrate (one pass of the dense model over ``batches``), score every unit, allocate the budget,
    solve every consumer ``W' = W_K + W_P G_PK (G_KK + Λ)⁻¹`` with λ chosen on held-out tokens, then
    slice the modules.

    Parameters
    ----------
    model : nn.Module
        A transformers model of a known family; it is changed only in the last step.
    batches : iterable of mapping
        See :func:`liar_ext.calibrate`.
    keep : float or Budget
        Fraction of the prunable parameters that may stay, or a :class:`liar_ext.Budget`.
    criterion : str
        Importance score; see :func:`liar_ext.score`. ``snip``, ``taylor`` and ``fisher`` hold all
        batches and run the model backward over them, once.
    allocation : {"uniform", "global", "curve"}
        How the pruning ratio is distributed over the sites; see :func:`liar_ext.allocate`.
        ``curve`` measures error curves and sensitivities for it:
        see :func:`liar_ext.selection.curve_allocation.measure_losses`.
    refine : int
        For ``curve``: whole plans to measure after that; see
        :func:`liar_ext.selection.refine.refine_plan`.
    reconstruct : {"auto", "none", "bias", "linear", "affine"}
        Error compensation in the weights that stay; see :func:`liar_ext.reconstruct`.
    damp : float or "auto"
        λ, or the held-out choice.
    schedule : {"one-pass", "layerwise"}
        Solve all sites on what the dense model computes, or one after the other on what the pruned
        model computes up to there. Layerwise holds all batches and runs the model some four times.
    target : {"dense-input", "branch", "stream", "auto"}, optional
        What a site is solved for in layerwise mode, "auto" by default; see
        :func:`liar_ext.reconstruct_layerwise`.
    refit : bool
        Solve the sites that lose nothing, too, in layerwise mode.
    keep_hidden : float
        Fraction of the hidden size that may stay, in (0, 1]; see :func:`liar_ext.narrow`. The
        stream is narrowed first, on a copy of the model; ``keep`` counts what is left then, and
        the sites are calibrated and solved there. With ``keep=1.0`` they stay as they are.
    kinds : sequence of {"attn", "mlp"}
        Sites that may be pruned.
    attn_unit : {"auto", "kv_group", "head"}
        What an attention unit is.
    seed : int
        For criteria that draw.
    evaluate_on : sequence of mapping, optional
        Batches of held-out text; the report then has dense and pruned perplexity.
    memory : int, optional
        Bytes that sums over the calibration text may take at a time: 32 GiB for those of the sites
        and 8 GiB for those of :func:`liar_ext.narrow` unless given, or half of what is free on a
        device in use, the CPU included, where that is less. What needs more is summed in groups,
        with the same result: of G groups of sites in 2 G − 1 passes, G with the schedule
        ``layerwise``. ``refine`` needs all sites at once.
    progress : bool
        Show progress bars.

    Returns
    -------
    Report
        With the plan as ``report.plan``.

    Raises
    ------
    InputError
        If an argument, the model, the data or the budget cannot be used; the model is then as
        it was.

    Notes
    -----
    FLAP is ``criterion="wifv", allocation="global", reconstruct="bias"``; Wanda-sp is
    ``criterion="wanda", allocation="uniform", reconstruct="none"``.
    """
    budget = keep if isinstance(keep, Budget) else Budget(keep)
    get_criterion(criterion)
    check_refine(refine, allocation)
    check_settings(reconstruct, damp)
    target = _check_schedule(schedule, target, refit, reconstruct)
    if is_pruned(model):
        raise InputError(
            "prune: the model is pruned already; start from the dense model, with a smaller keep"
        )
    at = sites(model, kinds, attn_unit)
    total = total_cost(model, at, budget)
    check_budget(at, budget, allocation, total)
    if memory is not None and memory <= 0:
        raise InputError(f"prune: memory must be more than 0 bytes, got {memory}")
    room = room_for_sums(model, memory)
    if refine and len(group_sites(at, room)) > 1:
        raise InputError(
            "prune: refine solves all sites for each plan, and their sums are over "
            f"{room / 2**30:.3g} GiB; raise memory, or leave refine out"
        )
    clock = Clock()
    if keep_hidden != 1.0:
        count_kept(hidden_of(model), keep_hidden, budget.multiple_of)
    backward = get_criterion(criterion).needs == "gradient"
    if backward or allocation == "curve" or schedule == "layerwise" or keep_hidden != 1.0:
        batches = list(batches)  # to be gone through again
    if backward and batches:
        check_loss(model, batches[0])

    evaluation = {}
    if evaluate_on is not None:
        with clock("evaluate"):
            evaluation["dense"] = perplexity(model, evaluate_on, progress=progress)
    prunable = sum(site.params for site in at)
    narrow_model, narrowing = model, None
    if keep_hidden != 1.0:
        with clock("narrow"):
            narrowing = narrow(
                model,
                batches,
                keep_hidden,
                mode=reconstruct,
                damp=damp,
                multiple_of=budget.multiple_of,
                memory=memory,
                progress=progress,
            )
            narrow_model = narrowing.applied_to_copy(model)
        at = sites(narrow_model, kinds, attn_unit)
        total = total_cost(narrow_model, at, budget)
    plan = Plan(model.config.model_type, attn_unit, {}, asdict(budget))
    weights, rows, sensitivities, divergences, taken = {}, [], {}, {}, {}
    if narrowing is None or budget.keep < 1.0:
        passes = Passes(narrow_model, batches, at, room, progress=progress)
        settings = {"mode": reconstruct, "progress": progress}
        scores, losses, sensitivities = _measure(
            passes, criterion, allocation, budget, seed, clock, **settings
        )
        with clock("allocate"):
            plan, divergences = decide(
                narrow_model,
                passes.bank,
                at,
                scores,
                budget,
                allocation,
                batches,
                refine=refine,
                total=total,
                losses=losses,
                **settings,
            )
        settings["damp"] = damp
        if schedule == "one-pass":
            weights, rows = _solve(passes, plan, clock, **settings)
        else:
            with clock("reconstruct"):
                weights, rows = reconstruct_layerwise(
                    narrow_model, batches, plan, target=target, refit=refit, **settings
                )
        source, taken["calibrate_passes"] = passes.bank.source, passes.taken
    hidden_rows = []
    if narrowing is not None:
        plan, weights = replace(plan, hidden=narrowing.kept), {**narrowing.weights, **weights}
        source, hidden_rows = narrowing.source, narrowing.rows
        taken["narrow_passes"] = source["passes"]
    before = count_params(model)
    with clock("surgery"):
        apply_plan(model, plan, weights)
    if evaluate_on is not None:
        with clock("evaluate"):
            evaluation["pruned"] = perplexity(model, evaluate_on, progress=progress)
    return Report(
        model=model.config.name_or_path or type(model).__name__,
        plan=plan,
        budget=asdict(budget),
        settings={
            "criterion": criterion,
            "allocation": allocation,
            "refine": refine,
            "reconstruct": reconstruct,
            "damp": damp,
            "schedule": schedule,
            "target": target,
            "refit": refit,
            "keep_hidden": keep_hidden,
            "kinds": list(kinds),
            "attn_unit": plan.attn_unit,
            "seed": seed,
            "calibration_sequences": source["sequences"],
            "calibration_tokens": source["tokens"],
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": ", ".join(sorted({str(each.device) for each in model.parameters()})),
            "threads": torch.get_num_threads(),
            **divergences,
            **taken,
        },
        versions=versions(),
        sites=[replace(row, sensitivity=sensitivities.get(row.name)) for row in rows],
        hidden=hidden_rows,
        params={
            "before": before,
            "after": count_params(model),
            "prunable_before": prunable,
            "prunable_after": sum(
                [row.params_after for row in rows] or [site.params for site in at]
            ),
        },
        evaluation=evaluation,
        seconds=clock.seconds,
        warnings=what_to_know(
            [*rows, *hidden_rows], reconstruct, source["tokens"], max(site.d_in for site in at)
        ),
        loading=how_to_load(model, plan),
    )


def _measure(
    passes: Passes,
    criterion: str,
    allocation: str,
    budget: Budget,
    seed: int,
    clock: Clock,
    *,
    mode: str,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Return the scores of all sites, and for ``curve`` their losses and sensitivities."""
    model, batches = passes.model, passes.batches
    scores, losses, sensitivities = {}, {}, {}
    probe = probe_batches(batches) if allocation == "curve" else []
    for group in clock.each("calibrate", passes):
        with clock("score"):
            scores |= score(
                model,
                passes.bank,
                group,
                criterion,
                seed=seed,
                batches=batches,
                per="feature" if allocation == "global" else "unit",
                progress=progress,
            )
        if allocation == "curve":
            with clock("allocate"):
                measured = measure_losses(
                    model, passes.bank, group, scores, budget, probe, mode=mode, progress=progress
                )
                losses |= measured[0]
                sensitivities |= measured[1]
    return scores, losses, sensitivities


def _solve(passes: Passes, plan: Plan, clock: Clock, **settings) -> tuple[dict, list[SiteRow]]:
    """Solve the sites of a plan on the dense model's moments."""
    weights, rows = {}, {}
    for group in clock.each("calibrate", passes.back()):
        with clock("reconstruct"):
            here = replace(plan, sites={site.name: plan.sites[site.name] for site in group})
            more, some = solve_sites(passes.model, passes.bank, here, **settings)
            weights |= more
            rows |= {row.name: row for row in some}
    return weights, [rows[name] for name in plan.sites]


def _check_schedule(schedule: str, target: str | None, refit: bool, mode: str) -> str:
    """Return the target; raise InputError unless the schedule can have it."""
    if schedule not in SCHEDULES:
        raise InputError(f"prune: schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "layerwise":
        target = "auto" if target is None else target
        check_target(target, mode)
        return target
    if refit or target not in (None, "dense-input"):
        raise InputError(
            "prune: in one pass a site knows its dense input only, got "
            f'target={target!r}, refit={refit}; use schedule="layerwise"'
        )
    return "dense-input"
