"""Stub."""

from __future__ import annotations

from pathlib import Path

from liar_ext.errors import InputError
from liar_ext.export.formats import Exported


def export(folder: Path, out: Path, *, progress: bool = True) -> Exported:
    """Refuse: not written yet."""
    raise InputError("export: --to vllm isn't written yet; use another format")
