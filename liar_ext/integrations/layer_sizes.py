"""The sizes that a config gives each layer, and whether weights and ranks agree with them.

Read through ``per_layer_config`` of transformers, which gives the config of any one layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from liar_ext.errors import InputError

SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
PROJECTION = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.([qkvo]_proj|gate_proj|up_proj|down_proj)"
    r"\.(weight|bias|weight_shape)$"
)


def is_pruned(config: Any) -> bool:
    """Tell whether a config is of a pruned model: marked as ours, or with sizes that differ."""
    differing = getattr(config, "per_layer_attributes", None) or ()
    return hasattr(config, "liar") or any(name in SIZES for name in differing)


def check_tensor_parallel(config: Any, ranks: int) -> None:
    """Refuse a number of ranks that doesn't divide every layer.

    Query heads and channels must be multiples of it; key/value heads too, or divide it, since
    vLLM then gives several ranks the same ones.

    Raises
    ------
    InputError
        With the layer, and the numbers of ranks that all layers allow.
    """

    def allowed(layer: Any, ranks: int) -> bool:
        heads, key_value, channels = (getattr(layer, name) for name in SIZES)
        shared = key_value % ranks == 0 or ranks % key_value == 0
        return heads % ranks == 0 and channels % ranks == 0 and shared

    layers = list(config.per_layer_config)
    bad = [index for index, layer in enumerate(layers) if not allowed(layer, ranks)]
    if bad:
        sizes = ", ".join(f"{name} {getattr(layers[bad[0]], name)}" for name in SIZES)
        fit = [n for n in range(1, ranks) if all(allowed(layer, n) for layer in layers)]
        raise InputError(
            f"vllm: tensor_parallel_size {ranks} must divide every layer, but layer {bad[0]} has "
            f"{sizes} ({len(bad)} such layers); use tensor_parallel_size "
            f"{' or '.join(map(str, fit))}, or prune to sizes that it divides"
        )


def expected_shape(config: Any, index: int, projection: str) -> tuple[int, int]:
    """Return (rows, columns) of a projection's weight by ``config.per_layer_config[index]``."""
    layer = config.per_layer_config[index]
    hidden = layer.hidden_size
    heads, key_value, channels = (getattr(layer, name) for name in SIZES)
    head_dim = getattr(layer, "head_dim", None) or hidden // heads
    return {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (key_value * head_dim, hidden),
        "v_proj": (key_value * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (channels, hidden),
        "up_proj": (channels, hidden),
        "down_proj": (hidden, channels),
    }[projection]


def check_shapes(
    weights: Iterable[tuple[str, Tensor]], config: Any, quantised: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, and refuse the first projection whose shape isn't the config's.

    Bytes of a quantised model may hold several numbers each, in any order: they pass. Beside packed
    weights compressed-tensors writes their ``weight_shape``, which is compared.

    Raises
    ------
    InputError
        With the name of the weight and both shapes.
    """
    for name, weight in weights:
        match = PROJECTION.search(name)
        if match is not None and not (quantised and weight.dtype == torch.uint8):
            index, projection, kind = int(match[1]), match[2], match[3]
            if index >= config.num_hidden_layers:
                raise InputError(
                    f"vllm: the weights have {name}, config.json has {config.num_hidden_layers} "
                    "layers; copy the folder again"
                )
            got = tuple(weight.tolist() if kind == "weight_shape" else weight.shape)
            wanted = expected_shape(config, index, projection)
            wanted = wanted[:1] if kind == "bias" else wanted
            if got != wanted:
                raise InputError(
                    f"vllm: {name} has the shape {got}, config.json says {wanted} "
                    f"for layer {index}; copy the folder again"
                )
        yield name, weight
