"""A process that is killed while it writes a bank, at 60 moments and by three signals."""

from __future__ import annotations

import os
import random
import signal
import time

import forked
import pytest
import torch
from tiny import tiny, tiny_inputs

from liar_ext import MomentBank, calibrate

SEEDS = 60


def writer(banks: list[MomentBank], path: str) -> None:
    """Write one bank after another until the process ends."""
    while True:
        for bank in banks:
            bank.save(path)


def ended(child: int, kind: int) -> int:
    """Signal a process until it ends, and return its status.

    Python drops an interrupt that comes within a destructor, so that one may not be enough.
    """
    for _ in range(200):
        os.kill(child, kind)
        for _ in range(10):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return status
            time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"{kind!r} did not end the process")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_bank_is_whole_whenever_its_writer_is_killed(kind, tmp_path):
    """The old one or the new one; what was left is gone after the next save."""
    model = tiny("llama")
    data = [[tiny_inputs(model, batch=4, seed=seed)] for seed in range(2)]
    banks = [calibrate(model, each) for each in data]
    path = tmp_path / "bank"
    banks[0].save(path)
    whole = {path.read_bytes()}
    banks[1].save(path)
    whole.add(path.read_bytes())
    assert len(whole) == 2
    left = []
    for seed in range(SEEDS // 3):
        if seed % 4 == 0:
            path.unlink(missing_ok=True)
        child = forked.fork(lambda: writer(banks, str(path)))
        time.sleep(random.Random(f"{kind}/{seed}").uniform(0.0, 0.03))
        status = ended(child, kind)
        if kind is signal.SIGINT:
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 130
        else:
            assert os.WTERMSIG(status) == kind
        assert not path.exists() or path.read_bytes() in whole
        left.append(len([each for each in tmp_path.iterdir() if each.name != "bank"]))
        assert left[-1] == 0 or kind is not signal.SIGINT
    assert max(left) <= 1  # of the last writer: each cleans up after the one before
    banks[0].save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["bank"]
    assert torch.equal(MomentBank.load(path)["0.mlp"].total, banks[0]["0.mlp"].total)
