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
    text = "    " + _write(family, 1, "    ")
    words = sorted(set(_words(family)))
    return (
        "from liar_ext import register_family\n"
        f"from liar_ext.models.family import {', '.join(words)}\n\n"
        f"register_family(\n{text}\n)\n"
    )


def _words(value: Any) -> Iterator[str]:
    """Yield the classes that a row is made of."""
    if is_dataclass(value) or hasattr(value, "_fields"):
        yield type(value).__name__
        value = [each for _, each in _set(value)]
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, list | tuple) or not isinstance(value, str | int | bool | None):
        for each in value:
            yield from _words(each)


def _set(value: Any) -> list[tuple[str, Any]]:
    """Return the fields of a row that aren't as they are by default."""
    if not is_dataclass(value):
        defaults = value._field_defaults
        pairs = zip(value._fields, value, strict=True)
        return [(name, each) for name, each in pairs if defaults.get(name, MISSING) != each]
    found = []
    for each in fields(value):
        default = each.default
        if each.default_factory is not MISSING:
            default = each.default_factory()
        if getattr(value, each.name) != default:
            found.append((each.name, getattr(value, each.name)))
    return found


def _label(value: Any, name: str) -> str:
    """Return what stands before a field in code; nothing for one of a tuple that must be given."""
    alone = not is_dataclass(value) and name not in value._field_defaults
    return "" if alone else f"{name}="


def _write(value: Any, taken: int, indent: str = "") -> str:
    """Return a value as code: on one line if it fits, beside what the line has already."""
    line = _line(value)
    if len(indent) + taken + len(line) <= WIDTH or isinstance(value, str | int | bool | None):
        return line
    deeper = indent + "    "
    if isinstance(value, Mapping):
        head, tail, items = "{", "}", [(f"{_line(k)}: ", v) for k, v in value.items()]
    elif is_dataclass(value) or hasattr(value, "_fields"):
        head, tail = f"{type(value).__name__}(", ")"
        items = [(_label(value, name), each) for name, each in _set(value)]
    else:
        head, tail, items = "(", ")", [("", each) for each in value]
    body = "".join(
        f"{deeper}{label}{_write(each, len(label) + 1, deeper)},\n" for label, each in items
    )
    return f"{head}\n{body}{indent}{tail}"


def _line(value: Any) -> str:
    """Return a value as code on one line, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # double quotes; newlines are escaped
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_line(k)}: {_line(v)}" for k, v in value.items()) + "}"
    if is_dataclass(value) or hasattr(value, "_fields"):
        inside = ", ".join(f"{_label(value, name)}{_line(each)}" for name, each in _set(value))
        return f"{type(value).__name__}({inside})"
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_line, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)
