"""Options: made from the fields of a recipe, readers of their values, and the parser."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field
from functools import partial
from typing import Any, NoReturn

from liar_ext.cli.messages import error_lines
from liar_ext.recipe import Recipe
from liar_ext.recipe.checks import CRITERIA, check_printable, shown
from liar_ext.recipe.fields import GROUPS, option_of, recipe_fields
from liar_ext.system.errors import InputError, did_you_mean

StrPath = str | os.PathLike[str]
NUMBERS = {"int": int, "float": float}  # types that fields begin with


class HelpAll(argparse.Action):
    """``--help-all``: print all options."""

    def __call__(self, parser: Any, *_: object) -> None:
        """Print, and end the command."""
        parser.common = ()
        parser.print_help()
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


def add_field(
    group: argparse._ActionsContainer, each: Field, *, shows_default: bool = True
) -> None:
    """Add the option of one field of the recipe; what isn't given leaves no trace."""
    facts, default, name = each.metadata, each.default, option_of(each)
    names, help = getattr(facts["check"], "names", None), facts["help"]
    if each.name == "criterion":
        help += ": " + ", ".join(sorted(CRITERIA))
    if shows_default and default not in (None, ()) and not isinstance(default, bool):
        help += f" (default: {'all' if isinstance(default, tuple) else default})"
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


def read_minutes(text: str) -> float:
    """Read a time such as 5m, 1h or 90s as minutes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not found or not float(found[1]) < 1e6:
        raise _wrong("be a number and a unit, such as 5m, 1h or 90s", text)
    return float(found[1]) * {"s": 1 / 60, "m": 1, "h": 60}[found[2]]


def path(metavar: str) -> dict[str, Any]:
    """Return what argparse has to know of a name or path."""
    return {"type": read_name, "metavar": metavar}


# What argparse has to know of other kinds of options.
NAME: dict[str, Any] = {"type": read_name}
FILE, DIR = path("FILE"), path("DIR")
COUNT: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
FLAG: dict[str, Any] = {"action": "store_true"}
YES_OR_NO: dict[str, Any] = {"action": argparse.BooleanOptionalAction}


def add(group: argparse._ActionsContainer, *options: tuple) -> None:
    """Add options to a group, each given by its names, its kind and its help."""
    for names, kind, *help in options:
        group.add_argument(*names.split(), **kind, help=help[0] if help else None)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are what is wrong, and what to type.

    ``--help`` shows the ``common`` options by their destinations, if there are any, or all.
    """

    common: tuple[str, ...] = ()

    def print_help(self, file: Any = None) -> None:
        """Print the common options, if the parser knows them, or all."""
        if not self.common:
            return super().print_help(file)
        formatter, shown = self._get_formatter(), (*self.common, "help", "help_all")
        actions = [each for each in self._actions if each.dest in shown]
        formatter.add_usage(self.usage, self._actions, ())
        formatter.add_text(self.description)
        formatter.start_section("Common options")
        formatter.add_arguments(sorted(actions, key=lambda each: shown.index(each.dest)))
        formatter.end_section()
        formatter.add_text(self.epilog)
        self._print_message(formatter.format_help(), file or sys.stdout)

    def error(self, message: str) -> NoReturn:
        """Print an error and a hint, and leave with exit code 2."""
        hint = "" if "; " in message else f"; {self.prog} --help shows what it takes"
        self.exit(2, error_lines(message + hint) + "\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        if not action.option_strings:
            hint = did_you_mean(value, action.choices, "liar --help lists them")
            self.error(f"there is no command {value}; {hint}")
        names = ", ".join(action.choices)
        hint = did_you_mean(value, action.choices, f"{self.prog} --help describes them")
        self.error(
            f"{'/'.join(action.option_strings)} must be one of {names}, got {value!r}; {hint}"
        )


PATHS = ("MODEL", "TEXT", "FILE", "DIR", "FOLDER")  # how the help names values that are paths


class PrintCompletion(argparse.Action):
    """Print the script and leave."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Print the script for the shell ``values``."""
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab; run pip install shtab")
        for each in (parser, *parser.of_command.values()):
            for action in each._actions:
                if action.metavar in PATHS:
                    action.complete = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit()


def paths_of(operation: str, text: StrPath | Sequence[StrPath]) -> tuple[str, ...]:
    """Return the names of one path, or of several."""
    texts = [text] if isinstance(text, str | os.PathLike) else text
    kinds = isinstance(texts, Sequence) and {isinstance(e, str | os.PathLike) for e in texts}
    if kinds != {True}:
        raise InputError(f"{operation}: text must be a path, or a list of paths, got {text!r}")
    return tuple(os.fspath(each) for each in texts)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe: a file's or a preset's, with what the options say on top."""
    path = getattr(options, "recipe", None)
    start = Recipe.load(path) if path else Recipe.preset(getattr(options, "preset", "balanced"))
    given = given_fields(options)
    recipe = Recipe.build(start, **given)
    for each in recipe_fields():
        name, _, value = each.metadata["needs"].partition(" ")
        found = getattr(recipe, name, None)
        if each.name in given and name and found != value and (value.islower() or found is None):
            option = option_of(each)
            raise InputError(
                f"{option} says nothing without --{name} {value}; add that, or leave {option} out"
            )
    return recipe


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a recipe that the options give."""
    names = (each.name for each in recipe_fields())
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def check_complete(command: str, given: Mapping[str, object], example: str) -> None:
    """Raise InputError, with an example, unless there is a value for each name."""
    names = [name for name, value in given.items() if not value]
    if names:
        raise InputError(
            f"{command}: liar {command} needs {', '.join(names)}; {example}, MODEL before "
            "--calibration"
        )
