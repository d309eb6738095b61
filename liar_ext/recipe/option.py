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
    """A field of a recipe, and its metadata.

    Parameters
    ----------
    default : object
        Its default.
    check : Callable
        Takes name and value, and returns the value in its type or raises InputError.
    help : str
        Help of the command's option.
    group : str
        Stage, one of ``GROUPS``.
    affects : {"inputs", "scores", "plan", "weights", "report"}
        First result that depends on the field. Jobs on the same inputs share their scores, unless
        a field of "scores" differs.
    common : bool
        Whether ``--help`` shows the option; ``--help-all`` shows all.
    option, metavar : str
        Name on the command line, and placeholder of its value, if not those of name and type.
    read : Callable, optional
        Reads the text of the option, if the type is not enough. Text that it can't read is
        returned, and refused by the check.
    in_bank : {"", "text", "sensitivities"}
        Part of a bank of statistics that depends on the field. A bank says the fields of its text.
    unsaid : object
        Value in banks that are older than the field.
    with_bank, streamed, from_sums : bool or Callable
        Whether a job works with a bank; block by block (``--max-memory``); from the statistics
        alone, without running the model over the text again.
    in_python : str
        Replacement in Python, if :func:`liar_ext.prune` has no such keyword.
    """

    default: Any
    check: Check
    help: str
    group: str
    affects: str
    common: bool = False
    option: str = ""
    metavar: str = ""
    read: Callable[[str], Any] | None = None
    in_bank: str = ""
    unsaid: Any = None
    with_bank: Works = True
    streamed: Works = True
    from_sums: Works = True
    in_python: str = ""


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
