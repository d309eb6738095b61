"""What operators write is theirs alone, of one device with the rest, and known to autograd."""

import pytest
import torch
from oracle import sums

from liar_ext import ops
from liar_ext.ops import dispatch


def shared_sums():
    gram, total, count = sums(4)
    x, buffer = torch.ones(3, 4), torch.zeros(40, dtype=torch.float64)
    wide = x.double()
    expanded = torch.zeros(1, 4, dtype=torch.float64).expand(4, 4)
    overlapping = buffer.as_strided((4, 4), (3, 1))
    own = buffer[:16].view(4, 4)
    return {
        "expanded gram": ((expanded, total, count, x), "rows that do not overlap"),
        "overlapping gram": ((overlapping, total, count, x), "rows that do not overlap"),
        "expanded total": ((gram, total[:1].expand(4), count, x), "total must be .* contiguous"),
        "expanded count": ((gram, total, count[:1].expand(2), x), "count must be .* contiguous"),
        "gram and total": ((own, buffer[12:16], count, x), "gram must .* with total"),
        "gram and count": ((own, total, buffer[15:17], x), "gram must .* with count"),
        "total and count": ((gram, buffer[:4], buffer[3:5], x), "total must .* with count"),
        "gram and x": ((own, total, count, own), "gram must .* with x"),
        "gram and y": ((own, total, count, wide, buffer[4:16].view(3, 4)), "gram must .* with y"),
        "total and x": ((gram, wide[1], count, wide), "total must .* with x"),
        "count and weight": ((gram, total, buffer[:2], x, None, buffer[:3]), "count .* weight"),
    }


@pytest.mark.parametrize("case", shared_sums())
def test_sums_that_share_memory_are_refused(case):
    arguments, message = shared_sums()[case]
    before = [one if one is None else one.clone() for one in arguments]
    with pytest.raises(RuntimeError, match="gram_update_: .*" + message):
        ops.gram_update_(*arguments)
    assert all(a is None or torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_neighbours_are_not_shared():
    buffer = torch.zeros(24, dtype=torch.float64)
    gram, total, count = buffer[:16].view(4, 4), buffer[16:20], buffer[20:22]
    ops.gram_update_(gram, total, count, torch.ones(3, 4))
    assert buffer.sum() == 10 * 3 + 4 * 3 + 3


def test_autograd_notices_what_is_written():
    gram, total, count = sums(3)
    versions = [one._version for one in (gram, total, count)]
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    product = (leaf * total).sum()  # keeps `total` for its derivative
    ops.gram_update_(gram, total, count, torch.ones(5, 3))
    after = [one._version for one in (gram, total, count)]
    assert all(a > b for a, b in zip(after, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_what_may_not_be_written_in_place_is_refused():
    gram, total, count = sums(3)
    with pytest.raises(RuntimeError, match="gram_update_: gram must be .* detach or clone"):
        ops.gram_update_(gram.requires_grad_(), total, count, torch.ones(5, 3))
    assert not gram.any()


def call(op):
    """Return the valid arguments of an operator, by name."""
    gram, total, count = sums(4)
    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    cross = torch.ones(4, 2)
    damps = torch.ones(1, dtype=torch.float64)
    return {
        "gram_update_": {"x": x, "gram": gram, "total": total, "count": count},
        "reconstruct": {
            "weight": weight,
            "gram": gram,
            "kept": torch.tensor([0]),
            "damps": damps,
            "holdout": gram,
            "cross": cross,
            "holdout_cross": cross,
        },
        "obs_curve": {"weight": weight, "gram": gram, "width": 2, "damp": 0.1, "at_least": 0},
    }[op]


OPERATORS = ("gram_update_", "reconstruct", "obs_curve")
MIXED = [(op, name) for op in OPERATORS for name, one in call(op).items() if torch.is_tensor(one)]
MIXED += [("gram_update_", "y"), ("gram_update_", "weight")]


@pytest.mark.parametrize(("op", "name"), MIXED)
def test_tensors_of_two_devices_are_refused(op, name):
    arguments = call(op)
    arguments[name] = torch.empty_like(arguments.get(name, torch.ones(3, 4)), device="meta")
    if (op, name) == ("gram_update_", "weight"):
        arguments[name] = arguments[name][:, 0]
    with pytest.raises(RuntimeError, match=rf"{op}: \w+ must be on the (META|CPU).*; move it"):
        getattr(ops, op)(**arguments)


@pytest.mark.skipif(bool(dispatch.MISSING), reason="there are no launchers")
@pytest.mark.parametrize(("op", "name"), MIXED)
def test_the_launchers_of_the_cpu_take_nothing_else(op, name):
    """Past torch's choice by device."""
    arguments = call(op)
    arguments[name] = torch.empty_like(arguments.get(name, torch.ones(3, 4)), device="meta")
    if (op, name) == ("gram_update_", "weight"):
        arguments[name] = arguments[name][:, 0]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=rf"{op}: {name} must be on the CPU, as"):
        getattr(torch.ops.liar_ext, op).default.redispatch(keys, **arguments)
