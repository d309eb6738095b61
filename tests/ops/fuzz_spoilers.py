"""Ways to break one rule of a call, so that it has to be refused."""

from __future__ import annotations

import math

import torch
from fuzz_calls import Call
from torch import Tensor

MATRICES = {
    "gram_update_": ("gram", "x", "y"),
    "reconstruct": ("weight", "gram", "holdout", "cross", "holdout_cross"),
    "obs_curve": ("weight", "gram"),
}
VECTORS = {
    "gram_update_": ("total", "count", "weight"),
    "reconstruct": ("kept", "damps"),
}
WRITTEN = {"gram_update_": ("gram", "total", "count")}
READ = {"gram_update_": ("x", "y", "weight")}


def _given(call: Call, names) -> list[str]:
    return [name for name in names if isinstance(call.arguments.get(name), Tensor)]


def _replace(call: Call, name: str, tensor: Tensor) -> bool:
    call.arguments[name] = tensor
    call.written.pop(name, None)
    return True


def rank(choices, call: Call) -> bool:
    """Give a tensor one dimension more."""
    names = _given(call, call.arguments)
    name = choices.pick(names)
    tensor = call.arguments[name]
    # A batch of one site is no mistake where all tensors have that dimension.
    if call.operator == "reconstruct" and name == "weight" and len(tensor.shape) == 2:
        return _replace(call, name, tensor[None, None])
    return _replace(call, name, tensor[None])


def size(choices, call: Call) -> bool:
    """Give a tensor one row or one column more than the others agree on."""
    names = _given(call, (*MATRICES[call.operator], *VECTORS.get(call.operator, ())))
    free = {"kept", "damps"} if call.operator == "reconstruct" else set()
    name = choices.pick([one for one in names if one not in free])
    tensor = call.arguments[name]
    axis = choices.integer(0, tensor.dim() - 1)
    if call.operator == "gram_update_" and name in ("gram", "y") and axis == 1:
        axis = 0  # one column more of both is right
    if call.operator == "gram_update_" and name == "x":
        axis = 1  # one token more is right
    if call.operator == "obs_curve" and name == "weight":
        axis = 1
    if call.operator == "reconstruct" and name == "weight":
        axis = tensor.dim() - 1
    shape = list(tensor.shape)
    shape[axis] += 1
    return _replace(call, name, torch.zeros(shape, dtype=tensor.dtype))


def dtype(choices, call: Call) -> bool:
    """Give a tensor a dtype that the operator does not take."""
    name = choices.pick(_given(call, call.arguments))
    wrong = [torch.int32, torch.complex64, torch.uint8]
    if name in ("total", "gram", "count", "damps", "holdout"):
        wrong += [torch.float16]
    if name in ("count", "damps"):
        wrong += [torch.float32]
    if name == "y":
        wrong += [torch.float64 if call.arguments["x"].dtype != torch.float64 else torch.float32]
    return _replace(call, name, call.arguments[name].to(choices.pick(wrong)))


def strides(choices, call: Call) -> bool:
    """Give a tensor that is written, or read as it lies, with gaps between its entries."""
    names = [n for n in _given(call, ("gram", "total", "count", "kept", "damps"))]
    names = names if call.operator in VECTORS else []
    if call.operator == "reconstruct":
        names = [name for name in names if name != "gram"]
    names = [name for name in names if call.arguments[name].shape[-1] > 1]
    if not names:
        return False
    name = choices.pick(names)
    tensor = call.arguments[name]
    return _replace(call, name, torch.stack([tensor, tensor], dim=-1)[..., 0])


def device(choices, call: Call) -> bool:
    """Leave one tensor on the meta device, or all but one."""
    names = _given(call, call.arguments)
    if len(names) < 2:
        return False
    name, others = choices.pick(names), choices.integer(0, 1)
    for one in names:
        if (one == name) != bool(others):
            _replace(call, one, call.arguments[one].to("meta"))
    return True


def sparse(choices, call: Call) -> bool:
    """Give a sparse tensor."""
    name = choices.pick(_given(call, call.arguments))
    return _replace(call, name, call.arguments[name].to_sparse())


def expanded(choices, call: Call) -> bool:
    """Write into a tensor whose entries are one."""
    names = _given(call, WRITTEN.get(call.operator, ()))
    names = [name for name in names if call.arguments[name].numel() > 1]
    if not names:
        return False
    name = choices.pick(names)
    tensor = call.arguments[name]
    if tensor.shape[0] > 1:
        return _replace(call, name, tensor[:1].clone().expand(tensor.shape))
    return _replace(call, name, tensor[..., :1].clone().expand(tensor.shape))


def overlap(choices, call: Call) -> bool:
    """Write into memory that another argument is read from or written to."""
    written = _given(call, WRITTEN.get(call.operator, ()))
    if not written:
        return False
    name = choices.pick(written)
    others = [one for one in _given(call, (*written, *READ[call.operator])) if one != name]
    other = choices.pick(others)
    one, two = call.arguments[name], call.arguments[other]
    if one.numel() == 0 or two.numel() == 0:
        return False
    items = max(one.element_size() * one.numel(), two.element_size() * two.numel())
    memory = torch.zeros(items + 16, dtype=torch.uint8)

    def inside(tensor: Tensor) -> Tensor:
        size = tensor.element_size() * tensor.numel()
        return memory[:size].view(tensor.dtype).view(tensor.shape)

    _replace(call, name, inside(one))
    return _replace(call, other, inside(two))


def index(choices, call: Call) -> bool:
    """Keep features that are not there, or not in order."""
    kept = call.arguments.get("kept")
    if kept is None or kept.numel() == 0:
        return False
    kept, d = kept.clone(), call.arguments["weight"].shape[-1]
    flat = kept.view(-1)
    place = choices.integer(0, len(flat) - 1)
    ways = ["negative", "beyond", "far"] + ["twice", "turned"] * (kept.shape[-1] > 1)
    way = choices.pick(ways)
    if way in ("negative", "beyond", "far"):
        flat[place] = {"negative": -1, "beyond": d, "far": 2**62}[way]
    elif way == "twice":
        kept[..., 1] = kept[..., 0]
    else:
        kept = kept.flip(-1)
    return _replace(call, "kept", kept)


def number(choices, call: Call) -> bool:
    """Give a width, a damp or a count that makes no sense."""
    if call.operator == "reconstruct":
        damps = call.arguments["damps"]
        sites = call.arguments["weight"].shape[0] if call.arguments["weight"].dim() > 2 else 1
        if len(damps) == 0 or sites == 0:
            return False
        damps[choices.integer(0, len(damps) - 1)] = choices.pick((-1.0, math.nan, -math.inf))
        return True
    if call.operator != "obs_curve":
        return False
    d = call.arguments["weight"].shape[-1]
    units = d // call.arguments["width"]
    wrong = [
        ("width", choices.pick((0, -1, d + 1, 2**40, -(2**63)))),
        ("damp", choices.pick((-1e-3, math.nan, math.inf))),
        ("at_least", choices.pick((-1, units + 1, 2**50))),
        ("groups", choices.pick((0, -1, units + 1, 2**50))),
    ]
    name, value = choices.pick(wrong)
    call.arguments[name] = value
    return True


SPOILERS = (rank, size, dtype, strides, device, sparse, expanded, overlap, index, number)


def spoil(choices, call: Call) -> None:
    """Break one rule of a call; which one is in ``call.spoilt``."""
    way = choices.pick(SPOILERS)
    if way(choices, call):
        call.spoilt = way.__name__
