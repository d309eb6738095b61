"""A job that is stopped at any stage goes on, and gives the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from covers import some
from stopping import stop_at
from tiny import batches, same_weights, tiny
from torch import nn

from liar_ext import InputError, calibrate, prune
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.calibration.taps import InFlight
from liar_ext.job import solving
from liar_ext.reconstruction.walk import LayerwiseSolver

pytestmark = pytest.mark.usefixtures("always_saving")

CURVE = {"keep": 0.6, "tile": 1, "allocation": "curve"}
JOBS = {
    "default": ("llama", CURVE),
    "groups": ("llama", {**CURVE, "schedule": "one-pass", "memory": 60_000}),
    "norm of the sum": ("bert", CURVE),
    "tuples": ("gpt_neox", CURVE),
    "experts": ("qwen3_moe", {**CURVE, "schedule": "one-pass"}),
    "narrowed": ("llama", {**CURVE, "keep_hidden": 0.8}),
    "shorter": ("llama", {**CURVE, "keep_blocks": 0.67}),
}


STAGES = {
    "batch": (InFlight, "set"),
    "divergence": (DenseOutputs, "divergence"),
    "block": (LayerwiseSolver, "step"),
}


def run(family: str, folder=None, **choices) -> tuple[nn.Module, object]:
    model = tiny(family)
    data = batches(model, 5)
    report = prune(model, data[:4], checkpoint=folder, certify_on=data[4:], **choices)
    return model, report


@some("name", JOBS, "default", "groups", "experts", "narrowed")
def test_a_job_that_is_stopped_at_every_stage_gives_the_same_bits(name, tmp_path, monkeypatch):
    family, choices = JOBS[name]
    whole, expected = run(family, **choices)
    done = {}
    for stage, (kind, method) in STAGES.items():
        with monkeypatch.context() as patch:
            calls = stop_at(patch, kind, method, 3)
            try:
                run(family, tmp_path / "c", **choices)
            except KeyboardInterrupt:
                done[stage] = len(calls)
    assert {"batch", "divergence"} <= done.keys()
    assert ("block" in done) == (expected.settings["schedule"] == "layerwise")
    counted = {}
    with monkeypatch.context() as patch:
        for stage, (kind, method) in STAGES.items():
            counted[stage] = stop_at(patch, kind, method, -1)
        pruned, report = run(family, tmp_path / "c", **choices)
    assert same_weights(pruned, whole) and report.plan == expected.plan
    assert report.evaluation == expected.evaluation
    passes = report.settings.pop("calibrate_passes") - expected.settings.pop("calibrate_passes")
    assert report.settings == expected.settings
    assert passes <= 0  # sums that are kept aren't taken again on the way back
    assert report.grid == expected.grid and report.warnings == expected.warnings
    for ours, theirs in zip(report.sites, expected.sites, strict=True):
        assert (ours.damp, ours.error, ours.path) == (theirs.damp, theirs.error, theirs.path)
        assert ours.certified_error == theirs.certified_error
        assert ours.sensitivity == theirs.sensitivity
    if "block" in done:
        again = 3 if "keep_blocks" in choices else 0  # a walk that is not kept
        assert len(counted["block"]) == 1 + again  # two of three were done
        assert counted["batch"] == [] or choices.get("keep_hidden")


def test_divergences_that_were_measured_are_not_measured_again(tmp_path, monkeypatch):
    choices = {**CURVE, "schedule": "one-pass", "kinds": ("attn",)}
    with monkeypatch.context() as patch:
        calls = stop_at(patch, DenseOutputs, "divergence", -1)
        whole, _ = run("llama", **choices)
    for stop in itertools.count(2):
        with monkeypatch.context() as patch:
            more = stop_at(patch, DenseOutputs, "divergence", stop)
            try:
                pruned, _ = run("llama", tmp_path / "c", **choices)
            except KeyboardInterrupt:
                continue
        break
    # One more is done each time: 1, 2, 3, ... stops before the next.
    assert same_weights(pruned, whole) and len(more) < len(calls) and stop < len(calls)


def test_a_bank_that_was_given_is_taken_again(tmp_path, monkeypatch):
    """Also where it keeps no text: nothing else has its sums."""
    data = batches(tiny("llama"), 3)
    bank = calibrate(tiny("llama"), data, keep_text=False)
    choices = {"keep": 0.6, "schedule": "one-pass", "allocation": "uniform", "bank": bank}
    models = [tiny("llama"), tiny("llama")]
    prune(models[0], **choices)
    with monkeypatch.context() as patch:
        stop_at(patch, solving, "solve", 1)
        with pytest.raises(KeyboardInterrupt):
            prune(tiny("llama"), checkpoint=tmp_path / "c", **choices)
    prune(models[1], checkpoint=tmp_path / "c", **choices)
    assert same_weights(*models) and not list((tmp_path / "c").glob("*.bank"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": 0.7}, "a job with keep 0.6, got 0.7"),
        ({"schedule": "one-pass"}, "a job with schedule layerwise, got one-pass"),
        ({"model": 3}, "a job with weights "),
        ({"dtype": torch.float64}, "a job with weights |a job with dtype "),
        ({"text": 1}, "a job with calibration text "),
        ({"fresh": 1}, "a job with fresh text "),
        ({"bank": True}, "a job with bank None"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_checkpoint_of_another_job_is_refused(changed, message, tmp_path, monkeypatch):
    choices = {**CURVE, **{k: v for k, v in changed.items() if k in ("keep", "schedule")}}
    data = batches(tiny("llama"), 6)
    text = data[changed.get("text", 0) :][:3]  # too few to hold some out
    model = tiny("llama", seed=changed.get("model", 0), dtype=changed.get("dtype", torch.float32))
    bank = calibrate(model, text) if "bank" in changed else None
    with monkeypatch.context() as patch:
        stop_at(patch, LayerwiseSolver, "step", 2)
        with pytest.raises(KeyboardInterrupt):
            prune(tiny("llama"), data[:3], checkpoint=tmp_path / "c", certify_on=data[4:], **CURVE)
    with pytest.raises(InputError, match=f"checkpoint: .*({message})"):
        fresh = data[4 + changed.get("fresh", 0) :]
        prune(model, text, checkpoint=tmp_path / "c", certify_on=fresh, bank=bank, **choices)
    assert (tmp_path / "c" / "plan.safetensors").exists()  # and left as it is


def test_a_file_that_is_damaged_is_named(tmp_path, monkeypatch):
    stop_at(monkeypatch, LayerwiseSolver, "step", 2)
    with pytest.raises(KeyboardInterrupt):
        run("llama", tmp_path / "c", **CURVE)
    monkeypatch.undo()
    for name in ("block-0", "layerwise-streams", "plan", "job"):
        path = tmp_path / "c" / f"{name}.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        with pytest.raises(InputError, match=f"{name}.safetensors is damaged"):
            run("llama", tmp_path / "c", **CURVE)
        path.write_bytes(content)
    (tmp_path / "c" / "block-0.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        run("llama", tmp_path / "c", **CURVE)


def test_seconds_are_measured_anew_every_time(tmp_path):
    with pytest.raises(InputError, match="--of latency"):
        prune(tiny("llama"), checkpoint=tmp_path / "c", batches=[], keep=0.7, of="latency")


@some("family", ["bart", "clip", "qwen3_moe"], "bart")
def test_a_walk_of_several_stacks_goes_on_from_every_block(family, tmp_path, monkeypatch):
    """What the decoder reads of the encoder lies behind the streams, and is kept with them."""
    choices = {"keep": 0.6, "tile": 1, "allocation": "uniform", "schedule": "layerwise"}
    with monkeypatch.context() as patch:
        calls = stop_at(patch, LayerwiseSolver, "step", -1)
        whole, _ = run(family, **choices)
        blocks = len(calls)
    assert blocks >= 2
    for block in range(1, blocks + 1):
        folder = tmp_path / f"stopped-{block}"
        with monkeypatch.context() as patch:
            stop_at(patch, LayerwiseSolver, "step", block)
            with pytest.raises(KeyboardInterrupt):
                run(family, folder, **choices)
        with monkeypatch.context() as patch:
            left = stop_at(patch, LayerwiseSolver, "step", -1)
            pruned, _ = run(family, folder, **choices)
        assert len(left) == blocks + 1 - block
        assert same_weights(pruned, whole)
