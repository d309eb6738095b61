"""A recipe is checked in one place, and the same after a way through YAML, JSON and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import batches, outputs, tiny

from liar_ext import Budget, InputError, Recipe, prune
from liar_ext.models.recipe import REMOVED
from liar_ext.models.recipe_fields import ALLOCATIONS, GROUPS, PRESETS, recipe_fields
from liar_ext.selection import allocation

# YAML reads other ends of lines than \n as spaces.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1)
NAMES = TEXT.filter(str.strip)
BIG = 2**63 - 1


@st.composite
def recipes(draw) -> Recipe:
    """Any recipe that there can be, but for criteria and texts of a schedule."""
    schedule = draw(st.sampled_from(["auto", "one-pass", "layerwise"]))
    layerwise = schedule == "layerwise"
    modes = ["auto", "linear", "affine"] + ["none", "bias"] * (not layerwise)
    positive = st.integers(1, BIG)
    fraction = st.floats(0, 1, exclude_min=True)
    return Recipe(
        text_digests=draw(st.dictionaries(TEXT, NAMES, max_size=2)),
        model=draw(st.none() | NAMES),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "float64"])),
        device=draw(NAMES),
        calibration=tuple(draw(st.lists(NAMES, max_size=3))),
        samples=draw(st.integers(2, BIG)),
        self_text=draw(st.floats(0, 0.9)),
        random_tokens=draw(st.just("auto") | st.floats(0, 0.9)),
        seq_len=draw(st.integers(2, BIG)),
        batch_size=draw(positive),
        seed=draw(st.integers(0, BIG)),
        memory=draw(st.none() | positive),
        keep=draw(fraction),
        of=draw(st.sampled_from(["prunable", "params", "flops", "latency"])),
        latency_phase=draw(st.sampled_from(["prefill", "decode", "both"])),
        latency_batch=draw(positive),
        latency_prompt=draw(positive),
        latency_new_tokens=draw(positive),
        tile=draw(st.just("auto") | positive),
        uniform_layers=draw(st.booleans()),
        keep_hidden=draw(fraction),
        keep_blocks=draw(fraction),
        keep_experts=draw(fraction | st.integers(2, 256)),
        keep_vocab=draw(st.floats(0, 1, exclude_min=True, exclude_max=True) | st.integers(2, BIG)),
        vocab_text=tuple(draw(st.lists(NAMES, max_size=2))),
        vocab_scripts=draw(st.sampled_from([(), ("latin",), ("Han", "cyrillic")])),
        kinds=draw(st.sampled_from([("attn", "mlp"), ("mlp",), ("attn",)])),
        attn_unit=draw(st.sampled_from(["auto", "kv_group", "head"])),
        criterion=draw(st.sampled_from(["wifv", "obs", "random"])),
        allocation=draw(st.sampled_from(ALLOCATIONS)),
        reconstruct=draw(st.sampled_from(modes)),
        damp=draw(st.just("auto") | st.floats(0, allow_infinity=True, allow_nan=False)),
        schedule=schedule,
        rescale=draw(st.booleans()),
        eval=draw(st.none() | NAMES),
        eval_samples=draw(st.none() | positive),
        certify=draw(st.just(0) | st.integers(2, BIG)),
    )


@given(recipes())
@example(Recipe(model="0", calibration=("é", "null", "1e3"), text_digests={"0": "1", "a": "0"}))
@settings(max_examples=60, deadline=None)
def test_a_recipe_is_the_same_after_yaml_and_json(recipe):
    digests = recipe.text_digests  # which make no recipe another one
    assert Recipe.from_yaml(recipe.to_yaml()).text_digests == digests
    assert Recipe.from_json(recipe.to_json()).text_digests == digests
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    json.loads(recipe.to_json(), parse_constant=pytest.fail)  # strict
    assert yaml.safe_load(recipe.to_yaml()).keys() == recipe.to_dict().keys()


def test_a_recipe_is_the_same_after_a_file(tmp_path):
    recipe = Recipe(keep=0.5, calibration=("straße.txt", "b: c"), damp=math.inf)
    for name in ("recipe.yaml", "recipe.json", "recipe"):
        recipe.save(tmp_path / name)
        assert Recipe.load(tmp_path / name) == recipe


def test_a_file_of_one_line_is_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("keep: 5e-1\n", encoding="utf-8-sig")
    assert Recipe.load(path) == Recipe(keep=0.5)


def test_yaml_shows_the_stages():
    assert [line[2:] for line in Recipe().to_yaml().splitlines() if line.startswith("# ")] == list(
        GROUPS.values()
    )


def test_every_field_has_a_stage_a_check_and_a_help():
    for each in recipe_fields():
        assert each.metadata["group"] in GROUPS and each.metadata["help"], each.name
        assert each.metadata["affects"] in ("inputs", "scores", "plan", "weights", "report")
        assert each.metadata["in_bank"] in ("", "text", "sensitivities")
        assert each.metadata["check"](each.name, each.default) == each.default
        assert each.name in Recipe.__doc__


def test_ways_in_which_values_do_not_work():
    def without(way, recipe):
        return [recipe.spelled(each) for each in recipe.without(way)]

    assert without("streamed", Recipe()) == without("with_bank", Recipe()) == []
    assert without("from_sums", Recipe(schedule="layerwise")) == [
        *("--allocation curve", "--schedule layerwise"),
    ]
    whole = Recipe(keep_hidden=0.5, rescale=True, criterion="snip", of="latency", memory=1)
    assert without("streamed", whole) == [
        *("--memory 1", "--of latency", "--keep-hidden 0.5", "--criterion snip", "--rescale"),
    ]
    assert without("with_bank", replace(whole, certify=2)) == ["--keep-hidden 0.5", "--certify 2"]


def test_the_names_of_allocations_are_those_that_there_are():
    assert set(ALLOCATIONS) == set(allocation._METHODS)


WRONG = {
    "model": ["", 7, "\udcff"],
    "dtype": ["int8", 32, ["float32"]],
    "device": ["", " ", None, 0],
    "calibration": ["text.txt", [""], [7], None, {"a": 1}],
    "samples": [1, 0, -1, 2.5, "8", None, True, 2**63],
    "self_text": [-0.1, 0.91, 1, math.nan, "some", None, True],
    "random_tokens": [-0.1, 0.91, 1, math.nan, "some", None, True],
    "seq_len": [0, -1, 1.0, None],
    "batch_size": [0, -1, 0.5, True],
    "seed": [-1, 2**70, 10**5000, 0.0, "0"],
    "memory": [0, -1, 1.5, True, math.inf, "8", "0GiB", "-1GiB", "1 lot", "9" * 400 + "GiB"],
    "keep": [0, 1.5, -1, math.nan, math.inf, "0.8", None, True, 10**400, [0.8]],
    "of": ["bytes", None],
    "latency_phase": ["train", None, 1],
    "latency_batch": [0, 1.5, "1"],
    "latency_prompt": [0, -1, None],
    "latency_new_tokens": [0, True, 2**63],
    "latency_table": ["", 7, "table.json"],  # the last: without of="latency"
    "tile": [0, -8, 1.5, "32", "all", True, None, 2**63, [8]],
    "uniform_layers": [1, "yes", None],
    "keep_hidden": [0.0, 1.01, math.nan, "all"],
    "keep_blocks": [0.0, 1.01, math.nan, "all"],
    "keep_experts": [0.0, 1.01, -2, 2.0, math.nan, "all", "48", True, None, 2**63],
    "keep_vocab": [0.0, 1.5, -1, math.nan, math.inf, "all", "k", "1.5k", True, None, 2**63],
    "vocab_text": ["a.txt", [""], [7], ["a.txt"]],  # the last: where all tokens stay
    "vocab_scripts": ["latin", [7], ["klingon"], ["common"], ["a}|b"], ["latin"]],  # as above
    "kinds": [[], "attn", ["ffn"], ["mlp", "mlp"], [["mlp"]], None],
    "attn_unit": ["token", None],
    "criterion": ["best", "", None, []],
    "allocation": ["fair", 1, []],
    "reconstruct": ["ridge", None, {}],
    "damp": ["much", -1, math.nan, None, [1], True, "nan"],
    "schedule": ["two-pass", None],
    "rescale": ["yes", 1, None],
    "eval": ["", " ", 1],
    "eval_samples": [0, -1, 1.5, "3"],
    "certify": [-1, 1, 0.5, None, True],
}


def test_every_field_is_tried():
    assert WRONG.keys() == {each.name for each in recipe_fields()}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(k, v, id=f"{k}-{i}") for k, vs in WRONG.items() for i, v in enumerate(vs)],
)
def test_a_wrong_value_is_refused_in_one_line(name, value):
    with pytest.raises(InputError) as caught:
        Recipe(**{name: value})
    said = str(caught.value)
    assert name in said and "\n" not in said and len(said) < 400
    with pytest.raises(InputError):
        Recipe.from_dict({name: value})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"schedule": "layerwise", "reconstruct": "none"}, "solves for no target"),
        ({"calibration": ("a.txt",), "seq_len": 1}, "seq_len must be at least 2"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices, message):
    with pytest.raises(InputError, match=message):
        Recipe(**choices)


HOSTILE = {
    "a tag": "keep: !!python/object/apply:os.system ['touch PWNED']",
    "a tag of numbers": "keep: !!python/name:os.system",
    "an own tag": "!recipe {keep: 0.5}",
    "an alias": "a: &a [x, x]\nb: *a",
    "a double key": "keep: 0.5\nkeep: 0.6",
    "a list as key": "? [keep]\n: 0.5",
    "two documents": "keep: 0.5\n---\nkeep: 0.6",
    "deep": "[" * 4000,
    "deep mappings": "{a: " * 4000,
    "open": "keep: [0.5",
    "a tab": "keep:\n\t- 1",
    "a control character": "keep: \x01",
    "long digits": "samples: " + "9" * 5000,
    "long hex": "samples: 0x" + "f" * 9000,
    "base 60": "samples: 1:30:00:00:00:00:00:00:00:00:00:00:00:00",
    "a date": "samples: 2001-99-99",
    "binary": "model: !!binary '####'",
    "a set": "calibration: !!set {a, b}",
    "empty": "",
    "a list": "- keep",
    "a word": "keep",
    "an unknown field": "keeep: 0.5",
    "an unknown field of another type": "7: 0.5",
    "another version": "version: 2",
    "true as version": "version: true",
    "nested": "keep: {a: {b: [[[0]]]}}",
    "digests of another type": "text_digests: {a.txt: 1}",
    "no digests": "text_digests: a.txt",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_in_one_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="recipe") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 99999, '{"seed": 1e999}', '{"keep": NaN}']
    + ['{"seed": ' + "9" * 5000 + "}"],
)
def test_hostile_json_is_refused(text, tmp_path):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(InputError, match="recipe"):
        Recipe.load(tmp_path / "recipe.json")


def test_files_that_are_no_recipes_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n#")
    for name, message in (
        ("absent", "No such file"),
        ("binary", "UTF-8"),
        ("large", "at most"),
        (".", "Is a directory"),
        ("a\0b", "recipe"),
    ):
        with pytest.raises(InputError, match=message):
            Recipe.load(tmp_path / name)


def test_presets_are_recipes():
    assert Recipe.preset("balanced") == Recipe()
    assert Recipe.preset("fast").allocation == "uniform"
    assert Recipe.preset("best", keep=0.5) == Recipe(rescale=True, keep=0.5)
    for name in ("flap", "wanda-sp"):
        found = Recipe.preset(name)
        assert found.settled().schedule == "one-pass" and found.tile == 1
        assert found.self_text == found.random_tokens == 0
    assert Recipe.preset("flap").criterion == "wifv"
    assert len({Recipe.preset(name) for name in PRESETS}) == len(PRESETS)
    with pytest.raises(InputError, match="preset must be one of fast, balanced, best"):
        Recipe.preset("quick")


def test_building_from_a_budget_or_a_fraction():
    budget = Budget(0.6, "flops", tile=4, seq_len=1)
    for recipe in (Recipe.build(budget), Recipe.build(keep=budget)):
        assert recipe.budget == budget and recipe.seq_len == 1
    assert Recipe.build(0.5, criterion="obs") == Recipe(keep=0.5, criterion="obs")
    assert Recipe.build(Recipe(keep=0.5), criterion="obs") == Recipe(keep=0.5, criterion="obs")
    with pytest.raises(InputError, match="keep must be given once"):
        Recipe.build(0.5, keep=0.6)
    with pytest.raises(InputError, match="tile must be given once"):
        Recipe.build(budget, tile=2)


def test_a_job_is_repeated_by_its_recipe(tmp_path):
    first, again = tiny("llama"), tiny("llama")
    report = prune(first, batches(first), keep=0.7, criterion="obs", seed=3)
    report.save(tmp_path)
    recipe = Recipe.load(tmp_path / "liar" / "recipe.yaml")
    assert recipe == report.recipe and recipe.criterion == "obs"
    assert json.loads((tmp_path / "liar/report.json").read_text())["recipe"] == recipe.to_dict()
    assert f"| criterion | {recipe.criterion} |" in (tmp_path / "liar/report.md").read_text()
    prune(again, batches(again), recipe)
    assert outputs(first).equal(outputs(again))
    assert prune(tiny("llama"), batches(first), recipe, keep=0.9).budget["keep"] == 0.9


def test_the_report_says_what_the_model_was():
    import torch

    model = tiny("llama", dtype=torch.float64)
    recipe = prune(model, batches(model), Recipe(keep=0.7)).recipe
    assert (recipe.dtype, recipe.device) == ("float64", "cpu")


def test_the_older_name_of_tile_is_read():
    """As in the recipe of every folder that was saved before."""
    assert Recipe.from_yaml("keep: 0.5\nmultiple_of: 1\n") == Recipe(keep=0.5, tile=1)
    assert Recipe.from_json('{"multiple_of": 8}') == Recipe(tile=8)
    for make in (Recipe.from_dict, lambda facts: Recipe.build(**facts)):
        with pytest.raises(InputError, match="unknown field 'multiple_of'"):
            make({"tile": 8, "multiple_of": 8})


def test_removed_fields_are_read_where_they_had_no_effect():
    facts = {name: values[-1] for name, values in REMOVED.items()}
    assert Recipe.from_dict({"keep": 0.5, **facts}) == Recipe(keep=0.5)
    assert Recipe.from_yaml("target: null") == Recipe()
    with pytest.raises(InputError, match="unknown field 'refine'"):
        Recipe.from_dict({"refine": 4})


@pytest.mark.parametrize(
    ("family", "choices", "schedule"),
    [
        ("llama", {}, "layerwise"),
        ("gpt2", {}, "layerwise"),
        ("bert", {}, "layerwise"),
        ("vit", {}, "layerwise"),
        ("bert", {"reconstruct": "bias"}, "one-pass"),
        ("llama", {"reconstruct": "none"}, "one-pass"),
        ("bert", {"schedule": "one-pass"}, "one-pass"),
    ],
)
def test_the_schedule_by_default_is_layerwise_where_consumers_are_solved(family, choices, schedule):
    model = tiny(family)
    report = prune(model, batches(model, 3), 0.7, **choices)
    assert report.recipe.schedule == report.settings["schedule"] == schedule
    assert ("stream" in {row.target for row in report.sites}) == (schedule == "layerwise")
    assert Recipe(**choices).settled().settled() == Recipe(**choices).settled()


def test_a_cheap_preset_stays_cheap():
    assert Recipe.preset("fast").settled().schedule == "one-pass"
    assert Recipe.preset("balanced").settled().schedule == "layerwise"


@pytest.mark.parametrize("size", [4 << 30, "4GiB", "4 gib", " 4.0GIB", "4096MiB", "4294.967296MB"])
def test_memory_is_a_size_with_its_unit_or_bytes(size):
    assert Recipe(memory=size).memory == 4 << 30
