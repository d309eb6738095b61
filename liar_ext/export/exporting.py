"""Write an export beside its folder, whole or not at all, and record it in a pruned folder."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from liar_ext.checkpoint.folder import (
    EXPORTS_FILE,
    MARKER_FILE,
    add_to_manifest,
    digest,
    strangers,
    write_manifest,
)
from liar_ext.checkpoint.inspection import inspect_folder, read_config
from liar_ext.checkpoint.placing import (
    NO_PATH,
    beside,
    check_outside,
    clean_leftovers,
    put_in_place,
    rename_to_nothing,
)
from liar_ext.export import FORMATS, Exported, Format
from liar_ext.system.errors import InputError, install, one_line, refusing
from liar_ext.system.files import atomic_write, begins_with, read_json
from liar_ext.system.progress import no_bars


def export(
    folder: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Exported:
    """Write a model folder in another format.

    Parameters
    ----------
    folder : path
        A model folder, pruned or not.
    to : str
        A name of :data:`FORMATS`.
    out : path, optional
        What to write; by default beside the folder, by its name: ``pruned.gguf`` for ``pruned``.
    overwrite : bool
        Replace a file that is there, or a folder that an export wrote and nobody has changed since.
    progress : bool
        Show progress bars.
    **options
        Those of the format.

    Returns
    -------
    Exported
        What was written, with notes on how to load it.

    Raises
    ------
    InputError
        If the folder can't be read, the format can't express it, a package is missing, the output
        exists or can't be written, or there is no such format or option.
    """
    row, run = _exporter(to, options)
    folder = _model_folder(folder)
    if row.suffix is None:
        if out is not None:
            raise InputError(f"export: --to {to} writes nothing, got an output {out}; leave it out")
        return Exported(to, notes=tuple(run(folder, folder, **options)))

    with refusing(f"export: can't write {out!r}", "", *NO_PATH):
        target = folder.with_name(folder.name + row.suffix) if out is None else Path(out)
        if target.name in ("", ".."):
            target = target.resolve()
        target = target.parent.resolve() / target.name  # a link is not followed: it is in the way
    _check_target(target, folder.resolve(), overwrite)
    hint = "nothing was left behind, free space or choose another output"
    with refusing(f"export: can't write {target}", hint, OSError, SafetensorError):
        clean_leftovers(target)
        with beside(target) as room, nullcontext() if progress else no_bars():
            made = room / target.name
            notes = run(folder, made, **options)
            _put(made, target, overwrite)
    notes = tuple(note.replace(str(made), str(target)) for note in notes)
    done = Exported(to, (target,), notes, _size(target))
    return replace(done, notes=(*notes, *_write_record(folder.resolve(), done, options)))


def _exporter(to: str, options: Mapping[str, Any]) -> tuple[Format, Callable[..., list[str]]]:
    """Return a row of the table and its function; refuse what can't be called."""
    if to not in FORMATS:
        raise InputError(f"export: to must be one of {', '.join(FORMATS)}, got {to!r}")
    row = FORMATS[to]
    for package in row.packages:
        what = f"export: --to {to} needs the package {package}"
        with refusing(what, install(row.extra), Exception):
            import_module(package)
    run = import_module(row.module).export
    known = [p.name for p in inspect.signature(run).parameters.values() if p.kind == p.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        has = ", ".join(known) or "none"
        raise InputError(f"export: --to {to} has no option {unknown[0]}; it has {has}")
    return row, run


def _model_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a model folder, looked over."""
    with refusing(f"export: {os.fspath(folder)!r} can't be read", "", *NO_PATH):
        path = Path(os.path.abspath(folder))  # the name of a link is that of its export
        if path.is_file():
            raise InputError(f"export: {folder} is a file; give a model folder")
    inspect_folder(path, "export")
    return path


def _check_target(target: Path, folder: Path, overwrite: bool) -> None:
    """Refuse an output that is in the way of something."""
    wrong = ""
    if target == folder or folder in target.parents:
        wrong = "lies in the folder that is exported; choose an output outside"
    elif target in folder.parents:
        wrong = "holds the folder that is exported; choose another"
    elif os.path.lexists(target):
        if not overwrite:
            wrong = "exists; choose another output or overwrite it"
        elif target.is_symlink() or not (target.is_file() or target.is_dir()):
            wrong = "is no ordinary file or folder; choose another output"
        elif target.is_file() and not begins_with("GGUF", target):
            wrong = "is a file that no export wrote; choose another output"
        elif target.is_dir() and (others := strangers(target)):
            wrong = (
                f"holds {others[0]}, which no export wrote or which was changed since, so it isn't "
                "overwritten; choose another output"
            )
    if wrong:
        raise InputError(f"export: {target} {wrong}")
    check_outside(target, "export")


def _put(made: Path, target: Path, overwrite: bool) -> None:
    """Let what was made take its place."""
    if target.exists() and made.is_dir() != target.is_dir():
        there = "folder" if target.is_dir() else "file"
        raise InputError(f"export: {target} is a {there}, and the output isn't; choose another")
    if made.is_dir():
        write_manifest(made)
        (made / MARKER_FILE).touch()
        put_in_place(made, target, overwrite)
    elif overwrite:
        os.replace(made, target)
    elif not rename_to_nothing(made, target):
        raise InputError(f"export: {target} exists; choose another or overwrite it")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


RECORD_VERSION = 1


def read_record(folder: Path) -> list[dict[str, Any]]:
    """Return the exports that a folder claims; refuse what names no file and no folder."""
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
        at, name = folder / said["path"], said["path"][:80]
        with refusing(f"export: {path} names {name!r}", "remove it", OSError):
            if "\0" in said["path"] or any(map(_is_special, [at, *(at / "onnx").glob("*")])):
                raise InputError(f"export: {path} names {name!r}, no file and no folder; remove it")
    return entries


def _is_special(path: Path) -> bool:
    """Tell whether opening a path may wait for ever, as a pipe does."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _write_record(folder: Path, done: Exported, options: Mapping[str, Any]) -> list[str]:
    """Add an export to the record of a pruned folder; return what the user should know of it."""
    if "liar" not in read_config(folder, "export"):
        return []
    path, out = folder / EXPORTS_FILE, done.paths[0]
    try:
        lock = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.parent.is_symlink():
                raise InputError(f"{path.parent} is a link")
            name = Path(os.path.relpath(out, folder)).as_posix()
            entry = {"format": done.format, "path": name, "bytes": done.bytes}
            entry |= {"sha256": digest(out), "options": dict(options)}
            entries = {each["path"]: each for each in read_record(folder)} | {name: entry}
            path.parent.mkdir(exist_ok=True)
            text = {"version": RECORD_VERSION, "exports": list(entries.values())}
            with atomic_write(path) as file:
                file.write((json.dumps(text, indent=1, default=str) + "\n").encode())
            add_to_manifest(folder, EXPORTS_FILE)
        finally:
            os.close(lock)
    except (OSError, InputError) as error:  # the export itself is done
        return [f"The folder keeps no record of it: {one_line(error)}."]
    return []
