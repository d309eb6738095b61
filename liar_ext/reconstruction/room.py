"""Where a solve is done: a site that a GPU has no room for is solved on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from liar_ext.calibration.moments import Moments
from liar_ext.errors import is_out_of_memory
from liar_ext.reconstruction.result import Solution
from liar_ext.reconstruction.targets import Shortfall
from liar_ext.report.rows import ON_HOST


def solve_where_it_fits(
    solve: Callable[..., Solution],
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    *more: Any,
    **choices: Any,
) -> Solution:
    """Return ``solve(weight, bias, moments, *more, **choices)``, which is done where the sums are.

    Where a GPU has no memory for it, it is done once more on the CPU, on copies of the sums, and
    the new weight comes back. The path of the solution, and so the row of the report, ends in
    :data:`ON_HOST` then.

    Parameters
    ----------
    solve : callable
        One of :mod:`liar_ext.reconstruction.ridge` and :mod:`liar_ext.reconstruction.targets`.
    weight, bias, moments, more, choices
        Its arguments.

    Raises
    ------
    RuntimeError
        If an allocation fails on the CPU.
    """
    device = moments.gram.device
    try:
        return solve(weight, bias, moments, *more, **choices)
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
    # Not in the handler: the traceback holds what was allocated.
    torch.cuda.empty_cache()
    found = solve(weight, bias, _on_host(moments), *map(_on_host, more), **choices)
    return replace(
        found,
        weight=found.weight.to(device),
        bias=None if found.bias is None else found.bias.to(device),
        path=f"{found.path}, {ON_HOST}",
    )


def _on_host(given: Any) -> Any:
    """Return sums with their tensors on the CPU; anything else as it is."""
    if isinstance(given, Moments):
        return Moments(given.gram.cpu(), given.total.cpu(), given.count.cpu())
    if isinstance(given, Shortfall):
        return Shortfall(given.cross.cpu(), given.total.cpu(), given.energy.cpu())
    return given
