"""The options of the ``liar`` command; those of ``prune`` are the fields of a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from liar_ext.cli.commands import COMMANDS
from liar_ext.cli.messages import error_lines
from liar_ext.errors import InputError, did_you_mean
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields


class Parser(argparse.ArgumentParser):
    """A parser whose errors are what is wrong, and what to type.

    ``--help`` shows the ``common`` options by their destinations, if there are any, or all.
    """

    common: tuple[str, ...] = ()

    def print_help(self, file: Any = None) -> None:
        """Print the common options, if the parser knows them, or all."""
        if not self.common:
            return self.print_all(file)
        formatter, shown = self._get_formatter(), (*self.common, "help", "help_all")
        actions = [each for each in self._actions if each.dest in shown]
        formatter.add_usage(self.usage, self._actions, ())
        formatter.add_text(self.description)
        formatter.start_section("Common options")
        formatter.add_arguments(sorted(actions, key=lambda each: shown.index(each.dest)))
        formatter.end_section()
        formatter.add_text(self.epilog)
        self._print_message(formatter.format_help(), file or sys.stdout)

    def print_all(self, file: Any = None) -> None:
        """Print all options."""
        super().print_help(file)

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
            parser.error("--print-completion needs shtab; run pip install '.[completion]'")
        for each in (parser, *parser.of_command.values()):
            for action in each._actions:
                if action.metavar in PATHS:
                    action.complete = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the name of the command as ``command``."""
    parser = Parser(
        prog="liar",
        description="Prune transformers without retraining: remove attention heads and MLP "
        "channels, and compensate for them in the weights that stay.",
        epilog="liar prune MODEL --calibration TEXT --out DIR is all that a first run needs.",
    )
    parser.add_argument("--version", action="version", version=f"liar_ext {version('liar_ext')}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh"),
        action=PrintCompletion,
        default=argparse.SUPPRESS,
        help="print a script that completes liar in a shell",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.of_command = commands.choices
    for add in COMMANDS:
        add(commands)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; leave with exit code 2 if they can't be parsed.

    MODEL may be missing where a recipe names it, and argparse misses such an argument where an
    option stands before it.
    """
    commands = parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        commands.print_help(sys.stderr)
        commands.error("no command was given; name one of those above")
    options, rest = commands.parse_known_args(arguments)
    takes = ("prune", "calibrate", "sweep", "compare-methods")
    lacks = options.command in takes and not hasattr(options, "model")
    if lacks and len(rest) == 1 and not rest[0].startswith("-"):
        options.model, rest = rest[0], []
    if rest:
        known = commands.of_command[options.command]
        hint = did_you_mean(rest[0].partition("=")[0], known._option_string_actions)
        what = "option" if rest[0].startswith("-") else "argument"
        known.error(f"unknown {what} {rest[0]}" + (f"; {hint}" if hint else ""))
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe: a file's or a preset's, with what the options say on top."""
    path = getattr(options, "recipe", None)
    start = Recipe.load(path) if path else Recipe.preset(getattr(options, "preset", "balanced"))
    given = {
        each.name: getattr(options, each.name)
        for each in recipe_fields()
        if hasattr(options, each.name)
    }
    return Recipe.build(start, **given)


def check_complete(command: str, given: Mapping[str, object], example: str) -> None:
    """Raise InputError, with an example, unless there is a value for each name."""
    names = [name for name, value in given.items() if not value]
    if names:
        raise InputError(
            f"{command}: liar {command} needs {', '.join(names)}; {example}, MODEL before "
            "--calibration"
        )
