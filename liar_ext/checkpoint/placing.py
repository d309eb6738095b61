"""Check a place, and put a folder there: whole, at once, and without losing what was there.

A folder is written beside its place and takes it by one rename::

    .pruned.1a2b3c4d   written here; locked by its writer; .liar_saving says whose it is
    pruned             takes its place at once: a rename, or an exchange with what was there
    .pruned.1a2b3c4d   what was there, on its way out

A writer that was killed leaves the hidden folder, unlocked, which the next one removes. If the file
system can't exchange two folders, there is a moment with none in place; after a kill in it the next
start moves the old folder back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from torch import nn

from liar_ext.checkpoint.folder import MANIFEST_FILE, MARKER_FILE, strangers
from liar_ext.system.errors import InputError, one_line, refusing
from liar_ext.system.files import made_folders

# Of Linux' <linux/fs.h> and <fcntl.h>.
RENAME_NOREPLACE, RENAME_EXCHANGE, AT_FDCWD = 1, 2, -100
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# Of a name that no file can have, or a link that leads to itself.
NO_PATH = (OSError, ValueError, RuntimeError)
UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
MARK = (
    "liar_ext writes here, or was stopped while it did. The next run that saves to the same place "
    "removes this folder.\n"
)


def check_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a folder that can't be written to, by writing beside it, or holds what isn't ours.

    What a run that was killed has left beside the folder is removed first.
    """
    what = f"save_pruned: can't write {os.fspath(folder)!r}"
    with refusing(what, "choose another folder", *NO_PATH):
        folder = Path(folder).resolve()
        check_outside(folder, "save_pruned")
        clean_leftovers(folder)
        _check_existing(folder, overwrite)
        with beside(folder):
            pass


def check_outside(path: Path, operation: str) -> None:
    """Refuse a place in a saved folder, whose files are those that its manifest lists."""
    above = Path(os.path.realpath(path)).parents
    around = next((each for each in above if (each / MANIFEST_FILE).is_file()), None)
    if around is not None:
        raise InputError(
            f"{operation}: {path} lies in {around}, whose files are listed in its manifest; "
            "choose a place outside"
        )


def check_place(path: Path, operation: str, option: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a place where a file can't be written, or that holds one that isn't ours to replace.

    ``operation`` is the command, and ``option`` the one of its options that names another place.
    """
    other, wrong = f"give another name with {option}", ""
    with refusing(f"{operation}: can't write {path}", other, OSError, ValueError):
        check_outside(path, operation)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            wrong = f"{path} is no ordinary file; "
        elif path.exists() and not is_ours(path):
            wrong = f"{path} exists and liar {operation} didn't write it; remove it, or "
        elif not path.parent.is_dir():
            wrong = f"there is no folder {path.parent} to write into; make it, or "
        elif not os.access(path.parent, os.W_OK):
            wrong = f"{path.parent} may not be written to; "
    if wrong:
        raise InputError(f"{operation}: {wrong}{other}")


def nearest_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder that a path is in, or the nearest one above it that is there."""
    return next(path for path in Path(folder).resolve().parents if path.is_dir())


def warn_of_little_room(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Warn, while nothing is computed yet, of a disk that has less room than a model takes."""
    where, size = nearest_folder(folder), sum(each.nbytes for each in model.parameters())
    free = shutil.disk_usage(where).free
    if free < size:
        warnings.warn(
            f"save_pruned: {where} has {free / 2**30:.3g} GiB free, and the model takes "
            f"{size / 2**30:.3g} now; free some, or what is left of it may not fit",
            stacklevel=2,
        )


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Make a hidden, locked folder beside ``folder``; remove what lies there in the end."""
    # It has its name before it is made, so that an interrupt in between leaves none.
    path, lock = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}"), None
    with made_folders(folder.parent):
        try:
            while lock is None:  # a run that starts now may take the empty folder for a leftover
                lock = _make_locked(path)
            yield path
        finally:
            _remove(path)
            if lock is not None:
                os.close(lock)


def put_in_place(path: Path, folder: Path, overwrite: bool) -> None:
    """Let ``path`` take the place of ``folder``; after that ``path`` is what was there, if any.

    If something came there that may not be replaced, ``path`` gets a name of its own, which the
    error tells, so that no work is lost.
    """
    if rename_to_nothing(path, folder):
        (folder / MARKER_FILE).unlink()
        return
    try:
        while (lock := _wait_for_lock(folder)) is None:  # of a run that replaces the same folder
            pass
        try:
            _check_existing(folder, overwrite)
            (folder / MARKER_FILE).write_text(MARK, encoding="utf-8")
            _exchange(path, folder)
        finally:
            (folder / MARKER_FILE).unlink(missing_ok=True)
            os.close(lock)
    except (InputError, OSError) as error:
        kept = folder.with_name(path.name.removeprefix("."))
        path.rename(kept)
        (kept / MARKER_FILE).unlink()
        raise InputError(
            f"save_pruned: this model is in {kept}; {folder} has changed while this ran, and was "
            f"left alone: {one_line(error).removeprefix('save_pruned: ')}"
        ) from error


def clean_leftovers(folder: Path) -> None:
    """Remove, or move back, what killed runs have left beside a folder; none that is in use."""
    if not folder.parent.is_dir():
        return
    name = re.compile(re.escape(f".{folder.name}.") + r"[0-9a-f]{8}(\.old)?")
    found = [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]
    for path in sorted(found, reverse=True):  # an old folder before the one that was to replace it
        lock = None if path.is_symlink() else _try_lock(path)
        if lock is None:
            continue
        try:
            if not (path / MARKER_FILE).exists():
                with suppress(OSError):  # not empty: not ours
                    path.rmdir()
            elif path.suffix == ".old" and not folder.exists():
                path.rename(folder)
            else:
                _remove(path)
        finally:
            os.close(lock)
    lock = _try_lock(folder) if (folder / MARKER_FILE).is_file() else None
    if lock is not None:
        (folder / MARKER_FILE).unlink(missing_ok=True)
        os.close(lock)


def _check_existing(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not overwrite:
        ours = folder.is_dir() and ((folder / MANIFEST_FILE).is_file() or not any(folder.iterdir()))
        advice = ", or overwrite it (--overwrite)" if ours else ""
        raise InputError(f"save_pruned: {folder} exists; choose another folder{advice}")
    others = strangers(folder) if folder.is_dir() else [folder.name]
    if others:
        raise InputError(
            f"save_pruned: {folder} holds {', '.join(others[:4])}"
            f"{f' and {len(others) - 4} more' if len(others) > 4 else ''}, which save_pruned "
            "didn't write or which was changed since, so it isn't overwritten; move what you need, "
            "or choose another folder"
        )


def _make_locked(path: Path) -> int | None:
    """Make a folder and lock it; return the descriptor of the lock, None if it was taken away."""
    path.mkdir(parents=True)
    with suppress(FileNotFoundError):
        lock = _wait_for_lock(path)
        if lock is not None:
            (path / MARKER_FILE).write_text(MARK, encoding="utf-8")
        return lock
    return None


def _wait_for_lock(path: Path) -> int | None:
    """Return the descriptor of a folder's lock; None if another folder is in its place by then."""
    lock = os.open(path, FOLDER)
    with suppress(OSError):  # a file system may have no locks; no run removes what it can't lock
        fcntl.flock(lock, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
    os.close(lock)
    return None


def _try_lock(path: Path) -> int | None:
    """Return the descriptor of a folder's lock; None if another run holds it, or nobody can."""
    with suppress(OSError):
        lock = os.open(path, FOLDER)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            os.close(lock)
    return None


def _remove(path: Path, again: bool = True) -> None:
    """Remove a folder, also if an interrupt comes; until it is empty its mark allows that."""
    try:
        with suppress(OSError):
            if path.is_dir():
                (path / MARKER_FILE).touch()
                for entry in path.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry, ignore_errors=True)
                    elif entry.name != MARKER_FILE:
                        entry.unlink()
                (path / MARKER_FILE).unlink()
                path.rmdir()
    except KeyboardInterrupt:
        if again:
            _remove(path, again=False)
        raise


def rename_to_nothing(path: Path, folder: Path) -> bool:
    """Rename unless there is something already; tell whether it was done."""
    try:
        if not _renameat2(path, folder, RENAME_NOREPLACE):
            if os.path.lexists(folder):
                return False
            path.rename(folder)
        return True
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise


def _exchange(path: Path, folder: Path) -> None:
    """Exchange two folders: at once, or in three renames where the file system can't."""
    if _renameat2(path, folder, RENAME_EXCHANGE):
        return
    old = path.with_name(path.name + ".old")
    try:
        folder.rename(old)
        path.rename(folder)
        old.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path if folder.exists() else folder)
        raise


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Call Linux' renameat2; False if system or file system don't have it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = os.fsencode(source), os.fsencode(target)
    if function is None:
        return False
    if function(AT_FDCWD, paths[0], AT_FDCWD, paths[1], ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNABLE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(target))
