"""Where work is done: on the device, on the host, or in a file, as far as there is memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from liar_ext.calibration.moments import Moments
from liar_ext.errors import is_out_of_memory
from liar_ext.reconstruction import blocked, ridge, targets
from liar_ext.reconstruction.result import Solution
from liar_ext.reconstruction.targets import Shortfall
from liar_ext.rows import BY_BLOCKS, ON_HOST

IN_BLOCKS = {
    ridge.solve: blocked.solve,
    ridge.drop: blocked.drop,
    targets.solve_towards: blocked.solve_towards,
}

Done = TypeVar("Done")


def where_it_fits(
    device: torch.device,
    here: Callable[[], Done],
    in_file: Callable[[], Done],
    on_host: Callable[[], Done],
) -> Done:
    """Return ``here()``; where an allocation fails ``in_file()``, or of a GPU ``on_host()``."""
    try:
        return here()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler: the traceback holds what was allocated.
    if device.type == "cpu":
        return in_file()
    torch.cuda.empty_cache()
    return on_host()


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
    :data:`ON_HOST` then. Where an allocation fails on the CPU, the solve is done once more by
    :mod:`liar_ext.reconstruction.blocked`, in a file, and :data:`BY_BLOCKS` is in its path.

    Parameters
    ----------
    solve : callable
        One of :mod:`liar_ext.reconstruction.ridge` and :mod:`liar_ext.reconstruction.targets`.
    weight, bias, moments, more, choices
        Its arguments.

    Raises
    ------
    MemoryError, RuntimeError
        If an allocation fails by blocks as well, or the file can't be made.
    """
    device, given = moments.gram.device, (weight, bias, moments, *more)

    def in_file() -> Solution:
        found = IN_BLOCKS[solve](*given, **choices)
        return replace(found, path=f"{found.path}, {BY_BLOCKS}")

    def on_host() -> Solution:
        copies = map(_on_host, (weight.detach(), bias, moments, *more))
        found = solve_where_it_fits(solve, *copies, **choices)
        return replace(
            found,
            weight=found.weight.to(device),
            bias=None if found.bias is None else found.bias.to(device),
            path=f"{found.path}, {ON_HOST}",
        )

    return where_it_fits(device, lambda: solve(*given, **choices), in_file, on_host)


def _on_host(given: Any) -> Any:
    """Return sums with their tensors on the CPU, and so other tensors; anything else as it is."""
    if isinstance(given, Moments):
        return Moments(given.gram.cpu(), given.total.cpu(), given.count.cpu())
    if isinstance(given, Shortfall):
        return Shortfall(given.cross.cpu(), given.total.cpu(), given.energy.cpu())
    return given.cpu() if isinstance(given, Tensor) else given
