"""Configs in one form: those of transformers are objects, and those of diffusers mappings."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Fields that change nothing that is computed, or that loading and saving set.
IDLE = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "initializer_range", "liar"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # a GGUF file may lack one
    *("id2label", "label2id", "task_specific_params", "tie_word_embeddings"),
    *("transformers_version", "use_cache", "output_attentions", "output_hidden_states"),
    *("attn_implementation", "experts_implementation", "return_dict", "quantization_config"),
}


class Fields(SimpleNamespace):
    """The config of a diffusers model as an object, to be changed."""

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
