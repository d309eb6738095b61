"""Edit ``tokenizer.json``: the same tokenizer with some of its tokens, and new ids."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from liar_ext.errors import InputError
from liar_ext.vocabulary.pieces import Pieces


def order_of(pieces: Pieces, kept: Collection[int]) -> list[int]:
    """Return the old ids in the order of the new ones.

    Tokens of the model come first, then those that are only added: the library numbers them so.
    """
    own = set(pieces.ids.values())
    return sorted(kept, key=lambda at: (at not in own, at))


def edited(spec: Mapping[str, Any], pieces: Pieces, order: list[int]) -> dict[str, Any]:
    """Return a tokenizer's JSON with the tokens of ``order`` alone, numbered by it.

    A merge stays if both parts and the result do; the ranks keep their order. Normalizer,
    pre-tokenizer, decoder and truncation stay as they are.

    Raises
    ------
    InputError
        If a step after the model needs a token that goes.
    """
    new = {old: at for at, old in enumerate(order)}
    spec = copy.deepcopy(dict(spec))
    model = spec["model"]
    if pieces.kind == "Unigram":
        rows = [row for at, row in enumerate(model["vocab"]) if at in new]
        model["vocab"] = rows
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        found = sorted((new[at], name) for name, at in pieces.ids.items() if at in new)
        model["vocab"] = {name: at for at, name in found}
    if pieces.kind == "BPE":
        model["merges"] = [merge for merge in model["merges"] if _stays(merge, model["vocab"])]
    for each in spec.get("added_tokens") or []:
        each["id"] = new[each["id"]]
    spec["added_tokens"] = sorted(spec.get("added_tokens") or [], key=lambda each: each["id"])
    if spec.get("padding"):
        spec["padding"]["pad_id"] = _moved(spec["padding"]["pad_id"], new, "padding")
    if spec.get("post_processor"):
        _move_step(spec["post_processor"], new)
    return spec


def _stays(merge: Any, vocab: Mapping[str, int]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in vocab and right in vocab and left + right in vocab


def _move_step(step: dict[str, Any], new: Mapping[int, int]) -> None:
    """Renumber the tokens that a step after the model adds."""
    for inner in step.get("processors", []):
        _move_step(inner, new)
    for name in ("sep", "cls"):
        if name in step:
            token, at = step[name]
            step[name] = [token, _moved(at, new, token)]
    tokens = step.get("special_tokens", {})
    for each in tokens.values() if isinstance(tokens, Mapping) else []:
        each["ids"] = [_moved(at, new, each["id"]) for at in each["ids"]]


def _moved(at: int, new: Mapping[int, int], what: str) -> int:
    if at not in new:
        raise InputError(
            f"vocabulary: the tokenizer adds token {at} ({str(what)[:40]}), which it does not "
            "list as a special token; add it there, or leave --keep-vocab out"
        )
    return new[at]
