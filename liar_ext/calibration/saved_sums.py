"""Calibration that goes on where a process that has ended was: its sums so far, as a bank.

The bank in a checkpoint has the moments over the first batches, the digest of these, and their
number. Sums are added batch by batch in float64, so that those that were saved and read back, and
go on, are the same to the last bit. Of several ranks the first one reads and writes the sums of
all, added up, so that any number of them can go on: to the same sums but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liar_ext.calibration.bank_file import Stored, read_bank, write_bank
from liar_ext.calibration.moments import Moments
from liar_ext.distributed import broadcast, is_first
from liar_ext.errors import InputError
from liar_ext.saved.progress import Progress

SUMS, SUFFIX = "calibration", ".bank"


class SavedSums:
    """The sums of one pass over the calibration text, in a checkpoint.

    Parameters
    ----------
    progress : Progress
        The checkpoint. All ranks take part in each method.
    name : str
        Of the sums.
    of : int, optional
        How many batches there are.
    """

    def __init__(self, progress: Progress, name: str = SUMS, of: int | None = None) -> None:
        self.progress, self.name, self.of = progress, name, of
        self.done, self.expected = 0, ""  # batches, and their digest
        self.facts: dict[str, Any] = {}  # of the bank
        self._at = 0  # over how many batches the sums were

    @property
    def path(self) -> Path:
        """The file, which the first rank alone reads and writes."""
        return self.progress.folder / f"{self.name}{SUFFIX}"

    def restore(
        self, widths: Mapping[str, int], moments: Mapping[str, Moments], facts: Mapping[str, Any]
    ) -> int:
        """Put the sums that were saved into ``moments``; return over how many batches they are.

        The first rank has them, and the others begin with none.

        Parameters
        ----------
        widths : mapping of str to int
            Features of each site.
        moments : mapping of str to Moments
            Sums over no tokens, by site.
        facts : mapping
            What tells the model from another.

        Raises
        ------
        InputError
            If they are of another model, by its ``facts``, or of other sites, or damaged.
        """
        stored = self._read(widths, facts) if is_first() else None
        self.done = broadcast(self.done)
        for name in widths if stored is not None else ():
            mine, sums = moments[name], stored.sums.pop(name)
            for into, value in zip((mine.gram, mine.total, mine.count), sums, strict=True):
                into.copy_(value)
        return self.done

    def _read(self, widths: Mapping[str, int], facts: Mapping[str, Any]) -> Stored | None:
        if not self.path.exists():
            return None
        stored = read_bank(self.path)
        theirs = {name: sums[1].shape[-1] for name, sums in stored.sums.items()}
        same = all(stored.source.get(name) == value for name, value in facts.items())
        if not same or theirs != dict(widths):
            raise InputError(
                f"checkpoint: {self.path} is of another model, or of other sites; name another "
                "folder, or remove that file"
            )
        self.facts = stored.source
        self.done = stored.source.get("progress", 0)
        self.expected = (stored.source.get("data") or [""])[-1]
        return stored

    def check(self, batches: int, digest: str) -> None:
        """Raise InputError, at the first rank, unless the first batches are those of the sums."""
        if is_first() and (batches != self.done or digest != self.expected):
            raise InputError(
                f"checkpoint: the sums in {self.path} are over {self.done} batches of other text "
                "than was given; give the same text, or remove that file"
            )

    def save(
        self,
        batches: int,
        moments: Callable[[], Mapping[str, Moments]],
        facts: Callable[[], dict[str, Any]],
        *,
        now: bool = False,
    ) -> None:
        """Save the sums over so many batches, if it is time to: it takes a twentieth at most.

        ``moments`` gives those of all sites at the first rank, and ``facts`` what is known of them.
        """
        due = batches != self._at and (now or self.progress.due(self.name))
        if not broadcast(due):
            return
        with self.progress.saving(self.name):
            whole, source = moments(), facts() | {"progress": batches}
            if is_first():
                source |= {} if self.of is None else {"batches": self.of}
                sums = {name: (each.gram, each.total, each.count) for name, each in whole.items()}
                write_bank(self.path, Stored(source, sums))
        self._at = batches
