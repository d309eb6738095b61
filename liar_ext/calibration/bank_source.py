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

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from liar_ext.errors import InputError

Source = dict[str, Any]
MOST = 2**63
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
    """Return the facts of the sum of two banks.

    Parameters
    ----------
    mine, theirs : dict
        Of the two.
    sequences : pair of Tensor, optional
        Digests of the sequences of both.

    Raises
    ------
    InputError
        If the banks don't add up: of other models, sites, units, dtypes or tokenizers, or with
        text in common.
    """
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
            raise InputError(
                f"MomentBank.merge: both banks must have the same units at {name}, got "
                f"{_units(ours[name])} and {_units(others[name])}; calibrate both with the same "
                "--attn-unit"
            )
    data = [*mine.get("data", ()), *theirs.get("data", ())]
    twice = _in_both(*sequences)
    if len(set(data)) < len(data) or twice:
        what = f"{twice} sequences" if twice else "sums"
        raise InputError(
            f"MomentBank.merge: both banks hold {what} over the same text, which would count it "
            "twice; calibrate on other text"
        )
    merged = {**theirs, **mine}
    for key in ("sequences", "tokens"):
        merged[key] = mine.get(key, 0) + theirs.get(key, 0)
    for key in ("data", "calibrations"):
        if key in mine or key in theirs:
            merged[key] = [*mine.get(key, ()), *theirs.get(key, ())]
    if "routed" in merged:
        parts = [bank.get("routed", {}) for bank in (mine, theirs)]
        merged["routed"] = {
            name: [sum(part.get(name, (0, 0))[fold] for part in parts) for fold in (0, 1)]
            for name in {**parts[0], **parts[1]}
        }
    if "seq_len" in merged:
        merged["seq_len"] = max(mine.get("seq_len", 0), theirs.get("seq_len", 0))
    if "texts" in merged:
        merged["texts"] = list(dict.fromkeys([*mine.get("texts", ()), *theirs.get("texts", ())]))
    merged.pop("sensitivities", None)  # measured by the sums of one alone
    return merged


def renumbered(text: Sequence[Mapping[str, Tensor]], own: Source, merged: Source) -> list[dict]:
    """Return a bank's text with the numbers that its sources have in the sum of banks."""
    names = own.get("texts")
    if not names or "texts" not in merged:
        return [dict(batch) for batch in text]
    number = torch.tensor([merged["texts"].index(name) for name in names])
    return [
        {**batch, "source": torch.where(own < 0, own, number[own.clamp_min(0)])}
        if (own := batch.get("source")) is not None
        else dict(batch)
        for batch in text
    ]


def _units(site: Mapping[str, Any]) -> str:
    return f"{site['units']} of {site['unit']}"


def _in_both(mine: Tensor | None, theirs: Tensor | None) -> int:
    if mine is None or theirs is None:
        return 0
    return int(torch.isin(mine, theirs).sum())


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _string(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and value >= 0


def _names(value: Any) -> bool:
    """Tell whether a value is a list of strings that a terminal shows as they are."""
    return isinstance(value, list) and all(_string(v) and v.isprintable() for v in value)


def _sites(value: Any) -> bool:
    numbers = ("units", "width", "groups")
    return isinstance(value, dict) and all(
        isinstance(site, dict)
        and site.keys() == {"unit", *numbers}
        and _string(site["unit"])
        and all(_count(site[name]) for name in numbers)
        for site in value.values()
    )


def _calibrations(value: Any) -> bool:
    """Tell how texts were drawn; the fields of a recipe are checked where one is made of them."""
    checks = {"texts": _names, "notes": _names, "bos": _string, "packed": _flag}
    return isinstance(value, list) and all(
        isinstance(each, dict) and checks.keys() <= each.keys() and _all(checks, each)
        for each in value
    )


def _sensitivities(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and each.keys() == {"key", "sites"}
        and _string(each["key"])
        and isinstance(each["sites"], dict)
        and all(_number(number) for number in each["sites"].values())
        for each in value
    )


def _all(checks: Mapping[str, Callable[[Any], bool]], facts: Mapping[str, Any]) -> bool:
    return all(check(facts[name]) for name, check in checks.items())


def _routed(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(counts, list) and len(counts) == 2 and all(map(_count, counts))
        for counts in value.values()
    )


CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("sequences", "tokens", "seq_len"), _count),
    **dict.fromkeys(("model_type", "model", "dtype", "tokenizer"), _string),
    **dict.fromkeys(("data", "texts", "relative"), _names),
    "sites": _sites,
    "routed": _routed,
    "calibrations": _calibrations,
    "sensitivities": _sensitivities,
}
