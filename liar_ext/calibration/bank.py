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
of all before it. Metadata: ``liar_bank``, the version of this layout, and ``source``, JSON: see
:mod:`liar_ext.calibration.saved_sums`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.saved_sums import (
    PARTS,
    UNSAID,
    Text,
    added,
    check_memory,
    check_source,
    packed,
    restored,
)
from liar_ext.calibration.taps import Moments, all_finite
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.files import SEAL, is_sealed, write_tensors

BANK_VERSION = 2
SEQUENCES, DOCUMENTS = "sequences/digest", "documents/digest"
EXTRAS = {
    **{SEQUENCES: "I64", DOCUMENTS: "I64", SEAL: "U8"},
    **{"text/batches": "I32", "text/input_ids": "I32", "text/attention_mask": "U8"},
    **{"text/fold": "U8", "text/source": "I32"},
}
# What a damaged file raises; shapes of text that contradict one another raise in torch.
UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, RecursionError, SafetensorError)
NAMES = ("input_ids", "attention_mask")
MOST_ID = 2**31 - 1
# Facts that must be the same for sums to add up. The first that differs is named: of two dtypes the
# weights differ, too.
SHARED = ("model_type", "dtype", "model", "config", "tokenizer", "relative")
Source = dict[str, Any]


@dataclass(eq=False)  # equal if the moments are, as of any other mapping
class MomentBank(Mapping[str, Moments]):
    """The moments of every site of a model by site name, and where they come from.

    Parameters
    ----------
    moments : dict of str to Moments
        By site name such as ``"3.mlp"``.
    source : dict
        JSON-ready facts on the calibration: ``model_type``, ``sequences``, ``tokens``, and more,
        see :mod:`liar_ext.calibration.saved_sums`.
    text : list of dict, optional
        The batches that the model was run over: ``input_ids`` and their like. Sensitivities,
        gradients and layerwise walks run over them; all else needs the moments alone.
    sequences, documents : Tensor, optional
        int64 digests of the sequences, and of the documents that they were drawn of.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    source: Source = field(default_factory=dict)
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
        same = self.moments.keys() == other.moments.keys()
        if not same or any(self[name].d_in != other[name].d_in for name in self):
            raise InputError("MomentBank.merge: both banks must hold the same sites of one model")
        source, text = _combined(self, other), None
        if self.text is not None and other.text is not None:
            text = [b for bank in (self, other) for b in _renumbered(bank, source)]
        for name, moments in self.moments.items():
            moments.merge(other[name])
        self.source, self.text = source, text
        for name in ("sequences", "documents"):
            both = getattr(self, name), getattr(other, name)
            setattr(self, name, None if any(x is None for x in both) else torch.cat(both))
        if self.documents is not None:
            self.documents = self.documents.unique()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as one safetensors file, see :mod:`liar_ext.calibration.bank`.

        The file is there whole or not at all, and replaces one of that name. It holds the
        calibration text as token ids, if the bank does.
        """
        extras = {SEQUENCES: self.sequences, DOCUMENTS: self.documents}
        extras |= {} if self.text is None else pack(self.text)
        tensors = {name: value for name, value in extras.items() if value is not None}
        facts = {"liar_bank": str(BANK_VERSION), "source": json.dumps(self.source, allow_nan=False)}
        hint = "nothing was left behind, free space or name another file"
        with refusing(f"MomentBank.save: can't write {os.fspath(path)!r}", hint, OSError):
            write_tensors(path, packed(self.moments) | tensors, facts)

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
        if not os.path.exists(path):
            raise InputError(
                f"MomentBank.load: there is no file {os.fspath(path)!r}; liar calibrate MODEL "
                "--calibration TEXT --out FILE makes one"
            )
        failure = f"MomentBank.load: {path} is not a moment bank of this version, or is damaged"
        with refusing(failure, "calibrate again and save that bank", *UNREADABLE):
            if not os.path.isfile(path):
                raise ValueError("it must be an ordinary file")
            with safe_open(os.fspath(path), framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                header = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
                bank = cls(source=_source(file.metadata() or {}))
                widths, extras = _checked(header)
                needed = sum(12 * prod(header[name][1]) for name in extras)  # as int64, and before
                if sums:  # squares of triangles, and one triangle more
                    needed += sum(8 * FOLDS * d * d for d in widths.values())
                    needed += max((4 * FOLDS * d * (d + 1) for d in widths.values()), default=0)
                check_memory(f"MomentBank.load: {path}", needed)
                if sums and not is_sealed(path):
                    raise ValueError("its bytes are not those that were written")
                tensors = {name: file.get_tensor(name) for name in extras}
                bank.sequences, bank.documents = tensors.get(SEQUENCES), tensors.get(DOCUMENTS)
                count = bank.source.get("sequences", 0)
                if bank.sequences is not None and bank.sequences.shape != (count,):
                    raise ValueError(f"{SEQUENCES} must be of {count} sequences")
                if any(name.startswith("text/") for name in extras):
                    bank.text = unpack(tensors, count)
                if sums:
                    bank.moments = {name: _sums(file, name) for name in widths}
                return bank


def _source(metadata: Mapping[str, str]) -> Source:
    version = metadata.get("liar_bank")
    if version != str(BANK_VERSION):
        raise ValueError(f"liar_bank must be {BANK_VERSION}, got {version}")
    source = json.loads(metadata["source"])
    check_source(source)
    return source


def _checked(header: Mapping[str, tuple[str, list[int]]]) -> tuple[dict[str, int], list[str]]:
    """Return the width of each site by a header of dtypes and shapes, and the names of the rest."""
    extras = [name for name in header if name in EXTRAS]
    if any(header[name][0] != EXTRAS[name] for name in extras):
        raise ValueError(f"{', '.join(extras)} must be {EXTRAS}")
    names = sorted({name.rpartition(".")[0] for name in header.keys() - extras})
    if header.keys() - extras != {f"{name}.{part}" for name in names for part in PARTS}:
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
    return widths, extras


def _sums(file: safe_open, name: str) -> Moments:
    sums = restored(file.get_tensor, name)
    finite = all(map(all_finite, vars(sums).values()))
    if not finite or (sums.gram.diagonal(dim1=1, dim2=2) < 0).any() or (sums.count < 0).any():
        raise ValueError(f"sums of {name} must be finite, sums of squares and counts not < 0")
    return sums


def _combined(one: MomentBank, other: MomentBank) -> Source:
    """Return the facts of the sum of two banks; raise InputError if they don't add up."""
    mine, theirs = both = one.source, other.source
    for name in SHARED:
        said = name in mine and name in theirs
        if mine.get(name) != theirs.get(name) and (said or name not in UNSAID):
            raise InputError(
                f"MomentBank.merge: both banks must be of one model, got {name} {mine.get(name)} "
                f"and {theirs.get(name)}; calibrate the same weights for both, with the same "
                "config.json and tokenizer, and the same --dtype"
            )
    units, others = mine.get("sites", {}), theirs.get("sites", {})
    for name in units.keys() & others.keys():
        if units[name] != others[name]:
            raise InputError(
                f"MomentBank.merge: both banks must have the same units at {name}; calibrate both "
                "with the same --attn-unit"
            )
    merged = {**theirs, **mine}
    for key in merged.keys() & {"data", "calibrations", "texts"}:
        merged[key] = [each for source in both for each in source.get(key, ())]
    data, digests = merged.get("data", ()), (one.sequences, other.sequences)
    twice = 0 if any(x is None for x in digests) else int(torch.isin(*digests).sum())
    if len(set(data)) < len(data) or twice:
        what = f"{twice} sequences" if twice else "sums"
        raise InputError(
            f"MomentBank.merge: both banks hold {what} over the same text, which would count it "
            "twice; calibrate on other text"
        )
    for key in ("sequences", "tokens"):
        merged[key] = sum(source.get(key, 0) for source in both)
    if "texts" in merged:
        merged["texts"] = list(dict.fromkeys(merged["texts"]))
    if "routed" in merged:
        merged["routed"] = added(source.get("routed", {}) for source in both)
    if "seq_len" in merged:
        merged["seq_len"] = max(source.get("seq_len", 0) for source in both)
    merged.pop("sensitivities", None)  # measured by the sums of one alone
    return merged


def _renumbered(bank: MomentBank, merged: Source) -> Text:
    """Return a bank's text with the numbers that its sources have in the sum of banks."""
    found, names = [dict(batch) for batch in bank.text], bank.source.get("texts")
    if names and "texts" in merged:
        number = torch.tensor([merged["texts"].index(name) for name in names])
        for batch in found:
            if (of := batch.get("source")) is not None:
                batch["source"] = torch.where(of < 0, of, number[of.clamp_min(0)])
    return found


def pack(text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a text."""
    shapes = [[*batch["input_ids"].shape, int("attention_mask" in batch)] for batch in text]

    def joined(name: str) -> Tensor:
        parts = [batch[name].flatten() for batch in text if name in batch]
        return torch.cat([torch.zeros(0, dtype=torch.long), *parts])

    packed = {
        "text/batches": torch.tensor(shapes, dtype=torch.int32).view(-1, 3),
        "text/input_ids": joined("input_ids").int(),
        "text/attention_mask": joined("attention_mask").byte(),
        "text/fold": joined("fold").byte(),
    }
    if all("source" in batch for batch in text):
        packed["text/source"] = joined("source").int()
    return packed


def unpack(tensors: Mapping[str, Tensor], sequences: int) -> Text:
    """Return the batches of packed tensors; raise an error if they contradict one another."""
    shapes = tensors["text/batches"].long()
    rows, widths, masked = shapes.unbind(1)
    sizes = {"input_ids": rows * widths, "attention_mask": rows * widths * masked, "fold": rows}
    sizes |= {"source": rows} if "text/source" in tensors else {}
    parts = {}
    for name, size in sizes.items():
        value = tensors[f"text/{name}"].long()
        most = {"attention_mask": 1, "fold": FOLDS - 1}.get(name, MOST_ID)
        if name != "source" and ((value < 0) | (value > most)).any():
            raise ValueError("token ids must be at least 0, masks and folds 0 or 1")
        parts[name] = value.split(size.tolist())
    if int(rows.sum()) != sequences or (shapes[:, :2] < 1).any():
        raise ValueError(f"text/batches must be of {sequences} sequences with a token at least")
    text: Text = []
    for index, (count, width, has_mask) in enumerate(shapes.tolist()):
        batch = {name: values[index] for name, values in parts.items()}
        if not has_mask:
            del batch["attention_mask"]
        text.append(
            {n: each.view(count, width) if n in NAMES else each for n, each in batch.items()}
        )
    return text
