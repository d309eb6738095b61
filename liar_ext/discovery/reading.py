"""Read the config of a folder or a repository, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.inspection import read_config
from liar_ext.checkpoint.reading import reading
from liar_ext.discovery.shrinking import MOST_DEPTH, bound_layers, most_layers
from liar_ext.discovery.suggest import Suggestion, suggest_family
from liar_ext.errors import InputError
from liar_ext.models.registry import FAMILIES

# What a pruned or quantised folder says beside the sizes of its dense model.
EXTRA = ("liar", "per_layer_config", "quantization_config", "auto_map")


def suggest_for(name: str) -> Suggestion:
    """Propose a row for the model in a folder, or in a repository of the hub, by its config alone.

    Raises
    ------
    InputError
        If there is no config, transformers has no such architecture, or no row can be proposed.

    Notes
    -----
    No code of a folder or repository is run. For a model that needs its own, build it, and call
    :func:`liar_ext.discovery.suggest.suggest_family` with it.
    """
    fields = _fields(name)
    kind = fields.get("model_type")
    if kind in FAMILIES:
        return Suggestion(FAMILIES[kind], known=True)
    import transformers

    if kind not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"families: transformers {transformers.__version__} has no architecture "
            f"{str(kind)[:60]!r}, and no code of {name} is run; load the model by what it needs, "
            "and call liar_ext.suggest_family(model)"
        )
    fields = {key: value for key, value in fields.items() if key not in EXTRA}
    if most_layers(fields) > MOST_DEPTH:
        fields = bound_layers(fields)
    with reading(f"the config of {name}", "families"):
        config = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    return suggest_family(config)


def _fields(name: str) -> Mapping[str, Any]:
    """Return the fields of a config."""
    path = Path(name)
    if path.is_dir():
        return read_config(path, "families")
    if path.suffix == ".gguf" or path.is_absolute() or path.exists():
        raise InputError(f"families: {name} must be a model folder or a hub id")
    from transformers import PreTrainedConfig

    with reading(name, "families"):
        return PreTrainedConfig.get_config_dict(name)[0]
