"""A row of the table of families: registered for a while, and as Python code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from liar_ext.models.family import Family
from liar_ext.models.registry import FAMILIES

WIDTH = 88


@contextmanager
def registered(family: Family) -> Iterator[None]:
    """Have a row in the table while the context is open."""
    before = FAMILIES.get(family.name)
    FAMILIES[family.name] = family
    try:
        yield
    finally:
        if before is None:
            FAMILIES.pop(family.name, None)
        else:
            FAMILIES[family.name] = before


def code(family: Family) -> str:
    """Return Python code that registers a row."""
    words: set[str] = set()
    text = _write(family, words, "    ")
    return (
        "from liar_ext import register_family\n"
        f"from liar_ext.models.family import {', '.join(sorted(words))}\n\n"
        f"register_family(\n    {text}\n)\n"
    )


def _write(value: Any, words: set[str], indent: str | None, taken: int = 0) -> str:
    """Return a value as code; on one line if it fits, or always without an indent.

    The classes that it is made of are added to ``words``.
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # double quotes; newlines are escaped
    if value is None or isinstance(value, int | float):
        return repr(value)
    brackets, items = "()", [("", each) for each in value] if type(value) in (tuple, list) else []
    if isinstance(value, Mapping):
        brackets, items = "{}", [(f"{json.dumps(key)}: ", each) for key, each in value.items()]
    head = ""
    if is_dataclass(value) or hasattr(value, "_fields"):
        head, items = type(value).__name__, _set_fields(value)
        words.add(head)
    line = ", ".join(label + _write(each, words, None) for label, each in items)
    line += "," * (type(value) in (tuple, list) and len(items) == 1)
    line = head + brackets[0] + line + brackets[1]
    if indent is None or len(indent) + taken + len(line) < WIDTH:
        return line
    deeper = indent + "    "
    body = "".join(
        f"{deeper}{label}{_write(each, words, deeper, len(label))},\n" for label, each in items
    )
    return f"{head}{brackets[0]}\n{body}{indent}{brackets[1]}"


def _set_fields(value: Any) -> list[tuple[str, Any]]:
    """Return label and value of the fields that aren't as they are by default."""
    if is_dataclass(value):
        defaults = {
            each.name: each.default if each.default_factory is MISSING else each.default_factory()
            for each in fields(value)
        }
        labels = {name: f"{name}=" for name in defaults}
    else:
        defaults = value._field_defaults
        labels = {name: f"{name}=" if name in defaults else "" for name in value._fields}
    return [
        (label, getattr(value, name))
        for name, label in labels.items()
        if defaults.get(name, MISSING) != getattr(value, name)
    ]
