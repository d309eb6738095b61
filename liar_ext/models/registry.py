"""The table of model families, and what applies to each: all of it comes from the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from liar_ext.models.families import bert, decoders, diffusion, gpt, hybrid, moe, t5, vit
from liar_ext.models.family import Family, Wiring
from liar_ext.system.errors import InputError

# One row a family, checked against the source of transformers 5.24 and by a test that slicing
# equals zeroing.
_MODULES = (decoders, gpt, hybrid, bert, t5, vit, moe, diffusion)
FAMILIES: dict[str, Family] = {row.name: row for module in _MODULES for row in module.ROWS}
COLUMNS = {
    "heads": "heads",
    "kv_groups": "KV groups",
    "channels": "channels",
    "experts": "experts",
    "hidden": "hidden size",
    "biases": "biases",
    "stock": "stock config",
    "layerwise": "layerwise",
}
YES, NO, NONE = "yes", "no", "–"
WRAPPED = {  # by an attribute of what wraps a model
    "_orig_mod": "is compiled; give model._orig_mod, and compile what comes out",
    "merge_and_unload": "has adapters of peft; give what model.merge_and_unload() returns",
    "module": "is wrapped, as by DataParallel; give model.module",
    "transformers_model": "is of sentence-transformers; give model.transformers_model",
}


def register_family(family: Family) -> Family:
    """Add a family to the table, or replace the row of that name, and return it.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from liar_ext import register_family
    >>> from liar_ext.models.registry import family_of
    >>> register_family(replace(family_of(llama), name="my_llama"))  # doctest: +SKIP
    """
    FAMILIES[family.name] = family
    return family


def is_diffusion(model: nn.Module) -> bool:
    """Tell whether a model is one of diffusers, whose configs are mappings."""
    return isinstance(getattr(model, "config", None), Mapping)


def type_of(model: nn.Module) -> str | None:
    """Return ``config.model_type`` of a model, or the name of its class if it is of diffusers."""
    if is_diffusion(model):
        return type(model).__name__
    return getattr(getattr(model, "config", None), "model_type", None)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, by :func:`type_of`.

    InputError is raised if the model has no config or is wrapped, or the table has no such family.
    """
    for mark, why in WRAPPED.items():
        if hasattr(model, mark):
            raise InputError(f"sites: the model {why}")
    name = type_of(model)
    if name in FAMILIES:
        return FAMILIES[name]
    if not isinstance(model, nn.Module):
        raise InputError(
            f"sites: needs a loaded model, got {type(model).__name__}; load it with "
            "liar_ext.load_model, or call liar_ext.compress with its name"
        )
    raise InputError(
        f"sites: unknown architecture {name!r} ({type(model).__name__}), which is none of the "
        f"{len(FAMILIES)} that `liar families` lists; `liar families --suggest MODEL`, or "
        "liar_ext.suggest_family(model), looks for a row and proves it; liar_ext.register_family "
        "adds one that you write: see docs/extend.md"
    )


class Entry(NamedTuple):
    """Whether something applies to a family (or what of it does), and why if it doesn't."""

    applies: str
    reason: str = ""


def overview() -> dict[str, dict[str, Entry]]:
    """Return what applies to each family, by :data:`COLUMNS`."""
    return {name: _entries(FAMILIES[name]) for name in sorted(FAMILIES)}


def _entries(family: Family) -> dict[str, Entry]:
    without, attn, mlp = family.without, family.wirings("attn"), family.wirings("mlp")
    sizes = {size for w in attn for size in (*w.numbers.values(), *(w.config or {}).values())}
    flags = sorted({wiring.bias_flag for wiring in (*attn, *mlp)} - {None})
    groups = Entry(NO, "every head has keys and values of its own" if attn else "heads can't")
    if "kv_group" in without:
        groups = Entry(NO, without["kv_group"])
    elif sizes & {"kv_heads", "group_size"}:  # of key/value heads that several query heads share
        groups = Entry(YES)
    return {
        "heads": _sites(attn, without.get("attn"), "its attention isn't described"),
        "kv_groups": groups,
        "channels": _sites(mlp, without.get("mlp"), "its MLP isn't described"),
        "experts": _experts(family) if any(wiring.experts for wiring in mlp) else Entry(NONE),
        "hidden": _hidden(family),
        "biases": Entry(", ".join(flags)) if flags else Entry(NO, "no field gives all of them one"),
        "stock": _stock(family, {"heads": attn, "channels": mlp}),
        "layerwise": _layerwise(family),
    }


def _only(needs: Iterable[tuple[str, object]]) -> str:
    return "only with " + ", ".join(dict.fromkeys(f"{name}={value}" for name, value in needs))


def _hidden(family: Family) -> Entry:
    row, reason = family.stream, family.without.get("hidden", "")
    if row is None:
        return Entry(NO, reason or "its residual stream isn't described")
    needs = {} if isinstance(row, tuple) else row.requires
    return Entry(YES, ": ".join(filter(None, (_only(needs.items()) if needs else "", reason))))


def _experts(family: Family) -> Entry:
    if "experts" in family.without:
        return Entry(NO, family.without["experts"])
    chain = _layerwise(family)  # they are chosen block by block
    return Entry(YES) if chain.applies == YES else chain


def _layerwise(family: Family) -> Entry:
    if "layerwise" in family.without:
        return Entry(NO, family.without["layerwise"])
    return Entry(YES, _only([(family.lends, 0)]) if family.lends else "")


def _sites(wirings: list[Wiring], reason: str | None, lacking: str) -> Entry:
    if not wirings or reason is not None:
        return Entry(NO, reason or lacking)
    states = [wiring for wiring in wirings if wiring.key_dim]
    notes = ["in the blocks that have any"] if any(w.optional for w in wirings) else []
    if any(not wiring.whole_groups for wiring in states):
        notes.append("of linear attention, too")
    if {bool(wiring.head_dim) for wiring in wirings} == {True, False}:
        notes.append("and channels of convolutions")
    if any(wiring.whole_groups for wiring in states):
        notes.append("of Mamba by whole groups")
    if not notes and all(wiring.requires for wiring in wirings):
        notes.append(_only(need for wiring in wirings for need in wiring.requires.items()))
    return Entry(YES, ", ".join(notes))


def _stock(family: Family, wirings: dict[str, list[Wiring]]) -> Entry:
    # An ordinary MLP in some layers of a mixture says nothing of the experts.
    mixture = [wiring for wiring in wirings["channels"] if wiring.experts]
    fields = [size for w in mixture or wirings["channels"] for size in (w.config or {}).values()]
    said = ["heads"] * any(wiring.config is not None for wiring in wirings["heads"])
    said += ["channels"] * ("features" in fields)
    said += ["experts"] * ("experts" in fields and "experts" not in family.without)
    lacking = [what for what, each in wirings.items() if each and what not in said]
    reason = family.without.get("stock", "")
    if lacking and not reason:
        reason = f"{' and '.join(lacking)}: no field says their number"
    return Entry(", ".join(said) or NO, reason)
