"""Pairs of texts, with a score of how alike they are or without."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liar_ext.data.documents import JSON_LINES, checked, read_text
from liar_ext.errors import InputError


@dataclass(frozen=True)
class Pairs:
    """Texts that belong together, by their places.

    Parameters
    ----------
    first, second : list of str
        The texts.
    scores : list of float or None
        How alike those of each pair are, where the file says so.
    """

    first: list[str]
    second: list[str]
    scores: list[float] | None


def read_pairs(path: str) -> Pairs:
    """Return the pairs of a file: a line for each, of two texts and, in all or none, a score.

    In a ``.jsonl`` file a line is an array of these, or an object whose values are these, by any
    names. In any other they are separated by tabs.

    Raises
    ------
    InputError
        If there is no such file, a line is anything else, or there is nothing to compare.
    """
    place = Path(path)
    if not place.is_file():
        raise InputError(f"pairs: {path} is no file; give one with two texts in each line")
    read = _of_json if place.suffix in JSON_LINES else _of_columns
    lines = enumerate(read_text(place).split("\n"), start=1)
    rows = [read(line, f"{path} line {number}") for number, line in lines if line.strip()]
    if len({len(row) for row in rows}) > 1:
        raise InputError(f"pairs: {path} has lines with a score and without; give all one, or none")
    if len(rows) < 2:
        raise InputError(f"pairs: {path} must have at least two pairs, got {len(rows)}")
    first, second, *scores = map(list, zip(*rows, strict=True))
    if scores and len(set(scores[0])) < 2:
        raise InputError(f"pairs: all scores of {path} are {scores[0][0]}; give different ones")
    if not scores and len(set(second)) < 2:
        raise InputError(f"pairs: all second texts of {path} are the same; give different ones")
    return Pairs(first, second, scores[0] if scores else None)


def _of_columns(line: str, place: str) -> tuple:
    first, *rest = line.rstrip("\r").split("\t")
    try:
        return _row([first, *rest[:1], *map(float, rest[1:])], place)
    except ValueError:
        raise _wrong(place) from None


def _of_json(line: str, place: str) -> tuple:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise _wrong(place) from None
    value = list(value.values()) if isinstance(value, dict) else value
    return _row(value if isinstance(value, list) else [], place)


def _row(values: list[Any], place: str) -> tuple:
    """Return two texts, and the score if there is one."""
    texts = [each for each in values if isinstance(each, str) and each.strip()]
    scores = [each for each in values if type(each) in (int, float) and math.isfinite(each)]
    if len(texts) != 2 or len(scores) > 1 or len(texts) + len(scores) < len(values):
        raise _wrong(place)
    return (*(checked(text, place) for text in texts), *map(float, scores))


def _wrong(place: str) -> InputError:
    return InputError(
        f"pairs: {place} must have two texts, and a number if they have a score: separated by "
        'tabs, or in a .jsonl file as ["text", "text", 0.5]'
    )
