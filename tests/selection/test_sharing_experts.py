"""How a budget is distributed over layers of experts."""

from __future__ import annotations

import pytest
import torch
from losses import measure_losses
from tiny import batches, tiny

from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.saved_sums import group_sites
from liar_ext.models.plan import Budget
from liar_ext.models.sites import get_consumer_weight, sites, teams_of
from liar_ext.models.slicing import allowed_counts
from liar_ext.ops.reference import symmetric
from liar_ext.reconstruction.solve import reconstruct
from liar_ext.selection.allocation import allocate, probe_plan
from liar_ext.selection.costs import Costs, total_cost
from liar_ext.selection.criteria import score
from liar_ext.selection.error_curves import error_curves
from liar_ext.selection.sensitivity import site_divergences
from liar_ext.system.errors import InputError


@pytest.fixture(scope="module")
def calibrated():
    model = tiny("mixtral")
    text = batches(model, 2)
    bank = calibrate(model, text)
    at = sites(model)
    return model, text, bank, at, score(model, bank, at, "wifv")


@pytest.mark.parametrize("method", ["uniform", "global", "curve"])
@pytest.mark.parametrize("uniform_layers", [False, True])
def test_experts_of_a_layer_keep_equally_many(calibrated, method, uniform_layers) -> None:
    model, text, bank, at, scores = calibrated
    budget = Budget(0.6, tile=1, uniform_layers=uniform_layers)
    losses, _ = measure_losses(model, bank, at, scores, budget, text)
    plan = allocate(at, scores, budget, method, losses=losses)
    for team in teams_of(at).values():
        assert len({len(plan.sites[site.name].kept) for site in team}) == 1
    chosen = [plan.sites[f"0.mlp.{expert}"].kept for expert in range(4)]
    if len(chosen[0]) < 32:
        assert len(set(chosen)) > 1  # each has channels of its own
    if uniform_layers:
        counts = {len(plan.sites[site.name].kept) for site in at if site.kind == "mlp"}
        assert len(counts) == 1
    assert Costs.of(at, budget).kept_fraction(plan) <= 0.6 + 1e-9


def test_channels_of_experts_come_in_eights(calibrated) -> None:
    """A grouped product takes rows of a multiple of 16 bytes only."""
    expert = calibrated[3][1]
    assert allowed_counts(expert, Budget(0.5, tile=1)) == (8, 16, 24, 32)
    assert allowed_counts(expert, Budget(0.5, tile=16)) == (16, 32)
    odd = sites(tiny("mixtral", intermediate_size=12))[1]
    assert allowed_counts(odd, Budget(0.5, tile=1)) == (4, 8, 12)


def test_the_losses_of_a_layer_are_those_of_its_output(calibrated) -> None:
    """Sensitivity is measured with all experts of the layer pruned, and shared by energy."""
    model, text, bank, at, scores = calibrated
    budget = Budget(0.5, tile=1)
    losses, sensitivities = measure_losses(model, bank, at, scores, budget, text)
    curves, probe = error_curves(model, bank, at, scores), probe_plan(at, scores, budget)
    weights, _ = reconstruct(model, bank, probe, damp=1e-2)
    names = [f"0.mlp.{expert}" for expert in range(4)]
    divergence = site_divergences(model, text, probe, weights)[names[0]]
    energy = {}
    for site in at:
        weight = get_consumer_weight(model, site).double()
        energy[site.name] = float((weight @ symmetric(bank[site.name].gram.sum(0)) * weight).sum())
    shares = {name: energy[name] / sum(energy[each] for each in names) for name in names}
    lost = sum(float(losses[name][len(probe.sites[name].removed)]) for name in names)
    assert lost == pytest.approx(divergence, rel=1e-6)
    for name in names:
        assert sensitivities[name] == sensitivities[names[0]]
        torch.testing.assert_close(losses[name], sensitivities[name] * shares[name] * curves[name])


def test_measuring_leaves_the_experts_as_they_were(calibrated) -> None:
    model, text, bank, at, scores = calibrated
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_losses(model, bank, at, scores, Budget(0.5, tile=1), text)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_the_experts_of_a_layer_are_calibrated_together(calibrated) -> None:
    at = calibrated[3]
    groups = group_sites(at, 1)
    assert [[site.name for site in group] for group in groups][:2] == [
        ["0.attn"],
        ["0.mlp.0", "0.mlp.1", "0.mlp.2", "0.mlp.3"],
    ]


def test_flops_count_the_experts_that_a_token_is_sent_to() -> None:
    model = tiny("mixtral")
    at, budget, tokens = sites(model), Budget(0.5, of="flops", seq_len=16), 16
    expert = at[1]
    assert expert.active == 0.5  # 2 of 4
    assert expert.unit_flops(tokens) == 2 * tokens * 3 * 40 * 0.5  # gate, up and down
    whole = total_cost(model, at, budget)
    heads = [site for site in at if site.kind == "attn"]
    assert total_cost(model, heads, budget) == whole
    one_expert = sum(32 * site.unit_flops(tokens) for site in at if site.expert == 0)
    head = 2 * tokens * model.lm_head.weight.numel()
    attention = sum(site.units * site.unit_flops(tokens) for site in heads)
    assert whole == 4 * one_expert + head + attention


def test_what_is_not_measured_of_experts_is_refused() -> None:
    from liar_ext.measure.latency import measure_latency

    model = tiny("mixtral")
    with pytest.raises(InputError, match="latency.*0.mlp.0, an expert.*flops"):
        measure_latency(model, Budget(0.5, of="latency"))
    with pytest.raises(InputError, match="gradients.*an expert.*wifv"):
        score(model, {}, sites(model), "taylor", batches=batches(model, 1))
