"""What a random call has to come to, and whether it did."""

from __future__ import annotations

import fuzz_calls
import oracle
import torch
from fuzz_calls import Call, overwritten_outside
from fuzz_spoilers import WRITTEN, spoil
from torch import Tensor

from liar_ext import ops
from liar_ext.ops import reference

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
TINY = 1e-36  # below it float32 and bfloat16 products are not normal numbers


class Wrong(AssertionError):
    """A result that is not what the oracle gives, or an error that does not say what to do."""


def require(ok: bool, call: Call, what: str) -> None:
    """Raise what is wrong with a call, with its shapes."""
    if ok:
        return
    shapes = [
        f"{name}={tuple(a.shape)} {a.dtype} {a.device} strides {a.stride()}"
        if isinstance(a, Tensor) and a.layout == torch.strided
        else f"{name}={a}"
        for name, a in call.arguments.items()
    ]
    raise Wrong(
        f"{call.operator}, {call.spoilt or 'as it should be'}: {what}\n" + "\n".join(shapes)
    )


def make_call(choices, operator: str) -> Call:
    """Return a random call of an operator, spoilt in every third case."""
    call = getattr(fuzz_calls, operator)(choices)
    if choices.integer(0, 2) == 0:
        spoil(choices, call)
    return call


def check_call(call: Call, choices) -> str:
    """Run a call; return "agreed" or "refused", or raise what is wrong."""
    run = getattr(ops, call.operator)
    before = _copies(call)
    if call.spoilt:
        _check_refused(run, call)
        _check_untouched(call, before, list(before))
        return "refused"
    shapes = _meta_shapes(run, call) if choices.integer(0, 3) == 0 else None
    result = run(**call.arguments)
    got = result if isinstance(result, tuple) else (result,)
    require(shapes is None or shapes == _shapes(got), call, "other shapes on meta tensors")
    written = WRITTEN.get(call.operator, ())
    _check_untouched(call, before, [name for name in before if name not in written])
    CHECKS[call.operator](call, before, *got)
    for name, base in call.written.items():
        outside = overwritten_outside(call.arguments[name], base)
        require(not outside, call, f"wrote outside of {name}")
    return "agreed"


def _copies(call: Call) -> dict[str, Tensor]:
    """Return what the tensors of a call hold; nothing of meta and sparse ones."""
    return {
        name: tensor.clone()
        for name, tensor in call.tensors().items()
        if tensor.device.type == "cpu" and tensor.layout == torch.strided
    }


def _check_refused(run, call: Call) -> None:
    try:
        run(**call.arguments)
    except (RuntimeError, ValueError) as error:
        named = call.operator in str(error)
        require(named, call, f"an error that does not name the operator: {error}")
        return
    require(False, call, "not refused")


def _check_untouched(call: Call, before: dict[str, Tensor], names) -> None:
    for name in names:
        same = torch.equal(call.arguments[name].nan_to_num(5.0), before[name].nan_to_num(5.0))
        require(same, call, f"{name} was changed")


def _shapes(tensors) -> list[tuple]:
    return [None if t is None else (tuple(t.shape), t.dtype) for t in tensors]


def _meta_shapes(run, call: Call) -> list[tuple]:
    meta = {
        name: a.to("meta") if isinstance(a, Tensor) else a for name, a in call.arguments.items()
    }
    result = run(**meta)
    return _shapes(result if isinstance(result, tuple) else (result,))


def _near(call: Call, got: Tensor, want: Tensor, allowed: Tensor | float, what: str) -> None:
    """Require values to be within ``allowed`` where both are finite, and both or neither to be."""
    require(got.shape == want.shape, call, f"{what} has shape {tuple(got.shape)}")
    both = got.isfinite() & want.isfinite()
    same = torch.equal(got.isfinite(), want.isfinite())
    require(same, call, f"{what} is not finite where the oracle is, or the other way round")
    allowed = torch.as_tensor(allowed, dtype=torch.float64).broadcast_to(want.shape)
    off = (got.double() - want.double()).abs()[both]
    require(
        bool((off <= allowed[both]).all()), call, f"{what} is off by {off.max() if len(off) else 0}"
    )


def _check_gram(call: Call, before: dict[str, Tensor], _result) -> None:
    """Compare sums with those of float64 rows; the scale of a sum is that of its magnitudes."""
    a = call.arguments
    x, y, weight = a["x"], a.get("y"), a["weight"]
    wide = x.dtype == a["gram"].dtype == torch.float64
    exact = [before[name].double() for name in ("gram", "total", "count")]
    scale = [sums.abs() for sums in exact]
    # The oracle's limit is that of float64 sums: what is beyond the limit of others goes before.
    limit = reference.LARGEST_FLOAT64 if wide else reference.LARGEST
    scaled = x.double() if weight is None else x.double() * weight.double().clamp(min=1)[:, None]
    beyond = ~(scaled.abs() <= limit).all(-1)
    if y is not None:
        beyond |= ~(y.double().abs() <= limit).all(-1)
    if weight is not None:
        beyond |= ~(weight.double() <= limit)
    hidden = torch.where(beyond[:, None], torch.nan, x.double())
    if x.shape[1] == 0 and bool(beyond.any()):
        return  # no column to mark the rows in
    right = None if y is None else y.double()
    reference.gram_update_(*exact, hidden, right, weight)
    reference.gram_update_(*scale, hidden.abs(), None if right is None else right.abs(), weight)
    eps = EPS64 if wide else EPS32
    steps = 4 if a["gram"].dtype == torch.float64 else 8
    keep = torch.ones_like(exact[0], dtype=torch.bool)
    if y is None:
        keep = keep.tril()
        untouched = torch.equal(a["gram"][~keep], before["gram"][~keep])
        require(untouched, call, "wrote above the diagonal")
    room = steps * (8 + len(x) ** 0.5) * eps
    zero = torch.zeros_like(exact[0])
    _near(
        call,
        torch.where(keep, a["gram"].double(), zero),
        torch.where(keep, exact[0], zero),
        room * scale[0] + len(x) * TINY,
        "gram",
    )
    _near(call, a["total"], exact[1], room * scale[1] + len(x) * TINY, "total")
    _near(call, a["count"], exact[2], torch.stack([1e-12 * scale[2][0], scale[2][1] * 0]), "count")


def _check_reconstruct(call: Call, _before, weight, error, held_out, info) -> None:
    """Compare with the oracle, NaNs and codes included; rounding grows with the condition."""
    arguments = call.arguments | {"errors_only": False}
    want = oracle.reconstruct(**arguments)
    require(torch.equal(info[..., 0], want[3][..., 0]), call, f"codes {info[..., 0]}")
    _near(call, info[..., 1], want[3][..., 1], 1e-6 * want[3][..., 1].abs(), "condition")
    names = {"error": ("gram", "cross"), "held-out error": ("holdout", "holdout_cross")}
    scale = _largest(want[0]) + _largest(call.arguments["weight"])
    if not call.arguments["errors_only"]:
        _near(call, weight, want[0], 1e-9 * scale, "weight")
    errors = want[1:3]
    if "cross" not in call.arguments:  # the Gram matrix as rounded to float32 may be indefinite
        errors = errors[0].clamp(min=0), errors[1]
    for (name, sums), got, exact in zip(names.items(), (error, held_out), errors, strict=True):
        size = sum(_largest(call.arguments.get(one)) for one in sums)
        d = call.arguments["weight"].shape[-1] * max(1, call.arguments["weight"].shape[-2])
        _near(call, got, exact, 1e-10 * d * size * (1 + scale) ** 2, name)


def _largest(tensor: Tensor | None) -> float:
    if tensor is None or tensor.numel() == 0:
        return 0.0
    return float(tensor.double().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _check_obs_curve(call: Call, _before, order, error, info) -> None:
    """Compare with the oracle up to the first choice between two that cost the same."""
    a = call.arguments
    want_order, want_error, want_info = oracle.obs_curve(**a)
    if not bool(a["weight"].isfinite().all()) and a["at_least"] > 0:
        return  # a unit whose weight is no number may stay
    failed = bool(want_info[0] > 0) or not call.finite  # the oracle factors an infinity
    require(
        bool(info[0] > 0) <= failed and bool(want_info[0] > 0) <= bool(info[0] > 0),
        call,
        f"code {info[0]}",
    )
    if info[0] > 0:
        require(bool(error.isnan().all()), call, "errors of what failed")
        return
    require(len(set(order.tolist())) == len(order), call, "a unit that goes twice")
    differ = (order != want_order).nonzero().flatten().tolist()
    same = differ[0] + 1 if differ else len(order)
    room = 1e-8 * (_largest(want_error) + TINY)
    _near(call, error[: same + 1], want_error[: same + 1], room, "error")
    require(bool((error.diff() >= 0).all()), call, "errors that fall")


CHECKS = {
    "gram_update_": _check_gram,
    "reconstruct": _check_reconstruct,
    "obs_curve": _check_obs_curve,
}
