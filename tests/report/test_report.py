"""What a person reads of a report, and what a program does."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from test_latency_table import table

from liar_ext import Recipe, Report
from liar_ext.reconstruction.solve import SiteRow, what_to_know
from liar_ext.report.page import write_comparison, write_page
from liar_ext.report.sections import sites
from liar_ext.report.tables import Table, figure, to_markdown, to_text
from liar_ext.system.progress import Clock

ROW = SiteRow(
    name="3.mlp",
    units_before=1536,
    units_after=1229,
    params_before=2654208,
    params_after=2123712,
    damp=0.001,
    error=0.0123456789,
    holdout_error=0.0234567891,
    condition=123456.789,
    dropped_rows=0,
    path="linear, cholesky float64",
    seconds=1.23456,
)
GRID = {
    "tile": 32,
    "sites": [
        {
            **{"layers": 30, "kind": "mlp", "unit": "channel", "units": 1536, "step": 32},
            **{"least_kept": 960, "most_kept": 1536},
        }
    ],
    "hidden": {"units": 576, "step": 16, "kept": 512, "kept_at_tile_1": 500},
    "objective": "divergence",
    **{"kept": 0.8, "kept_at_tile_1": 0.81},
    **{"predicted_divergence": 0.1, "predicted_divergence_at_tile_1": 0.09},
    "notes": ["Of 3 layers some keep all."],
}
LATENCY = {
    **{"dense_seconds": 0.04, "predicted": 0.8},
    "measured": {"median": 0.81, "low": 0.8, "high": 0.83},
    "table": table().to_dict(),
}
HEALED = {
    **{"before": 1.0, "after": 0.9, "improved": True, "tokens": 9, "seconds": 1.5},
    "curve": [[0, 1.0], [9, 0.9]],
    "quality": {"perplexity": [7.0, 9.0, 8.0]},
    "notes": ["x"],
    "lr": 1e-4,
}
FEWER = {
    **{"before": 1000, "after": 400, "kind": "BPE", "kept_of_text": 0.99, "alike_lines": 12},
    "text": ["a.txt"],
    "tokens_per_byte": [0.25, 0.3],
    "auto": {"judged_by": "cosine", "most_loss": 0.01, "curve": [[400, math.inf, 0.3]]},
    "held_out": {"bits_per_byte": [1.0, 1.1], "cosine": 0.98, "pruned": {"cosine": 0.9}},
}
PERPLEXITY = {"perplexity": 26.9712345, "tokens": 4088, "sequences": 8, "seq_len": 512}


def report(**changes) -> Report:
    facts = {
        "model": "a/model",
        "sites": [ROW],
        "params": {
            "before": 134515008,
            "after": 113281344,
            "prunable_before": 106168320,
            "prunable_after": 84934656,
        },
        "evaluation": {"dense": PERPLEXITY, "pruned": {**PERPLEXITY, "perplexity": 34.7387}},
        "seconds": {"calibrate": 12.3456789},
        "settings": {"criterion": "wifv", "calibration_tokens": 65536, "predicted": 0.331234},
        "warnings": ["Few tokens."],
        "loading": "It loads.",
        "recipe": Recipe(keep=0.123456789),
    }
    return Report(**{**facts, **changes})


def test_the_summary_is_a_few_plain_lines():
    lines = report().summary().splitlines()
    assert len(lines) == 6 and all("|" not in line and len(line) < 110 for line in lines)
    assert "134,515,008" in lines[0] and "(84.2%)" in lines[0]
    assert "(80.0%)" in lines[1]
    assert "26.97" in lines[2] and "34.74" in lines[2] and "4,088 tokens" in lines[2]
    assert "3.mlp: 2.3% relative error on held-out text" in lines[3]
    assert lines[4:] == ["It loads.", "Warning: Few tokens."]


def test_the_summary_says_what_held_out_text_decided():
    found = {"schedule": "layerwise", "schedules": {"one-pass": 0.1834, "layerwise": 0.1729}}
    expected = (
        "layer by layer; divergence on held-out text: 0.183 in one pass, 0.173 layer by layer"
    )
    said = report(settings=found)
    assert expected in said.summary()
    assert Report.from_dict(said.to_dict()).summary() == said.summary()
    more = report(settings=found | {"blocks_gone": {"2": 0.3}, "expert_scales": {"scaled": 0.5}})
    assert Report.from_dict(more.to_dict()).settings == more.settings
    strange = (
        {"schedule": [], "schedules": {}},
        *(found | {"schedules": s} for s in ([1], {"a": 1})),
    )
    for settings in ([], *strange):
        assert "divergence on" not in report(settings=dict(settings)).summary()
    some = report(settings=found | {"schedules": {"one-pass": "nan", "layerwise": 0.2}})
    assert "divergence on held-out text: 0.2 layer by layer" in some.summary()


def test_the_summary_names_the_worst_site_that_was_pruned():
    untouched = replace(ROW, name="0.mlp", units_after=1536, holdout_error=0.9)
    worse = replace(ROW, name="7.mlp", holdout_error=0.5, certified_error=0.6)
    said = report(sites=[untouched, ROW, worse]).summary()
    assert "7.mlp: 50.0% relative" in said and "7.mlp: 60.0% (certified)" in said
    walked = replace(ROW, name="9.attn", holdout_error=1.2, target="stream")
    said = report(sites=[walked, ROW]).summary()
    assert "9.attn: 120.0% relative error on held-out text, with what earlier layers lost\n" in said


def test_the_verdict_says_what_needs_attention():
    worse = replace(ROW, name="7.attn", units_before=3, units_after=1, holdout_error=0.5)
    certified = {"certified": {"divergence": 0.31}}
    fine = report(sites=[ROW, worse], warnings=[], evaluation=certified).verdict()
    assert fine.note == "16% smaller, divergence 0.31, no warnings."
    assert [row[0] for row in fine.rows] == ["removed", "worst layer", "needs attention"]
    assert fine.rows[0][1] == "67% of the attention heads and 20% of the MLP channels"
    assert fine.rows[1][1].startswith("attention of layer 7 keeps 1 of 3 units.")
    assert fine.rows[2][1] == "nothing"
    unknown = report(evaluation={}, warnings=["a", "b"])
    for form in (unknown.to_markdown(), unknown.to_card()):
        assert "16% smaller, quality not measured, 2 warnings." in form
        assert "measure the quality" in form and "read the 2 warnings below" in form
        assert "| weights, float32 | 538.1 MB | 453.1 MB | 0.842 |" in form


def test_a_report_of_nothing_is_short():
    assert Report("x").summary() == ""
    assert Report("x").to_markdown().startswith("# Pruning report: x\n")


def test_numbers_are_rounded_as_a_person_reads_them():
    page = report(sites=[replace(ROW, dropped_rows=12345)]).to_markdown()
    (row,) = [line for line in page.splitlines() if line.startswith("| 3.mlp")]
    assert row == (
        "| 3.mlp | 1,536 → 1,229 | 2,654,208 → 2,123,712 | 1e-03 | 0.0123 | 0.0235 | 1e+05 "
        "| 12,345 | linear, cholesky float64 | dense-input | 1.2 |"
    )
    assert "| predicted | 0.331234 |" in page and "| calibrate | 12.3 |" in page
    assert [figure(x) for x in (0.000012345, 120.0, 3, None)] == ["1.23e-05", "120", "3", "–"]


@pytest.mark.parametrize("form", [to_text, to_markdown])
def test_every_line_of_a_table_has_as_many_cells(form):
    for rows in ([ROW], [replace(ROW, certified_error=0.1), ROW]):
        table = sites("Sites", rows)
        assert {len(row) for row in table.rows} == {len(table.columns)}
        lines = form(replace(table, note=""))
        assert len(lines) == len(rows) + (2 if form is to_markdown else 1)
        assert len({line.count("|") for line in lines}) == 1


def test_columns_of_numbers_end_where_their_heads_do():
    table = Table("", ("a", "number", "b"), [("long", "1", "x"), ("s", "23", "y")], (0, 2))
    assert to_text(table) == ["a     number  b", "long       1  x", "s         23  y"]
    assert to_markdown(table)[1] == "| --- | ---: | --- |"


def test_markup_and_lines_are_no_markdown():
    nasty = "a|b\n\n# <script>"
    whole = report(model=nasty, loading=nasty, warnings=[nasty], settings={nasty: nasty})
    page, card = whole.to_markdown(), whole.to_card()
    assert "<script" not in page and page.count("\n# ") == 0 and page.count("&lt;script>") == 5
    assert "<script" not in card.split("---")[2] and "a&#124;b # &lt;script>" in card


def test_a_stranger_puts_no_image_and_no_link_into_a_report():
    """As a pruned source's config does, or the report of a folder that is healed."""
    nasty = "`![a](https://b.c/d.png) \\[a](javascript:e) <https://b.c> [f]: https://b.c `"
    names = ("criterion", "allocation", "reconstruct", "schedule", "dtype")
    whole = report(
        model=nasty, loading=nasty, warnings=[nasty], settings=dict.fromkeys(names, nasty)
    )
    whole.earlier = [{"budget": {"keep": nasty}, "params": [1, 5]}]
    whole.heal = Report.from_dict({"heal": HEALED | {"notes": [nasty]}}).heal
    for page in (whole.to_markdown(), whole.to_card().split("---", 2)[2]):
        assert page.count("javascript:e") >= 5
        assert not re.search(r"(?<!\\)(\\\\)*\[|<\w", page), page


def test_the_recipe_stands_in_the_report_as_it_is_saved(tmp_path):
    whole = report()
    whole.save(tmp_path)
    page = (tmp_path / "liar/report.md").read_text()
    recipe = page.split("## Recipe")[1].split("## Found")[0]
    assert "| criterion | wifv |" in recipe and "`liar prune --recipe liar/recipe.yaml" in recipe
    assert page.count("| criterion | wifv |") == 1  # once is enough
    assert Recipe.load(tmp_path / "liar" / "recipe.yaml") == whole.recipe
    facts = json.loads((tmp_path / "liar/report.json").read_text())
    assert facts["recipe"]["keep"] == 0.123456789
    assert facts["sites"][0]["error"] == 0.0123457 and facts["seconds"]["calibrate"] == 12.3457


def test_a_report_is_read_as_it_was_written(tmp_path):
    hidden = [replace(ROW, name="hidden", damp=math.inf, certified_error=0.1, sensitivity=0.5)]
    written = report(
        hidden=hidden,
        earlier=[{"budget": {"keep": 0.9}, "params": [2000, 1800]}],
        grid=GRID,
        latency=LATENCY,
        heal=HEALED,
        vocabulary=FEWER,
    )
    written.save(tmp_path)
    read = Report.load(tmp_path)
    assert read.to_dict() == written.to_dict() and read.recipe == written.recipe
    assert (read.to_markdown(), read.summary()) == (written.to_markdown(), written.summary())
    assert "| 30 mlp layers, channels | 1536 | 32 | 960 to 1536 |" in read.to_markdown()
    assert "×1.250 predicted, ×1.235 measured (1.205–1.250)" in read.summary()
    assert "2,000 → 1,800 parameters (keep 0.9)" in read.summary()


def test_an_infinite_perplexity_is_read_again(tmp_path):
    dense = {"perplexity": 12.5, "tokens": 1000, "seq_len": 512}
    pruned = {**dense, "perplexity": math.inf}
    params = {"before": 2000, "after": 1500}
    written = Report("m", params=params, evaluation={"dense": dense, "pruned": pruned})
    written.save(tmp_path)
    read = Report.load(tmp_path)
    assert read.to_markdown() == written.to_markdown()
    assert "12.50 →             inf" in read.summary()
    (page,) = write_page(tmp_path, tmp_path / "page.html")
    (compared,) = write_comparison([tmp_path], tmp_path / "compared.html")
    assert "12.50 → inf" in page.read_text() and "×\u00a0inf" in compared.read_text()


def test_a_long_name_of_a_model_is_no_path():
    assert "base_model" in Report.from_dict({"model": "模" * 150}).to_card()


def test_blocks_without_counts_have_no_line():
    assert Report.from_dict({"sites": [{"name": "blocks"}]}).lines() == []


@pytest.mark.parametrize("facts", [{"keep": 0.5}, {"version": 99, "keep": 0.5, "new": 1}])
def test_a_recipe_of_another_version_is_shown_as_it_is(facts):
    """Not with choices of today that the job never made."""
    read = Report.from_dict({"recipe": facts})
    assert read.recipe == facts and Report.from_dict({"recipe": [1]}).recipe is None
    (table,) = read.tables()
    assert table.title == "Recipe" and [name for name, _ in table.rows] == list(facts)


@pytest.mark.parametrize("name", ["grid", "latency", "heal", "vocabulary"])
@pytest.mark.parametrize("value", [None, -1, "x", [1], {}, 10**400, math.nan])
def test_any_part_of_a_section_may_be_anything(name, value):
    """What has a wrong part is shown without it, or not at all."""
    whole = {"grid": GRID, "latency": LATENCY, "heal": HEALED, "vocabulary": FEWER}[name]

    def wrong(part):
        for key, inner in part.items():
            yield {**part, key: value}
            if isinstance(inner, list) and inner and isinstance(inner[0], dict):
                yield from ({**part, key: [each]} for each in wrong(inner[0]))
            elif isinstance(inner, dict):
                yield from ({**part, key: each} for each in wrong(inner))

    for facts in wrong(whole):
        read = Report.from_dict({name: facts})
        read.to_markdown(), read.summary(), read.to_card()


def test_json_is_strict():
    rows = [replace(ROW, damp=math.inf, condition=math.nan)]
    facts = json.loads(report(sites=rows).to_json(), parse_constant=pytest.fail)
    assert (facts["sites"][0]["damp"], facts["sites"][0]["condition"]) == ("inf", "nan")


def test_a_report_without_a_recipe_shows_its_settings(tmp_path):
    plain = report(recipe=None)
    plain.save(tmp_path)
    assert not (tmp_path / "liar" / "recipe.yaml").exists()
    assert "| criterion | wifv |" in (tmp_path / "liar/report.md").read_text()


@pytest.mark.parametrize(
    ("row", "mode", "tokens", "said"),
    [
        (replace(ROW, dropped_rows=3), "linear", 9999, "Up to 3 token rows"),
        (replace(ROW, damp=math.inf), "linear", 9999, "least with plain dropping at 3.mlp: give"),
        (ROW, "linear", 99, "99 calibration tokens are few"),
        (replace(ROW, error=math.nan), "linear", 9999, "are not finite"),
    ],
)
def test_warnings_are_given_where_they_are_due(row, mode, tokens, said):
    (warning,) = what_to_know([row], mode, tokens, 1536)
    assert said in warning
    assert what_to_know([ROW], mode, 9999, 1536) == []


def test_a_warning_names_eight_sites_and_counts_the_others():
    rows = [replace(ROW, name=f"{block}.mlp", damp=math.inf) for block in range(10)]
    (warning,) = what_to_know(rows, "linear", 9999, 1536)
    assert "at 0.mlp, 1.mlp, " in warning and ", 7.mlp and 2 more: give" in warning


def test_the_clock_adds_stages_of_one_name():
    clock = Clock()
    for _ in range(2):
        with clock("a"):
            pass
    assert list(clock.each("b", [1, 2])) == [1, 2]
    assert clock.seconds.keys() == {"a", "b"} and all(s >= 0 for s in clock.seconds.values())


def test_errors_of_a_walk_are_said_to_count_what_was_lost_before():
    notes = [sites("", [replace(ROW, target=t)]).note for t in ("dense-input", "stream")]
    assert [("fresh text can show several times" in note) for note in notes] == [False, True]


def test_a_notebook_shows_sizes_warnings_and_sites_as_text():
    nasty = "<script>alert(1)</script>"
    shown = report(model=nasty, warnings=[nasty], sites=[replace(ROW, name=nasty)])._repr_html_()
    assert "134,515,008" in shown and shown.count("&lt;script&gt;") == 3
    assert "<script" not in shown and shown.count("<table>") == shown.count("</table>") == 2
    assert "<details>" not in Report("a/model")._repr_html_()


def test_a_report_is_shown_in_one_line():
    found = report(evaluation={"dense": PERPLEXITY, "pruned": PERPLEXITY}, warnings=["a", "b"])
    sizes = "134,515,008 → 113,281,344 parameters, perplexity 26.97 → 26.97"
    assert repr(found) == f"Report(a/model, {sizes}, 2 warnings)"
    assert repr(Report("a/model")) == "Report(a/model, 0 warnings)"
    assert repr(Report("a/model", warnings=["a"])) == "Report(a/model, 1 warning)"


def test_sites_are_a_frame_of_pandas(monkeypatch):
    pytest.importorskip("pandas")
    frame = report(sites=[ROW, replace(ROW, name="4.mlp", error=0.5)]).to_frame()
    assert frame.loc["4.mlp", "error"] == 0.5 and frame["units_after"].tolist() == [1229, 1229]
    assert "error" in report(sites=[]).to_frame().columns
