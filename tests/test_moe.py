"""Mixtures of experts through whole jobs: pruned, saved, loaded, saved again, trained, run."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from tiny import MOE, batches, outputs, tiny, tiny_inputs

from liar_ext import load_pruned, prune, save_pruned, verify_pruned
from liar_ext.checkpoint import load_model
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import sites
from liar_ext.models.slicing import apply_plan
from liar_ext.report.pictures import KINDS, kept
from liar_ext.report.report import Report
from liar_ext.system.errors import InputError

SIZE = {"qwen3_moe": "moe_intermediate_size"}


@pytest.fixture(scope="module", params=MOE)
def even(request, tmp_path_factory):
    """A pruned model with equal layers, its report and its folder."""
    name, folder = request.param, tmp_path_factory.mktemp("even") / "pruned"
    model = tiny(name)
    kinds = ("mlp",) if name == "olmoe" else ("attn", "mlp")
    report = prune(
        model, batches(model, 2), 0.5, allocation="uniform", uniform_layers=True, kinds=kinds
    )
    save_pruned(model, folder, report.plan, report=report)
    return name, model, report, folder


def test_equal_layers_load_in_the_stock_class(even) -> None:
    name, model, report, folder = even
    assert "plain" in report.loading
    stock = getattr(transformers, MOE[name][0])
    config = json.loads((folder / "config.json").read_text())
    assert config[SIZE.get(name, "intermediate_size")] == 16 and "auto_map" not in config
    loaded, info = stock.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is stock
    torch.testing.assert_close(outputs(loaded), outputs(model))
    torch.testing.assert_close(outputs(load_pruned(folder)), outputs(model))


def test_a_loaded_model_is_saved_trained_and_run(even, tmp_path) -> None:
    name, model, _, folder = even
    loaded = load_pruned(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(outputs(again), outputs(model))
    again.train()
    ids = tiny_inputs(again)["input_ids"]
    again(input_ids=ids, labels=ids).loss.backward()
    grown = [each.grad for each in again.model.layers[0].mlp.experts.parameters()]
    assert all(each is not None and torch.isfinite(each).all() for each in grown)
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    again.eval()
    made = again.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, ids.shape[1] + 3)


def test_the_report_shows_experts(even) -> None:
    name, _, report, folder = even
    experts = [row for row in report.sites if row.tokens is not None]
    assert len(experts) == 4 * (2 - (name == "qwen3_moe"))
    assert {row.name.split(".")[1] for row in experts} == {"mlp"}
    removed = ("" if name == "olmoe" else "and ") + r"\d+% of the MLP channels \|"
    assert re.search(removed, report.to_card())
    panels = kept(Report.load(folder).sites, Figure).axes
    titles = [panel.get_title(loc="left").partition(":")[0] for panel in panels]
    assert titles == [KINDS[kind] for kind in ("attn", "mlp")[name == "olmoe" :]]


@pytest.mark.parametrize("name", MOE)
def test_unequal_layers_load_with_the_folder_s_code(name: str, tmp_path) -> None:
    model = tiny(name)
    choices = {"allocation": "global", "tile": 1, "kinds": ("mlp",), "criterion": "obs"}
    report = prune(model, batches(model, 2), 0.65, **choices)  # five eights of eight
    assert len({len(site.kept) for site in report.plan.sites.values()}) == 2
    save_pruned(model, tmp_path / "pruned", report.plan, report=report)
    auto = transformers.AutoModelForCausalLM
    for loaded in (
        load_pruned(tmp_path / "pruned"),
        auto.from_pretrained(tmp_path / "pruned", trust_remote_code=True),
    ):
        torch.testing.assert_close(outputs(loaded), outputs(model))
    loaded.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(outputs(again), outputs(model))


@pytest.mark.parametrize("name", MOE)
def test_experts_and_then_channels_leave(name: str, tmp_path) -> None:
    """One plan, and a folder that the stock class loads."""
    dense, model = tiny(name), tiny(name)
    choices = {"allocation": "uniform", "uniform_layers": True, "kinds": ("mlp",)}
    report = prune(model, batches(model, 2), 0.5, keep_experts=0.75, **choices)
    rows = [row for row in report.sites if row.name.endswith(".experts")]
    assert [(row.units_before, row.units_after) for row in rows] == [(4, 3)] * len(rows)
    assert {len(layer.kept) for layer in report.plan.experts.values()} == {3}
    assert report.recipe.keep_experts == 0.75
    layer = model.model.layers[0].mlp.experts
    assert len(layer.down_proj) == 3 == model.config.num_experts
    save_pruned(model, tmp_path / "pruned", report.plan, report=report)
    stock = getattr(transformers, MOE[name][0]).from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(outputs(stock), outputs(model))
    loaded = load_pruned(tmp_path / "pruned")
    torch.testing.assert_close(outputs(loaded), outputs(model))
    ids = tiny_inputs(stock)["input_ids"]
    stock(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    # The plan alone, without new weights, keeps the same units of the dense model.
    apply_plan(dense, report.plan)
    assert [each.shape for each in dense.parameters()] == [e.shape for e in model.parameters()]


def test_experts_leave_alone(tmp_path) -> None:
    """Unequal layers, too, once a plan names the experts of one layer."""
    model = tiny("mixtral")
    report = prune(model, batches(model, 2), 1.0, keep_experts=0.75)
    assert not report.plan.sites and len(report.plan.experts) == 2
    counted = tiny("mixtral")
    assert prune(counted, batches(counted, 2), 1.0, keep_experts=3).plan == report.plan
    assert "plain" in report.loading
    again = prune(model, batches(model, 2), 1.0, keep_experts=0.67)
    assert [layer.units for layer in again.plan.experts.values()] == [4, 4]
    assert [len(layer.kept) for layer in again.plan.experts.values()] == [2, 2]
    uneven = tiny("mixtral")
    plan = Plan("mixtral", "auto", {}, experts={"1.mlp": SitePlan(4, (0, 2, 3))})
    apply_plan(uneven, plan)
    save_pruned(uneven, tmp_path / "uneven", plan)
    auto = transformers.AutoModelForCausalLM
    for loaded in (
        load_pruned(tmp_path / "uneven"),
        auto.from_pretrained(tmp_path / "uneven", trust_remote_code=True),
    ):
        torch.testing.assert_close(outputs(loaded), outputs(uneven))


@pytest.mark.parametrize("name", MOE)
def test_a_folder_of_single_experts_is_loaded_and_pruned_twice(name: str, tmp_path) -> None:
    """transformers writes a tensor per expert; two jobs come to one plan of the dense model."""
    tiny(name).save_pretrained(tmp_path / "dense")
    model, _ = load_model(tmp_path / "dense")
    choices = {"allocation": "uniform", "kinds": ("mlp",), "tile": 1}
    prune(model, batches(model, 2), 0.75, keep_experts=0.75, **choices)
    report = prune(model, batches(model, 2), 1.0, keep_experts=0.67, **choices)
    assert {layer.units for layer in report.plan.experts.values()} == {4}
    assert {len(layer.kept) for layer in report.plan.experts.values()} == {2}
    again = tiny(name)
    apply_plan(again, report.plan)
    assert [each.shape for each in again.parameters()] == [e.shape for e in model.parameters()]
    save_pruned(model, tmp_path / "pruned", report.plan, report=report)
    assert verify_pruned(tmp_path / "pruned")["agrees"]


def test_a_pruned_model_is_pruned_again() -> None:
    model = tiny("mixtral")
    choices = {"allocation": "uniform", "kinds": ("mlp",), "tile": 1}
    prune(model, batches(model, 2), 0.75, **choices)
    report = prune(model, batches(model, 2), 0.5, **choices)
    assert {site.units for site in sites(model, ("mlp",))} == {8}  # 24, then half in eights
    assert {site.units for site in report.plan.sites.values()} == {32}


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"criterion": "taylor"}, "gradients.*0.mlp.0, an expert"),
        ({"keep_hidden": 0.5}, "hidden"),
        ({"keep_experts": 0.25}, "less than the 2 that every token is sent to"),
        ({"keep_experts": 4}, "a layer has 4 experts, and keep_experts 4 removes none"),
    ],
)
def test_what_experts_lack_is_refused_before_any_text_is_read(choices: dict, match: str) -> None:
    def never():
        raise AssertionError("text was read")
        yield

    with pytest.raises(InputError, match=match):
        prune(tiny("mixtral"), never(), 0.5, **choices)
