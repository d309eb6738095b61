"""Rows in a JSON file that is whole at any time: a run that was killed goes on where it was."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from bench.common import write_json
from liar_ext import InputError, Recipe
from liar_ext.models.recipe import REMOVED

# What makes two rows the same measurement, but for the recipe.
KEY = ("model", "weights", "method", "ratio", "seed", "calibration_digest", "judged_digest")


class Record:
    """The rows of a JSON file, which need not be there; InputError if it holds anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            try:
                self.rows = json.loads(path.read_text(encoding="utf-8"))
                known = {key_of(row) for row in self.rows}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    f"quality: {path} must hold rows of this bench; move it away, or name another "
                    "folder by --out"
                ) from None
            del known

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row that was measured as ``wanted`` says, if there is one."""
        key = key_of(wanted)
        return next((row for row in reversed(self.rows) if key_of(row) == key), None)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row in the place of one of its key, and write all of them."""
        key = key_of(row)
        self.rows = [each for each in self.rows if key_of(each) != key] + [row]
        write_json(self.path, self.rows)


def key_of(row: Mapping[str, Any]) -> str:
    """Return what tells a row from others.

    Fields of the recipe that a row lacks, as one from before there were such fields, count as they
    are by default; fields that were removed since don't count where they had no effect.
    """
    recipe = {
        name: value for name, value in row["recipe"].items() if value not in REMOVED.get(name, ())
    }
    for each in fields(Recipe):
        if each.default is not MISSING:
            default = list(each.default) if isinstance(each.default, tuple) else each.default
            recipe.setdefault(each.name, default)
    return json.dumps([[row[name] for name in KEY], sorted(recipe.items())])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one run at a time write into a folder; InputError if another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"quality: another run writes into {folder}; wait for it, or give another --out"
            ) from None
        yield
