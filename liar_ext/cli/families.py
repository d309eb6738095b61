"""``liar families``: which model families there are, and a row for one that is lacking."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def add_families(commands: Any, name: Callable[[str], str]) -> None:
    """Add the subcommand to those of the parser."""
    parser = commands.add_parser(
        "families",
        help="which model families are known, and a row for one that isn't",
        description="Print what can be removed from the models of each family, and why something "
        "can't; or look for the row of a family that is lacking, prove it on tiny random models, "
        "and print it as Python code.",
    )
    add = parser.add_argument
    add(
        "--suggest",
        type=name,
        metavar="MODEL",
        help="propose a family definition for a model folder or hub id; only its config is read",
    )
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Print the table, or a proposed row."""
    if options.suggest:
        print(_suggestion(options.suggest, options.json))
        return
    from liar_ext.models.overview import overview, plain

    table = overview()
    if options.json:
        facts = {n: {key: each._asdict() for key, each in row.items()} for n, row in table.items()}
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(plain(table)))


def _suggestion(model: str, as_json: bool) -> str:
    """Return a row as Python code, with what is known of it in comments; or all as JSON."""
    from liar_ext.suggest.suggest import suggest_for

    found = suggest_for(model)
    if as_json:
        fields = {
            "family": found.family.name,
            "known": found.known,
            "code": found.code,
            "proved": found.proved,
            "missing": dict(found.family.without),
            "notes": found.notes,
        }
        return json.dumps(fields, indent=1)
    if found.known:
        said = [f"{found.family.name} is in the table of families; nothing was tried"]
    else:
        said = [f"{found.family.name}: proposed, and proved on tiny random models"]
    said += [f"proved: {each}" for each in found.proved]
    said += [f"lacking: {name}: {why}" for name, why in found.family.without.items()]
    said += [f"note: {each}" for each in found.notes]
    comments = [f"# {' '.join(line.split())}" for line in said]
    return "\n".join([*comments, found.code.rstrip()])
