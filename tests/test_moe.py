"""Mixtures of experts through whole jobs: pruned, saved, loaded, saved again, trained, run."""

from __future__ import annotations

import json
import re

import pytest
import torch
from matplotlib.figure import Figure
from tiny import MOE, batches, class_of, outputs, tiny

from liar_ext import load_pruned, prune, save_pruned, verify_pruned
from liar_ext.checkpoint import load_model
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
    save_pruned(model, folder, report=report)
    return name, model, report, folder


def test_equal_layers_load_in_the_stock_class(even) -> None:
    name, model, report, folder = even
    assert "plain" in report.loading
    stock = class_of(name)
    config = json.loads((folder / "config.json").read_text())
    assert config[SIZE.get(name, "intermediate_size")] == 16 and "auto_map" not in config
    loaded, info = stock.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is stock
    torch.testing.assert_close(outputs(loaded), outputs(model))
    torch.testing.assert_close(outputs(load_pruned(folder)), outputs(model))


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


def test_experts_leave_alone() -> None:
    model = tiny("mixtral")
    report = prune(model, batches(model, 2), 1.0, keep_experts=0.75)
    assert not report.plan.sites and len(report.plan.experts) == 2
    counted = tiny("mixtral")
    assert prune(counted, batches(counted, 2), 1.0, keep_experts=3).plan == report.plan
    assert "plain" in report.loading
    again = prune(model, batches(model, 2), 1.0, keep_experts=0.67)
    assert [layer.units for layer in again.plan.experts.values()] == [4, 4]
    assert [len(layer.kept) for layer in again.plan.experts.values()] == [2, 2]


@pytest.mark.parametrize("name", MOE)
def test_a_folder_of_single_experts_is_loaded_and_pruned_twice(name: str, tmp_path) -> None:
    """transformers writes a tensor per expert; two jobs come to one plan of the dense model."""
    tiny(name).save_pretrained(tmp_path / "dense")
    model, _ = load_model(tmp_path / "dense")
    choices = {"allocation": "uniform", "kinds": ("mlp",), "tile": 1}
    prune(model, batches(model, 2), 0.75, keep_experts=0.75, **choices)
    report = prune(model, batches(model, 2), 1.0, keep_experts=0.67, **choices)
    assert {layer.units for layer in report.plan.experts.values()} == {4}
    sizes = {site.name: site.units for site in sites(tiny(name), ("mlp",))}
    assert all(plan.units == sizes[name] for name, plan in report.plan.sites.items())
    assert {len(layer.kept) for layer in report.plan.experts.values()} == {2}
    again = tiny(name)
    apply_plan(again, report.plan)
    assert [each.shape for each in again.parameters()] == [e.shape for e in model.parameters()]
    save_pruned(model, tmp_path / "pruned", report=report)
    assert verify_pruned(tmp_path / "pruned")["agrees"]


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"criterion": "taylor"}, "gradients.*0.mlp.0, an expert"),
        ({"keep_hidden": 0.5}, "hidden"),
        ({"keep_experts": 0.25}, "leaves 1 of 4 experts; .* the 2 that every token is sent to"),
        ({"keep_experts": 4}, "keep_experts 4 leaves 4 of 4 experts; it must remove some"),
    ],
)
def test_what_experts_lack_is_refused_before_any_text_is_read(choices: dict, match: str) -> None:
    def never():
        raise AssertionError("text was read")
        yield

    with pytest.raises(InputError, match=match):
        prune(tiny("mixtral"), never(), 0.5, **choices)
