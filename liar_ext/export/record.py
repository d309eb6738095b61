"""The record of its exports that a pruned folder keeps, ``liar/exports.json``.

::

    {"version": 1, "exports": [{"format": "gguf", "path": "../pruned.gguf", "bytes": 1234,
                                "sha256": "...", "options": {"quantize": "q8_0"}}]}

Paths are relative to the folder, so that both may move together; ``sha256`` is null for a folder,
which has a manifest of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.inspection import read_config, read_json
from liar_ext.checkpoint.manifest import add_to_manifest, digest
from liar_ext.checkpoint.names import EXPORTS_FILE
from liar_ext.errors import InputError, one_line
from liar_ext.export.formats import Exported

RECORD_VERSION = 1


def read_record(folder: Path) -> list[dict[str, Any]]:
    """Return the exports that a folder claims; none where it has no record.

    Raises
    ------
    InputError
        If the record can't be read, or names what is no file and no folder.
    """
    path = folder / EXPORTS_FILE
    if not os.path.lexists(path):
        return []
    fields = read_json(path, "export")
    entries = fields.get("exports")
    if fields.get("version") != RECORD_VERSION or not isinstance(entries, list):
        raise InputError(f"export: {path} is no record of this version; remove it")
    for entry in entries:
        said = entry if isinstance(entry, dict) else {}
        if not all(isinstance(said.get(name), str) for name in ("format", "path")):
            raise InputError(f"export: {path} has an entry without format or path; remove it")
        if "\0" in said["path"] or any(map(_is_special, _exported(folder / said["path"]))):
            raise InputError(
                f"export: {path} names {said['path'][:80]!r}, which is no file and no folder; "
                "remove that entry"
            )
    return entries


def _exported(path: Path) -> list[Path]:
    """Return what is opened of an export: the file, or the folder and the graph in it."""
    return [path, *(path / "onnx").glob("*")]


def _is_special(path: Path) -> bool:
    """Tell whether opening a path may wait for ever, as a pipe does."""
    return path.exists() and not (path.is_file() or path.is_dir())


def write_record(folder: Path, done: Exported, options: Mapping[str, Any]) -> list[str]:
    """Add an export to the record of a pruned folder; return what the user should know of it."""
    if "liar" not in read_config(folder, "export"):
        return []
    path = folder / EXPORTS_FILE
    try:
        lock = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            _add(folder, path, done, options)
        finally:
            os.close(lock)
    except (OSError, InputError) as error:  # the export itself is done
        return [f"The folder keeps no record of it: {one_line(error)}."]
    return []


def _add(folder: Path, path: Path, done: Exported, options: Mapping[str, Any]) -> None:
    if path.parent.is_symlink():
        raise InputError(f"{path.parent} is a link")
    entries = {entry["path"]: entry for entry in read_record(folder)}
    for each in done.paths:
        name = Path(os.path.relpath(each, folder)).as_posix()
        size = done.bytes if len(done.paths) == 1 else each.stat().st_size
        entries[name] = {
            "format": done.format,
            "path": name,
            "bytes": size,
            "sha256": digest(each),
            "options": dict(options),
        }
    path.parent.mkdir(exist_ok=True)
    text = {"version": RECORD_VERSION, "exports": list(entries.values())}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(text, indent=1, default=str) + "\n", encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    add_to_manifest(folder, EXPORTS_FILE)
