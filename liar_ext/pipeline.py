"""The whole job: calibrate, score, allocate, reconstruct, operate."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version

import torch
from torch import Tensor, nn

from liar_ext import ops
from liar_ext.allocation import allocate, check_budget, probe_plan, total_cost
from liar_ext.arch import Site, sites
from liar_ext.calibration import calibrate
from liar_ext.criteria import get_criterion, score
from liar_ext.curves import CURVE_DAMP, error_curves
from liar_ext.errors import InputError
from liar_ext.evaluation import perplexity
from liar_ext.gradients import check_loss
from liar_ext.layerwise import check_target, reconstruct_layerwise
from liar_ext.moments import MomentBank
from liar_ext.plan import Budget
from liar_ext.probe import count_params
from liar_ext.reconstruction import reconstruct as solve_sites
from liar_ext.reconstruction import with_bias
from liar_ext.report import Report, SiteRow
from liar_ext.sensitivity import site_divergences
from liar_ext.solution import check_settings
from liar_ext.stock import how_to_load
from liar_ext.surgery import apply_plan, is_pruned

Batches = Iterable[Mapping[str, Tensor] | Tensor]
SCHEDULES = ("one-pass", "layerwise")
PROBE_SEQUENCES = 4


def prune(
    model: nn.Module,
    batches: Batches,
    keep: float | Budget = 0.8,
    *,
    criterion: str = "wifv",
    allocation: str = "uniform",
    reconstruct: str = "linear",
    damp: float | str = "auto",
    schedule: str = "one-pass",
    target: str | None = None,
    refit: bool = False,
    kinds: Sequence[str] = ("attn", "mlp"),
    attn_unit: str = "auto",
    seed: int = 0,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None = None,
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
        Who goes; see :func:`liar_ext.score`. ``snip``, ``taylor`` and ``fisher`` hold all batches
        and run the model backward over them, once.
    allocation : {"uniform", "global", "curve"}
        How many go where; see :func:`liar_ext.allocate`. ``curve`` measures error curves and
        sensitivities for it: see :func:`measure_losses`.
    reconstruct : {"none", "bias", "linear", "affine"}
        What is put back; see :func:`liar_ext.reconstruct`.
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
    kinds : sequence of {"attn", "mlp"}
        Sites that may be pruned.
    attn_unit : {"auto", "kv_group", "head"}
        What an attention unit is.
    seed : int
        For criteria that draw.
    evaluate_on : sequence of mapping, optional
        Batches of held-out text; the report then has dense and pruned perplexity.
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
    check_settings(reconstruct, damp)
    target = _check_schedule(schedule, target, refit, reconstruct)
    if is_pruned(model):
        raise InputError(
            "prune: the model is pruned already; start from the dense model, with a smaller keep"
        )
    at = sites(model, kinds, attn_unit)
    total = total_cost(model, at, budget)
    check_budget(at, budget, allocation, total)
    clock = _Clock()
    backward = get_criterion(criterion).needs == "gradient"
    if backward or allocation == "curve" or schedule == "layerwise":
        batches = list(batches)  # to be gone through again
    if backward and batches:
        check_loss(model, batches[0])

    evaluation = {}
    if evaluate_on is not None:
        with clock("evaluate"):
            evaluation["dense"] = perplexity(model, evaluate_on, progress=progress)
    with clock("calibrate"):
        bank = calibrate(model, batches, at, progress=progress)
    with clock("score"):
        scores = score(model, bank, at, criterion, seed=seed, batches=batches, progress=progress)
    losses = sensitivities = None
    if allocation == "curve":
        with clock("allocate"):
            probe = probe_batches(batches)
            losses, sensitivities = measure_losses(
                model, bank, at, scores, budget, probe, mode=reconstruct, progress=progress
            )
    model_type = model.config.model_type
    plan = allocate(
        at, scores, budget, allocation, model_type=model_type, total=total, losses=losses
    )
    plan = with_bias(plan, model, reconstruct)
    with clock("reconstruct"):
        settings = {"mode": reconstruct, "damp": damp, "progress": progress}
        if schedule == "one-pass":
            weights, rows = solve_sites(model, bank, plan, **settings)
        else:
            weights, rows = reconstruct_layerwise(
                model, batches, plan, target=target, refit=refit, **settings
            )
    measured = {}
    if losses is not None:
        rows = [replace(row, sensitivity=sensitivities[row.name]) for row in rows]
        measured["predicted_divergence"] = sum(
            float(losses[name][len(site.removed)]) for name, site in plan.sites.items()
        )
    before = count_params(model)
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
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
            "reconstruct": reconstruct,
            "damp": damp,
            "schedule": schedule,
            "target": target,
            "refit": refit,
            "kinds": list(kinds),
            "attn_unit": plan.attn_unit,
            "seed": seed,
            "calibration_sequences": bank.source["sequences"],
            "calibration_tokens": bank.source["tokens"],
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
            **measured,
        },
        versions=versions(),
        sites=rows,
        params={
            "before": before,
            "after": count_params(model),
            "prunable_before": sum(row.params_before for row in rows),
            "prunable_after": sum(row.params_after for row in rows),
        },
        evaluation=evaluation,
        seconds=clock.seconds,
        warnings=_warnings(rows, reconstruct, bank.source["tokens"], at),
        loading=how_to_load(model, plan),
    )


def measure_losses(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    budget: Budget,
    batches: Batches,
    *,
    mode: str = "linear",
    progress: bool = False,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Predict what the model's output loses for every number of units gone from every site.

    ``L_s(k) = a_s · E_s(k)``: the site's held-out error curve times its sensitivity
    ``a_s = KL(dense ‖ only s pruned) / E_s``, measured with about the budget's fraction of the
    site gone. The losses of a plan add up to its predicted divergence.

    Parameters
    ----------
    model, bank, at, scores, budget
        As for :func:`liar_ext.allocate`; the model stays as it is.
    batches : iterable
        A few sequences to measure the divergence on.
    mode : str
        What is put back when a site is pruned for the measurement.
    progress : bool
        Show progress bars.

    Returns
    -------
    losses : dict of str to Tensor
        ``(units + 1,)`` float64 by site name, in nats per token.
    sensitivities : dict of str to float
        ``a_s`` by site name.
    """
    curves = error_curves(model, bank, at, scores, progress=progress)
    probe = probe_plan(at, scores, budget, model_type=model.config.model_type)
    probe = with_bias(probe, model, mode)
    weights, _ = solve_sites(model, bank, probe, mode=mode, damp=CURVE_DAMP, progress=progress)
    divergences = site_divergences(model, batches, probe, weights, progress=progress)
    losses, sensitivities = {}, {}
    for name, curve in curves.items():
        error = float(curve[len(probe.sites[name].removed)])
        sensitivities[name] = divergences[name] / error if error > 0 else 0.0
        losses[name] = sensitivities[name] * curve
    return losses, sensitivities


def probe_batches(batches: Sequence[Mapping[str, Tensor] | Tensor]) -> list[dict[str, Tensor]]:
    """Return ``PROBE_SEQUENCES`` batches of one sequence each, evenly spread."""
    sequences = []
    for batch in batches:
        inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        for row in range(len(next(iter(inputs.values())))):
            sequences.append((inputs, row))
    stride = max(1, len(sequences) // PROBE_SEQUENCES)
    return [
        {key: value[row : row + 1] for key, value in inputs.items()}
        for inputs, row in sequences[stride // 2 :: stride][:PROBE_SEQUENCES]
    ]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the kernels in use."""
    packages = ("liar_ext", "torch", "transformers", "safetensors", "numpy")
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        **{f"liar_ext.{key}": str(value) for key, value in ops.build_info().items()},
    }


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


def _warnings(rows: Sequence[SiteRow], mode: str, tokens: int, at: Sequence[Site]) -> list[str]:
    """Return what a user has to know before trusting the result."""
    warnings = []
    dropped = max((row.dropped_rows for row in rows), default=0)
    if dropped:
        warnings.append(
            f"Up to {dropped} token rows per site held a non-finite value and were left out; "
            "calibrate in a wider dtype."
        )
    pruned = [row for row in rows if row.units_after < row.units_before]
    given_up = [row.name for row in pruned if math.isinf(row.damp)]
    if mode in ("linear", "affine") and given_up:
        warnings.append(
            "Held-out text is served best by plain dropping at "
            f"{', '.join(given_up[:8])}{' ...' if len(given_up) > 8 else ''} "
            f"({len(given_up)} sites): give more calibration text."
        )
    widest = max((site.d_in for site in at), default=0)
    if tokens < 2 * widest:
        warnings.append(
            f"{tokens} calibration tokens are few for sites of {widest} features; "
            "the held-out errors say what that costs."
        )
    return warnings


class _Clock:
    """Seconds by stage; stages of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
