"""Seconds of sites by their units: what is run, what is timed, and what a job makes of it."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from covers import some
from tiny import CAUSAL, batches, outputs, tiny

from liar_ext import (
    Budget,
    InputError,
    LatencyTable,
    Recipe,
    measure_latency,
    prune,
    save_pruned,
    sites,
    sweep,
)
from liar_ext.cli.calibrate import sweep_table
from liar_ext.job.planning import describe
from liar_ext.job.state import Speed
from liar_ext.measure import latency
from liar_ext.measure.latency import plan_of, ratios, rising_means, sliced
from liar_ext.measure.speed import Quartiles
from liar_ext.report.sections import latency_lines
from liar_ext.report.tables import to_text
from liar_ext.selection.allocation import even_plan
from liar_ext.selection.costs import Costs

SHORT = {"latency_prompt": 8, "latency_new_tokens": 4}
# So much that the sites take most of the time, whatever else the machine does.
LONG = {"latency_phase": "prefill", "latency_prompt": 32, "latency_batch": 64}


@pytest.fixture
def quick(monkeypatch):
    """Few runs, of which no test says how long they take."""
    monkeypatch.setattr(latency, "SAMPLES", 1)
    monkeypatch.setattr(latency, "COMPARED", 2)


def ticking(step=1e-3):
    """A clock that goes on by a step whenever it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * step


def table_for(model, at, budget, fixed=0.0):
    """A made-up table: a channel takes a millisecond, a group of heads eight, at any size."""
    measured = measure_latency(model, budget, at, clock=ticking())
    rows = [
        replace(row, seconds=tuple(1e-3 * n * (8 if row.kind == "attn" else 1) for n in row.counts))
        for row in measured.rows
    ]
    return replace(measured, rows=tuple(rows), fixed=fixed)


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "mpnet", "vit", "dinov2_swiglu"])
def test_every_family_is_measured_and_left_as_it_was(family, quick):
    model = tiny(family)
    before = outputs(model)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    at = sites(model)
    phase = "both" if family in CAUSAL else "prefill"
    budget = Budget(0.8, "latency", tile=8, latency_phase=phase, **SHORT)
    table = measure_latency(model, budget, at, clock=ticking())
    assert {row.shape for row in table.rows} == {site.shape for site in at}
    assert sum(row.sites for row in table.rows) == len(at)
    for row in table.rows:
        assert row.counts[-1] == row.units
        # A clock that ticks when it is read finds one tick in every site, twice in both phases.
        ticks = 1 + (budget.latency_new_tokens if phase == "both" else 0)
        assert row.seconds == pytest.approx([1e-3 * ticks] * len(row.counts))
    assert table.fixed > 0 and table.total > table.fixed
    assert torch.equal(outputs(model), before)
    after = model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sizes_that_are_measured_are_of_the_grid(quick):
    model = tiny("llama", intermediate_size=512)
    table = measure_latency(model, Budget(0.8, "latency", **SHORT), clock=ticking())
    counts = {row.kind: row.counts for row in table.rows}
    assert counts["attn"] == (1, 2, 3, 4)
    assert counts["mlp"][0] == 32 and counts["mlp"][-1] == 512 and len(counts["mlp"]) == 7
    assert all(count % 32 == 0 for count in counts["mlp"])


def test_layers_of_different_sizes_have_rows_of_their_own(quick):
    model = tiny("llama")
    prune(model, batches(model), 0.6)
    at = sites(model)
    table = measure_latency(model, Budget(0.8, "latency", **SHORT), at, clock=ticking())
    assert {row.shape for row in table.rows} == {site.shape for site in at}
    assert Costs.measured(table, at).total == table.total


def test_a_sliced_copy_shares_what_stays_whole():
    model = tiny("llama")
    at = sites(model)
    counts = {site.name: site.units for site in at} | {"1.mlp": 8}
    made = sliced(model, plan_of(model, at, counts))
    mine, theirs = dict(model.named_parameters()), dict(made.named_parameters())
    other = [name for name in mine if mine[name] is not theirs[name]]
    assert sorted(other) == [
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate", "up")
    ]
    down, gate, _ = sorted(other)
    assert (theirs[down].shape, theirs[gate].shape) == ((40, 8), (8, 40))
    assert (mine[down].shape, mine[gate].shape) == ((40, 24), (24, 40))
    heads = sites(model, attn_unit="head")
    fewer = plan_of(model, heads, {s.name: s.units // 2 for s in heads})
    assert fewer.sites["0.attn"].kept == (0, 2, 4, 6)  # a query head of every group
    sliced(model, fewer)


def test_models_are_timed_in_turns(quick):
    model = tiny("llama")
    order = []
    named = {"dense": model, "pruned": copy.deepcopy(model)}
    for role, each in named.items():
        each.register_forward_pre_hook(lambda *_, role=role: order.append(role))
    budget = Budget(0.8, "latency", latency_phase="prefill", **SHORT)
    found = ratios(named, budget, rounds=2, clock=ticking())
    assert found["pruned"].median == pytest.approx(1.0)
    runs = [role for role, _ in itertools.groupby(order)]
    assert runs == ["pruned", "dense", "pruned"]  # the dense one twice in the middle


def test_values_that_fall_are_pooled():
    assert rising_means([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert rising_means([1.0, 4.0, 2.0, 3.0, 9.0]) == [1.0, 3.0, 3.0, 3.0, 9.0]
    assert rising_means([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert rising_means([]) == []


def test_phases_and_lengths_that_a_model_lacks():
    model = tiny("bert")
    with pytest.raises(InputError, match="decode needs a model that generates"):
        measure_latency(model, Budget(0.8, "latency", latency_phase="decode"))
    for name in ("bert", "llama"):
        with pytest.raises(InputError, match="latency: .* has 64 positions"):
            measure_latency(tiny(name), Budget(0.8, "latency", latency_prompt=65))
    with pytest.raises(InputError, match="latency: .* has 64 positions"):
        measure_latency(tiny("llama"), Budget(0.8, "latency", latency_prompt=60))
    with pytest.raises(InputError, match="latency_phase must be one of prefill, decode, both"):
        Budget(0.8, "latency", latency_phase="train")
    with pytest.raises(InputError, match="latency_batch must be an integer of at least 1"):
        Budget(0.8, "latency", latency_batch=0)


def test_a_model_without_sites_is_refused():
    with pytest.raises(InputError, match="no site to measure"):
        measure_latency(tiny("llama"), Budget(0.8, "latency", **SHORT), [])


def test_a_model_on_several_devices_is_refused():
    model = tiny("mistral")
    model.lm_head.to("meta")
    with pytest.raises(InputError, match="must lie on one device, got cpu, meta"):
        measure_latency(model, Budget(0.8, "latency", **SHORT))


def test_costs_are_corrected_by_what_whole_plans_take(monkeypatch):
    model = tiny("llama")
    at, budget = sites(model), Budget(0.75, "latency", tile=1, **SHORT)
    table = table_for(model, at, budget, fixed=0.02)
    found = []

    def timed(models, budget):
        counts = {site.name: site.units for site in sites(models["pruned"])}
        added = Costs.measured(replace(speed.table, scale=1.0), at)
        plan = plan_of(model, at, counts)
        ratio = 1.0 - 0.8 * (1.0 - added.kept_fraction(plan))  # sites save less together
        found.append(ratio)
        return {"pruned": Quartiles(ratio, ratio, ratio)}

    monkeypatch.setattr("liar_ext.job.state.measure_latency", lambda *_, **__: table)
    monkeypatch.setattr("liar_ext.job.state.ratios", timed)
    speed = Speed(model, at, budget)
    costs = speed.settle(lambda costs: even_plan(at, budget, costs))
    assert speed.table.scale == pytest.approx(0.8)
    plan = even_plan(at, budget, costs)
    speed.time(plan)
    assert found[0] > 0.78 and speed.measured.median <= 0.75 + 1e-9
    assert speed.predicted == pytest.approx(speed.measured.median)
    assert speed.warnings() == []
    speed.table = replace(speed.table, spread=speed.table.total)
    assert "varied by 100% of it:" in speed.warnings()[0]
    # The corrected table gives the plan again, and is not corrected once more.
    again = Speed(model, at, budget, speed.table)
    assert even_plan(at, budget, again.costs) == plan
    assert not again.fit(plan)


def test_a_correction_that_no_plan_meets_is_not_taken(monkeypatch):
    model = tiny("llama")
    at, budget = sites(model), Budget(0.4, "latency", tile=1, **SHORT)
    table = table_for(model, at, budget, fixed=0.01)
    monkeypatch.setattr("liar_ext.job.state.measure_latency", lambda *_, **__: table)
    slow = Quartiles(0.9, 0.9, 0.9)
    monkeypatch.setattr("liar_ext.job.state.ratios", lambda *_, **__: {"pruned": slow})
    speed = Speed(model, at, budget)
    costs = speed.settle(lambda costs: even_plan(at, budget, costs))
    even_plan(at, budget, costs)
    assert "takes 0.9 of the dense time, where 0.4 was asked for" in speed.warnings()[0]


def write_table(model, tmp_path, budget, **more):
    at = sites(model)
    path = tmp_path / "table.json"
    table_for(model, at, budget, **more).save(path)
    return path


@some("allocation", ["uniform", "global", "curve"], "curve")
def test_a_job_by_a_table_of_elsewhere(allocation, tmp_path, quick):
    model = tiny("llama")
    budget = Budget(0.7, "latency", tile=4, **SHORT)
    path = write_table(model, tmp_path, budget, fixed=0.01)
    facts = json.loads(path.read_text())
    facts["where"] = {"cpu": "another"}  # which may say no more
    path.write_text(json.dumps(facts))
    plans = []
    for _ in range(2):
        model = tiny("llama")
        report = prune(
            model, batches(model), budget, allocation=allocation, latency_table=str(path)
        )
        plans.append(report.plan)
        found = report.latency
        assert found["measured"] is None and found["predicted"] <= 0.7 + 1e-9
        assert report.grid["kept"] == found["predicted"]
    assert plans[0] == plans[1]
    assert plans[0].budget["latency_prompt"] == 8
    at = sites(tiny("llama"))
    costs = Costs.measured(LatencyTable.load(path), at)
    assert costs.kept_fraction(plans[0]) == found["predicted"]
    for lines in (report.summary(), report.to_markdown()):
        assert f"×{1 / found['predicted']:.3f} predicted" in lines
        assert "measured (" not in lines
    save_pruned(model, tmp_path / "out", report.plan, report=report)
    saved = LatencyTable.load(tmp_path / "out")  # to six digits
    assert saved.total == pytest.approx(costs.total, rel=1e-5)
    assert [row.shape for row in saved.rows] == [row.shape for row in LatencyTable.load(path).rows]
    recipe = Recipe.load(tmp_path / "out" / "liar" / "recipe.yaml")
    assert recipe.latency_table == str(path) and recipe.of == "latency"
    model = tiny("llama")
    assert prune(model, batches(model), recipe).plan == report.plan


def test_a_job_that_measures_here(tmp_path, quick):
    model = tiny("llama", intermediate_size=256, num_hidden_layers=2)
    report = prune(model, batches(model), 0.9, of="latency", **LONG)
    found = report.latency
    assert found["predicted"] <= 0.9 + 1e-9 and found["measured"]["median"] > 0
    assert found["table"]["where"]["device"] == "cpu"
    assert "measured (" in report.summary() and "## Latency" in report.to_markdown()
    assert "time of prefill" in report.to_card()
    assert LatencyTable.from_dict(found["table"]).total == pytest.approx(found["dense_seconds"])
    save_pruned(model, tmp_path / "out", report.plan, report=report)
    assert LatencyTable.load(tmp_path / "out").phase == "prefill"


def test_a_dry_run_says_what_was_measured(tmp_path, quick):
    model = tiny("llama")
    budget = Budget(0.7, "latency", tile=4, **SHORT)
    path = write_table(model, tmp_path, budget, fixed=0.01)
    recipe = Recipe.build(budget, latency_table=str(path))
    said = [line for line in describe(model, batches(model), recipe) if line.startswith("latency")]
    assert "predicted" in said[0] and "lie outside of what can be pruned" in said[1]
    cache = Recipe.build(0.5, of="kv_cache")
    lines = describe(model, batches(model), cache)
    assert [line for line in lines if line.startswith("attn")]
    assert not [line for line in lines if line.startswith("mlp")]


def test_budgets_of_latency_that_no_plan_meets(tmp_path, quick):
    model = tiny("llama")
    budget = Budget(0.3, "latency", tile=4, **SHORT)
    path = write_table(model, tmp_path, budget, fixed=1.0)
    with pytest.raises(InputError, match="no plan keeps 0.3 of latency.* lies outside of them"):
        prune(model, batches(model), budget, latency_table=str(path))
    with pytest.raises(InputError, match="ask for what it has, or measure again"):
        prune(model, batches(model), 0.9, of="latency", latency_table=str(path))
    with pytest.raises(InputError, match="latency_table is for of='latency'"):
        Recipe.build(0.9, latency_table=str(path))
    with pytest.raises(InputError, match="yet to lose hidden features or blocks"):
        Recipe.build(0.9, of="latency", latency_table=str(path), keep_hidden=0.5)
    with pytest.raises(InputError, match="no sizes of 0.attn"):
        other = tiny("llama", num_attention_heads=4, num_key_value_heads=2)
        prune(other, batches(other), budget, latency_table=str(path))


def test_a_narrowed_model_is_measured_as_it_is_then(quick):
    model = tiny("opt", ffn_dim=256)
    data = batches(model)
    report = prune(model, data, 0.9, of="latency", keep_hidden=0.75, tile=1, **LONG)
    assert {row["d_out"] for row in report.latency["table"]["rows"]} == {24}


def test_reports_and_sweeps_say_what_was_timed(tmp_path, quick):
    model = tiny("bert")
    found = prune(model, batches(model), 1.0, of="latency", **SHORT).latency
    assert "(a forward pass, batch 1, prompt of" in latency_lines(found)[0]
    model = tiny("llama")
    path = write_table(model, tmp_path, Budget(0.7, "latency", tile=4, **SHORT), fixed=0.01)
    how = {"of": "latency", "tile": 4, "latency_table": str(path), **SHORT}
    (point,) = sweep(model, batches(model), keep=[0.7], **how)
    assert point.time == pytest.approx(0.7, abs=0.05)
    row = point.to_dict()
    dense = {"params": 1, "flops": 1.0, "time": 1.0}
    assert f"{point.time:.1%}" in "\n".join(to_text(sweep_table(dense, [row])))
    assert "predicted time" not in to_text(sweep_table(dense, [row | {"time": None}]))[0]
