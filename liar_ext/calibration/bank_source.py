"""Where a bank comes from: its facts, its text, and what two banks must share to add up.

========================  ======================================================================
``model_type``, ``model`` family, and a fingerprint of the weights
``config``                a digest of what the config computes with, such as activations
``dtype``                 of the weights, as the model was run
``sites``                 per site what its units are: ``unit``, ``units``, ``width``, ``groups``
``sequences``, ``tokens`` numbers of them
``seq_len``               tokens of the longest sequence
``relative``              names of the sites whose tokens count relative to the output
``routed``                by the name of an expert, the tokens of each fold that reached it
``data``                  a fingerprint of each text run over, with its folds
``texts``                 names of the texts that ``source`` of the kept text counts
``tokenizer``             a fingerprint of the tokenizer
``calibrations``          of each run that was added: how its sequences were drawn
``sensitivities``         measured ones, see :mod:`liar_ext.job.analysis`
========================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from liar_ext.calibration.batches import FOLDS, Batch, Batches, read_batches
from liar_ext.system import untrusted
from liar_ext.system.errors import InputError

NAMES = ("input_ids", "attention_mask")
MOST_ID = 2**31 - 1
SAMPLED = 64  # values of each weight that a fingerprint has one by one
Text = list[dict[str, Tensor]]
Source = dict[str, Any]
Check = Callable[[Any], bool]
# Facts that must be the same for sums to add up, with what a person can do where they aren't; what
# banks of older versions don't say may be anything. The first that differs is named: of two dtypes
# the weights differ, too.
UNSAID = ("config", "dtype", "tokenizer")
SHARED = {
    "model_type": "calibrate the same weights for both",
    "dtype": "calibrate both with the same --dtype",
    "model": "calibrate the same weights for both",
    "config": "calibrate both with the same config.json",
    "tokenizer": "calibrate both with the same tokenizer",
    "relative": "calibrate both anew, so that tokens count alike",
}


def check_source(source: Any) -> None:
    """Raise InputError unless the facts are such as a bank has, as far as it has them."""
    if not isinstance(source, dict):
        raise InputError("it is none")
    for name, value in source.items():
        if name in CHECKS and not CHECKS[name](value):
            raise InputError(f"{name} can't be {str(value)[:60]!r}")


def combine(mine: Source, theirs: Source, sequences: Sequence[Tensor | None]) -> Source:
    """Return the facts of the sum of two banks, with digests of the ``sequences`` of both.

    InputError is raised if the banks don't add up: of other models, sites, units, dtypes or
    tokenizers, or with text in common.
    """
    _check_alike(mine, theirs)
    both = (mine, theirs)
    merged = {**theirs, **mine}
    for key in merged.keys() & {"data", "calibrations", "texts"}:
        merged[key] = [each for bank in both for each in bank.get(key, ())]
    data, known = merged.get("data", ()), all(digests is not None for digests in sequences)
    twice = int(torch.isin(*sequences).sum()) if known else 0
    if len(set(data)) < len(data) or twice:
        what = f"{twice} sequences" if twice else "sums"
        raise InputError(
            f"MomentBank.merge: both banks hold {what} over the same text, which would count it "
            "twice; calibrate on other text"
        )
    for key in ("sequences", "tokens"):
        merged[key] = sum(bank.get(key, 0) for bank in both)
    if "texts" in merged:
        merged["texts"] = list(dict.fromkeys(merged["texts"]))
    if "routed" in merged:
        merged["routed"] = added(bank.get("routed", {}) for bank in both)
    if "seq_len" in merged:
        merged["seq_len"] = max(bank.get("seq_len", 0) for bank in both)
    merged.pop("sensitivities", None)  # measured by the sums of one alone
    return merged


def added(shares: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Return the sums of the counts of each fold by name, such as tokens by expert."""
    totals: dict[str, list[int]] = {}
    for name, counts in (pair for share in shares for pair in share.items()):
        totals[name] = [a + b for a, b in zip(totals.get(name, (0,) * FOLDS), counts, strict=True)]
    return totals


def _check_alike(mine: Source, theirs: Source) -> None:
    for name, advice in SHARED.items():
        said = name in mine and name in theirs
        if mine.get(name) != theirs.get(name) and (said or name not in UNSAID):
            raise InputError(
                f"MomentBank.merge: both banks must be of one model, got {name} {mine.get(name)} "
                f"and {theirs.get(name)}; {advice}"
            )
    ours, others = mine.get("sites", {}), theirs.get("sites", {})
    for name in ours.keys() & others.keys():
        if ours[name] != others[name]:
            one, other = (f"{at[name]['units']} of {at[name]['unit']}" for at in (ours, others))
            raise InputError(
                f"MomentBank.merge: both banks must have the same units at {name}, got {one} and "
                f"{other}; calibrate both with the same --attn-unit"
            )


def renumbered(text: Sequence[Mapping[str, Tensor]], own: Source, merged: Source) -> list[dict]:
    """Return a bank's text with the numbers that its sources have in the sum of banks."""
    found, names = [dict(batch) for batch in text], own.get("texts")
    if names and "texts" in merged:
        number = torch.tensor([merged["texts"].index(name) for name in names])
        for batch in found:
            if (of := batch.get("source")) is not None:
                if (of >= len(names)).any():
                    raise InputError(
                        f"MomentBank.merge: text is of source {int(of.max())} and the names are "
                        f"{', '.join(names)}, counted from 0; calibrate on that text anew"
                    )
                batch["source"] = torch.where(of < 0, of, number[of.clamp_min(0)])
    return found


def _count(value: Any) -> bool:
    return untrusted.count(value) is not None


def _number(value: Any) -> bool:
    return untrusted.number(value) is not None and value >= 0


def _string(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _named(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _record(more: bool = False, /, **checks: Check) -> Check:
    """Return the check of an object with these fields, and others if there may be ``more``."""
    return lambda value: (
        isinstance(value, dict)
        and (value.keys() >= checks.keys() if more else value.keys() == checks.keys())
        and all(check(value[name]) for name, check in checks.items())
    )


_names = _list_of(lambda value: _string(value) and value.isprintable())  # shown on terminals
_sizes = {"units": _count, "width": _count, "groups": _count}
# How texts were drawn; the fields of a recipe are checked where one is made of them.
_drawn = {"texts": _names, "notes": _names, "bos": _string}
_drawn["packed"] = lambda value: isinstance(value, bool)
CHECKS: dict[str, Check] = {
    **dict.fromkeys(("sequences", "tokens", "seq_len"), _count),
    **dict.fromkeys(("model_type", "model", "config", "dtype", "tokenizer"), _string),
    **dict.fromkeys(("data", "texts", "relative"), _names),
    "sites": _named(_record(unit=_string, **_sizes)),
    "routed": _named(lambda counts: _list_of(_count)(counts) and len(counts) == 2),
    "calibrations": _list_of(_record(True, **_drawn)),
    "sensitivities": _list_of(_record(key=_string, sites=_named(_number))),
}


def text_of(batch: Batch) -> dict[str, Tensor] | None:
    """Return a batch as a bank keeps it; None where it is not text alone."""
    ids, more = batch.inputs.get("input_ids"), batch.labels or batch.weight is not None
    if more or not batch.inputs.keys() <= {*NAMES} or ids is None or ids.dim() != 2:
        return None
    if any(each.is_floating_point() or each.shape != ids.shape for each in batch.inputs.values()):
        return None
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= MOST_ID:
        return None
    kept = {name: value.detach().long().cpu() for name, value in batch.inputs.items()}
    kept["fold"] = batch.fold.cpu()
    if batch.source is not None:
        kept["source"] = batch.source.long().cpu()
    return kept


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
    """Return the batches of packed tensors.

    Raise ValueError if they contradict one another, or hold what no text gives.
    """
    shapes = tensors["text/batches"]
    if shapes.dim() != 2 or shapes.shape[1] != 3 or (shapes[:, :2] < 1).any():
        raise ValueError("text/batches must be (batches, 3), of at least a sequence and a token")
    if ((shapes[:, 2] != 0) & (shapes[:, 2] != 1)).any():
        raise ValueError("text/batches must say by 0 or 1 whether there is a mask")
    rows, widths, masked = shapes.long().unbind(1)
    sizes = {"input_ids": rows * widths, "attention_mask": rows * widths * masked, "fold": rows}
    sizes |= {"source": rows} if "text/source" in tensors else {}
    parts = {}
    for name, size in sizes.items():
        value = tensors[f"text/{name}"].long()
        if value.shape != (int(size.sum()),) or int(rows.sum()) != sequences:
            raise ValueError(f"text/{name} must hold {int(size.sum())} of {sequences} sequences")
        parts[name] = value.split(size.tolist())
        most = {"attention_mask": 1, "fold": FOLDS - 1}.get(name, MOST_ID)
        if name != "source" and ((value < 0) | (value > most)).any():
            raise ValueError("token ids must be at least 0, masks and folds 0 or 1")
    text: Text = []
    for index, (count, width, has_mask) in enumerate(shapes.tolist()):
        batch = {name: values[index] for name, values in parts.items()}
        if not has_mask:
            del batch["attention_mask"]
        text.append(
            {n: each.view(count, width) if n in NAMES else each for n, each in batch.items()}
        )
    return text


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the names, shapes and values of tensors.

    Of each it takes some values, and the sum of all bits as integers, which no order of adding
    changes and which is as quick as reading them.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        flat = flat.clone() if flat.storage_offset() % 8 else flat  # as a view of eight bytes asks
        whole = flat.nbytes // 8 * 8 // flat.itemsize
        bits = flat[:whole].view(torch.int64).sum() if whole else 0
        some = torch.cat([flat[:: max(flat.numel() // SAMPLED, 1)], flat[whole:]])
        digest.update(f"{name} {tuple(tensor.shape)} {int(bits)}".encode())
        digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def digest_of(batches: Batches) -> str:
    """Return a digest of all that batches hold, but for labels."""
    seen = Seen()
    for batch in read_batches(batches):
        seen.add(batch)
    return seen.digest.hexdigest()


def _update(digest: blake2b, name: str, value: Tensor | list) -> None:
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value}".encode())
        return
    digest.update(f"{name} {tuple(value.shape)}".encode())
    digest.update(value.detach().double().cpu().contiguous().numpy().tobytes())


class Seen:
    """What is kept of the batches that were run: digests, and the text if it is asked for."""

    def __init__(self, keep_text: bool = False) -> None:
        self.digest = blake2b(digest_size=16)
        self.sequences: list[int] = []  # a digest of each
        self.text: Text | None = [] if keep_text else None
        self.batches = self.longest = 0  # longest: in tokens

    def add(self, batch: Batch) -> None:
        """Count a batch in."""
        known = {**batch.inputs, "fold": batch.fold}
        known |= {} if batch.weight is None else {"weight": batch.weight}
        for name, value in sorted(known.items()):
            _update(self.digest, name, value)
        self.batches += 1
        self.sequences += [self._digest(batch, row) for row in range(len(batch))]
        ids = batch.inputs.get("input_ids")
        self.longest = max(self.longest, 0 if ids is None else ids.shape[-1])
        if self.text is not None:
            kept = text_of(batch)
            if kept is None:
                self.text = None
            else:
                self.text.append(kept)

    @staticmethod
    def _digest(batch: Batch, row: int) -> int:
        """Return a digest of 8 bytes of a sequence, without its padding and its fold."""
        digest = blake2b(digest_size=8)
        for name, value in sorted(batch.inputs.items()):
            own = value[row] if len(value) == len(batch) else value  # patches of a lone image
            if name == "attention_mask":
                continue
            if batch.mask is not None and own.shape[:1] == batch.mask.shape[1:]:
                own = own[batch.mask[row].to(own.device)]
            _update(digest, name, own)
        return int.from_bytes(digest.digest(), "little", signed=True)

    def facts(self, tokens: int, routed: dict[str, list[int]]) -> dict[str, object]:
        """Return what a bank says of its text; ``routed`` if there are experts."""
        said = {"sequences": len(self.sequences), "tokens": tokens, "seq_len": self.longest}
        said["data"] = [self.digest.hexdigest()]
        return said | ({"routed": routed} if routed else {})
