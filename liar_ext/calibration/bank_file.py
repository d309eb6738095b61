"""The file of a moment bank: safetensors, each Gram as its packed lower triangle.

Per site ``NAME.gram`` ``(2, d (d + 1) / 2)``, ``NAME.total`` ``(2, d)`` and ``NAME.count``
``(2, 2)``. Metadata: ``liar_bank``, the version of this layout, and ``source``, JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liar_ext.data.batches import FOLDS
from liar_ext.errors import InputError

BANK_VERSION = 1
PARTS = ("gram", "total", "count")
DTYPES = {"F64": torch.float64, "F32": torch.float32}
Sums = tuple[Tensor, Tensor, Tensor]  # gram, total, count


def write_bank(
    path: str | os.PathLike[str], sums: Mapping[str, Sums], source: Mapping[str, object]
) -> None:
    """Write sums by site name; the file is there whole or not at all."""
    tensors = {}
    for name, (gram, total, count) in sums.items():
        triangle = torch.ones(gram.shape[-2:], dtype=torch.bool).tril_()
        tensors[f"{name}.gram"] = gram.cpu()[:, triangle]
        tensors[f"{name}.total"] = total.cpu()
        tensors[f"{name}.count"] = count.cpu()
    metadata = {"liar_bank": str(BANK_VERSION), "source": json.dumps(source)}
    temporary = f"{os.fspath(path)}.tmp"
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_bank(path: str | os.PathLike[str]) -> tuple[dict[str, Sums], dict[str, object]]:
    """Return the sums by site name, and where they come from.

    Names, shapes and dtypes are checked by the header before a byte of them is read.

    Raises
    ------
    InputError
        If the file is no bank of this version, is damaged, or holds what no calibration gives.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            source = _source(path, file.metadata() or {})
            widths = _widths(path, file)
            return {name: _sums(path, file, name, d) for name, d in widths.items()}, source
    except SafetensorError as error:
        raise _refusal(path, f"safetensors says: {error}") from None


def _refusal(path: str | os.PathLike[str], what: str) -> InputError:
    return InputError(
        f"MomentBank.load: {path} is not a moment bank of this version, or is damaged: {what}; "
        "calibrate again and save that bank"
    )


def _source(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, object]:
    if metadata.get("liar_bank") != str(BANK_VERSION):
        raise _refusal(path, f"liar_bank must be {BANK_VERSION}, got {metadata.get('liar_bank')}")
    try:
        source = json.loads(metadata["source"])
    except (KeyError, ValueError, RecursionError):
        source = None
    counts = ("sequences", "tokens")
    if not isinstance(source, dict) or not all(
        isinstance(source.get(key, 0), int) and source.get(key, 0) >= 0 for key in counts
    ):
        raise _refusal(path, "source must be a JSON object with counts of sequences and tokens")
    return source


def _widths(path: str | os.PathLike[str], file: safe_open) -> dict[str, int]:
    """Return the number of features by site name, after a look at the header."""
    keys = set(file.keys())
    names = {key.rpartition(".")[0] for key in keys}
    if keys != {f"{name}.{part}" for name in names for part in PARTS}:
        raise _refusal(path, "each site must have gram, total and count, and nothing else")
    widths = {}
    for name in sorted(names):
        gram, total, count = (file.get_slice(f"{name}.{part}") for part in PARTS)
        shape = total.get_shape()
        d = shape[-1] if shape else 0
        wanted = [[FOLDS, d * (d + 1) // 2], [FOLDS, d], [FOLDS, 2]]
        got = [part.get_shape() for part in (gram, total, count)]
        if got != wanted or d < 1:
            raise _refusal(path, f"gram, total, count of {name} must be {wanted}, got {got}")
        dtypes = [part.get_dtype() for part in (gram, total, count)]
        if dtypes[0] not in DTYPES or dtypes[1:] != [dtypes[0], "F64"]:
            raise _refusal(path, f"sums of {name} must be F64, or F32, got {dtypes}")
        widths[name] = d
    return widths


def _sums(path: str | os.PathLike[str], file: safe_open, name: str, d: int) -> Sums:
    packed, total, count = (file.get_tensor(f"{name}.{part}") for part in PARTS)
    triangle = torch.ones(d, d, dtype=torch.bool).tril_()
    gram = packed.new_zeros(FOLDS, d, d)
    gram[:, triangle] = packed
    finite = all(bool(torch.isfinite(part).all()) for part in (packed, total, count))
    if not finite or (gram.diagonal(dim1=1, dim2=2) < 0).any() or (count < 0).any():
        raise _refusal(path, f"sums of {name} must be finite, sums of squares and counts not < 0")
    return gram, total, count
