"""Tables of latency as they are stored: read back as they were, and nothing that is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from tiny import tiny

from liar_ext import Budget, Costs, InputError, LatencyTable, sites
from liar_ext.measure.latency_table import SizeRow

ATTN = SizeRow("attn", "kv_group", 4, 8, 1, 40, 3, (1, 2, 4), (1e-3, 2e-3, 3e-3), (1e-5,) * 3)
MLP = SizeRow("mlp", "channel", 24, 1, 1, 40, 3, (8, 16, 24), (2e-3, 2e-3, 8e-3), (1e-4,) * 3)


def table(**changes):
    made = LatencyTable(
        phase="both",
        batch=1,
        prompt=128,
        new_tokens=32,
        fixed=7e-3,
        spread=1e-4,
        rows=(ATTN, MLP),
        where={"device": "cpu", "dtype": "float32", "threads": 1},
    )
    return replace(made, **changes)


def test_sizes_between_lie_on_a_line():
    assert ATTN.by_count() == pytest.approx([0.0, 1e-3, 2e-3, 2.5e-3, 3e-3])
    found = MLP.by_count()
    assert found[0] == 0.0 and found[1] == found[8] == found[16] == 2e-3
    assert found[20] == pytest.approx(5e-3) and found[24] == 8e-3


def test_the_model_takes_its_sites_and_the_rest(tmp_path):
    at = sites(tiny("llama"))
    one = table()
    assert one.total == pytest.approx(7e-3 + 3 * 3e-3 + 3 * 8e-3)
    costs = Costs.measured(one, at)
    assert costs.total == one.total
    assert costs.by_count["1.mlp"] == pytest.approx(MLP.by_count())
    # What a whole plan saved, by what its sites add up to.
    half = Costs.measured(replace(one, scale=0.5), at)
    assert half.total == one.total
    for name, found in costs.by_count.items():
        saved = [found[-1] - each for each in found]
        again = [half.by_count[name][-1] - each for each in half.by_count[name]]
        assert again == pytest.approx([each / 2 for each in saved])
    assert min(Costs.measured(replace(one, scale=9.0), at).by_count["0.mlp"]) == 0.0
    with pytest.raises(InputError, match="no sizes of 0.attn, with 8 heads of 4 features"):
        Costs.measured(one, sites(tiny("llama"), attn_unit="head"))


def test_a_table_is_read_as_it_was_written(tmp_path):
    one = table(scale=1.07)
    one.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == one
    folder = tmp_path / "pruned"
    (folder / "liar").mkdir(parents=True)
    report = {"latency": {"table": one.to_dict()}}
    (folder / "liar" / "report.json").write_text(json.dumps(report))
    assert LatencyTable.load(folder) == LatencyTable.load(folder / "liar" / "report.json") == one


def test_a_table_of_other_settings_is_refused():
    table().check(Budget(0.8, "latency"))
    for changes in (
        {"latency_phase": "prefill"},
        {"latency_batch": 2},
        {"latency_prompt": 64},
        {"latency_new_tokens": 1},
    ):
        with pytest.raises(InputError, match="measured with phase both, batch 1, prompt 128"):
            table().check(Budget(0.8, "latency", **changes))


def broken():
    """What is no table, by one change each."""
    whole = table().to_dict()
    yield {}
    for name, values in {
        "version": (2, None, "1"),
        "batch": ("x", None, [1]),
        "fixed": (-1.0, math.nan, None, "a"),
        "spread": (-1.0, math.nan, math.inf, "inf"),
        "scale": (-2.0, math.nan, math.inf, {}),
        "rows": (None, "rows", [1], [[]]),
    }.items():
        for value in values:
            yield {**whole, name: value}
    row = whole["rows"][0]
    for name, values in {
        "units": (5, -1, None, "many"),
        "counts": ([1, 2], [2, 1, 4], [], None, [1, 2, 5], [-1, 2, 4]),
        "seconds": ([1.0], [3.0, 2.0, 1.0], [math.nan] * 3, [math.inf] * 3, [-1.0, 1.0, 2.0]),
        "spread": ([], None, [0.1, 0.1, math.nan], ["inf"] * 3),
    }.items():
        for value in values:
            yield {**whole, "rows": [{**row, name: value}]}


@pytest.mark.parametrize("facts", [*broken()], ids=lambda facts: "")
def test_what_is_no_table_is_refused(facts, tmp_path):
    with pytest.raises(InputError, match="latency: "):
        LatencyTable.from_dict(facts)
    (tmp_path / "a.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="latency: "):
        LatencyTable.load(tmp_path / "a.json")


def test_files_that_hold_no_table(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("{")
    for name in ("a.json", "b.json", "missing.json", "."):
        with pytest.raises(InputError, match="latency: "):
            LatencyTable.load(tmp_path / name)


@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("mlp",)])
def test_a_table_of_a_model_with_other_layers_is_refused(kinds):
    every, some = sites(tiny("llama")), sites(tiny("llama"), kinds)
    table().check_sites(some, every)
    more = sites(tiny("llama", num_hidden_layers=5), kinds)
    with pytest.raises(InputError, match="the table is of 3 layers with .*, and the model has 5"):
        table().check_sites(more, sites(tiny("llama", num_hidden_layers=5)))
    table().check_sites(some[:2], every)  # of which the budget counts a part
