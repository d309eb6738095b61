"""The bytes of activation statistics, and the refusal of more than is free on the CPU."""

from __future__ import annotations

from liar_ext.data.batches import FOLDS
from liar_ext.environment import available_memory
from liar_ext.errors import InputError


def bytes_of_sums(features: int) -> int:
    """Return the bytes of the sums at one site: ``d²`` of float64 for each fold."""
    return FOLDS * 8 * features**2


def check_memory(operation: str, needed: int) -> None:
    """Raise InputError if sums of so many bytes can't be held at once on the CPU."""
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{operation}: the sums of all sites take {needed / 2**30:.3g} GiB at once, and "
            f"{free / 2**30:.3g} are free; free some, or let liar prune --memory sum them in groups"
        )
