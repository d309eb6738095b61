"""Options that are fields of a recipe, and what reads the text of any option."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, Field
from typing import Any

from liar_ext.errors import InputError
from liar_ext.recipe.checks import check_printable, shown
from liar_ext.recipe.choices import CRITERIA
from liar_ext.recipe.recipe import option_of

GIB = 2**30


def add_field(group: argparse._ArgumentGroup, each: Field) -> None:
    """Add the option of one field of the recipe; what isn't given leaves no trace."""
    facts, default = each.metadata, each.default
    help = facts["help"]
    if each.name == "criterion":
        help += ": " + ", ".join(CRITERIA)
    settings: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS}
    if each.name == "model":
        group.add_argument(
            "model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=help
        )
        return
    names = getattr(facts["check"], "names", None)
    if isinstance(default, bool):
        settings["action"] = argparse.BooleanOptionalAction
    elif each.name == "calibration":
        settings |= {"nargs": "+", "metavar": facts["metavar"]}
    elif each.name == "tile":
        settings |= {"type": _tile, "metavar": "N"}
    elif each.name == "kinds":
        settings |= {"type": _sites, "metavar": "{all,attn,mlp}"}
    elif names:
        settings["choices"] = names
    else:
        settings |= {"type": _type_of(each), "metavar": _metavar(each)}
    if default not in (None, (), MISSING) and not isinstance(default, bool):
        help += f" (default: {'all' if each.name == 'kinds' else default})"
    group.add_argument(option_of(each), help=help.replace("%", "%%"), **settings)


def _metavar(each: Field) -> str:
    """Return what stands for an option's value in the help."""
    by_type = {"int": "N", "int | None": "N", "float": "F"}.get(each.type, each.name.upper())
    return each.metadata.get("metavar", by_type)


def _type_of(each: Field) -> Callable[[str], Any]:
    """Return what reads an option's text."""
    if each.name == "memory":
        return _gibibytes
    return {"int": _whole, "int | None": _whole, "float": read_number}.get(each.type, str)


def read_name(text: str) -> str:
    """Read a name or path."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    try:
        check_printable("name", text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def read_names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [read_name(name).strip() for name in text.split(",")]


def _whole(text: str) -> int:
    """Read an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {shown(text)}") from None


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads an integer of at least ``least``."""

    def read(text: str) -> int:
        value = _whole(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {shown(value)}"
            )
        return value

    return read


def _tile(text: str) -> int | str:
    """Read a tile: a number, or "auto"."""
    return text if text == "auto" else _whole(text)


def read_number(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {shown(text)}")
    return value


def _gibibytes(text: str) -> int:
    """Read GiB as bytes."""
    value = read_number(text)
    if not 0 < value < 2**33:
        raise argparse.ArgumentTypeError(f"must be GiB, more than 0 and below 2^33, got {text}")
    return max(1, int(value * GIB))


def _sites(text: str) -> tuple[str, ...]:
    """Read which sites may be pruned."""
    known = {"all": ("attn", "mlp"), "attn": ("attn",), "mlp": ("mlp",)}
    if text not in known:
        raise argparse.ArgumentTypeError(f"must be one of all, attn, mlp, got {shown(text)}")
    return known[text]


def read_size(text: str) -> int:
    """Read a size with its unit as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(
            f"must be a number and a unit, such as 12GiB or 500MB, got {shown(text)}"
        )
    power = 1 + "KMGT".index(found[2].upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
