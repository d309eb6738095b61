"""Calibration that goes on where a process that has ended was: its sums so far, as a bank.

A checkpoint is a folder with ``calibration.bank``: the moments over the first batches, the digest
of these, and their number. Sums are added batch by batch in float64, so that those that were saved
and read back, and go on, are the same to the last bit.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liar_ext.calibration.bank_file import Stored, read_bank, write_bank
from liar_ext.errors import InputError, one_line

BANK_FILE, LOCK_FILE = "calibration.bank", ".lock"
SHARE = 0.05  # of the time that saving may take


class Progress:
    """The checkpoint of one calibration.

    Parameters
    ----------
    folder : path
        It is made if it isn't there; one process at a time works in it.
    clock : callable
        Seconds.

    Raises
    ------
    InputError
        If no files can be written there, or another process does.
    """

    def __init__(
        self, folder: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.clock = Path(folder), clock
        self.path = self.folder / BANK_FILE
        self.done, self.expected = 0, ""  # batches, and their digest
        self.facts: dict[str, Any] = {}  # of the bank
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK_FILE, "w")  # noqa: SIM115  (held as long as this)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"checkpoint: another process works in {self.folder}; wait for it, or name another "
                "folder"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"checkpoint: can't write into {os.fspath(folder)!r}: {one_line(error)}; name "
                "another folder"
            ) from error
        self._saved, self._took = clock(), 0.0  # when, and how long it took
        self._at = 0  # over how many batches the sums were

    def restore(self, moments: Mapping[str, Any], facts: Mapping[str, Any]) -> int:
        """Put the sums that were saved into ``moments``; return over how many batches they are.

        Raises
        ------
        InputError
            If they are of another model, by its ``facts``, or of other sites, or damaged.
        """
        if not self.path.exists():
            return 0
        stored = read_bank(self.path)
        theirs = {name: sums[0].shape for name, sums in stored.sums.items()}
        same = all(stored.source.get(name) == value for name, value in facts.items())
        if not same or theirs != {name: each.gram.shape for name, each in moments.items()}:
            raise InputError(
                f"checkpoint: {self.path} is of another model, or of other sites; name another "
                "folder, or remove that file"
            )
        for name, sums in stored.sums.items():
            mine = moments[name]
            for into, value in zip((mine.gram, mine.total, mine.count), sums, strict=True):
                into.copy_(value)
        self.facts = stored.source
        self.done = stored.source.get("progress", 0)
        self.expected = (stored.source.get("data") or [""])[-1]
        return self.done

    def check(self, batches: int, digest: str) -> None:
        """Raise InputError unless the first batches are those that the sums are over."""
        if batches != self.done or digest != self.expected:
            raise InputError(
                f"checkpoint: the sums in {self.path} are over {self.done} batches of other text "
                "than was given; give the same text, or remove that file"
            )

    def save(
        self,
        batches: int,
        moments: Mapping[str, Any],
        facts: Callable[[], dict[str, Any]],
        *,
        now: bool = False,
    ) -> None:
        """Save the sums over so many batches, if it is time to: it takes a twentieth at most."""
        start = self.clock()
        due = start - self._saved >= self._took / SHARE
        if batches == self._at or not (now or due):
            return
        sums = {name: (each.gram, each.total, each.count) for name, each in moments.items()}
        write_bank(self.path, Stored(facts() | {"progress": batches}, sums))
        self._saved = self.clock()
        self._took, self._at = self._saved - start, batches

    def close(self) -> None:
        """Let other processes work in the folder."""
        self._lock.close()


def saved_batches(folder: str | os.PathLike[str]) -> int:
    """Return over how many batches the sums in a checkpoint are; 0 where there are none."""
    path = Path(folder) / BANK_FILE
    return read_bank(path, sums=False).source.get("progress", 0) if path.exists() else 0
