from __future__ import annotations

import errno
import os

import pytest
import torch

from liar_ext import InputError
from liar_ext.reconstruction import streams
from liar_ext.reconstruction.streams import HiddenStates

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_held_on_disk_comes_back(dtype, tmp_path):
    states = HiddenStates(0, tmp_path)
    tensors = [torch.randn(2, 3, 5).to(dtype).mT, torch.randn(7).to(dtype), torch.zeros(0, 4)]
    held = [states.hold(tensor) for tensor in tensors]
    for tensor, each in zip(tensors, held, strict=True):
        assert torch.equal(each.get(), tensor) and each.get().dtype == tensor.dtype
    assert (states.in_memory, states.most_on_disk) == (0, (30 + 7) * dtype.itemsize)


def test_the_bound_is_kept_and_the_rest_lies_on_disk(tmp_path):
    states = HiddenStates(100, tmp_path)
    held = [states.hold(torch.full((10,), float(i))) for i in range(4)]  # 40 bytes each
    assert (states.in_memory, states.most_on_disk) == (80, 80)
    assert [float(each.get()[3]) for each in held] == [0, 1, 2, 3]
    for each in held:
        each.set(each.get() + 1)
    assert [float(each.get()[3]) for each in held] == [1, 2, 3, 4]
    assert (states.in_memory, states.most_on_disk) == (80, 80)
    held[2].set(torch.ones(20))  # another size: another place
    assert torch.equal(held[2].get(), torch.ones(20)) and states.most_on_disk == 160
    assert float(held[3].get()[0]) == 4


def test_places_that_are_given_back_are_used_again(tmp_path):
    states = HiddenStates(0, tmp_path)
    for value in range(5):
        held = states.hold(torch.full((10,), float(value)))
        assert float(held.get()[0]) == value
        del held
    assert states.most_on_disk == 40


def test_nothing_of_the_file_is_to_be_seen(tmp_path):
    states = HiddenStates(0, tmp_path)
    held = states.hold(torch.ones(3))
    assert os.listdir(tmp_path) == []
    states.close()
    del held


def test_long_tensors_are_moved_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MOST_AT_ONCE", 7)
    tensor = torch.randn(33)
    assert torch.equal(HiddenStates(0, tmp_path).hold(tensor).get(), tensor)


def test_a_full_disk_is_told_of_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    states = HiddenStates(0, tmp_path)
    with pytest.raises(InputError, match="are needed .*No space left.*; free disk space"):
        states.hold(torch.ones(3))
    assert states.most_on_disk == 0
