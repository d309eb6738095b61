"""A job by blocks that is stopped at any block goes on, and writes the same folder."""

from __future__ import annotations

import os

import pytest
from covers import some
from stopping import stop_at
from tiny import batches, same_weights, tiny

from liar_ext import InputError, load_pruned
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.job import analysis
from liar_ext.job.pruning import prune_folder
from liar_ext.job.state import Evaluation, Job
from liar_ext.job.streamed import StreamedPasses
from liar_ext.models.recipe import Recipe
from liar_ext.reconstruction.walk import LayerwiseSolver
from liar_ext.system.checkpoint_store import Checkpoint

pytestmark = pytest.mark.usefixtures("always_saving")

ONE_PASS = {"schedule": "one-pass"}
# Family, choices, and whether hidden states are on disk and the sums of one block there at a time.
JOBS = {
    "default": ("llama", {}, True),
    "tuples": ("gpt_neox", {}, False),
    "one-pass": ("llama", ONE_PASS, False),
    "one-pass-tight": ("llama", ONE_PASS, True),
    "uniform": ("llama", {**ONE_PASS, "allocation": "uniform"}, True),
    "experts": ("qwen3_moe", ONE_PASS, False),
    "fewer experts": ("qwen3_moe", {"keep_experts": 0.75}, False),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders of models, each with text, by family."""
    found = {}
    for family in ("llama", "gpt_neox", "qwen3_moe"):
        model, folder = tiny(family, num_hidden_layers=3), tmp_path_factory.mktemp("dense") / family
        model.save_pretrained(folder)
        found[family] = folder, batches(model, 5)
    return found


def run(folder, data, out, saved=None, **choices):
    recipe = Recipe(**{"keep": 0.6, "tile": 1, **choices})
    measured = "llama" in str(folder) or recipe.keep_experts != 1.0
    texts = {"evaluate_on": data[3:4]} if measured else {}
    if recipe.settled().schedule == "layerwise":
        texts["certify_on"] = data[4:]
    with Checkpoint(saved) if saved else open(os.devnull) as kept:
        store = BlockStore(folder)
        given = {"limit": 4 << 30, "saved": kept if saved else None, **texts}
        return prune_folder(store, Job(store.model, data[:3], recipe, **given), out)


@some("job", JOBS, "default", "one-pass-tight", "experts", "fewer experts")
def test_a_job_that_is_stopped_at_blocks_gives_the_same_folder(dense, job, tmp_path, monkeypatch):
    family, choices, tight = JOBS[job]
    dense = dense[family]
    if tight:
        monkeypatch.setattr("liar_ext.job.streamed.room_for_states", lambda *_: 0)
    expected = run(*dense, tmp_path / "whole", **choices)
    layerwise = expected.settings["schedule"] == "layerwise"
    # The sums of block 2; after walk 1, with its blocks kept and with the plan; in walk 2.
    stops = [(StreamedPasses, "_sums", 3), (analysis, "allocated", 1)]
    stops += [(Evaluation, "see_dense", 1), (BlockStore, "tensors", 2)]
    stops += [(LayerwiseSolver, "step", 2)] if layerwise else []
    for number, (kind, name, call) in enumerate(stops):
        with monkeypatch.context() as patch:
            stop_at(patch, kind, name, call)
            with pytest.raises(KeyboardInterrupt):
                run(*dense, tmp_path / "pruned", tmp_path / "c", **choices)
        kept = {path.name for path in (tmp_path / "c").iterdir()}
        # Without experts the dense model is judged before anything else is.
        assert ("plan.safetensors" in kept) == (number > (2 if "keep_experts" in choices else 1))
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "c"}
    with monkeypatch.context() as patch:
        sums, steps = (
            stop_at(patch, StreamedPasses, "_sums"),
            stop_at(patch, LayerwiseSolver, "step"),
        )
        report = run(*dense, tmp_path / "pruned", tmp_path / "c", **choices)
    assert len(sums) == (2 if tight and not layerwise else 0)
    assert len(steps) == (1 if layerwise else 0)
    assert same_weights(*(load_pruned(tmp_path / name) for name in ("pruned", "whole")))
    assert report.plan == expected.plan and report.evaluation == expected.evaluation
    ours, theirs = ({**each.settings} for each in (report, expected))
    if tight:
        assert ours.pop("hidden_states_on_disk") > 0 and theirs.pop("hidden_states_on_disk") > 0
    assert ours == theirs
    for a, b in zip(report.sites, expected.sites, strict=True):
        assert (a.damp, a.error, a.path, a.sensitivity) == (b.damp, b.error, b.path, b.sensitivity)
        assert a.certified_error == b.certified_error


def test_a_job_without_sites_goes_on_writing(dense, tmp_path, monkeypatch):
    given, choices = dense["qwen3_moe"], {"keep": 1.0, "keep_experts": 0.75}
    expected = run(*given, tmp_path / "whole", **choices)
    with monkeypatch.context() as patch:
        stop_at(patch, BlockStore, "tensors", 3)
        with pytest.raises(KeyboardInterrupt):
            run(*given, tmp_path / "pruned", tmp_path / "c", **choices)
    assert (tmp_path / "c/pruning-streams.safetensors").exists()
    report = run(*given, tmp_path / "pruned", tmp_path / "c", **choices)
    assert same_weights(*(load_pruned(tmp_path / name) for name in ("pruned", "whole")))
    assert report.plan == expected.plan and report.evaluation == expected.evaluation


def test_other_weights_are_refused(dense, tmp_path, monkeypatch):
    folder, data = dense["llama"]
    with monkeypatch.context() as patch:
        stop_at(patch, StreamedPasses, "_sums", 2)
        with pytest.raises(KeyboardInterrupt):
            run(folder, data, tmp_path / "pruned", tmp_path / "c")
    tiny(folder.name, seed=3).save_pretrained(tmp_path / folder.name)
    with pytest.raises(InputError, match="checkpoint: .*is of a job with weights "):
        run(tmp_path / folder.name, data, tmp_path / "pruned", tmp_path / "c")
