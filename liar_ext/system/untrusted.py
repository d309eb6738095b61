"""Read JSON that a stranger may have written: text is printable and bounded, numbers are finite.

What is no value of its kind is None or empty.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liar_ext.system.errors import InputError, printable, refusing

MOST_BYTES = 64 << 20  # a report of 10⁵ sites takes some 40 MB, an index of 10⁵ tensors less
MOST_TEXT = 400  # characters of one value
MOST_NAMED = 200  # names of one object
LARGEST = 2**53  # of a count: what a double says exactly
UNREADABLE = (OSError, ValueError, RecursionError)  # what a damaged JSON file raises


def read_object(path: Path, operation: str) -> tuple[dict[str, Any], str]:
    """Return the object of a JSON file, and the SHA-256 of the file; InputError if it is none."""
    if not os.path.lexists(path):
        raise InputError(f"{operation}: there is no file {path}")
    with refusing(f"{operation}: {path} can't be read", "copy it again", *UNREADABLE):
        value, data = read_value(path)
        if not isinstance(value, dict):
            raise ValueError(f"it is a {type(value).__name__} and no object")
    return value, hashlib.sha256(data).hexdigest()


def read_value(path: Path) -> tuple[Any, bytes]:
    """Return the value of a JSON file, and its bytes; raises one of ``UNREADABLE``."""
    if not path.is_file():
        raise ValueError("it is no ordinary file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes, which is too many")
    return json.loads(data.decode("utf-8")), data


def text(value: Any, most: int = MOST_TEXT) -> str:
    """Return a value as printable text of bounded length; "" of None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        flat = len(value) <= most and not any(isinstance(each, list | dict) for each in value)
        value = ", ".join(map(str, value)) if flat else f"{len(value):,} entries"
    said = str(value)[: most + 1] if not isinstance(value, int) or abs(value) < LARGEST else "?"
    said = printable(said)
    return said if len(said) <= most else said[:most] + "…"


def number(value: Any) -> float | None:
    """Return a finite number as it is, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: Any) -> int | None:
    """Return an integer of at least 0, or None."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return value if number and 0 <= value < LARGEST else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return an object, or an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """Return a list, or an empty one."""
    return value if isinstance(value, list) else []


def named(value: Any) -> dict[str, Any]:
    """Return the names and values of an object: numbers as they are, all else as text."""
    return {
        text(key, 60): each if isinstance(each, bool) or number(each) is not None else text(each)
        for key, each in list(mapping(value).items())[:MOST_NAMED]
    }


def record(value: Any, **read: Callable[[Any], Any]) -> dict[str, Any] | None:
    """Return the named fields of an object, each as read by its function; None if one is wrong."""
    found = {name: each(mapping(value).get(name)) for name, each in read.items()}
    return None if None in found.values() else found
