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
from liar_ext.calibration.saved_sums import SAMPLED, SUMS, fingerprint_of
from liar_ext.system.checkpoint_store import Checkpoint, facts_of

SEEDS = 30


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [tiny_inputs(tiny("llama"), batch=4, seed=seed) for seed in range(count)]


def same(a: MomentBank, b: MomentBank) -> bool:
    return a == b and a.source == b.source and torch.equal(a.sequences, b.sequences)


def saved_batches(folder) -> int:
    """Return over how many batches the sums in a checkpoint are; 0 where there are none."""
    return (facts_of(folder, SUMS) or {"batches": 0})["batches"]


def stopping(data: list, after: int):
    """Yield batches and fail."""
    yield from data[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("family", "after"), [("llama", 0), ("llama", 1), ("qwen3_moe", 5), ("llama", 8)]
)
def test_what_was_stopped_goes_on(family, after, tmp_path, monkeypatch):
    model = tiny(family)
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (lambda: 0.0,))  # saves each batch
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
    assert max(reached) > 0


def one_value_changed(model):
    """Change a value that is none of those taken one by one."""
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight.view(-1)[weight.numel() // SAMPLED + 1] += 1
    assert weight.numel() > 2 * SAMPLED
    return model


def test_a_fingerprint_is_of_values_and_shape_alone():
    for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool):
        whole = torch.randn(41, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        known = fingerprint_of([("weight", whole)])
        padded = torch.cat([whole.new_zeros(3), whole.reshape(-1)])
        for alike in (whole.T.contiguous().T, padded[3:].view(41, 7)):
            assert fingerprint_of([("weight", alike)]) == known
        for row in range(len(whole)):
            other = whole.clone()
            other[row, row % 7] = 1 - other[row, row % 7].float()
            assert fingerprint_of([("weight", other)]) != known
    assert fingerprint_of([("weight", torch.empty(0, 3))])


def test_sums_of_something_else_are_refused(model, tmp_path):
    data, folder = batches(), tmp_path / "c"
    calibrate(model, data, checkpoint=folder)
    for other, text, at, message in (
        (tiny("llama", seed=3), data, None, "of another model"),
        (tiny("llama").double(), data, None, "of another model"),
        (tiny("llama", rope_theta=77.0), data, None, "of another model"),
        (one_value_changed(tiny("llama")), data, None, "of another model"),
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
    path = folder / f"{SUMS}.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="damaged"):
        calibrate(model, data, checkpoint=folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batches", "many"),
        ("source", {"tokens": "many"}),
        ("source", None),
        ("0.attn.total", torch.zeros(2, 3, dtype=torch.float64)),
        ("0.attn.gram", torch.zeros(1, dtype=torch.float64)),
        ("0.attn.count", torch.zeros(2, dtype=torch.float64)),
    ],
)
def test_sums_that_a_stranger_has_written_are_refused(name, value, model, tmp_path):
    calibrate(model, batches(2), checkpoint=tmp_path)
    with Checkpoint(tmp_path) as saved:
        tensors, facts = saved.need(SUMS)
        known = dict(tensors) | facts | {name: value}
        tensors = {name: each for name, each in known.items() if isinstance(each, torch.Tensor)}
        saved.put(SUMS, tensors, {n: each for n, each in known.items() if n not in tensors})
    with pytest.raises(InputError, match="calibration.safetensors is damaged"):
        calibrate(model, batches(2), checkpoint=tmp_path)


def test_one_process_at_a_time(model, tmp_path):
    held = Checkpoint(tmp_path / "c")
    with pytest.raises(InputError, match="another process works in"):
        calibrate(model, batches(), checkpoint=tmp_path / "c")
    files = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
    assert files.count(str(tmp_path / "c" / ".lock")) == 1
    held.__exit__()
    calibrate(model, batches(), checkpoint=tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write into"):
        calibrate(model, batches(), checkpoint=tmp_path / "file")


def test_saving_takes_a_twentieth_of_the_time(tmp_path):
    """With a clock by which a save takes 3 seconds and a batch 10."""
    now = [0.0]

    class Slow:
        dtype, shape = torch.float64, (1,)

        def get(self) -> torch.Tensor:
            now[0] += 3.0
            return torch.zeros(1, dtype=torch.float64)

    checkpoint, saved = Checkpoint(tmp_path, lambda: now[0]), []
    for batch in range(1, 41):
        now[0] += 10.0
        if checkpoint.due("sums"):
            checkpoint.put("sums", {"sum": Slow()})
            saved.append(batch)
    assert saved == [1, 7, 13, 19, 25, 31, 37]
