"""Methods by name: a criterion, an allocation, a form of reconstruction, and recipe fields."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import yaml

from liar_ext import InputError, Recipe

# What a method costs or is judged by is the same for all rows, and chosen by options.
OF_THE_RUN = (
    "model",
    "dtype",
    "device",
    "calibration",
    "samples",
    "seq_len",
    "seed",
    "keep",
    "eval",
    "eval_samples",
    "certify",
)
SHORT = {
    "layerwise": {"schedule": "layerwise"},
    "one-pass": {"schedule": "one-pass"},
    "equal": {"uniform_layers": True},
}
DENSE = "dense"
FLAP = "wifv+global+bias"
# Configurations of ours after what others publish; docs/quality.md says how near each comes.
OTHERS = {
    "wanda+uniform+none": "after Wanda-sp, on dense activations",
    FLAP: "after FLAP, and agrees with its own code",
    "wanda+uniform+linear": "after GRAIL with Wanda's units, in one pass",
    "wifv+global+linear": "after GRAIL with FLAP's units, in one pass",
    "obs+uniform+linear": "after SlimGPT, in one pass and with equal ratios",
    "obs+uniform+linear+layerwise": "after SlimGPT, with equal ratios",
}
STEPS = (
    "wifv+uniform+linear",
    "wifv+curve+none",
    "liar+one-pass",
    "liar+equal",
    "obs+curve+auto+layerwise",
)
LISTS = {"others": tuple(OTHERS), "steps": STEPS}


def read_method(name: str, *, keep: float, seed: int) -> Recipe:
    """Return the recipe that a method's name stands for.

    ``liar`` is what ``liar prune`` does by default, ``A+B+C`` has the criterion A, the
    allocation B and the reconstruction C, in one pass, on the named text alone. Further words set
    fields of the recipe: ``damp=0.1``, ``kinds=mlp``; ``layerwise``, ``one-pass`` and ``equal``
    are short for ``schedule=layerwise``, ``schedule=one-pass`` and ``uniform_layers=true``;
    ``blocks`` removes whole blocks in place of heads and channels. The tile is 1, single channels,
    unless it is named: ``liar+tile=auto``. InputError if a word is none of these, or the recipe
    can't be.
    """
    first, *words = name.split("+")
    chosen: dict[str, Any] = {"tile": 1, "keep": keep, "seed": seed}
    if first != "liar":
        if len(words) < 2:
            raise InputError(
                f"quality: a method is liar or CRITERION+ALLOCATION+RECONSTRUCTION, then +FIELD="
                f"VALUE, got {name!r}"
            )
        chosen |= {"criterion": first, "allocation": words[0], "reconstruct": words[1]}
        chosen |= SHORT["one-pass"] | {"self_text": 0.0, "random_tokens": 0.0}
        words = words[2:]
    for word in words:
        field, equals, value = word.partition("=")
        if not equals and field in SHORT:
            chosen |= SHORT[field]
        elif word == "blocks":
            chosen |= {"keep": 1.0, "keep_blocks": keep}
        elif equals and field not in OF_THE_RUN:
            chosen[field] = _value(field, value)
        else:
            raise InputError(
                f"quality: no such word in a method: {word!r} in {name!r}; fields of a recipe are "
                f"written FIELD=VALUE, and {', '.join(OF_THE_RUN)} are options of the run"
            )
    return Recipe.build(**chosen)


def expand(names: list[str]) -> list[str]:
    """Return names of methods, each once, with ``others`` and ``steps`` written out."""
    return list(dict.fromkeys(each for name in names for each in LISTS.get(name, (name,))))


def _value(field: str, text: str) -> Any:
    """Return a field's value as YAML has it; items of a list are separated by commas."""
    default = next((each.default for each in fields(Recipe) if each.name == field), MISSING)
    if isinstance(default, tuple):
        return tuple(text.split(","))
    return yaml.safe_load(text)


def is_layerwise(name: str) -> bool:
    """Tell whether a method solves layer by layer; the dense model is no method."""
    return name != DENSE and read_method(name, keep=1.0, seed=0).settled().schedule == "layerwise"
