"""Hybrids: some blocks have linear attention, Mamba or a convolution in place of attention.

Linear attention and Mamba keep one state for all tokens. A *key head* writes it with its key and
reads it with its query, and the value heads that share these have a state each::

    projections ──▶ depthwise convolution ──▶ state ──▶ norm ──▶ gate ──▶ out_proj

Heads are independent up to that norm. If it runs over single heads, as in Gated DeltaNet, any of
them may leave; if it runs over a group of them, as in Mamba-2, whole groups alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from liar_ext.models.families.llama import ATTN, MLP, NORMS, ROW, in_pictures, with_block
from liar_ext.models.families.moe import GATED, QWEN3_EXPERTS, mixture
from liar_ext.models.family import Family, Stack, Wiring, mlp

_KEYS = ("query", "key")  # of which a value head has none of its own


def _delta(projections: Mapping[str, Stack | None]) -> Wiring:
    """Return Gated DeltaNet by its projections; those of one matrix have no Stack."""
    module = "linear_attn"
    stacks = {f"in_proj_{name}": stack for name, stack in projections.items() if stack}
    stacks["conv1d.weight"] = Stack(("query", "key", "value"), grouped=_KEYS)
    sizes = {
        **{"num_v_heads": "heads", "num_k_heads": "kv_heads"},
        **{"value_dim": "features", "key_dim": "key_features", "conv_dim": "conv_features"},
    }
    return Wiring(
        producers=tuple(f"{module}.in_proj_{name}" for name in projections),
        consumer=f"{module}.out_proj",
        head_dim=f"{module}.head_v_dim",
        key_dim=f"{module}.head_k_dim",
        stacked={f"{module}.{name}": stack for name, stack in stacks.items()},
        numbers={f"{module}.{name}": size for name, size in sizes.items()},
        config={"linear_num_value_heads": "heads", "linear_num_key_heads": "kv_heads"},
        per_head=tuple(f"{module}.{name}" for name in ("conv1d.weight", "dt_bias", "A_log")),
    )


_DELTA = _delta(
    {"qkv": Stack(("query", "key", "value"), grouped=_KEYS), "z": None, "b": None, "a": None}
)
# The same, key head by key head; b and a are a number for each value head.
_DELTA_NEXT = _delta(
    {
        "qkvz": Stack(("query", "key", "value", "gate"), by_group=True, grouped=_KEYS),
        "ba": Stack(("b", "a"), by_group=True, single=("b", "a")),
    }
)
# A head of q_proj is its query and the gate of its output, one after the other.
_QWEN = replace(
    ROW,
    name="qwen3_5_text",
    attn=(ROW.attn, _DELTA),
    mlp=MLP,
    stream=replace(
        with_block(
            NORMS[0],
            f"read_if {' '.join((*ATTN.layers[:-1], *_DELTA.producers))}",
            f"write_if {ATTN.consumer} {_DELTA.consumer}",
            f"aside_if {_DELTA.per_head[0].removesuffix('.weight')}",
            *(NORMS[1], MLP),
        ),
        norm_offset=1.0,
    ),
)
_NEXT = mixture("qwen3_next", (ROW.attn, _DELTA_NEXT), (QWEN3_EXPERTS, MLP), GATED)
DELTA_ROWS = (
    *(_QWEN, in_pictures(_QWEN, "qwen3_5")),
    *(_NEXT, replace(_NEXT, name="qwen3_5_moe_text", attn=(ROW.attn, _DELTA))),
)

CONVOLUTION_ROWS = (
    Family(
        "lfm2",
        "layers",
        replace(ATTN, consumer="self_attn.out_proj", optional=True),
        # Of intermediate_size the config takes two thirds, rounded, unless it is told not to.
        mlp("feed_forward.w1 feed_forward.w3 feed_forward.w2", ""),
        without={
            "hidden": "its convolutions are as wide as the hidden size",
            "stock": "channels: its config rounds their number",
        },
    ),
)

ROWS = (*DELTA_ROWS, *CONVOLUTION_ROWS)
