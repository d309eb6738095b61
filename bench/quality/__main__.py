"""Measure, and write after every row."""

from __future__ import annotations

from bench.quality.options import parse
from bench.quality.run import run
from liar_ext import InputError

if __name__ == "__main__":
    try:
        run(parse())
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
