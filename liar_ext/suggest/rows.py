"""Rows of the table of families that are being tried: to register, to change, to write as code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from liar_ext.models.family import Family
from liar_ext.models.registry import FAMILIES

KINDS = {"attn": "heads", "mlp": "channels"}  # of sites, and their units
WIDTH = 88


@contextmanager
def registered(family: Family) -> Iterator[None]:
    """Have a row in the table while the context is open."""
    before = dict(FAMILIES)
    FAMILIES[family.name] = family
    try:
        yield
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def rewired(family: Family, kind: str, **changes: Any) -> Family:
    """Return a row whose wirings of a kind, in all its parts, have some fields changed."""

    def change(row: Any) -> Any:
        names = ("attn", "cross_attn") if kind == "attn" else (kind,)
        there = {name: getattr(row, name, None) for name in names}
        return replace(row, **{n: replace(w, **changes) for n, w in there.items() if w is not None})

    return (
        replace(family, parts=tuple(map(change, family.parts))) if family.parts else change(family)
    )


def kinds_of(family: Family) -> list[str]:
    """Return the kinds of sites that a row describes."""
    return [kind for kind in KINDS if family.wirings(kind)]


def tells_sizes(family: Family, kind: str) -> bool:
    """Tell whether config fields express how many units the sites of a kind have."""
    found = family.wirings(kind)
    return bool(found) and all(wiring.config for wiring in found)


def code(family: Family) -> str:
    """Return Python code that registers a row."""
    words: set[str] = set()
    text = _write(family, words, 4)
    return (
        "from liar_ext import register_family\n"
        f"from liar_ext.models.family import {', '.join(sorted(words))}\n\n"
        f"register_family(\n    {text}\n)\n"
    )


def _write(value: Any, words: set[str], indent: int | None = None, label: str = "") -> str:
    """Return a value as code behind a label; on one line if it fits, or always without an indent.

    The classes that it is made of are added to ``words``.
    """
    if isinstance(value, str):
        return label + json.dumps(value, ensure_ascii=False)  # newlines are escaped
    if value is None or isinstance(value, int | float):
        return label + repr(value)
    first, last, end = "(", ")", ""
    if isinstance(value, Mapping):
        first, last = "{", "}"
        items = [(f"{json.dumps(key)}: ", each) for key, each in value.items()]
    elif type(value) in (tuple, list):
        items, end = [("", each) for each in value], "," * (len(value) == 1)
    else:
        first, items = f"{type(value).__name__}(", _set_fields(value)
        words.add(type(value).__name__)
    line = ", ".join(_write(each, words, None, name) for name, each in items)
    line = f"{label}{first}{line}{end}{last}"
    if indent is None or indent + len(line) < WIDTH:
        return line
    deeper = indent + 4
    lines = [f"{' ' * deeper}{_write(each, words, deeper, name)},\n" for name, each in items]
    return f"{label}{first}\n{''.join(lines)}{' ' * indent}{last}"


def _set_fields(value: Any) -> list[tuple[str, Any]]:
    """Return label and value of the fields that aren't as they are by default."""
    fields = inspect.signature(type(value)).parameters
    needed = [name for name, field in fields.items() if field.default is field.empty]
    blank = type(value)(*(getattr(value, name) for name in needed))
    bare = needed if isinstance(value, tuple) else []
    return [
        ("" if name in bare else f"{name}=", getattr(value, name))
        for name in fields
        if name in needed or getattr(value, name) != getattr(blank, name)
    ]
