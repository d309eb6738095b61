"""The moments of all sites, and their file: safetensors, a Gram as its packed lower triangle.

Per site ``NAME.gram`` ``(2, d (d + 1) / 2)``, ``NAME.total`` ``(2, d)`` and ``NAME.count``
``(2, 2)``. ``sequences/digest`` ``(S,)`` int64 has a digest of each sequence,
``documents/digest`` one of each document that they were drawn of. Of the text, S sequences in B
batches::

    text/batches          (B, 3) int32     sequences, tokens, and whether there is a mask
    text/input_ids        (Σ,)   int32     all tokens, batch after batch
    text/attention_mask   (Σ,)   uint8     of the batches that have one
    text/fold             (S,)   uint8
    text/source           (S,)   int32     which text each is of; left out where none is said

All of these may be missing. ``file/digest``, 16 bytes at the end of the file, is the BLAKE2b digest
of all before it. Metadata: ``liar_bank``, the version of this layout, and ``source``, JSON.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from liar_ext.calibration.bank_source import Text, check_source, combine, pack, renumbered, unpack
from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.moments import Moments, all_finite
from liar_ext.system.atomic_write import SEAL, Held, is_sealed, write_tensors
from liar_ext.system.environment import available_memory
from liar_ext.system.errors import InputError, refusing

BANK_VERSION = 2
PARTS = ("gram", "total", "count")
SEQUENCES, DOCUMENTS = "sequences/digest", "documents/digest"
TEXT = {
    "text/batches": "I32",
    "text/input_ids": "I32",
    "text/attention_mask": "U8",
    "text/fold": "U8",
    "text/source": "I32",
}
EXTRAS = {SEQUENCES: "I64", DOCUMENTS: "I64", SEAL: "U8", **TEXT}
Header = dict[str, tuple[str, list[int]]]  # dtype and shape by name


@dataclass(eq=False)  # equal if the moments are, as of any other mapping
class MomentBank(Mapping[str, Moments]):
    """The moments of every site of a model by site name, and where they come from.

    Parameters
    ----------
    moments : dict of str to Moments
        By site name such as ``"3.mlp"``.
    source : dict
        JSON-ready facts on the calibration: ``model_type``, ``sequences``, ``tokens``, and more,
        see :mod:`liar_ext.calibration.bank_source`.
    text : list of dict, optional
        The batches that the model was run over: ``input_ids`` and their like. Sensitivities,
        gradients and layerwise walks run over them; all else needs the moments alone.
    sequences, documents : Tensor, optional
        int64 digests of the sequences, and of the documents that they were drawn of.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    source: dict[str, object] = field(default_factory=dict)
    text: Text | None = None
    sequences: Tensor | None = None
    documents: Tensor | None = None

    def __getitem__(self, name: str) -> Moments:
        return self.moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)

    def merge(self, other: MomentBank) -> None:
        """Add another bank of the same model on other text, site by site.

        Counts add up exactly, and sums in float64: ``A + B`` and ``B + A`` are the same bits, other
        groupings differ by rounding. Text is kept where both have it, and measured sensitivities
        are dropped.

        Raises
        ------
        InputError
            If the banks hold different sites, are of different models, dtypes or tokenizers, or
            have text in common; nothing is added then.
        """
        same = isinstance(other, MomentBank) and self.moments.keys() == other.moments.keys()
        if not same or any(self[name].d_in != other[name].d_in for name in self):
            raise InputError("MomentBank.merge: both banks must hold the same sites of one model")
        if other is self:
            raise InputError(
                "MomentBank.merge: both banks hold sums over the same text, being one; calibrate "
                "on other text"
            )
        source, text = combine(self.source, other.source, (self.sequences, other.sequences)), None
        if self.text is not None and other.text is not None:
            text = [b for bank in (self, other) for b in renumbered(bank.text, bank.source, source)]
        for name, moments in self.moments.items():
            moments.merge(other[name])
        self.source, self.text = source, text
        for name in ("sequences", "documents"):
            both = getattr(self, name), getattr(other, name)
            setattr(self, name, None if any(x is None for x in both) else torch.cat(both))
        if self.documents is not None:
            self.documents = self.documents.unique()

    def save(
        self, path: str | os.PathLike[str], take: Callable[[str, Path], None] | None = None
    ) -> None:
        """Write the bank as one safetensors file, see :mod:`liar_ext.calibration.bank`.

        The file is there whole or not at all. ``take`` moves it to its place, by default over one
        that is there. It holds the calibration text as token ids, if the bank does.
        """
        extras = {SEQUENCES: self.sequences, DOCUMENTS: self.documents}
        extras |= {} if self.text is None else pack(self.text)
        tensors: dict[str, Tensor | Held] = {}
        for name, sums in self.moments.items():
            own = Triangles(sums.gram), sums.total, sums.count
            tensors |= {f"{name}.{part}": each for part, each in zip(PARTS, own, strict=True)}
        tensors |= {name: value for name, value in extras.items() if value is not None}
        source = json.dumps(self.source, allow_nan=False)
        hint = "nothing was left behind, free space or name another file"
        with refusing(f"MomentBank.save: can't write {os.fspath(path)!r}", hint, OSError):
            write_tensors(path, tensors, {"liar_bank": str(BANK_VERSION), "source": source}, take)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sums: bool = True) -> MomentBank:
        """Read a bank that :meth:`save` wrote; without ``sums`` the facts alone, in no time.

        The header, with the memory that it asks for, is checked before anything is read, then the
        digest of the file, then the numbers.

        Raises
        ------
        InputError
            If the file is not a moment bank of this version, or is damaged, or holds what no
            calibration gives, or memory can't hold it.
        """
        failure = f"MomentBank.load: {path} is not a moment bank of this version, or is damaged"
        hint, kinds = "calibrate again and save that bank", (OSError, ValueError, SafetensorError)
        with refusing(failure, hint, *kinds):
            try:
                mode = os.stat(path).st_mode
            except FileNotFoundError:
                raise InputError(
                    f"MomentBank.load: there is no file {os.fspath(path)!r}; liar calibrate MODEL "
                    "--calibration TEXT --out FILE makes one"
                ) from None
            if not stat.S_ISREG(mode):
                raise ValueError("it must be an ordinary file")
            with safe_open(os.fspath(path), framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                header = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
                bank = cls(source=_source(file.metadata() or {}))
                extras = _extras(header)
                widths = _widths({name: header[name] for name in header.keys() - extras})
                more = sum(12 * prod(header[name][1]) for name in extras)  # as int64, and before
                _check_memory(path, list(widths.values()) if sums else [], more)
                if sums and not is_sealed(path):
                    raise ValueError("its bytes are not those that were written")
                tensors = {name: file.get_tensor(name) for name in extras}
                bank.sequences, bank.documents = tensors.get(SEQUENCES), tensors.get(DOCUMENTS)
                count = bank.source.get("sequences", 0)
                if bank.sequences is not None and bank.sequences.shape != (count,):
                    raise ValueError(f"{SEQUENCES} must be of {count} sequences")
                if "text/fold" in tensors:
                    bank.text = unpack(tensors, count)
                if sums:
                    bank.moments = {name: _sums(file, name, d) for name, d in widths.items()}
                return bank


class Triangles:
    """The lower triangles of a Gram matrix per fold, packed when they are asked for."""

    def __init__(self, gram: Tensor) -> None:
        d = gram.shape[-1]
        self.gram, self.dtype, self.shape = gram, gram.dtype, (FOLDS, d * (d + 1) // 2)

    def get(self) -> Tensor:
        """Return them, ``(2, d (d + 1) / 2)``."""
        below = torch.ones(self.gram.shape[1:], dtype=torch.bool).tril_()
        found = torch.empty(self.shape, dtype=self.dtype)
        for fold, gram in enumerate(self.gram):  # a triangle at a time
            found[fold] = gram.detach().cpu()[below]
        return found


def unpacked(triangles: Tensor, d: int) -> Tensor:
    """Return the Gram matrices ``(2, d, d)`` of packed triangles, with zeros above."""
    gram = triangles.new_zeros(FOLDS, d, d)
    gram[:, torch.ones(d, d, dtype=torch.bool).tril_()] = triangles
    return gram


def _source(metadata: Mapping[str, str]) -> dict[str, Any]:
    version = metadata.get("liar_bank")
    if version != str(BANK_VERSION):
        raise ValueError(f"liar_bank must be {BANK_VERSION}, got {version}")
    try:
        source = json.loads(metadata["source"])
        check_source(source)
    except (KeyError, ValueError, RecursionError) as error:
        why = f"{error}" if isinstance(error, InputError) else "it is none"
        raise ValueError(f"source must be a JSON object of facts: {why}") from None
    return source


def _extras(header: Header) -> list[str]:
    names = [name for name in header if "/" in name]
    for name in names:
        if name not in EXTRAS:
            raise ValueError("each site must have gram, total and count, and nothing else")
        dtype, shape = header[name]
        if dtype != EXTRAS[name] or len(shape) > 2:
            raise ValueError(f"{name} must be {EXTRAS[name]}, got {dtype}")
    if SEAL not in names:
        raise ValueError(f"it has no {SEAL}")
    text = set(names) & TEXT.keys()
    if text and not text >= TEXT.keys() - {"text/source"}:
        raise ValueError("of the text some is missing")
    return names


def _widths(header: Header) -> dict[str, int]:
    names = sorted({key.rpartition(".")[0] for key in header})
    if header.keys() != {f"{name}.{part}" for name in names for part in PARTS}:
        raise ValueError("each site must have gram, total and count, and nothing else")
    widths = {}
    for name in names:
        dtypes, shapes = zip(*(header[f"{name}.{part}"] for part in PARTS), strict=True)
        d = (shapes[1] or [0])[-1]
        wanted = ([FOLDS, d * (d + 1) // 2], [FOLDS, d], [FOLDS, 2])
        if shapes != wanted or d < 1:
            raise ValueError(f"gram, total, count of {name} must be {wanted}, got {shapes}")
        if dtypes not in (("F64",) * 3, ("F32", "F32", "F64")):
            raise ValueError(f"sums of {name} must be F64, or F32, got {dtypes}")
        widths[name] = d
    return widths


def _check_memory(path: str | os.PathLike[str], widths: list[int], more: int) -> None:
    """Refuse sums that the memory can't hold: squares of triangles, and one triangle more."""
    needed = more + sum(8 * FOLDS * d * d for d in widths)
    needed += max((4 * FOLDS * d * (d + 1) for d in widths), default=0)
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"MomentBank.load: the sums in {path} take {needed / 2**30:.3g} GiB of memory, and "
            f"{free / 2**30:.3g} are free; free some, or use a machine that has them"
        )


def _sums(file: safe_open, name: str, d: int) -> Moments:
    packed, total, count = (file.get_tensor(f"{name}.{part}") for part in PARTS)
    gram = unpacked(packed, d)
    finite = all(all_finite(part) for part in (packed, total, count))
    if not finite or (gram.diagonal(dim1=1, dim2=2) < 0).any() or (count < 0).any():
        raise ValueError(f"sums of {name} must be finite, sums of squares and counts not < 0")
    return Moments(gram, total, count)
