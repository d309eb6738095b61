"""Several ranks heal as one process does with as many batches per step, but for rounding."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Callable

import forked
import pytest
import torch
import torch.distributed.fsdp  # once for all forks
from command import quick
from safetensors.torch import load_file
from stopping import stop_at
from test_ranks import close
from tiny import batches, tiny

from liar_ext import distributed, heal, prune
from liar_ext.cli.main import main
from liar_ext.healing import heal as runs
from liar_ext.job import pruning
from liar_ext.system.progress import no_bars

RANKS, STEPS = 2, 5


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr("liar_ext.healing.heal.computes_bfloat16", lambda _: False)
    with no_bars():
        yield


def healed(
    family: str, settings: dict, accumulate: int, join: Callable[[], None] = lambda: None
) -> dict:
    """Return the weights and the losses of a run; the batches differ in their padding."""
    dense = tiny(family).eval()
    model, text = copy.deepcopy(dense), batches(dense, 7)
    prune(model, text, keep=0.3, allocation="uniform", schedule="one-pass")
    join()
    how = {"budget": {"steps": STEPS}, "accumulate": accumulate, "lr": 3e-4}
    found = heal(model, dense, text, held_out=batches(dense, 3), **how | settings)
    facts = {name: found[name] for name in ("before", "after", "tokens", "steps", "improved")}
    # A bias of all keys has no gradient but rounding, of which Adam takes the sign.
    state = model.state_dict().items()
    weights = {k: each for k, each in state if each.numel() and not k.endswith("key.bias")}
    return {"weights": weights, "curve": sum(found["curve"], []), **facts}


RISES = {"lr": 1e-3}  # at first, and goes back to the best weights


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *[("llama", {}), ("qwen3_moe", {}), ("bert", {}), ("bert", RISES)],
        *[("llama", {"train": "lora", "lr": 3e-3}), ("llama", {"gradient_checkpointing": True})],
        ("dinov3_vit gated", {"lr": 1e-4}),  # has a parameter without values
    ],
)
def test_ranks_share_each_step(family, settings, tmp_path):
    def rank(number: int) -> None:
        torch.save(healed(family, settings, 2, distributed.join), tmp_path / f"{number}.pt")

    assert forked.run(RANKS, rank, tmp_path) == [0] * RANKS, (tmp_path / "err0").read_text()
    one, other = (torch.load(tmp_path / f"{each}.pt") for each in range(RANKS))
    whole = healed(family, settings, 2 * RANKS)
    assert whole["improved"] and close(one, whole) and close(other, whole)
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    half = healed(family, settings, 2)["weights"]  # it sees half of the text
    assert not close(one["weights"], half)
    start, *after = whole["curve"][1::2]
    assert (max(after) > runs.RISEN * start) == (settings == RISES)


def test_the_command_is_shared_stopped_and_resumed(llama_folder, corpus, tmp_path, monkeypatch):
    job = llama_folder, corpus[0], tmp_path / "pruned"
    assert main(quick(*job, "--keep", 0.5, "--quiet")) == 0
    settings = ["--steps", "6", "--lr", "1e-2", "--batch-size", "2", "--quiet"]
    one = ["heal", tmp_path / "pruned", "--out", tmp_path / "one", "--grad-accumulation", "2"]
    assert main([*map(str, one), *settings]) == 0
    shutil.copytree(tmp_path / "pruned", tmp_path / "two")
    place = ["--checkpoint", str(tmp_path / "checkpoint")]
    shared = ["heal", str(tmp_path / "two"), *settings, *place]
    monkeypatch.setattr(runs.Checkpoint, "due", lambda *_: distributed.is_first())

    with monkeypatch.context() as patch:
        stop_at(patch, runs.Healing, "step", 4)
        assert forked.run(RANKS, lambda _: main(shared), tmp_path) == [130] * RANKS
    assert forked.run(RANKS, lambda _: main(shared), tmp_path) == [0] * RANKS
    found = json.loads((tmp_path / "two/liar/report.json").read_text())["heal"]
    assert found["steps"] == 6 and not (tmp_path / "checkpoint").exists()
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert close(two, one)


def test_a_rank_that_is_lost_is_named(llama_folder, corpus, tmp_path, monkeypatch):
    """It is killed while the others wait for its part of the weights."""
    job = llama_folder, corpus[0], tmp_path / "pruned"
    assert main(quick(*job, "--keep", 0.5, "--quiet")) == 0
    real = runs.losses

    def losses(*given):
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    monkeypatch.setattr(runs, "losses", losses)
    heal = ["heal", str(tmp_path / "pruned"), "--steps", "6", "--batch-size", "2", "--quiet"]
    assert forked.run(RANKS, lambda _: main(heal), tmp_path) == [3, -signal.SIGKILL]
    said = (tmp_path / "err0").read_text()
    assert said.startswith("error: another process of the job has ended"), said
    assert said.rstrip().endswith("start the same command again, with as many ranks"), said


def test_ranks_wait_for_the_folder_that_they_train(llama_folder, corpus, tmp_path, monkeypatch):
    """The first rank alone writes the pruned folder, slowly here, and all read it next."""
    fill = pruning.fill_folder

    def slowly(*given, **named):
        time.sleep(2)
        fill(*given, **named)

    monkeypatch.setattr(pruning, "fill_folder", slowly)
    job = llama_folder, corpus[0], tmp_path / "pruned"
    command = quick(*job, "--keep", 0.5, "--heal", "1s", "--quiet")
    ended = forked.run(RANKS, lambda _: main(command), tmp_path)
    assert ended == [0] * RANKS, [(tmp_path / f"err{each}").read_text() for each in range(RANKS)]
    found = json.loads((tmp_path / "pruned/liar/report.json").read_text())["heal"]
    assert found["steps"] > 0 and found["after"] <= found["before"]
