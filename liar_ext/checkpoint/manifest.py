"""What of a folder was written by ``save_pruned``: only that may be replaced.

``liar/manifest.json`` lists every file with its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath

from liar_ext.checkpoint.names import MANIFEST_FILE, MARKER_FILE

MANIFEST_VERSION = 1
BLOCK = 1 << 20


def write_manifest(folder: Path) -> None:
    """List every file below a folder, with its digest, in ``liar/manifest.json``."""
    files = {name: digest(folder / name) for name in entries(folder) if name != MARKER_FILE}
    _write(folder / MANIFEST_FILE, files)


def add_to_manifest(folder: Path, name: str) -> None:
    """List one file more, or its new digest; a folder without a readable manifest stays as it is.

    Files that others put there, or changed, stay strangers.
    """
    path = folder / MANIFEST_FILE
    files = _listed(path)
    if files is not None and not path.is_symlink():
        _write(path, {**files, name: digest(folder / name)})


def strangers(folder: Path, *, contents: bool = True) -> list[str]:
    """Return the entries of a folder that ``save_pruned`` didn't write, or not as they are now.

    Parameters
    ----------
    folder : Path
        An existing folder; an empty one holds no strangers.
    contents : bool
        Compare digests, too, and not only names: it reads every file.
    """
    found = [name for name in entries(folder) if name != MARKER_FILE]
    if MANIFEST_FILE not in found:
        return found
    files = _listed(folder / MANIFEST_FILE)
    if files is None:
        return [MANIFEST_FILE]
    return [
        name
        for name in found
        if name != MANIFEST_FILE
        and not (name in files and (not contents or digest(folder / name) == files[name]))
    ]


def entries(folder: Path) -> list[str]:
    """Return what is no directory below a folder, and the empty directories, relative to it."""
    found = []
    for path in sorted(folder.iterdir()):
        inner = entries(path) if path.is_dir() and not path.is_symlink() else []
        name = path.name
        found += [str(PurePosixPath(name, each)) for each in inner] or [name]
    return found


def digest(path: Path) -> str | None:
    """Return the SHA-256 of an ordinary file; None of anything else, a link for one."""
    if path.is_symlink() or not path.is_file():
        return None
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            value.update(block)
    return value.hexdigest()


def _listed(path: Path) -> dict[str, str] | None:
    """Return the digests by name; None if the manifest can't be read."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return dict(files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, files: dict[str, str | None]) -> None:
    """Write the manifest beside its place and rename it: a killed run leaves the one that was."""
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1) + "\n"
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
