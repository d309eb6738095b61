"""What a field of a recipe says of itself. Every list of fields elsewhere is made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field
from typing import Any

from liar_ext.recipe.checks import Check

# The stages that fields belong to, in order: headings of the YAML and groups of the command's help.
GROUPS = {
    "model": "Model",
    "calibration": "Calibration",
    "budget": "Budget: how much stays",
    "selection": "Selection: which units stay",
    "reconstruction": "Reconstruction: error compensation in the weights that stay",
    "evaluation": "Evaluation",
}
GIB = 2**30
# Whether a job works: with any value, with the default alone, or as a function of the value.
Works = bool | Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """A field of a recipe, and its metadata."""

    default: Any
    check: Check  # takes name and value; returns the value in its type, or raises InputError
    help: str  # of the command's option
    group: str  # stage, one of GROUPS
    # First result that depends on it: inputs, scores, plan, weights or report. Jobs on the same
    # inputs share their scores, unless a field of "scores" differs.
    affects: str
    common: bool = False  # whether --help shows the option; --help-all shows all
    option: str = ""  # name on the command line, if not that of the field
    metavar: str = ""  # placeholder of its value, if not that of its type
    # Reads the text of the option, if the type is not enough; what it can't read is returned, and
    # refused by the check.
    read: Callable[[str], Any] | None = None
    in_bank: str = ""  # part of a bank that depends on it: text, which a bank says, sensitivities
    unsaid: Any = None  # value in banks that are older than the field
    with_bank: Works = True  # whether a job works with a bank
    streamed: Works = True  # block by block (--max-memory)
    from_sums: Works = True  # from the statistics alone, without running the model over the text
    in_python: str = ""  # replacement in Python, if liar_ext.prune has no such keyword


def with_options(cls: type) -> type:
    """Make each option of a class a field, with the option's own fields as metadata."""
    for name, each in list(vars(cls).items()):
        if isinstance(each, Option):
            setattr(cls, name, field(default=each.default, metadata=vars(each)))
    return cls


def option_of(each: Field) -> str:
    """Return the option of ``liar prune`` that sets a field."""
    return each.metadata["option"] or "--" + each.name.replace("_", "-")


def works(each: Field, way: str, value: Any) -> bool:
    """Tell whether a field's value works ``with_bank``, ``streamed`` or ``from_sums``."""
    fact = each.metadata[way]
    return fact(value) if callable(fact) else fact or value == each.default


def read_gibibytes(text: str) -> int | str:
    """Read GiB as bytes."""
    try:
        return int(float(text) * GIB)
    except (ValueError, OverflowError):  # no number, or none that is finite
        return text
