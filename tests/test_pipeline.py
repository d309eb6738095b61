from __future__ import annotations

import copy
import json

import pytest
import torch
from covers import cover
from tiny import batches, outputs, same_weights, tiny, tiny_inputs

from liar_ext import Budget, InputError, Plan, apply_plan, kl_divergence, prune, save_pruned, sites
from liar_ext.models.plan import SitePlan
from liar_ext.report.report import Report


@cover(
    1,
    family=["llama", "qwen2", "bert", "gpt2", "gpt_neox", "opt", "mpnet", "vit"],
    allocation=["uniform", "global", "curve"],
)
def test_the_whole_job(family, allocation):
    model = tiny(family)
    data = batches(model)
    dense = sum(parameter.numel() for parameter in model.parameters())
    report = prune(model, data, 0.7, allocation=allocation)
    params = report.params
    assert params["before"] == dense
    assert params["after"] == sum(parameter.numel() for parameter in model.parameters())
    assert (
        params["before"] - params["after"] == params["prunable_before"] - params["prunable_after"]
    )
    assert params["prunable_after"] <= 0.7 * params["prunable_before"]
    assert torch.isfinite(outputs(model)).all()
    for row in report.sites:
        assert row.units_after == len(report.plan.sites[row.name].kept)
        if row.units_after == row.units_before:
            assert row.error == row.holdout_error == 0


@cover(
    1,
    mode=["auto", "none", "bias", "linear", "affine"],
    family=["llama", "mistral", "bert", "gpt2"],
)
def test_every_mode_on_models_with_and_without_biases(family, mode):
    model = tiny(family)
    report = prune(model, batches(model), 0.7, reconstruct=mode)
    assert all(0 <= row.error < 1.5 for row in report.sites)
    if mode == "auto":
        mode = "affine" if family in ("bert", "gpt2") else "linear"
    assert {row.path.split(",")[0] for row in report.sites} - {"kept as it is"} == {mode}


def test_the_mode_auto_adds_no_parameter():
    """It uses the biases that there are: the same names of tensors, and the affine solution."""
    for family, mode in (("llama", "linear"), ("bert", "affine")):
        auto, named = tiny(family), tiny(family)
        prune(auto, batches(auto), 0.7)
        prune(named, batches(named), 0.7, reconstruct=mode)
        assert auto.state_dict().keys() == tiny(family).state_dict().keys()
        for name, tensor in named.state_dict().items():
            assert torch.equal(auto.state_dict()[name], tensor)


def test_reconstruction_is_nearer_to_the_dense_model_than_dropping():
    dense = tiny("llama")
    data, held_out = batches(dense), tiny_inputs(dense, batch=16, tokens=16, seed=99)
    wanted, distance = outputs(dense, held_out), {}
    for mode in ("none", "linear"):
        model = copy.deepcopy(dense)
        prune(model, data, 0.8, kinds=("mlp",), reconstruct=mode)
        distance[mode] = float((outputs(model, held_out) - wanted).square().mean())
    assert distance["linear"] < distance["none"]


@cover(1, criterion=["wifv", "obs"], mode=["none", "linear", "affine"])
def test_curve_allocation_with_any_criterion_and_mode(criterion, mode):
    model = tiny("llama")
    report = prune(
        model, iter(batches(model)), 0.7, criterion=criterion, allocation="curve", reconstruct=mode
    )
    assert report.params["prunable_after"] <= 0.7 * report.params["prunable_before"]
    assert all(row.sensitivity > 0 for row in report.sites)
    assert 0 < report.settings["predicted_divergence"] < 10


def test_query_heads_are_pruned_by_curves_too():
    model = tiny("llama")
    report = prune(
        model, batches(model), 0.7, criterion="obs", allocation="curve", attn_unit="head"
    )
    kept = [len(report.plan.sites[f"{block}.attn"].kept) for block in range(3)]
    assert all(count % 4 == 0 for count in kept) and torch.isfinite(outputs(model)).all()


def test_predicted_divergence_is_near_the_measured_one():
    """Single-site losses add up, as long as little is lost."""
    dense = tiny("llama")
    model, data = copy.deepcopy(dense), batches(dense)
    report = prune(model, data, 0.9, criterion="obs", allocation="curve")
    measured = kl_divergence(model, dense, data)
    assert 1 / 3 < report.settings["predicted_divergence"] / measured < 3


def test_curve_allocation_loses_less_than_uniform():
    dense = tiny("llama")
    # One block that hardly matters: its outputs are a tenth of the others'.
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        dense.model.layers[1].get_submodule(name).weight.data *= 0.1
    data, held_out = batches(dense), [tiny_inputs(dense, batch=16, tokens=16, seed=99)]
    lost = {}
    for allocation in ("uniform", "curve"):
        model = copy.deepcopy(dense)
        report = prune(model, data, 0.7, allocation=allocation)
        lost[allocation] = kl_divergence(model, dense, held_out)
    kept = {name: len(site.kept) for name, site in report.plan.sites.items()}
    assert kept["1.mlp"] < min(kept["0.mlp"], kept["2.mlp"])
    assert lost["curve"] < lost["uniform"]


def test_keeping_everything_changes_nothing():
    model = tiny("llama")
    before = outputs(model)
    report = prune(model, batches(model), 1.0)
    assert torch.equal(outputs(model), before)
    assert report.params["after"] == report.params["before"]


@pytest.mark.parametrize("of", ["prunable", "params", "flops"])
def test_budgets(of):
    model = tiny("llama")
    report = prune(model, batches(model), Budget(0.8, of, tile=4, uniform_layers=True))
    assert report.budget["of"] == of
    assert {row.units_after for row in report.sites if row.name.endswith("mlp")}.__len__() == 1


def test_perplexity_is_reported_before_and_after():
    model = tiny("llama")
    report = prune(model, batches(model), 0.6, evaluate_on=batches(model, 2))
    assert report.evaluation["dense"]["tokens"] == 2 * 8 * 15
    assert report.evaluation["pruned"]["perplexity"] != report.evaluation["dense"]["perplexity"]
    model, text = tiny("llama"), (each for each in batches(model, 2))
    once = prune(model, batches(model), 0.6, evaluate_on=text)
    assert once.evaluation == report.evaluation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 1.5}, r"keep must be in \(0, 1\]"),
        ({"keep": 0.01}, "no plan keeps"),
        ({"criterion": "best"}, "unknown criterion 'best'; known: fisher"),
        ({"reconstruct": "ridge"}, "reconstruct must be one of"),
        ({"damp": "lots"}, "damp must be"),
        ({"allocation": "fair"}, "allocation must be one of"),
        ({"kinds": ("ffn",)}, "kinds must be a list of some of"),
        ({"memory": 0}, "memory must be a number and a unit, such as 12GiB or 500MB, got 0"),
        ({"seed": 2**70}, "seed must be .* below 2.63, got 1180591620717411303424"),
        ({"criterium": "wifv"}, "no keyword criterium; did you mean criterion"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_batch(arguments, message):
    model = tiny("llama")

    def no_batch():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(InputError, match=message):
        prune(model, no_batch(), **arguments)


def test_a_failure_leaves_the_model_as_it_was():
    model = tiny("llama")
    before = outputs(model)
    with pytest.raises(InputError, match="only padding"):
        bad = tiny_inputs(model)
        bad["attention_mask"][:] = 0
        prune(model, [*batches(model), bad], 0.5)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("criterion", ["obs", "taylor"])
def test_a_job_in_inference_mode_makes_ordinary_weights(criterion):
    model, other = tiny("llama"), tiny("llama")
    with torch.inference_mode():
        prune(model, batches(model), 0.6, criterion=criterion)
    prune(other, batches(other), 0.6, criterion=criterion)
    assert same_weights(model, other)
    assert not any(each.is_inference() for each in model.parameters())


def test_a_model_of_inference_mode_is_pruned_in_any_mode():
    with torch.inference_mode():
        model = tiny("llama")
    prune(model, batches(model), 0.6)
    assert all(each.is_inference() for each in model.parameters())


@cover(
    1, choices=[{}, {"uniform_layers": True}, {"keep_hidden": 0.8}], name=["llama", "bert", "mpnet"]
)
def test_a_pruned_model_is_pruned_again(name, choices):
    """Sizes, plan and report are those of both jobs; the first one's weights are the second's."""
    if name == "mpnet" and "keep_hidden" in choices:
        choices = {"keep_hidden": 0.9}  # at 0.8 it has as many features as relative positions
    model = tiny(name)
    dense = {site.name: site.units for site in sites(model)}
    first = prune(model, batches(model), 0.8, **choices)
    between = copy.deepcopy(model)
    second = prune(model, batches(model), 0.7, **choices)
    assert second.params["before"] == first.params["after"] and second.earlier[0]["params"] == [
        first.params["before"],
        first.params["after"],
    ]
    assert "Pruned before" in second.summary() and "Pruned before" in second.to_markdown()
    assert len(model.config.liar["history"]) == 2
    for site in sites(model):
        plan = second.plan.sites[site.name]
        assert (plan.units, len(plan.kept)) == (dense[site.name], site.units)
        assert set(plan.kept) <= set(first.plan.sites[site.name].kept)
    # Where nothing is reconstructed the composed plan does to the dense model what both jobs did.
    other, plain = tiny(name), {**choices, "reconstruct": "none"}
    plain.pop("keep_hidden", None)
    prune(other, batches(other), 0.8, **plain)
    twice = prune(other, batches(other), 0.7, **plain)
    at_once = tiny(name)
    apply_plan(at_once, twice.plan)
    assert torch.equal(outputs(at_once), outputs(other))
    assert not torch.equal(outputs(between), outputs(model))


def test_warnings_name_what_limits_the_result():
    model = tiny("llama")
    few = prune(copy.deepcopy(model), [tiny_inputs(model, batch=2, tokens=4)], 0.7)
    assert any("8 calibration tokens are few" in warning for warning in few.warnings)
    overflowing = tiny("llama", dtype=torch.float16)
    overflowing.model.layers[2].mlp.up_proj.weight.data *= 12000
    report = prune(overflowing, batches(overflowing), 0.7)
    assert any("non-finite" in warning for warning in report.warnings)


def test_the_report_is_strict_json(tmp_path):
    model = tiny("llama")
    report = prune(model, batches(model), 0.7, reconstruct="none")
    report.save(tmp_path)
    data = json.loads((tmp_path / "liar/report.json").read_text(), parse_constant=pytest.fail)
    assert data["sites"][0]["damp"] == "inf"
    assert data.keys() == {key for key in vars(Report("x")) if key != "plan"}
    markdown = (tmp_path / "liar/report.md").read_text()
    assert "| 0.attn | 4" in markdown


def test_same_inputs_same_result():
    results = []
    for _ in range(2):
        model = tiny("llama")
        prune(model, batches(model), 0.7)
        results.append(outputs(model))
    assert torch.equal(*results)


@cover(2, tile=["auto", 1, 16, 128], allocation=["uniform", "global", "curve"], keep=[0.05, 0.99])
def test_a_job_at_the_ends_of_the_budget_meets_it_or_says_why_not(keep, allocation, tile):
    """A tile larger than the layer, too: its 24 channels then stay."""
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choices = {"keep": keep, "allocation": allocation, "tile": tile, "reconstruct": "none"}
    if keep == 0.05:
        said = f"no plan keeps 0.05 .* raise keep=0.05, or lower tile={tile}"
        with pytest.raises(InputError, match=said):
            prune(model, batches(model, 2), **choices)
        assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
        return
    report = prune(model, batches(model, 2), **choices)
    kept = report.params["prunable_after"] / report.params["prunable_before"]
    assert kept <= keep and report.grid["kept"] == pytest.approx(kept)
    step = {"auto": 2, 1: 1, 16: 16, 128: 128}[tile]
    for name, site in report.plan.sites.items():
        assert "attn" in name or len(site.kept) == 24 or len(site.kept) % step == 0
    assert any("tile=128" in warning for warning in report.warnings) == (tile == 128)


def test_the_report_says_the_grid_and_what_it_costs():
    model = tiny("llama")
    report = prune(model, batches(model, 2), keep=0.7, keep_hidden=0.8, tile=16)
    grid = json.loads(report.to_json())["grid"]
    assert grid["tile"] == 16 and grid["hidden"] == {
        **{"units": 40, "step": 16, "kept": 32},
        "kept_at_tile_1": 32,
    }
    assert {row["kind"]: row["step"] for row in grid["sites"]} == {"attn": 1, "mlp": 16}
    assert grid["predicted_divergence"] >= grid["predicted_divergence_at_tile_1"] > 0
    page, summary = report.to_markdown(), report.summary()
    assert "| 3 mlp layers, channels | 24 | 16 |" in page
    assert "| hidden features | 40 | 16 | 32 |" in page and "with tile 1" in page
    (line,) = [line for line in summary.splitlines() if line.startswith("sizes")]
    assert "MLP channels in steps of 16" in line and "predicted divergence" in line
    assert "hidden features in steps of 16: 32 stay, with tile 1 32" in line


def test_tile_1_is_not_talked_of_in_the_summary():
    model = tiny("llama")
    report = prune(model, batches(model, 2), keep=0.7, tile=1, allocation="uniform")
    assert not [line for line in report.summary().splitlines() if line.startswith("sizes")]
    assert "none that is a loss" in report.to_markdown()


def test_a_model_that_was_sliced_by_hand_since_is_pruned():
    """The plan that it carries is out of date: the new one counts what came in."""
    model = tiny("llama")
    prune(model, batches(model), 0.8)
    by_hand = {site.name: SitePlan(site.units, (0, 1)) for site in sites(model, ("mlp",))}
    apply_plan(model, Plan("llama", "auto", by_hand))
    with pytest.warns(UserWarning, match="isn't as liar_ext left it"):
        report = prune(model, batches(model), 0.6)
    assert all(report.plan.sites[name].units == 2 for name in by_hand)
    assert torch.isfinite(outputs(model)).all()


@pytest.mark.parametrize(
    ("choice", "instead"),
    [
        ({"eval": "nope.txt"}, "evaluate_on"),
        ({"certify": 4}, "certify_on"),
        ({"calibration": ("nowhere.txt",)}, "calibration_sequences"),
        ({"samples": 3}, "calibration_sequences"),
        ({"seq_len": 8}, "calibration_sequences"),
        ({"dtype": "bfloat16"}, "load_model"),
        ({"out": "folder"}, "save_pruned"),
        ({"max_memory": "12GiB"}, "compress"),
    ],
)
def test_a_choice_that_the_command_alone_heeds_is_refused(choice, instead):
    model = tiny("llama")
    with pytest.raises(InputError, match=f"prune: {next(iter(choice))} is no .*{instead}"):
        prune(model, batches(model), **choice)


@pytest.mark.parametrize(
    ("name", "near"), [("keeep", "keep"), ("evaluate", "evaluate_on"), ("zzz", "docs/options.md")]
)
def test_an_unknown_keyword_is_refused_with_a_near_one(name, near):
    model = tiny("llama")
    with pytest.raises(InputError, match=f"prune: there is no keyword {name}; .*{near}"):
        prune(model, batches(model), **{name: 1})


def test_a_preset_and_sites_are_keywords():
    model = tiny("llama")
    report = prune(model, batches(model), 0.7, preset="fast", sites="mlp")
    assert report.recipe.allocation == "uniform" and report.recipe.kinds == ("mlp",)
    assert all(row.name.endswith("mlp") for row in report.sites if row.is_pruned)


def test_a_function_is_told_of_every_step_and_may_end_the_job():
    model, seen = tiny("llama"), []
    prune(model, batches(model), keep=0.7, progress=lambda *step: seen.append(step))
    by_stage = {stage: [each[1:] for each in seen if each[0] == stage] for stage, *_ in seen}
    assert {"calibrate", "curves", "sensitivity", "layerwise"} <= by_stage.keys()
    for steps in by_stage.values():
        assert steps[-1][0] == steps[-1][1]  # all of them are done
    assert seen[0][3] > 0 and seen[-1][3] < seen[0][3] + 60

    def stop(*_):
        raise KeyboardInterrupt

    before = outputs(fresh := tiny("llama"))
    with pytest.raises(KeyboardInterrupt):
        prune(fresh, batches(fresh), keep=0.7, progress=stop)
    assert outputs(fresh).equal(before)


def test_the_recipe_of_a_job_in_python_says_what_was_run(tmp_path):
    model = tiny("llama")
    report = prune(model, batches(model), keep=0.7, schedule="one-pass", allocation="uniform")
    found = report.recipe
    assert (found.samples, found.seq_len, found.self_text, found.random_tokens) == (48, 16, 0, 0)
    save_pruned(model, tmp_path / "out", report=report)
    assert "repeats it" not in (tmp_path / "out/README.md").read_text()


def test_memory_that_ends_anywhere_is_named_and_leaves_the_model(monkeypatch) -> None:
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())

    def ends(*given):
        raise MemoryError

    monkeypatch.setattr("liar_ext.job.pruning.decide", ends)
    with pytest.raises(MemoryError, match=r"^prune: out of memory: MemoryError$"):
        prune(model, [tiny_inputs(model)], keep=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
