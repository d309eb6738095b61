"""Where a bank comes from: what its facts may be, and what two banks must share to add up.

========================  ======================================================================
``model_type``, ``model`` family, and a fingerprint of the weights
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
``sensitivities``         measured ones, see :mod:`liar_ext.job.scoring`
========================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from liar_ext import untrusted
from liar_ext.errors import InputError

Source = dict[str, Any]
Check = Callable[[Any], bool]
# Facts that must be the same for sums to add up, with what a person can do where they aren't; what
# banks of older versions don't say may be anything.
UNSAID = ("dtype", "tokenizer")
SHARED = {
    "model_type": "calibrate the same weights for both",
    "model": "calibrate the same weights for both",
    "dtype": "calibrate both with the same --dtype",
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


def combine(
    mine: Source, theirs: Source, sequences: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Source:
    """Return the facts of the sum of two banks, with digests of the ``sequences`` of both.

    InputError is raised if the banks don't add up: of other models, sites, units, dtypes or
    tokenizers, or with text in common.
    """
    _check_alike(mine, theirs)
    both = (mine, theirs)
    data = [each for bank in both for each in bank.get("data", ())]
    known = all(digests is not None for digests in sequences)
    twice = int(torch.isin(*sequences).sum()) if known else 0
    if len(set(data)) < len(data) or twice:
        what = f"{twice} sequences" if twice else "sums"
        raise InputError(
            f"MomentBank.merge: both banks hold {what} over the same text, which would count it "
            "twice; calibrate on other text"
        )
    merged = {**theirs, **mine}
    for key in ("sequences", "tokens"):
        merged[key] = sum(bank.get(key, 0) for bank in both)
    for key in merged.keys() & {"data", "calibrations", "texts"}:
        merged[key] = [each for bank in both for each in bank.get(key, ())]
    if "texts" in merged:
        merged["texts"] = list(dict.fromkeys(merged["texts"]))
    if "routed" in merged:
        parts = [bank.get("routed", {}) for bank in both]
        merged["routed"] = {
            name: [sum(part.get(name, (0, 0))[fold] for part in parts) for fold in (0, 1)]
            for name in {**parts[0], **parts[1]}
        }
    if "seq_len" in merged:
        merged["seq_len"] = max(bank.get("seq_len", 0) for bank in both)
    merged.pop("sensitivities", None)  # measured by the sums of one alone
    return merged


def _check_alike(mine: Source, theirs: Source) -> None:
    """Raise InputError unless two banks are of one model, in the same units."""
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
    **dict.fromkeys(("model_type", "model", "dtype", "tokenizer"), _string),
    **dict.fromkeys(("data", "texts", "relative"), _names),
    "sites": _named(_record(unit=_string, **_sizes)),
    "routed": _named(lambda counts: _list_of(_count)(counts) and len(counts) == 2),
    "calibrations": _list_of(_record(True, **_drawn)),
    "sensitivities": _list_of(_record(key=_string, sites=_named(_number))),
}
