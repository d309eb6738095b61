"""What the stock class of a model can say, and build, of layers that were pruned."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from liar_ext.arch import block_config, family_of, get_consumer_bias, sites, skeleton

LAYER_FIELDS = ("per_layer_config", "allow_global_per_layer_attribute_access")


def equal_config(model: nn.Module, config: Any) -> Any | None:
    """Return a config from which the stock class builds exactly these layers, if there is one.

    The proof is to build it: names and shapes must be those of the model.
    """
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(config)
    part = block_config(family_of(model), config)
    for site in sites(model):
        for name, size in (site.wiring.config or {}).items():
            setattr(part, name, site.sizes[size])
        if site.wiring.bias_flag and get_consumer_bias(model, site) is not None:
            setattr(part, site.wiring.bias_flag, True)
    try:
        # Through a dict, as a loader reads it, so that the config's own rules are checked.
        stock = skeleton(type(model), type(config).from_dict(config.to_dict()))
    except (ValueError, StrictDataclassError):
        return None
    return config if shapes_of(stock) == shapes_of(model) else None


def write_layer_sizes(model: nn.Module, folder: Path) -> None:
    """Add the sizes of each layer to the config, in the spelling of transformers.

    The global sizes stay the dense ones, from which a loader builds before it applies the plan.
    Most code reads them, which a config with per-layer sizes forbids unless it says otherwise.
    """
    family = family_of(model)
    dense = block_config(family, model.config)
    layers: dict[str, dict[str, int]] = {}
    for site in sites(model):
        for name, size in (site.wiring.config or {}).items():
            if getattr(dense, name, site.sizes[size]) != site.sizes[size]:
                layers.setdefault(str(site.block), {})[name] = site.sizes[size]
    if layers:
        path = folder / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        part = fields[family.config] if family.config else fields
        part |= dict(zip(LAYER_FIELDS, (layers, True), strict=True))
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the model's weights hold, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
