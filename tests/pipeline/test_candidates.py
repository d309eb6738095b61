"""Whole candidates: what is kept is what the least divergence on unseen text says."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny, tiny_inputs

from liar_ext import Recipe, prune
from liar_ext.errors import InputError
from liar_ext.pipeline.sweep import Sweep
from liar_ext.recipe.candidates import candidates_of
from liar_ext.selection.divergence import Divergence

TRIED = ("criterion=magnitude,allocation=uniform", "criterion=obs", "schedule=one-pass")


def batches(model, *seeds: int) -> list[dict[str, torch.Tensor]]:
    return [
        {**tiny_inputs(model, batch=4, seed=seed), "fold": torch.tensor([seed % 2] * 4)}
        for seed in seeds
    ]


def same_weights(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("more", [{}, {"keep_hidden": 0.75}], ids=["whole", "narrowed"])
def test_the_model_kept_is_that_of_least_divergence_pruned_alone(more):
    model = tiny("llama")
    data, judge = batches(model, 0, 1), batches(model, 2)
    alone, found = {}, {}
    for name, recipe in candidates_of(Recipe(keep=0.6, candidates=TRIED, **more)).items():
        alone[name] = copy.deepcopy(model)
        prune(alone[name], data, recipe)
        found[name] = Divergence(model, judge).of(alone[name])["divergence"]
    report = prune(model, data, keep=0.6, candidates=TRIED, judge_on=judge, **more)
    said = report.settings["candidates"]
    assert list(said) == ["criterion=wifv,allocation=curve,schedule=auto", *TRIED]
    assert said == pytest.approx(found, rel=1e-4)
    best = min(found, key=found.get)
    assert same_weights(model, alone[best])
    assert max(found.values()) > 1.1 * found[best]  # so that the choice is one
    again = copy.deepcopy(tiny("llama"))
    prune(again, data, report.recipe)
    assert same_weights(again, model)
    assert any(f"Of {len(found)} candidates" in warning for warning in report.warnings)


def test_candidates_and_text_to_judge_by_go_together():
    model = tiny("llama")
    data = batches(model, 0, 1)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="candidates and judge_on go together.*without judge_on"):
        prune(model, data, keep=0.6, candidates=("criterion=obs",))
    with pytest.raises(InputError, match="candidates and judge_on go together.*and judge_on"):
        prune(model, data, keep=0.6, judge_on=data)
    with pytest.raises(InputError, match="candidates are judged as whole models"):
        Sweep(model, data).plan(Recipe(candidates=("criterion=obs",)))
    assert same_weights(model, before)


def test_candidates_and_a_checkpoint_do_not_go_together(tmp_path):
    model, other = tiny("llama"), {"candidates": ("criterion=obs",), "checkpoint": tmp_path / "c"}
    with pytest.raises(InputError, match="a checkpoint keeps one job, and candidates are several"):
        prune(model, batches(model, 0, 1), keep=0.6, judge_on=batches(model, 2), **other)


def test_a_sweep_judges_the_candidates_of_its_recipes():
    model = tiny("llama")
    data, judge = batches(model, 0, 1), batches(model, 2)
    sweep = Sweep(model, data, judge_on=judge)
    pruned, point = sweep.prune(Recipe(keep=0.6, candidates=TRIED))
    assert sweep.prune(Recipe(keep=0.6))[1].report.settings.get("candidates") is None
    prune(model, data, keep=0.6, candidates=TRIED, judge_on=judge)
    assert same_weights(pruned, model)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("obs", "candidates must be FIELD=VALUE"),
        ("keep=0.5", "candidates must be FIELD=VALUE"),
        ("candidates=x", "candidates must be FIELD=VALUE"),
        ("rescale=true", "candidates must be FIELD=VALUE"),
        ("criterion=obs,", "candidates must be FIELD=VALUE"),
        ("criterion=nothing", "criterion"),
        ("damp=many", "damp"),
        ("damp={a", "not YAML.*candidates, 'damp={a'"),
        ("rescale=" + "9" * 5000, "candidates must be FIELD=VALUE"),
        ("damp=" + "[" * 2000, "not YAML|not nested deeply"),
        ("criterion=!!python/name:os.system x", "not YAML"),
        ("schedule=layerwise,reconstruct=none", "solves for no target"),
    ],
)
def test_a_candidate_that_cannot_be_is_refused(candidate, message):
    with pytest.raises(InputError, match=message):
        Recipe(candidates=(candidate,))


def test_a_candidate_that_changes_nothing_is_tried_once():
    assert list(candidates_of(Recipe(candidates=("criterion=wifv", "criterion=obs")))) == [
        "criterion=wifv",
        "criterion=obs",
    ]
