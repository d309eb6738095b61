"""What ``schedule="auto"`` is, model by model, and how a report says so."""

from __future__ import annotations

import pytest
from tiny import batches, tiny

from liar_ext import Recipe, calibrate, prune
from liar_ext.calibration.saved_sums import bytes_of_sums
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.job.planning import describe
from liar_ext.job.pruning import prune_folder, run
from liar_ext.job.state import Job
from liar_ext.models.sites import sites

READ_BY_A_NORM = ["gemma2", "gemma3_text", "olmo2", "exaone4", "glm4"]
JOB = {"keep": 0.6, "tile": 1, "allocation": "uniform"}


def said(report) -> list[str]:
    return [each for each in report.warnings if "not one after the other" in each]


@pytest.mark.parametrize("name", READ_BY_A_NORM)
def test_layers_that_a_norm_reads_are_solved_in_one_pass(name):
    model = tiny(name)
    report = prune(model, batches(model, 2), **JOB)
    assert report.settings["schedule"] == report.recipe.schedule == "one-pass"
    assert ["a norm reads what each gives" in each for each in said(report)] == [True]


@pytest.mark.parametrize("name", ["llama", "gemma", "bert", "gpt2"])
def test_other_layers_are_solved_one_after_the_other(name):
    model = tiny(name)
    report = prune(model, batches(model, 2), **JOB)
    assert report.settings["schedule"] == "layerwise" and not said(report)


def test_of_blocks_that_cannot_be_walked_schedules_are_not_compared():
    model = tiny("albert")
    text = batches(model, 3)
    report = run(Job(model, text[:2], Recipe(**JOB), judged=text[2:]))
    assert report.settings["schedule"] == "one-pass" and "schedules" not in report.settings
    assert ["a block runs several times" in each for each in said(report)] == [True]


def test_who_names_a_walk_gets_it():
    model = tiny("gemma3_text")
    report = prune(model, batches(model, 2), **JOB, schedule="layerwise")
    assert report.settings["schedule"] == "layerwise" and not said(report)


def test_a_bank_without_text_serves_a_job_that_need_not_walk():
    model = tiny("gemma3_text")
    bank = calibrate(model, batches(model, 2), keep_text=False)
    report = prune(model, None, bank=bank, **JOB)
    assert report.settings["schedule"] == "one-pass"


@pytest.mark.parametrize(("schedule", "passes"), [("auto", 3), ("one-pass", 3), ("layerwise", 2)])
def test_a_dry_run_counts_the_passes_of_the_schedule(schedule, passes):
    model = tiny("gemma3_text")
    sums = sum(bytes_of_sums(site.d_in) for site in sites(model))
    recipe = Recipe(**JOB, schedule=schedule, memory=int(sums / 1.5))
    lines = describe(model, batches(model, 2), recipe)
    assert f"passes over the calibration text: {passes} to calibrate" in lines


@pytest.mark.parametrize("certified", [False, True])
def test_block_by_block_too_but_for_fresh_text(certified, tmp_path):
    model = tiny("gemma3_text")
    model.save_pretrained(tmp_path / "dense")
    data = batches(model, 4)
    store, fresh = BlockStore(tmp_path / "dense"), data[2:] if certified else None
    job = Job(store.model, data[:2], Recipe(**JOB), certify_on=fresh, limit=2**32)
    report = prune_folder(store, job, tmp_path / "pruned")
    assert report.settings["schedule"] == ("layerwise" if certified else "one-pass")
    assert bool(said(report)) != certified
