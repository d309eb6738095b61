"""Blocks of linear attention beside those of attention: heads that keep a state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from covers import some
from folders import check_sliced, make_plan, read
from journeys import check_job
from tiny import batches, outputs, tiny

from liar_ext import Budget, InputError, Plan, load_pruned, prune, save_pruned, sites
from liar_ext.checkpoint import load_model
from liar_ext.models.layers import get_path
from liar_ext.models.plan import SitePlan
from liar_ext.models.sites import Site, attn_unit_of
from liar_ext.models.slicing import apply_plan
from liar_ext.selection.costs import cached_values, total_cost

DELTA = ["qwen3_5_text", "qwen3_next"]


def linear(model: torch.nn.Module, unit: str = "auto") -> list:
    """Return the sites of heads that keep a state."""
    return [site for site in sites(model, ("attn",), unit) if site.key_dim]


def owned(model: torch.nn.Module, site: Site) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Return the parameters before the consumer that units own, each with the unit of its rows."""
    held = [(f"{path}.weight", path) for path in site.producers]
    held += [(f"{site.path}.{name}", f"{site.path}.{name}") for name in site.wiring.per_head]
    found = [(get_path(model, name), path) for name, path in held]
    return [(each, site.row_units(path, len(each))) for each, path in found if each is not None]


@pytest.mark.parametrize("name", [*DELTA, "nemotron_h", "lfm2"])
@torch.no_grad()
def test_what_leaves_with_a_unit_is_all_that_it_alone_uses(name: str) -> None:
    """Noise in every weight that a unit is said to own changes nothing but the unit."""
    model = tiny(name)
    site = next(site for site in sites(model) if site.wiring.per_head)
    inputs = torch.randn(2, 9, model.config.hidden_size)
    mixer = model.get_submodule(site.consumer.rpartition(".")[0])
    seen = []
    model.get_submodule(site.consumer).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    mixer(inputs)
    for parameter, rows in owned(model, site):
        assert rows.bincount().unique().numel() == 1 and len(rows.unique()) == site.units
        parameter[rows == 1] += torch.randn_like(parameter[rows == 1])
    mixer(inputs)
    own = site.features([1])
    others = site.features([unit for unit in range(site.units) if unit != 1])
    torch.testing.assert_close(seen[1][..., others], seen[0][..., others])
    assert not torch.isclose(seen[1][..., own], seen[0][..., own]).all(dim=(0, 1)).any()


@pytest.mark.parametrize("name", DELTA)
def test_value_heads_leave_key_heads_that_others_share(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    kept = {site.name: SitePlan(8, (0, 3, 4, 7)) for site in linear(model, "head")}
    plan = Plan(model.config.model_type, "head", kept)
    sliced = check_sliced(model, plan, rtol=1e-5, atol=1e-5)
    config = sliced.config
    save_pruned(sliced, tmp_path / "one", plan)
    fields = read(tmp_path / "one")
    assert fields["liar"]["layers"] == "equal"
    assert (fields["linear_num_value_heads"], fields["linear_num_key_heads"]) == (4, 4)
    loaded = type(model).from_pretrained(tmp_path / "one")
    assert torch.equal(outputs(loaded.eval()), outputs(sliced))
    assert loaded.config.num_attention_heads == config.num_attention_heads


def test_a_folder_says_the_sizes_of_single_layers(tmp_path: Path) -> None:
    model = tiny("qwen3_5_text")
    plan = Plan("qwen3_5_text", "auto", {"0.attn": SitePlan(4, (1, 2, 3))})
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "one", plan)
    said = read(tmp_path / "one")["liar"]["modules"]
    assert said["layers.0.linear_attn"] == {
        **{"A_log": [6], "dt_bias": [6], "num_v_heads": 6, "num_k_heads": 3},
        **{"key_dim": 18, "value_dim": 24, "conv_dim": 60},
    }
    shape = {"weight": [60, None, None], "in_channels": 60, "out_channels": 60, "groups": 60}
    assert said["layers.0.linear_attn.conv1d"] == shape
    assert torch.equal(outputs(load_pruned(tmp_path / "one")), outputs(model))


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("qwen3_5_text", {"schedule": "layerwise", "reconstruct": "affine"}),
        ("qwen3_5_text", {"attn_unit": "head", "schedule": "one-pass", "criterion": "obs"}),
        ("qwen3_5_text", {"attn_unit": "head", "keep_hidden": 0.7}),
        ("lfm2", {"keep_hidden": 0.7, "tile": 4}),
        ("bamba", {"keep_hidden": 0.7}),
    ],
)
def test_jobs(name: str, choices: dict, tmp_path: Path) -> None:
    dense = {site.name: site.d_in for site in sites(tiny(name), ("attn",))}
    model = check_job(name, tmp_path, **choices)
    left = {site.name: site.d_in for site in sites(model, ("attn",))}
    assert any(left[name] < dense[name] for name in dense)
    assert "keep_hidden" not in choices or sites(model)[0].d_out < tiny(name).config.hidden_size


@some("schedule", ["one-pass", "layerwise"], "layerwise")
@pytest.mark.parametrize("name", DELTA)
def test_heads_that_others_repeat_are_given_back(name: str, schedule: str) -> None:
    """The consumer is solved on the heads that stay, as that of attention."""
    model = tiny(name)
    blocks = model.config.num_hidden_layers
    model = tiny(name, layer_types=["linear_attention"] * blocks, use_cache=False)
    for site in linear(model):
        for parameter, rows in owned(model, site):
            with torch.no_grad():
                for twin in (1, 3):
                    parameter[rows == twin] = parameter[rows == twin - 1]
    expected = outputs(model)
    choices = {"kinds": ("attn",), "allocation": "uniform", "criterion": "obs"}
    report = prune(model, batches(model, 16), 0.5, schedule=schedule, **choices)
    assert [row.units_after for row in report.sites] == [2] * blocks
    assert all(row.error < 1e-3 for row in report.sites)
    assert (outputs(model) - expected).norm() < 0.02 * expected.norm()


def test_one_unit_where_some_blocks_share_keys_and_others_do_not(tmp_path: Path) -> None:
    """As in small models, where every key head has one value head."""
    model = tiny("qwen3_5_text", linear_num_value_heads=4)
    for unit in ("auto", "kv_group"):
        assert {site.unit for site in sites(model, ("attn",), unit)} == {"kv_group"}
    assert attn_unit_of(sites(model, ("attn",), "head")) == "head"
    report = prune(model, batches(model, 4), 0.6)
    assert report.plan.attn_unit == "kv_group"
    save_pruned(model, tmp_path / "one", report.plan, report=report)
    assert torch.equal(outputs(load_pruned(tmp_path / "one")), outputs(model))


def test_costs_of_heads_that_keep_a_state() -> None:
    model = tiny("qwen3_5_text")
    full = [site for site in sites(model, ("attn",)) if not site.key_dim]
    state = linear(model)
    assert total_cost(model, sites(model), Budget(0.8, "kv_cache")) == sum(map(cached_values, full))
    assert [cached_values(site) for site in state] == [0, 0]
    site = state[0]
    of_state = 2 * 3 * 6 * site.width  # three products with a state of (6, width)
    assert site.unit_flops(10) == 10 * (2 * site.unit_weights + of_state)
    report = prune(model, batches(model, 4), 0.6, of="kv_cache")
    assert not any(report.plan.sites[s.name].removed for s in state if s.name in report.plan.sites)


def test_heads_of_mamba_leave_by_groups_as_its_norm_mixes_them(tmp_path: Path) -> None:
    model = tiny("nemotron_h")
    assert [(site.unit, site.units) for site in linear(model, "head")] == [("kv_group", 4)] * 2
    kept = {"0.attn": SitePlan(4, (1, 2, 3)), "2.attn": SitePlan(8, (1, 3, 4, 6))}
    plan = Plan("nemotron_h", "head", kept)
    sliced = check_sliced(model, plan, rtol=1e-5, atol=1e-5)
    save_pruned(sliced, tmp_path / "one", plan)
    said = read(tmp_path / "one")["liar"]["modules"]["layers.0.mixer"]
    assert said == {
        **{"A_log": [6], "D": [6], "dt_bias": [6], "num_heads": 6, "n_groups": 3},
        **{"intermediate_size": 18, "conv_dim": 48},
    }
    assert torch.equal(outputs(load_pruned(tmp_path / "one")), outputs(sliced))
    assert attn_unit_of(sites(model, ("attn",), "head")) == "head"


def test_experts_that_write_fewer_features_than_the_stream_has_stay() -> None:
    model = tiny("nemotron_h", moe_latent_size=20)
    names = ["0.attn", "1.shared_mlp", "2.attn", "3.mlp", "4.attn"]
    assert [site.name for site in sites(model)] == names
    prune(model, batches(model, 4), 0.6)
    with pytest.raises(InputError, match="experts"):
        prune(model, batches(model, 4), 0.9, keep_experts=0.75)


def test_a_mixture_without_routed_experts_has_the_shared_one_alone() -> None:
    model = tiny("granitemoehybrid", num_local_experts=0, output_router_logits=False)
    assert [site.name for site in sites(model)] == ["0.shared_mlp", "1.attn", "1.shared_mlp"]
    check_sliced(model, make_plan(model), rtol=1e-5, atol=1e-5)


def test_channels_of_a_convolution_have_a_width_of_their_own(tmp_path: Path) -> None:
    model = tiny("lfm2")
    convolution, hidden = sites(model, ("attn",))[1], model.config.hidden_size
    assert (convolution.unit, convolution.units, convolution.d_out) == ("channel", hidden, hidden)
    assert convolution.unit_flops(10) == 10 * 2 * 4 * hidden  # in_proj has three rows a channel
    report = prune(model, batches(model, 4), 0.6, allocation="uniform", tile=4)
    left = len(report.plan.sites["1.attn"].kept)
    assert left < hidden and left % 4 == 0 and report.plan.attn_unit == "kv_group"
    save_pruned(model, tmp_path / "one", report.plan, report=report)
    said = read(tmp_path / "one")["liar"]["modules"]
    assert said["layers.1.conv.in_proj"]["weight"] == [3 * left, None]  # the hidden size
    assert torch.equal(outputs(load_pruned(tmp_path / "one")), outputs(model))


@pytest.mark.parametrize("name", DELTA)
def test_another_number_of_key_heads_than_the_rows_have_is_refused(name: str) -> None:
    model = tiny(name)
    plan = make_plan(model)
    apply_plan(model, plan)
    model.get_submodule(linear(model)[0].consumer.rpartition(".")[0]).head_k_dim = 7
    with pytest.raises(Exception, match="must stack query, key, value"):
        sites(model)


@pytest.mark.parametrize("name", ["nemotron_h", "bamba", "granitemoehybrid"])
def test_a_config_with_an_infinite_number_is_read(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "dense")
    assert "__float__" in (tmp_path / "dense" / "config.json").read_text()
    loaded, _ = load_model(tmp_path / "dense")
    assert torch.equal(outputs(loaded), outputs(model))
