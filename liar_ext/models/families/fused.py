"""Phi-3 and GLM: Llama's kind with q, k and v, or gate and up, stacked in one layer."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, HEADS, LLAMA, ROW
from liar_ext.models.family import Family, Stack, Step, Wiring

_MLP = Wiring(
    producers=("mlp.gate_up_proj",),
    consumer="mlp.down_proj",
    stacked={"mlp.gate_up_proj": Stack(("gate", "up"))},
    config={"intermediate_size": "features"},
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _block(*reads: str) -> tuple[Step, ...]:
    """Return the steps of a block of which ``reads`` are the layers that attention reads by."""
    return (
        Step("norm", ("input_layernorm",)),
        Step("read", reads),
        Step("write", ("self_attn.o_proj",)),
        Step("norm", ("post_attention_layernorm",)),
        Step("read", ("mlp.gate_up_proj",)),
        Step("write", ("mlp.down_proj",)),
    )


_BLOCK = _block(*_QKV)
_SANDWICHED = (
    *_BLOCK[:3],
    Step("branch_norm", ("post_self_attn_layernorm",)),
    *_BLOCK[3:],
    Step("branch_norm", ("post_mlp_layernorm",)),
)
_GLM = replace(ROW, name="glm", attn=ATTN, mlp=_MLP, stream=replace(LLAMA, block=_BLOCK))

# The rows of the table.
ROWS = (
    # Also of Phi-4. Where q ends, its forward computes by the config's number of heads.
    Family(
        name="phi3",
        blocks="layers",
        attn=Wiring(
            producers=("self_attn.qkv_proj",),
            consumer="self_attn.o_proj",
            head_dim="self_attn.head_dim",
            stacked={"self_attn.qkv_proj": Stack(("query", "key", "value"))},
            numbers={
                "self_attn.num_key_value_groups": "group_size",
                "self_attn.num_key_value_heads": "kv_heads",
                "self_attn.config.num_attention_heads": "heads",
            },
            config=HEADS,
        ),
        mlp=_MLP,
        stream=replace(LLAMA, block=_block("self_attn.qkv_proj")),
    ),
    _GLM,
    replace(
        _GLM,
        name="glm4",
        attn=replace(ATTN, output_norm="post_self_attn_layernorm"),
        mlp=replace(_MLP, output_norm="post_mlp_layernorm"),
        stream=replace(LLAMA, block=_SANDWICHED),
    ),
)
