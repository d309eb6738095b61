"""Sensitivity: what the whole model's output loses when sites are pruned, by forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar_ext.arch import Site, sites
from liar_ext.errors import InputError
from liar_ext.outputs import evaluating, output_divergence
from liar_ext.plan import Plan

Weights = Mapping[str, tuple[Tensor, Tensor | None]]


def site_divergences(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    plan: Plan,
    weights: Weights,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Return the divergence from the dense model when one site alone is pruned, for every site.

    Parameters
    ----------
    model : nn.Module
        The dense model; it is as it was afterwards.
    batches : iterable of mapping or Tensor
        Inputs of the model, as for :func:`liar_ext.calibrate`.
    plan : Plan
        What stays at each site.
    weights : mapping of str to (Tensor, Tensor or None)
        Consumer weights and biases for the plan, from :func:`liar_ext.reconstruct`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict of str to float
        Mean ``KL(dense ‖ pruned)`` per token in nats, by site name; see
        :func:`liar_ext.outputs.output_divergence`. 0 for a site that keeps everything.
    """
    pruned = [name for name, site_plan in plan.sites.items() if site_plan.removed]
    values = _divergences(model, batches, plan, weights, [(name,) for name in pruned], progress)
    return dict.fromkeys(plan.sites, 0.0) | dict(zip(pruned, values, strict=True))


def plan_divergence(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    plan: Plan,
    weights: Weights,
    *,
    progress: bool = False,
) -> float:
    """Return the divergence from the dense model when the whole plan is applied.

    Arguments as for :func:`site_divergences`; nothing is sliced.
    """
    return _divergences(model, batches, plan, weights, [tuple(plan.sites)], progress)[0]


@torch.no_grad()
def _divergences(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    plan: Plan,
    weights: Weights,
    probes: Sequence[Sequence[str]],
    progress: bool,
) -> list[float]:
    """Return the mean divergence per probe, the sites that are pruned together.

    A probe leaves the blocks before its first site alone, so they repeat what they gave before.
    """
    every = sites(model, attn_unit=plan.attn_unit)
    found = {site.name: site for site in every}
    blocks = [model.get_submodule(path) for path in dict.fromkeys(site.path for site in every)]
    device = next(model.parameters()).device
    total, rows = [0.0] * len(probes), 0
    bar = tqdm(desc="sensitivity", disable=not progress)
    with evaluating(model):
        for batch in batches:
            inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
            inputs = {key: value.to(device) for key, value in inputs.items() if key != "fold"}
            mask = inputs.get("attention_mask")
            with _recorded(blocks) as given:
                dense = model(**inputs)
            rows += output_divergence(dense, dense, mask)[1]
            for index, names in enumerate(probes):
                first = min(found[name].block for name in names)
                with ExitStack() as stack:
                    for block, output in zip(blocks[:first], given, strict=False):
                        stack.enter_context(_answering(block, output))
                    for name in names:
                        stack.enter_context(_pruned(model, found[name], plan, weights[name]))
                    total[index] += output_divergence(dense, model(**inputs), mask)[0]
                bar.update()
    bar.close()
    if not rows:
        raise InputError("sensitivity: needs at least one batch to run, got none")
    return [value / rows for value in total]


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list]:
    """Collect what each block returns while the context is open."""
    given: list = []
    handles = [
        block.register_forward_hook(lambda module, args, output: given.append(output))
        for block in blocks
    ]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _answering(block: nn.Module, output: object) -> Iterator[None]:
    """Let a block return ``output`` without computing it."""
    before = vars(block).get("forward")
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


@contextmanager
def _pruned(
    model: nn.Module, site: Site, plan: Plan, weights: tuple[Tensor, Tensor | None]
) -> Iterator[None]:
    """Give a consumer its new weights, with zeros for the units that go: as good as sliced."""
    consumer = model.get_submodule(site.consumer)
    weight, bias = consumer.weight, consumer.bias
    full = weight.new_zeros(site.d_out, site.d_in)
    kept = site.features(plan.sites[site.name].kept).to(full.device)
    full[:, kept] = weights[0].to(full)
    consumer.weight = nn.Parameter(full.T if site.wiring.transposed else full, requires_grad=False)
    if weights[1] is not None:
        consumer.bias = nn.Parameter(weights[1].to(full), requires_grad=False)
    try:
        yield
    finally:
        consumer.weight, consumer.bias = weight, bias
