"""Options made from the fields of a recipe, and readers of option values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import Field
from functools import partial
from typing import Any

from liar_ext.errors import InputError
from liar_ext.recipe.checks import check_printable, shown
from liar_ext.recipe.fields import CRITERIA, GROUPS, option_of

Add = Callable[..., None]
NUMBERS = {"int": int, "float": float}  # types that fields begin with


class HelpAll(argparse.Action):
    """``--help-all``: print all options."""

    def __call__(self, parser: Any, *_: object) -> None:
        """Print, and end the command."""
        parser.print_all()
        parser.exit()


def add_fields(parser: Any, chosen: Iterable[Field], *more: str) -> None:
    """Add the options of fields, by stage; ``--help`` shows the common ones, and ``more``."""
    help_all = {"action": HelpAll, "nargs": 0, "default": argparse.SUPPRESS}
    parser.add_argument("--help-all", **help_all, help="show all options and exit")
    chosen = list(chosen)
    parser.common = (*(each.name for each in chosen if each.metadata["common"]), *more)
    for group, title in GROUPS.items():
        own = [each for each in chosen if each.metadata["group"] == group]
        section = parser.add_argument_group(title) if own else parser
        for each in own:
            add_field(section, each)


def add_field(group: argparse._ActionsContainer, each: Field) -> None:
    """Add the option of one field of the recipe; what isn't given leaves no trace."""
    facts, default, name = each.metadata, each.default, option_of(each)
    names, help = getattr(facts["check"], "names", None), facts["help"]
    if each.name == "criterion":
        help += ": " + ", ".join(CRITERIA)
    if default not in (None, ()) and not isinstance(default, bool):
        help += f" (default: {'all' if default == names else default})"
    add = partial(group.add_argument, default=argparse.SUPPRESS, help=help.replace("%", "%%"))
    kind = each.type.split(" ")[0]
    metavar = facts["metavar"] or {"int": "N", "float": "F"}.get(kind, each.name.upper())
    if not name.startswith("-"):
        add(each.name, nargs="?", metavar=name)
    elif isinstance(default, bool):
        add(name, dest=each.name, action=argparse.BooleanOptionalAction)
    elif facts["read"]:
        add(name, dest=each.name, type=facts["read"], metavar=metavar)
    elif names:
        add(name, dest=each.name, choices=names)
    elif kind.startswith("tuple"):
        add(name, dest=each.name, nargs="+", metavar=metavar)
    else:
        add(name, dest=each.name, type=partial(_read, NUMBERS.get(kind, str)), metavar=metavar)


def _read(kind: type, text: str) -> Any:
    """Read a value of a type; what isn't one stays text, which the check of the field refuses."""
    try:
        return kind(text)
    except ValueError:
        return text


def _wrong(must: str, value: object) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must {must}, got {shown(value)}")


def read_name(text: str) -> str:
    """Read a name or path."""
    if not text.strip():
        raise _wrong("not be empty", text)
    try:
        check_printable("name", text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def read_names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [read_name(name).strip() for name in text.split(",")]


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads an integer of at least ``least``."""

    def read(text: str) -> int:
        value = _read(int, text)
        if isinstance(value, str):
            raise _wrong("be an integer", text)
        if not least <= value < 2**63:
            raise _wrong(f"be an integer of at least {least}", value)
        return value

    return read


def read_number(text: str) -> float:
    """Read a finite number."""
    value = _read(float, text)
    if isinstance(value, str) or not math.isfinite(value):
        raise _wrong("be a number", text)
    return value


def above_zero(text: str) -> float:
    """Read a number above 0."""
    value = read_number(text)
    if value <= 0:
        raise _wrong("be above 0", text)
    return value


def read_count(text: str) -> int:
    """Read a count such as 20000, 100k or 2M."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    value = float(found[1]) * {"": 1, "k": 1000, "M": 1_000_000}[found[2]] if found else 0
    if not 1 <= value < 2**53:
        raise _wrong("be a number of at least 1, such as 20000, 100k or 2M", text)
    return int(value)


def read_size(text: str) -> int:
    """Read a size with its unit as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]) > 0:
        raise _wrong("be a number and a unit, such as 12GiB or 500MB", text)
    power = 1 + "KMGT".index(found[2].upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def path(metavar: str) -> dict[str, Any]:
    """Return what argparse has to know of a name or path."""
    return {"type": read_name, "metavar": metavar}


# What argparse has to know of other kinds of options.
NAME: dict[str, Any] = {"type": read_name}
FILE, DIR = path("FILE"), path("DIR")
COUNT: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
FLAG: dict[str, Any] = {"action": "store_true"}
YES_OR_NO: dict[str, Any] = {"action": argparse.BooleanOptionalAction}


def adder(group: argparse._ActionsContainer) -> Add:
    """Return what adds an option to a group, given by its names, its kind and its help."""

    def add(names: str, kind: dict[str, Any], help: str | None = None) -> None:
        group.add_argument(*names.split(), **kind, help=help)

    return add
