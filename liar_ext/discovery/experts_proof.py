"""Prove that whole experts can leave: the rest is what the router chooses among those that stay."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.checkpoint.quietening import quiet
from liar_ext.discovery.instance import Instance, outputs
from liar_ext.discovery.proof import compared, saved
from liar_ext.discovery.rows import registered
from liar_ext.models.experts import choice_of, reroute, router_of
from liar_ext.models.family import Family
from liar_ext.models.sites import Site, sites
from liar_ext.plan import Plan, SitePlan
from liar_ext.surgery.units import apply_plan


def prove_experts(instances: Sequence[Instance], family: Family) -> list[str]:
    """Return in words what was proved of experts that leave.

    A model without them must equal the one that has them, and whose router chooses, by its own
    code, among the logits of the others.

    Raises
    ------
    Refused
        If it doesn't, or a saved folder doesn't load.
    """
    fields = [n for n, size in (family.mlp.config or {}).items() if size == "experts"]
    with registered(family):
        worst = max(_compare(instance) for instance in instances)
        said = f"to {worst:.0e} of the largest output" if worst else "exactly"
        proved = [f"without some experts it is what the router makes of the others, {said}"]
        if fields:
            with tempfile.TemporaryDirectory() as folder, quiet():
                instance = instances[0]
                loaded = saved(instance, _plan(instance.model), Path(folder) / "experts")
            proved.append(f"fewer experts load in {loaded}")
    return proved


def _layers(model: nn.Module) -> dict[str, Site]:
    """Return the first expert of each layer, by the layer's name."""
    return {site.team: site for site in sites(model, ("mlp",)) if site.expert == 0}


def _plan(model: nn.Module) -> Plan:
    """Keep all experts of a layer but two, at random, and those that a token needs."""
    generator, kept = torch.Generator().manual_seed(6), {}
    for name, site in _layers(model).items():
        count = max(router_of(model, site).top_k, site.experts - 2)
        chosen = torch.randperm(site.experts, generator=generator)[:count].sort().values
        kept[name] = SitePlan(site.experts, tuple(chosen.tolist()))
    return Plan(model.config.model_type, "auto", {}, experts=kept)


def _compare(instance: Instance) -> float:
    dense, sliced = copy.deepcopy(instance.model), copy.deepcopy(instance.model)
    plan, before = _plan(dense), outputs(dense, instance.inputs)
    for name, site in _layers(dense).items():
        _choose_among(dense, site, torch.tensor(plan.experts[name].kept))

    def given() -> Tensor:
        apply_plan(sliced, plan)
        return outputs(sliced, instance.inputs)

    expected = outputs(dense, instance.inputs)
    return compared("with experts removed", before, expected, given)


def _choose_among(model: nn.Module, site: Site, kept: Tensor) -> None:
    """Let the router of a layer choose among some experts."""
    router = router_of(model, site)

    def choose(_: nn.Module, args: tuple, given: Any) -> tuple[Tensor, Tensor, Tensor]:
        experts = site.wiring.experts
        weights, places = reroute(router, given[0], kept, experts, choice_of(model, site))
        return given[0], weights, kept[places]

    router.register_forward_hook(choose)
