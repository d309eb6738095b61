"""Recipes as text: YAML without tags and aliases, strict JSON, neither trusted."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from liar_ext.errors import InputError

MOST_BYTES = 1 << 20  # of a file: a recipe takes one or two thousand
# YAML 1.1 takes 1e-3 for text, since it lacks a point.
FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases (which can grow beyond all bounds) and double keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise InputError("recipe: YAML must hold no alias (*name); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        made: dict = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in made:
                raise InputError(
                    f"recipe: YAML must name each field once, line {key_node.start_mark.line + 1}"
                )
            made[key] = self.construct_object(value_node, deep=deep)
        return made


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which puts what :class:`_Loader` takes for a number in quotes, too."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read(path: str | os.PathLike[str]) -> str:
    """Return the text of a recipe's file.

    Raises
    ------
    InputError
        If it can't be read, is not UTF-8, or is far too long.
    """
    try:
        with Path(path).open("rb") as file:
            written = file.read(MOST_BYTES + 1)
        if len(written) > MOST_BYTES:
            raise InputError(f"recipe: {path} must be at most {MOST_BYTES} bytes; is it a recipe?")
        return written.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"recipe: can't read {path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"recipe: {path!r} must be a UTF-8 file of YAML or JSON") from error


def from_yaml(written: str) -> Any:
    """Return what YAML text says; InputError if it is none, or asks for more than plain values."""
    try:
        return yaml.load(written, Loader=_Loader)  # noqa: S506  (a safe loader)
    except InputError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"recipe: not YAML{at}: {' '.join(problem.split())[:120]}") from error
    except RecursionError as error:
        raise InputError("recipe: YAML must be fields and lists, not nested deeply") from error
    except (ValueError, OverflowError, AttributeError, KeyError, TypeError) as error:
        # Dates and numbers that YAML promises and Python can't hold.
        raise InputError(f"recipe: not YAML: {str(error)[:120]}") from error


def from_json(written: str) -> Any:
    """Return what JSON text says; InputError if it is none, or names a field twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise InputError("recipe: JSON must name each field once")
        return made

    try:
        return json.loads(written, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe: not JSON: {str(error)[:120]}") from error


def plain(value: Any) -> Any:
    """Return a field's value as JSON has it: lists, and "inf" for infinity."""
    if isinstance(value, tuple):
        return list(value)
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def to_json(facts: Mapping[str, Any]) -> str:
    """Return strict JSON."""
    return json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False)


def yaml_lines(facts: Mapping[str, Any]) -> str:
    """Return lines of YAML, one for each field, lists in brackets."""
    lines = []
    for name, value in facts.items():
        # Line ends other than \n would come back as spaces: they are escaped, with all that isn't
        # ASCII beside them.
        words = "".join(value) if isinstance(value, list) else str(value)
        style = {"Dumper": _Dumper, "allow_unicode": words.isprintable(), "width": math.inf}
        if isinstance(value, list):
            lines.append(f"{name}: {yaml.dump(value, default_flow_style=True, **style)}")
        else:
            lines.append(yaml.dump({name: value}, default_flow_style=False, **style))
    return "".join(lines)
