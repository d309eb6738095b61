"""Refine a plan by the measured divergence of whole plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from liar_ext.bars import Bar
from liar_ext.calibration.moments import MomentBank
from liar_ext.data.batches import Batches
from liar_ext.errors import InputError
from liar_ext.models.sites import Site
from liar_ext.plan import Budget, Plan
from liar_ext.ranks import Owners
from liar_ext.reconstruction.one_pass import reconstruct_shared, with_bias
from liar_ext.selection.allocation import allocate
from liar_ext.selection.costs import Costs
from liar_ext.selection.error_curves import CURVE_DAMP
from liar_ext.selection.sensitivity import divergences

# Depths that refinement tells apart: early, middle and late blocks, for each kind of site.
DEPTHS = 3
# One round of refinement changes the losses of a group by this factor at most.
MOST_RESCALED = 4.0


def check_refine(refine: int, allocation: str) -> None:
    """Raise InputError unless ``refine`` rounds can follow the allocation method."""
    if refine < 0 or (refine and allocation != "curve"):
        raise InputError(
            "prune: refine must be 0 or more rounds after allocation='curve', got "
            f"refine={refine}, allocation={allocation!r}"
        )


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
    costs: Costs | None = None,
    owners: Owners = Owners(),  # noqa: B008  (holds nothing that changes)
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
    model, bank, at, scores, budget, costs
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
        How the pruned units are reconstructed.
    owners : Owners
        Of several ranks who solves which site; they share the batches, and the plans to try are
        those of the first.
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
        found = reconstruct_shared(model, bank, plan, at, owners, mode=mode, damp=CURVE_DAMP)
        weights = {name: new for name, (new, _) in found.items()}
        return partial(divergences, model, batches, plan, weights, ranks=owners.ranks)

    measure = solve(plan)
    (least,), shares = measure([_pruned(plan)]), None
    history = [least]
    for _ in Bar(range(rounds), desc="refine", disable=not progress):
        if shares is None:
            rests = [[name for name in _pruned(plan) if name not in group] for group in groups]
            shares = [least - rest for rest in measure(rests)]
        trial = _rescaled(losses, plan, groups, shares, step)
        candidate = allocate(
            at, scores, budget, "curve", model_type=plan.model_type, costs=costs, losses=trial
        )
        candidate = owners.ranks.broadcast(with_bias(candidate, model, mode))
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
    groups: dict[tuple[str, str, int], list[str]] = {}
    for site in at:
        key = site.part.name, site.kind, DEPTHS * site.block // blocks
        groups.setdefault(key, []).append(site.name)
    return list(groups.values())
