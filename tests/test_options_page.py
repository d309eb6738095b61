"""docs/options.md: every option of every command, its default as parsed, and a reason."""

from __future__ import annotations

import argparse
import inspect
import re
from importlib import import_module
from typing import NamedTuple

import pytest
from test_docs import ROOT, subcommands

from liar_ext.export import FORMATS
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_fields import option_of, recipe_fields

TEXT = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
# Sections of `liar prune` have the names of its stages.
HEADING = re.compile(r"^##+ (?:liar ([\w-]+)|Of (\w+)|.*)$")


class Row(NamedTuple):
    """A row for one option: what follows its name in the page."""

    default: str
    why: str


def rows(text: str) -> dict[tuple[str, str], dict[str, Row]]:
    """Return the options of each command and export format."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    place = ("prune", "")
    for line in text.splitlines():
        if heading := HEADING.match(line):
            command, form = heading.groups()
            place = ("export", form) if form else (command or "prune", "")
        elif line.startswith("| `--"):
            names, default, values, why = [
                cell.strip() for cell in line.strip().strip("|").split("|")
            ]
            options = re.findall(r"`(--[\w-]+)`", names)
            defaults = [each.strip().strip("`") for each in default.split(",")]
            assert len(options) == len(defaults), line
            for option, each in zip(options, defaults, strict=True):
                assert option not in found.setdefault(place, {}), f"{option} twice"
                found[place][option] = Row(each, why)
    return found


def said(default: object) -> str:
    """Return a default as the page says it."""
    if default is None or default == () or default is argparse.SUPPRESS:
        return "–"
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def of_parser(command: str) -> dict[str, str]:
    """Return the options of a command with their defaults.

    Fields of a recipe stand in the tables of ``liar prune`` alone, whatever command has them, too.
    """
    found = {}
    for action in subcommands()[command]._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        field = action.dest in {each.name for each in recipe_fields()}
        elsewhere = command != "prune" and field and action.default == argparse.SUPPRESS
        shown = action.help is not argparse.SUPPRESS
        if shown and names and not names[0].startswith("--help") and not elsewhere:
            found[names[0]] = said(action.default)
    return found


def of_formats() -> dict[tuple[str, str], str]:
    """Return the options of `liar export` that a format has, with defaults."""
    found = {}
    for form, row in FORMATS.items():
        function = import_module(row.module).export
        for name, each in inspect.signature(function).parameters.items():
            if each.kind is each.KEYWORD_ONLY and name != "progress":
                found[form, "--" + name.replace("_", "-")] = said(each.default)
    return found


def expected(command: str) -> dict[str, str]:
    """Return what the page has to say of a command's options."""
    options = of_parser(command)
    if command == "prune":
        for each in recipe_fields():
            if each.name != "model":
                options[option_of(each)] = said(getattr(Recipe(), each.name))
        options["--sites"] = "all"
    if command == "export":
        own = {option for _, option in of_formats()}
        assert own <= options.keys()
        options = {name: default for name, default in options.items() if name not in own}
    return options


@pytest.mark.parametrize("command", subcommands())
def test_every_option_has_its_default(command):
    written = {name: row.default for name, row in rows(TEXT).get((command, ""), {}).items()}
    assert written == expected(command)


def test_every_option_of_a_format_has_its_default():
    written = {
        (form, name): row.default
        for (_, form), table in rows(TEXT).items()
        for name, row in table.items()
        if form
    }
    assert written == of_formats()


def test_every_option_says_why():
    tables = rows(TEXT)
    assert sum(map(len, tables.values())) > 60
    short = [name for table in tables.values() for name, row in table.items() if len(row.why) < 10]
    assert short == []


def test_every_command_has_its_section():
    found = re.findall(r"^## liar ([\w-]+)$", TEXT, re.MULTILINE)
    assert set(found) == {*subcommands()} - {"prune"}


def test_a_wrong_default_would_be_seen():
    text = "## Budget\n| `--keep` | `0.9` | (0, 1] | why |\n"
    found = rows(text + "## liar bench\n| `--batch` | `1 32` | n | x |")
    assert found["prune", ""]["--keep"] == Row("0.9", "why")
    assert found["bench", ""]["--batch"].default == expected("bench")["--batch"] == "1 32"
    assert expected("prune")["--keep"] == "0.8"
