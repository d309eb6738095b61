"""Write an export beside its folder: whole or not at all, and with a record of it.

The exporter writes into a hidden folder beside the output, which then takes its place by a rename.
A folder that ``save_pruned`` wrote keeps a record of its exports in ``liar/exports.json``; any
other folder stays as it is.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.fingerprint import add_to_manifest, digest, strangers, write_manifest
from liar_ext.checkpoint.inspection import inspect_folder, read_config, read_json
from liar_ext.checkpoint.names import EXPORTS_FILE, MARKER_FILE
from liar_ext.checkpoint.placing import beside, clean_leftovers, put_in_place
from liar_ext.errors import InputError, one_line
from liar_ext.export.formats import FORMATS, Exported, Format


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
    folder = model_folder(folder)
    if row.suffix is None:
        if out is not None:
            raise InputError(f"export: --to {to} writes nothing, got an output {out}; leave it out")
        return run(folder, folder, progress=progress, **options)

    target = _target(folder, out, row.suffix)
    _check_target(target, folder.resolve(), overwrite)
    try:
        clean_leftovers(target)
        with beside(target) as room:
            done = run(folder, room / target.name, progress=progress, **options)
            _put(room / target.name, target, overwrite)
    except OSError as error:
        raise InputError(
            f"export: can't write {target}: {one_line(error)}; nothing was left behind, free space "
            "or choose another output"
        ) from error
    done = replace(done, paths=(target,), bytes=_size(target))
    return replace(done, notes=(*done.notes, *write_record(folder.resolve(), done, options)))


def _exporter(to: str, options: Mapping[str, Any]) -> tuple[Format, Callable[..., Exported]]:
    """Return a row of the table and its function; refuse what can't be called."""
    if to not in FORMATS:
        raise InputError(f"export: to must be one of {', '.join(FORMATS)}, got {to!r}")
    row = FORMATS[to]
    for package in row.packages:
        try:
            import_module(package)
        except Exception as error:  # a broken package raises anything
            raise InputError(
                f"export: --to {to} needs the package {package} ({one_line(error, 160)}); pip "
                f"install '.[{row.extra}]'"
            ) from error
    run = import_module(row.module).export
    known = [
        name
        for name, each in inspect.signature(run).parameters.items()
        if each.kind is each.KEYWORD_ONLY and name != "progress"
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"export: --to {to} has no option {unknown[0]}; {has}")
    return row, run


def model_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a model folder, looked over.

    Raises
    ------
    InputError
        If it isn't one.
    """
    try:
        path = Path(os.path.abspath(folder))  # the name of a link is that of its export
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a loop
        raise InputError(
            f"export: {os.fspath(folder)!r} can't be read: {one_line(error)}"
        ) from error
    if not is_folder:
        what = "is a file" if path.exists() else "doesn't exist"
        raise InputError(f"export: {folder} {what}; give a model folder")
    inspect_folder(path, "export")
    return path


def _target(folder: Path, out: str | os.PathLike[str] | None, suffix: str) -> Path:
    """Return what is to be written: ``out``, or the folder's name with a suffix, beside it."""
    try:
        target = folder.with_name(folder.name + suffix) if out is None else Path(out)
        return target.parent.resolve() / target.name  # a link is not followed: it is in the way
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"export: can't write {out!r}: {one_line(error)}") from error


def _check_target(target: Path, folder: Path, overwrite: bool) -> None:
    """Refuse an output that is in the way of something."""
    if target.name in ("", ".", ".."):
        raise InputError(f"export: {target} is no name for an output; name one with --out")
    if target == folder or folder in target.parents:
        raise InputError(
            f"export: {target} lies in the folder that is exported, whose files are listed in its "
            "manifest; choose an output outside"
        )
    if target in folder.parents:
        raise InputError(f"export: {target} holds the folder that is exported; choose another")
    try:
        exists = os.path.lexists(target)
    except ValueError as error:
        raise InputError(f"export: can't write {str(target)!r}: {error}") from error
    if not exists:
        return
    if not overwrite:
        raise InputError(f"export: {target} exists; choose another output or overwrite it")
    if target.is_symlink() or not (target.is_file() or target.is_dir()):
        raise InputError(f"export: {target} is no ordinary file or folder; choose another output")
    others = strangers(target) if target.is_dir() else []
    if others:
        raise InputError(
            f"export: {target} holds {others[0]}, which no export wrote or which was changed "
            "since, so it isn't overwritten; choose another output"
        )


def _put(made: Path, target: Path, overwrite: bool) -> None:
    """Let what was made take its place."""
    if not made.is_dir():
        if target.is_dir():
            raise InputError(f"export: {target} is a folder, the output a file; choose another")
        if overwrite:
            os.replace(made, target)
            return
        try:  # unlike a rename, a link replaces nothing that has come there meanwhile
            os.link(made, target)
        except FileExistsError:
            raise InputError(f"export: {target} exists; choose another or overwrite it") from None
        except OSError:  # a file system without links
            os.replace(made, target)
        return
    if target.is_file():
        raise InputError(f"export: {target} is a file, the output a folder; choose another")
    write_manifest(made)
    (made / MARKER_FILE).touch()
    put_in_place(made, target, overwrite)


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


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
