"""The table of model families, what applies to each, and the configs that name a family."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from liar_ext.models.families import decoders, encoders, mixtures, vision
from liar_ext.models.family import Family, Wiring
from liar_ext.system.errors import InputError

# Each is checked against the source of transformers 5.24, and by a test that slicing is zeroing.
_ROWS = (
    *(*decoders.ROWS, *mixtures.HYBRIDS, *mixtures.ROWS),
    *(*encoders.ROWS, *encoders.SEQUENCES, *vision.ROWS),
)
FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
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
# What a wrapper of a model has: of torch.compile, DataParallel, sentence-transformers and peft.
WRAPPED = ("_orig_mod", "module", "transformers_model", "merge_and_unload")
# Config fields that change nothing that is computed, or that loading and saving set.
IDLE = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "initializer_range", "liar"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # a GGUF file may lack one
    *("id2label", "label2id", "task_specific_params", "tie_word_embeddings"),
    *("transformers_version", "use_cache", "output_attentions", "output_hidden_states"),
    *("attn_implementation", "experts_implementation", "return_dict", "quantization_config"),
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
    """Return the family of a model, by :func:`type_of`; refuse a model without one."""
    for mark in WRAPPED:
        if hasattr(model, mark):
            inside = f"{mark}()" if mark == "merge_and_unload" else mark
            raise InputError(f"sites: the model is wrapped; give model.{inside}")
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
    attn, mlp = family.wirings("attn"), family.wirings("mlp")
    sizes = {size for w in attn for size in (*w.numbers.values(), *(w.config or {}).values())}
    flags = sorted({wiring.bias_flag for wiring in (*attn, *mlp)} - {None})
    groups = Entry(NO, "every head has keys and values of its own" if attn else "heads can't")
    if sizes & {"kv_heads", "group_size"}:  # of key/value heads that several query heads share
        groups = Entry(YES)
    layerwise = Entry(YES, _only({family.lends: 0}.items()) if family.lends else "")
    layerwise = _unless(family, "layerwise", layerwise)
    # Experts are chosen block by block.
    experts = Entry(YES) if layerwise.applies == YES else layerwise
    mixed = any(wiring.experts for wiring in mlp)
    return {
        "heads": _unless(family, "attn", _sites(attn, "its attention isn't described")),
        "kv_groups": _unless(family, "kv_group", groups),
        "channels": _unless(family, "mlp", _sites(mlp, "its MLP isn't described")),
        "experts": _unless(family, "experts", experts) if mixed else Entry(NONE),
        "hidden": _hidden(family),
        "biases": Entry(", ".join(flags)) if flags else Entry(NO, "no field gives all of them one"),
        "stock": _stock(family, {"heads": attn, "channels": mlp}),
        "layerwise": layerwise,
    }


def _unless(family: Family, what: str, entry: Entry) -> Entry:
    """Return an entry, or the reason for which a row says that a family is without it."""
    return Entry(NO, family.without[what]) if what in family.without else entry


def _only(needs: Iterable[tuple[str, object]]) -> str:
    return "only with " + ", ".join(dict.fromkeys(f"{name}={value}" for name, value in needs))


def _hidden(family: Family) -> Entry:
    row, reason = family.stream, family.without.get("hidden", "")
    if row is None:
        return Entry(NO, reason or "its residual stream isn't described")
    needs = {} if isinstance(row, tuple) else row.requires
    return Entry(YES, ": ".join(filter(None, (_only(needs.items()) if needs else "", reason))))


def _sites(wirings: list[Wiring], lacking: str) -> Entry:
    if not wirings:
        return Entry(NO, lacking)
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


class Fields(SimpleNamespace):
    """The config of a diffusers model, a mapping there, as an object like those of transformers."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fields:
        """Make one of the fields of a config."""
        return cls(**copy.deepcopy(dict(fields)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return copy.deepcopy(vars(self))


def config_parts(config: Any) -> list[Any]:
    """Return a config, and those of its parts that are configs and there."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if part is not None)]


def counts_layers(config: Any) -> bool:
    """Tell whether a plain config can count the layers of this one, whose name for them is its own.

    ``Trainer`` reads ``config.json`` as a plain one, without the names of its class.
    """
    return "num_hidden_layers" not in getattr(config, "attribute_map", ())


def put_config(model: nn.Module, config: Any) -> None:
    """Let a model have another config."""
    if isinstance(config, Fields):
        config = type(model.config)(config.to_dict())
    if isinstance(config, Mapping):
        model._internal_dict = config  # what diffusers calls it
    else:
        model.config = config


def source_of(model: nn.Module) -> str:
    """Return the folder, or the name, that a model was loaded from; empty if there is none."""
    found = getattr(model.config, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    return str(found or "")


def config_digest(model: nn.Module) -> str:
    """Return a digest of what a config says beside the weights, such as activations and angles.

    However a model is loaded, it is the same. What a class has by default is left out, since other
    versions of transformers have other fields.
    """
    config = getattr(model, "config", {})
    said = dict(config) if isinstance(config, Mapping) else config.to_diff_dict()
    text = json.dumps(_computing(said), sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _computing(value: Any) -> Any:
    if isinstance(value, Mapping):
        named = {str(name): each for name, each in value.items() if each is not None}
        kept = {name for name in named if name not in IDLE and not name.startswith("_")}
        return {name: _computing(named[name]) for name in kept}
    if isinstance(value, list | tuple):
        return [_computing(each) for each in value]
    # Of GGUF files numbers are float32; JSON may have 1 for 1.0.
    return f"{value:.6g}" if isinstance(value, int | float) else value


class _Unfilled(TorchFunctionMode):
    """Skip the initialisation of weights, half of the time that a model without memory takes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Return the tensor that a function of ``torch.nn.init`` would fill."""
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def skeleton(model_class: type[nn.Module], config: Any) -> nn.Module:
    """Build a model without its weights: shapes only, on the meta device."""
    with torch.device("meta"), _Unfilled():
        if isinstance(config, Fields):
            return model_class.from_config(config.to_dict())
        return model_class(copy.deepcopy(config))
