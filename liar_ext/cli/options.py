"""Options: made from the fields of a recipe, readers of their values, and the parser."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from liar_ext.models import recipe_checks as check
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_fields import GROUPS, option_of, recipe_fields
from liar_ext.system.errors import InputError, did_you_mean, one_line

StrPath = str | os.PathLike[str]
NUMBERS = {"int": int, "float": float}  # types that fields begin with
TRACKERS = ("mlflow", "wandb")


class HelpAll(argparse.Action):
    """``--help-all``."""

    def __call__(self, parser: Any, *_: object) -> None:
        """Print all options, and end the command."""
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
        help += ": " + ", ".join(sorted(check.CRITERIA))
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


def _reader(checks: check.Check, kind: type = str) -> Callable[[str], Any]:
    """Return what argparse reads an option by, which is checked as a field of a recipe is."""

    def read(text: str) -> Any:
        try:
            return checks("value", _read(kind, text))
        except InputError as error:
            said = str(error).removeprefix("recipe: value ")
            raise argparse.ArgumentTypeError(said) from None

    return read


def _quantity(
    examples: str, units: Mapping[str, float], kind: type = int, least: int = 1
) -> Callable[[str], Any]:
    """Return what reads a number and its unit."""

    def read(text: str) -> Any:
        found = check.quantity(text, units)
        if found is None or not least <= found < check.MOST:
            must = f"must be a number and a unit, such as {examples}"
            raise argparse.ArgumentTypeError(f"{must}, got {check.shown(text)}")
        return kind(found)

    return read


read_size = _reader(check.size)
read_count = _quantity("20000, 100k or 2M", {"": 1, "k": 1000, "M": 1_000_000})
read_minutes = _quantity("5m, 1h or 90s", {"s": 1 / 60, "m": 1, "h": 60}, float, 0)
read_number = _reader(check.number, float)
read_name = _reader(check.text)
above_zero = _reader(
    check.checked("be a number above 0", lambda value: check.is_number(value) and 0 < value < 1e18),
    float,
)


def read_names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [read_name(name).strip() for name in text.split(",")]


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads an integer of at least ``least``."""
    return _reader(check.whole(least), int)


def read_tracker(name: str) -> str:
    """Read the name of a tracker; one that isn't installed is refused before the job begins."""
    if name in TRACKERS and find_spec(name) is None:
        raise argparse.ArgumentTypeError(f"{name} is not installed; run pip install {name}")
    return name


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
    """``--print-completion``."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Print the script for the shell ``values``, and leave."""
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


def paths_of(text: StrPath | Sequence[StrPath]) -> tuple[str, ...]:
    """Return the names of one path, or of several."""
    texts = [text] if isinstance(text, str | os.PathLike) else text
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


COLOURS = {"error": "1;31", "warning": "1;33", "hint": "1;36"}
OPERATION = re.compile(r"^(?:[A-Za-z]\w*\.?)+: ")  # the function that raised, or the command
ARGUMENT = re.compile(r"argument ([^\s:]+): ")  # as argparse begins
# of="flops" or tile=32, as Python has it.
KEYWORD = re.compile(r"""(?<![\w./-])([a-z_]+)=(["']?)([\w.-]+)\2(?![\w/]|\.\w)""")
READ = (  # options that name something to read
    *("model", "calibration", "eval", "text", "recipe", "bank", "banks", "latency_table"),
    *("folder", "folders", "against"),
)
FIELD = re.compile(r"^(?:recipe|Budget): (\w+)(?= )")  # of a recipe, where an error begins
OPTIONS = {each.name: option_of(each) for each in recipe_fields() if each.name != "model"}
# A field such as keep_blocks in a line, and no part of a path.
NAMED = re.compile(rf"(?<![\w./-])({'|'.join(n for n in OPTIONS if '_' in n)})(?![\w/=-])")


def error_lines(message: object, options: argparse.Namespace | None = None) -> str:
    """Return ``error:`` with what is wrong and, where there is one, ``hint:`` with what to type.

    An error of the package reads ``operation: what is wrong; what to do``. Fields of a recipe
    become options. For a file or folder of the options that isn't there, a near name is shown.
    """
    line = as_options(" ".join(str(message).split()))
    line = FIELD.sub(lambda found: f"recipe: {OPTIONS.get(found[1], found[1])}", line)
    line = ARGUMENT.sub(r"\1 ", OPERATION.sub("", line))
    cause, _, hint = line.partition("; ")
    hint = " ".join(filter(None, [_near_path(options, cause), hint]))
    lines = [("error", cause)] + ([("hint", hint)] if hint else [])
    return "\n".join(f"{painted(word)} {one_line(said)}" for word, said in lines)


def as_options(line: str) -> str:
    """Return a line with ``of="flops"``, ``tile=32`` and ``keep_blocks`` spelled as options."""
    line = KEYWORD.sub(
        lambda found: f"{OPTIONS[found[1]]} {found[3]}" if found[1] in OPTIONS else found[0], line
    )
    return NAMED.sub(lambda found: OPTIONS[found[1]], line)


def _near_path(options: argparse.Namespace | None, cause: str) -> str:
    """Return a near name for the first path of the options that an error names and that isn't."""
    words = tuple(word.strip("'\",:") for word in cause.split())
    for value in (getattr(options, name, None) for name in READ):
        for text in value if isinstance(value, list | tuple) else (value,):
            named = isinstance(text, str) and any(word.endswith(text) for word in words)
            if named and not os.path.lexists(text):
                path, near = Path(text), ""
                with suppress(OSError):  # no such folder, or none that can be read
                    near = did_you_mean(path.name, os.listdir(path.parent))
                return near.replace("mean ", f"mean {path.parent}/") if "/" in text else near
    return ""


def painted(word: str) -> str:
    """Return a word with its colon, in colour where stderr is a terminal that has some."""
    plain = (
        not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    )
    return f"{word}:" if plain else f"\033[{COLOURS[word]}m{word}:\033[0m"
