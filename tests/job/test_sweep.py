"""Several budgets from one calibration: each as from scratch, and nothing is run twice."""

from __future__ import annotations

import pytest
import torch
from covers import slow
from tiny import batches, outputs, same_weights, tiny

import liar_ext
from liar_ext import Budget, InputError, MomentBank, Recipe, calibrate, prune, sweep
from liar_ext.calibration import collect
from liar_ext.job import analysis
from liar_ext.job.planning import PROBE_KEEP, Sweep
from liar_ext.job.pruning import run
from liar_ext.job.state import Job, Known, score_key
from liar_ext.models.recipe_fields import recipe_fields

KEEP = (0.8, 0.6)
CHOICES = [
    ("llama", {"allocation": "uniform", "criterion": "obs", "reconstruct": "affine"}),
    ("bert", {}),
    *(
        slow(*each)
        for each in (
            ("llama", {}),
            ("llama", {"allocation": "global", "tile": 1}),
            ("llama", {"criterion": "taylor", "attn_unit": "head"}),
            ("llama", {"criterion": "random", "seed": 3, "kinds": ("mlp",)}),
            ("llama", {"schedule": "one-pass", "of": "params"}),
            ("qwen3_moe", {}),
            ("bert", {"reconstruct": "none"}),
            ("llama", {"keep_hidden": 0.5, "allocation": "uniform"}),
        )
    ),
]


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """The bank of each family, by way of a file."""
    found = {}
    for name in ("llama", "bert", "qwen3_moe"):
        path = tmp_path_factory.mktemp("banks") / name
        calibrate(tiny(name), batches(tiny(name))).save(path)
        found[name] = MomentBank.load(path)
    return found


@pytest.mark.parametrize(("family", "choices"), CHOICES, ids=str)
def test_each_budget_is_what_it_is_from_scratch(family, choices, banks, monkeypatch):
    """By the recipe that a point names and its probes: the same plan, and the same bits."""
    model, found = tiny(family), []
    before = outputs(model)
    with monkeypatch.context() as patch:
        if "keep_hidden" not in choices:  # all of its moments are others
            patch.setattr(collect, "collect", lambda *_, **__: pytest.fail("summed again"))
        points = sweep(
            model,
            bank=banks[family],
            keep=KEEP,
            on_result=lambda pruned, _: found.append(pruned),
            **choices,
        )
        plans = sweep(model, bank=banks[family], keep=KEEP, **choices)
    assert torch.equal(outputs(model), before)
    for keep, pruned, point, planned in zip(KEEP, found, points, plans, strict=True):
        alone = tiny(family)
        known = Known(probe_keep=PROBE_KEEP)
        report = run(Job(alone, batches(alone), point.recipe, known=known))
        assert point.recipe.keep == keep and report.plan == point.plan == planned.plan
        assert same_weights(pruned, alone)
        assert point.predicted_divergence == report.settings.get("predicted_divergence")
        assert planned.predicted_divergence == point.predicted_divergence
        assert point.params == planned.params == report.params["after"]
        assert point.flops == pytest.approx(planned.flops, rel=1e-9)
        assert planned.report is None and point.report.params == report.params


def test_sensitivities_are_measured_once_for_all_budgets(banks, monkeypatch):
    calls, measure = [], analysis.site_divergences

    def counted(model, data, plan, *rest, **more):
        calls.append(len(plan.sites))
        return measure(model, data, plan, *rest, **more)

    monkeypatch.setattr(analysis, "site_divergences", counted)
    model = tiny("llama")
    points = sweep(model, bank=banks["llama"], keep=(0.9, 0.8, 0.7, 0.5))
    assert calls == [6]
    losses = [point.predicted_divergence for point in points]
    assert losses == sorted(losses) and losses[0] > 0
    # At each budget's own fraction there is nothing to share; what is known still is.
    work = Sweep(model, bank=banks["llama"])
    for keep in (0.9, 0.8, 0.9):
        work.plan(Recipe(keep=keep))
    assert calls == [6, 6, 6]
    work.plan(Recipe(keep=0.8, kinds=("mlp",), tile=1, damp=0.1))
    assert calls == [6, 6, 6]
    work.plan(Recipe(keep=0.8, attn_unit="head"))  # MLPs are the same
    assert calls == [6, 6, 6, 3]


def test_scores_are_shared_by_recipes_of_the_same_scores():
    own = {each.name for each in recipe_fields(affects="scores")}
    assert own == {"seed", "criterion", "keep_hidden", "keep_experts", "keep_blocks"}
    keys = [score_key(recipe) for recipe in (Recipe(), Recipe(seed=1), Recipe(keep=0.5))]
    assert keys[0] == keys[2] != keys[1]


def test_a_bank_with_sensitivities_needs_no_forward_pass(banks, tmp_path, monkeypatch):
    model, bank = tiny("llama"), calibrate(tiny("llama"), batches(tiny("llama")), keep_text=False)
    expected = sweep(tiny("llama"), bank=banks["llama"], keep=KEEP)
    with pytest.raises(InputError, match="allocation curve runs the model over the calibration"):
        sweep(model, bank=bank, keep=KEEP)
    work = Sweep(model, bank=banks["llama"], probe_keep=PROBE_KEEP)
    work.plan(Recipe())
    work.known.store_sensitivities(bank)
    bank.save(tmp_path / "bank")
    bank = MomentBank.load(tmp_path / "bank")
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("run"))
    points = sweep(model, bank=bank, keep=KEEP)
    assert [point.plan for point in points] == [point.plan for point in expected]
    report = prune(model, bank=bank, keep=0.8, schedule="one-pass")
    assert report.plan == expected[0].plan
    assert all(row.sensitivity > 0 for row in report.sites)
    other = calibrate(tiny("llama"), [batch["input_ids"] + 1 for batch in batches(model)])
    assert Known.of_bank(bank).found and not Known.of_bank(other).found
    bank.merge(other)
    assert not Known.of_bank(bank).found  # they are of the sums of one alone


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"schedule": "one-pass"}, "allocation curve"),
        ({"allocation": "uniform", "criterion": "snip"}, "criterion snip"),
        ({"allocation": "uniform"}, "schedule layerwise"),
        ({"allocation": "global", "schedule": "layerwise"}, "schedule layerwise"),
    ],
)
def test_what_needs_text_says_so_without_it(choices, named):
    model = tiny("llama")
    bank = calibrate(model, batches(model), keep_text=False)
    before = outputs(model)
    said = f"prune: --{named} runs the model .* keeps none; .* fast without --{named.split()[0]}$"
    with pytest.raises(InputError, match=said):
        prune(model, bank=bank, keep=0.6, **choices)
    assert torch.equal(outputs(model), before)
    prune(model, bank=bank, keep=0.6, allocation="uniform", schedule="one-pass")


def test_batches_that_are_none_are_refused():
    with pytest.raises(InputError, match="must be a list of batches, got int"):
        sweep(tiny("llama"), 5)


@pytest.mark.parametrize("family", ["vit", "wav2vec2"])
def test_a_bank_of_files_is_not_blamed_on_an_option(family):
    model = tiny(family)
    bank = calibrate(model, batches(model))
    with pytest.raises(InputError, match="bank keeps none; .* use --preset fast without"):
        prune(model, bank=bank, keep=0.6)
    with pytest.raises(InputError, match="keep-blocks 0.5 needs the calibration set; give batches"):
        sweep(model, bank=bank, keep_blocks=0.5)
    prune(model, bank=bank, recipe=Recipe.preset("fast", keep=0.6))


def test_what_can_not_be_swept_is_refused_before_anything_is_run(banks, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(analysis, "score", lambda *_, **__: pytest.fail("run"))
    bare = MomentBank(dict(banks["llama"].moments), banks["llama"].source)
    for keep, choices, message in (
        (torch.tensor([0.5, 0.8]), {}, "keep must be a number such as 0.5, got tensor"),
        ((0.8, 0.001), {}, "no plan keeps 0.001"),
        ((0.8, 1.5), {}, "keep must be in"),
        ((0.8,), {"keep_hidden": 0.5}, "keep-hidden 0.5 needs the calibration set"),
        ((0.8,), {"colour": 1}, "unknown field"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(model, bank=bare, keep=keep, **({"allocation": "uniform"} | choices))
    with pytest.raises(InputError, match="must be a list of batches, got NoneType"):
        sweep(model)
    with pytest.raises(InputError, match="of other weights"):
        sweep(tiny("llama", seed=5), bank=banks["llama"])
    with pytest.raises(InputError, match="in float32, got float64"):
        sweep(tiny("llama").double(), bank=banks["llama"])


def test_perplexities_and_budgets_of_other_units(banks):
    model = tiny("llama")
    text = batches(model, 2)
    points = liar_ext.sweep(
        model,
        batches(model),
        keep=[Budget(0.9, "flops"), Budget(0.8, "params")],
        allocation="uniform",
        evaluate_on=(each for each in text),
    )
    assert [point.recipe.of for point in points] == ["flops", "params"]
    assert points[0].flops <= 0.9 and points[0].quality()["perplexity"] > 1
    assert points[0].report.evaluation["dense"] == liar_ext.perplexity(model, text)
    facts = points[1].to_dict()
    assert facts["keep"] == 0.8 and facts["predicted_divergence"] is None
    assert facts["perplexity"] == points[1].quality()["perplexity"]
