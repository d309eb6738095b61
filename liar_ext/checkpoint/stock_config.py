"""What the stock class of a model can say, and build, of layers that were pruned."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from liar_ext.models.sites import block_config, family_of, get_consumer_bias, sites, skeleton
from liar_ext.plan import Plan

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
    for name, size in _narrowed_fields(model).items():
        setattr(part, name, size)
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


def auto_classes(model: nn.Module) -> list[str]:
    """Return the names of transformers' auto classes that load this class of model."""
    from transformers.models.auto import modeling_auto

    names = []
    for name in sorted(name for name in dir(modeling_auto) if name.startswith("AutoModel")):
        mapping = getattr(modeling_auto, name)._model_mapping
        if mapping is not None and type(model.config) in mapping:
            classes = mapping[type(model.config)]
            if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
                names.append(name)
    return names


def how_to_load(model: nn.Module, plan: Plan) -> str:
    """Return a sentence on which loaders take a folder with this model, pruned by ``plan``."""
    auto = min(auto_classes(model), default=type(model).__name__)
    if equal_config(model, model.config) is not None:
        return f"The saved folder loads with plain `transformers.{auto}.from_pretrained(folder)`."
    needs = (
        "Plain transformers cannot build these layers: load the saved folder with "
        f"`liar_ext.load_pruned(folder)` or, where liar_ext is installed, with `transformers.{auto}"
        ".from_pretrained(folder, trust_remote_code=True)`."
    )
    if plan.hidden is not None and family_of(model).stream.multiple_of is None:
        return f"{needs} No config of {plan.model_type} can tell of a smaller hidden size."
    cut = [site for site in sites(model, attn_unit=plan.attn_unit) if site.name in plan.sites]
    stuck = {s.kind for s in cut if s.wiring.config is None and plan.sites[s.name].removed}
    options = [f"--sites {kind}" for kind in ("attn", "mlp") if stuck and kind not in stuck]
    if any(plan.sites[s.name].bias and s.wiring.bias_flag is None for s in cut):
        options.append("--reconstruct linear")
    narrowed = ""
    if plan.hidden is not None and "heads" in family_of(model).stream.config.values():
        heads = len(plan.hidden.kept) // sites(model, ("attn",))[0].head_dim
        narrowed = f" {len(plan.hidden.kept)} hidden features go with {heads} heads in every layer."
    choices = " ".join([*options, "--uniform-layers"])
    return (
        f"{needs} With `{choices}` a folder needs no liar_ext, if the config of {plan.model_type} "
        f"allows the sizes.{narrowed}"
    )


def _narrowed_fields(model: nn.Module) -> dict[str, int]:
    """Return the config fields that a smaller hidden size sets; none if it is the dense one."""
    family = family_of(model)
    if family.stream is None:
        return {}
    site = sites(model, ("attn",))[0]
    sizes = {**site.sizes, "hidden": site.d_out}
    fields = {name: sizes[size] for name, size in family.stream.config.items()}
    dense = block_config(family, model.config)
    same = all(
        getattr(dense, n) == fields[n] for n, s in family.stream.config.items() if s == "hidden"
    )
    return {} if same else fields


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the model's weights hold, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
