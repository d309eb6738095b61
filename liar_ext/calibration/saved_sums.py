"""Calibration that goes on where a process that has ended was: its sums so far, as a bank.

The bank in a checkpoint has the moments over the first batches, the digest of these, and their
number. Sums are added batch by batch in float64, so that those that were saved and read back, and
go on, are the same to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liar_ext.calibration.bank_file import Stored, read_bank, write_bank
from liar_ext.errors import InputError
from liar_ext.saved.progress import Progress

SUMS, SUFFIX = "calibration", ".bank"


class SavedSums:
    """The sums of one pass over the calibration text, in a checkpoint.

    Parameters
    ----------
    progress : Progress
        The checkpoint.
    name : str
        Of the sums.
    of : int, optional
        How many batches there are.
    """

    def __init__(self, progress: Progress, name: str = SUMS, of: int | None = None) -> None:
        self.progress, self.name, self.of = progress, name, of
        self.path = progress.folder / f"{name}{SUFFIX}"
        self.done, self.expected = 0, ""  # batches, and their digest
        self.facts: dict[str, Any] = {}  # of the bank
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
        if batches == self._at or not (now or self.progress.due(self.name)):
            return
        sums = {name: (each.gram, each.total, each.count) for name, each in moments.items()}
        of = {} if self.of is None else {"batches": self.of}
        with self.progress.saving(self.name):
            write_bank(self.path, Stored(facts() | {"progress": batches} | of, sums))
        self._at = batches


def saved_batches(folder: str | os.PathLike[str]) -> int:
    """Return over how many batches the sums in a checkpoint are; 0 where there are none."""
    path = Path(folder) / f"{SUMS}{SUFFIX}"
    return read_bank(path, sums=False).source.get("progress", 0) if path.exists() else 0
