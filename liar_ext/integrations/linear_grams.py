"""The Gram matrix of every linear layer's input in the blocks, from the pass of pruning.

All are of the dense model's activations; a quantiser such as GPTQ wants ``H = 2 Σ_t x_t x_tᵀ``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import Batches
from liar_ext.calibration.collect import check_finite_weights, collect
from liar_ext.calibration.saved_sums import bytes_of_sums, room_for_sums
from liar_ext.calibration.taps import tap_at
from liar_ext.models.plan import Plan
from liar_ext.models.sites import CROSS, Site
from liar_ext.models.whole import refuse_experts
from liar_ext.ops.reference import symmetric
from liar_ext.system.errors import InputError


def calibrate_linears(
    model: nn.Module, batches: Batches, at: Sequence[Site], memory: int | None = None
) -> MomentBank:
    """Return the moments of all sites, as ``NAME``, and of what their producers read, ``NAME.in``.

    If tokens of a site count relative to its output, ``NAME.alike`` counts them alike.
    """
    check_finite_weights(model)
    instead = "let the quantiser calibrate by itself"
    refuse_experts(at, "calibrate_linears: Grams are summed at", instead)
    taps = []
    for site in at:
        reads = _producer_inputs(model, site)
        pruned = tap_at(model, site)
        here = replace(pruned, name=f"{site.name}.in", module=_producers(site)[0], d_in=reads)
        taps += [pruned, replace(here, relative=False)]
        if pruned.relative:  # a quantiser counts all tokens alike
            taps.append(replace(pruned, name=f"{site.name}.alike", relative=False))
    size, room = sum(bytes_of_sums(tap.d_in) for tap in taps), room_for_sums(model, memory)
    if size > room:
        raise InputError(
            f"calibrate_linears: the Grams of all linear layers take {size / 2**30:.3g} GiB at "
            f"once, and {room / 2**30:.3g} GiB are allowed; raise memory, or {instead}"
        )
    return collect(model, batches, taps)


def linear_grams(
    bank: MomentBank, at: Sequence[Site], plan: Plan, earlier: Plan | None = None
) -> dict[str, Tensor]:
    """Return ``G`` of each linear layer's input by its path: float32, ``G_KK`` at consumers.

    ``bank`` is from :func:`calibrate_linears`, ``at`` are the sites before they were sliced, with
    the units of the plan. ``earlier`` is what the model was pruned by before, if ``plan`` counts
    units of the dense model.
    """
    grams = {}
    for site in at:
        reads = symmetric(bank[f"{site.name}.in"].pooled()[0]).float()
        grams |= dict.fromkeys(_producers(site), reads)
        gram = bank.get(f"{site.name}.alike", bank[site.name]).pooled()[0]
        if site.name in plan.sites:
            kept = plan.sites[site.name].kept
            if earlier is not None and site.name in earlier.sites:
                place = {unit: index for index, unit in enumerate(earlier.sites[site.name].kept)}
                kept = [place[unit] for unit in kept]
            features = site.features(kept).to(gram.device)
            gram = gram[features][:, features]  # ascending: the lower triangle stays the lower one
        grams[site.consumer] = symmetric(gram).float()
    return grams


def _producers(site: Site) -> list[str]:
    """Return the paths of all layers before the consumer, also those that a unit shares."""
    return [f"{site.path}.{name}" for name in site.wiring.layers if name != site.wiring.consumer]


def _producer_inputs(model: nn.Module, site: Site) -> int:
    """Return how many features the producers read; refuse any that GPTQ's Hessian isn't of."""
    layers = [model.get_submodule(path) for path in (*_producers(site), site.consumer)]
    wrong = ""
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        kind = type(layers[0]).__name__
        wrong = f"the layers of {site.name} must be torch.nn.Linear, got {kind}"
    # Attention to another part, or to positions, has producers that read something else.
    elif site.kind == "attn" and (
        (len(site.wiring.producers) > 1 and not site.key_dim) or site.name.endswith(CROSS)
    ):
        wrong = f"the producers of {site.name} must all read the same, and they don't"
    if wrong:
        raise InputError(f"calibrate_linears: {wrong}; let the quantiser calibrate by itself")
    return layers[0].in_features
