"""Losses: what the whole model's output loses for every number of units gone, and for plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from tqdm.auto import tqdm

from liar_ext.allocation import allocate, probe_plan
from liar_ext.calibration.moments import MomentBank
from liar_ext.curves import CURVE_DAMP, error_curves
from liar_ext.data.batches import Batches, probe_batches
from liar_ext.errors import InputError
from liar_ext.models.sites import Site
from liar_ext.plan import Budget, Plan
from liar_ext.reconstruction.one_pass import reconstruct, with_bias
from liar_ext.sensitivity import divergences, site_divergences

# Depths that refinement tells apart: early, middle and late blocks, for each kind of site.
DEPTHS = 3
# One round of refinement changes the losses of a group by this factor at most.
MOST_RESCALED = 4.0


def decide(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    budget: Budget,
    allocation: str,
    batches: Batches,
    *,
    mode: str = "auto",
    refine: int = 0,
    total: float | None = None,
    losses: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> tuple[Plan, dict[str, float]]:
    """Return the plan of an allocation method.

    Parameters
    ----------
    model, bank, at, scores, budget, total
        As for :func:`liar_ext.allocate`; the model stays as it is.
    allocation : {"uniform", "global", "curve"}
        Method.
    batches : sequence
        Calibration batches, of which ``curve`` takes :func:`probe_batches`.
    mode : str
        What is put back.
    refine : int
        Rounds of :func:`refine_plan`, for ``curve``; they need the moments of all sites.
    losses : mapping of str to Tensor, optional
        For ``curve``, from :func:`measure_losses`; measured here if not given.
    progress : bool
        Show progress bars.

    Returns
    -------
    plan : Plan
    divergences : dict of str to float
        ``predicted_divergence`` of the plan for ``curve``; with ``refine`` also its
        ``measured_divergence``, and ``unrefined_divergence``, measured before the first round.
    """
    model_type = model.config.model_type
    if allocation != "curve":
        plan = allocate(at, scores, budget, allocation, model_type=model_type, total=total)
        return with_bias(plan, model, mode), {}
    settings = {"mode": mode, "progress": progress}
    probe = probe_batches(batches)
    if losses is None:
        losses, _ = measure_losses(model, bank, at, scores, budget, probe, **settings)
    plan = allocate(at, scores, budget, "curve", model_type=model_type, total=total, losses=losses)
    plan = with_bias(plan, model, mode)
    measured = {}
    if refine:
        plan, history = refine_plan(
            model,
            bank,
            at,
            scores,
            budget,
            probe,
            losses,
            plan,
            rounds=refine,
            total=total,
            **settings,
        )
        measured = {"unrefined_divergence": history[0], "measured_divergence": history[-1]}
    predicted = predict_divergence(losses, plan)
    return plan, {"predicted_divergence": predicted, **measured}


def check_refine(refine: int, allocation: str) -> None:
    """Raise InputError unless ``refine`` rounds can follow the allocation method."""
    if refine < 0 or (refine and allocation != "curve"):
        raise InputError(
            "prune: refine must be 0 or more rounds after allocation='curve', got "
            f"refine={refine}, allocation={allocation!r}"
        )


def measure_losses(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    budget: Budget,
    batches: Batches,
    *,
    mode: str = "auto",
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
    batches : sequence
        A few sequences to measure the divergence on, from :func:`probe_batches`.
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
    weights, _ = reconstruct(model, bank, probe, mode=mode, damp=CURVE_DAMP, progress=progress)
    measured = site_divergences(model, batches, probe, weights, progress=progress)
    losses, sensitivities = {}, {}
    for name, curve in curves.items():
        error = float(curve[len(probe.sites[name].removed)])
        sensitivities[name] = measured[name] / error if error > 0 else 0.0
        losses[name] = sensitivities[name] * curve
    return losses, sensitivities


def predict_divergence(
    losses: Mapping[str, Tensor], plan: Plan, names: Sequence[str] | None = None
) -> float:
    """Return the sum of the losses of a plan, at all its sites or at those named."""
    names = plan.sites if names is None else names
    return sum(float(losses[name][len(plan.sites[name].removed)]) for name in names)


def refine_plan(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    budget: Budget,
    batches: Batches,
    losses: Mapping[str, Tensor],
    plan: Plan,
    *,
    rounds: int,
    mode: str = "auto",
    total: float | None = None,
    progress: bool = False,
) -> tuple[Plan, list[float]]:
    """Improve a plan by the measured divergence ``D`` of whole plans.

    Losses are measured one site at a time, and add up only as long as little is lost. A group
    ``g`` of sites, attention or MLP of the early, middle or late blocks, has the share
    ``D(plan) − D(plan, g dense)`` in what the plan loses, where its losses predict ``Σ_g L``. A
    round scales the losses of every group by ``(share / predicted)^η``, allocates anew, and takes
    the new plan if its ``D`` is less; if it is not, η is halved, from 1. So the result is never
    worse than the start on the sequences that it is measured on.

    Parameters
    ----------
    model, bank, at, scores, budget, total
        As for :func:`liar_ext.allocate`; the model stays as it is.
    batches : sequence
        A few sequences to measure the divergence on, from :func:`probe_batches`.
    losses : mapping of str to Tensor
        From :func:`measure_losses`.
    plan : Plan
        Where to start.
    rounds : int
        Plans to try; each costs one solve of all sites and up to seven passes over ``batches``.
    mode : str
        What is put back.
    progress : bool
        Show a progress bar.

    Returns
    -------
    plan : Plan
        The best plan that was measured.
    divergences : list of float
        ``D`` of the best plan so far, at the start and after every round: it never rises.
    """
    groups, losses, step = _groups(at), dict(losses), 1.0

    def solve(plan: Plan) -> Callable[[Sequence[Sequence[str]]], list[float]]:
        """Return how to measure the divergence when only some of a plan's sites are pruned."""
        weights, _ = reconstruct(model, bank, plan, mode=mode, damp=CURVE_DAMP)
        return partial(divergences, model, batches, plan, weights)

    measure = solve(plan)
    (least,), shares = measure([_pruned(plan)]), None
    history = [least]
    for _ in tqdm(range(rounds), desc="refine", disable=not progress):
        if shares is None:
            rests = [[name for name in _pruned(plan) if name not in group] for group in groups]
            shares = [least - rest for rest in measure(rests)]
        trial = _rescaled(losses, plan, groups, shares, step)
        candidate = allocate(
            at, scores, budget, "curve", model_type=plan.model_type, total=total, losses=trial
        )
        candidate = with_bias(candidate, model, mode)
        if candidate.sites == plan.sites:
            losses = trial  # better losses, of which the plan is the optimum still
        else:
            its_measure = solve(candidate)
            (divergence,) = its_measure([_pruned(candidate)])
            if divergence < least:
                plan, losses, least = candidate, trial, divergence
                measure, shares = its_measure, None
            else:
                step /= 2
        history.append(least)
    return plan, history


def _pruned(plan: Plan) -> list[str]:
    return [name for name, site in plan.sites.items() if site.removed]


def _rescaled(
    losses: Mapping[str, Tensor],
    plan: Plan,
    groups: Sequence[Sequence[str]],
    shares: Sequence[float],
    step: float,
) -> dict[str, Tensor]:
    """Return losses that predict a plan's measured shares better; a common factor is left out."""
    predicted = [predict_divergence(losses, plan, group) for group in groups]
    common = sum(shares) / sum(predicted) if sum(predicted) > 0 else 0.0
    rescaled = dict(losses)
    for group, share, loss in zip(groups, shares, predicted, strict=True):
        if common > 0 and loss > 0:
            ratio = min(max(share / (common * loss), 1 / MOST_RESCALED), MOST_RESCALED)
            rescaled |= {name: losses[name] * ratio**step for name in group}
    return rescaled


def _groups(at: Sequence[Site]) -> list[list[str]]:
    """Return the names of the sites, by kind and depth."""
    blocks = 1 + max(site.block for site in at)
    groups: dict[tuple[str, int], list[str]] = {}
    for site in at:
        groups.setdefault((site.kind, DEPTHS * site.block // blocks), []).append(site.name)
    return list(groups.values())
