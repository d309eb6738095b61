"""A calibration that is stopped at any point goes on, and gives the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import forked
import pytest
import torch
from tiny import tiny, tiny_inputs

from liar_ext import InputError, MomentBank, calibrate, sites
from liar_ext.calibration import collect
from liar_ext.calibration.bank_file import read_bank
from liar_ext.calibration.saved_sums import SUFFIX, SUMS, SavedSums
from liar_ext.saved.progress import Progress

SEEDS = 30


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [tiny_inputs(tiny("llama"), batch=4, seed=seed) for seed in range(count)]


def same(a: MomentBank, b: MomentBank) -> bool:
    facts = a.source == b.source and torch.equal(a.sequences, b.sequences)
    return facts and all(
        torch.equal(a[name].gram.tril(), b[name].gram.tril())
        and torch.equal(a[name].total, b[name].total)
        and torch.equal(a[name].count, b[name].count)
        for name in a
    )


def saved_batches(folder) -> int:
    """Return over how many batches the sums in a checkpoint are; 0 where there are none."""
    path = folder / f"{SUMS}{SUFFIX}"
    return read_bank(path, sums=False).source.get("progress", 0) if path.exists() else 0


def stopping(data: list, after: int):
    """Yield batches and fail."""
    yield from data[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("family", "after"), [("llama", 0), ("llama", 1), ("qwen3_moe", 5), ("llama", 8)]
)
def test_what_was_stopped_goes_on(family, after, tmp_path, monkeypatch):
    model = tiny(family)
    monkeypatch.setattr(Progress.__init__, "__defaults__", (lambda: 0.0,))  # saves each batch
    data = batches()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, stopping(data, after), checkpoint=tmp_path / "c")
    assert saved_batches(tmp_path / "c") == after
    ran, add = [], collect.InFlight.set
    monkeypatch.setattr(collect.InFlight, "set", lambda s, b: ran.append(b) or add(s, b))
    bank = calibrate(model, data, checkpoint=tmp_path / "c")
    assert len(ran) == 8 - after and len(bank.text) == 8
    assert same(bank, calibrate(model, data))
    assert saved_batches(tmp_path / "c") == 8
    del ran[:]
    assert same(bank, calibrate(model, data, checkpoint=tmp_path / "c")) and not ran


def test_a_process_that_is_killed_at_any_moment_loses_nothing(model, tmp_path):
    data = batches(24)
    expected, folder, done = calibrate(model, data), tmp_path / "c", 0
    start = time.monotonic()
    calibrate(model, data, checkpoint=tmp_path / "timed")
    seconds, reached = time.monotonic() - start, []
    for seed in range(SEEDS):
        child = forked.fork(lambda: calibrate(model, data, checkpoint=folder) and None)
        time.sleep(random.Random(seed).uniform(0.0, 0.6 * seconds))
        os.kill(child, signal.SIGKILL)
        forked.end(child)
        before, done = done, saved_batches(folder)
        assert done >= before
        reached.append(done)
        if done == len(data):
            assert same(calibrate(model, data, checkpoint=folder), expected)
            shutil.rmtree(folder)
            done = 0
    assert same(calibrate(model, data, checkpoint=folder), expected)
    assert len(set(reached)) > 1 and max(reached) > 0


def test_sums_of_something_else_are_refused(model, tmp_path):
    data, folder = batches(), tmp_path / "c"
    calibrate(model, data, checkpoint=folder)
    for other, text, at, message in (
        (tiny("llama", seed=3), data, None, "of another model"),
        (tiny("llama").double(), data, None, "of another model"),
        (model, data, sites(model, ["mlp"]), "or of other sites"),
        (model, data[1:], None, "8 batches of other text"),
        (model, [*data[:7], data[0]], None, "8 batches of other text"),
        (model, [], None, "8 batches of other text"),
    ):
        with pytest.raises(InputError, match=f"checkpoint: .*{message}"):
            calibrate(other, text, at, checkpoint=folder)
    assert same(calibrate(model, data, checkpoint=folder), calibrate(model, data))
    more = batches(10)  # text that goes on where the other ends
    assert same(calibrate(model, more, checkpoint=folder), calibrate(model, more))
    torn = (folder / "calibration.bank").read_bytes()[:-7]
    (folder / "calibration.bank").write_bytes(torn)
    with pytest.raises(InputError, match="damaged"):
        calibrate(model, data, checkpoint=folder)


def test_one_process_at_a_time(model, tmp_path):
    held = Progress(tmp_path / "c")
    with pytest.raises(InputError, match="another process works in"):
        calibrate(model, batches(), checkpoint=tmp_path / "c")
    held.close()
    calibrate(model, batches(), checkpoint=tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write into"):
        calibrate(model, batches(), checkpoint=tmp_path / "file")


def test_saving_takes_a_twentieth_of_the_time(tmp_path):
    """With a clock by which a save takes 3 seconds and a batch 10."""
    now = [0.0]

    def facts() -> dict:
        now[0] += 3.0  # what writing takes
        return {}

    progress, saved = SavedSums(Progress(tmp_path, lambda: now[0])), []
    for batch in range(1, 41):
        now[0] += 10.0
        before = now[0]
        progress.save(batch, dict, facts)
        saved += [batch] * (now[0] > before)
    assert saved == [1, 7, 13, 19, 25, 31, 37]
    progress.save(40, dict, facts, now=True)
    progress.save(40, dict, facts, now=True)  # which are there already
    assert now[0] == 400.0 + 3.0 * 8
