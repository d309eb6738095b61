"""Decoders of Llama's kind whose MLP has no gate: ``down(act(up x))``."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, LLAMA, MLP, ROW
from liar_ext.models.family import Family, Step, Wiring

_UP = replace(MLP, producers=("mlp.up_proj",), bias_flag="mlp_bias")


def _block(before: str, between: str, up: str, down: str) -> tuple[Step, ...]:
    """Return the steps of a block with these norms and these layers of its MLP."""
    return (
        Step("norm", (before,)),
        *LLAMA.block[1:3],
        Step("norm", (between,)),
        Step("read", (up,)),
        Step("write", (down,)),
    )


_PLAIN = _block("input_layernorm", "post_attention_layernorm", "mlp.up_proj", "mlp.down_proj")
_STREAM = replace(LLAMA, block=_PLAIN)

# The rows of the table.
ROWS = (
    replace(ROW, name="arcee", mlp=_UP, stream=_STREAM),
    replace(ROW, name="jais2", mlp=_UP, stream=_STREAM),
    # Squared ReLU; its LayerNorm scales by its weight and one.
    replace(
        ROW,
        name="nemotron",
        attn=replace(
            ROW.attn,
            numbers={
                **ATTN.numbers,
                "self_attn.num_heads": "heads",
                "self_attn.num_key_value_heads": "kv_heads",
            },
        ),
        mlp=_UP,
        stream=replace(_STREAM, norm_offset=1.0),
    ),
    replace(
        ROW,
        name="apertus",
        mlp=replace(_UP, numbers={}, bias_flag=None),
        stream=replace(
            LLAMA,
            block=_block(
                "attention_layernorm", "feedforward_layernorm", "mlp.up_proj", "mlp.down_proj"
            ),
        ),
    ),
    Family(
        name="nanochat",
        blocks="layers",
        attn=ROW.attn,
        mlp=Wiring(
            producers=("mlp.fc1",), consumer="mlp.fc2", config={"intermediate_size": "features"}
        ),
        without={"hidden": "its stream begins as what a norm without weights puts out"},
    ),
    replace(
        ROW,
        name="starcoder2",
        attn=replace(ATTN, bias_flag="use_bias"),
        mlp=Wiring(
            producers=("mlp.c_fc",),
            consumer="mlp.c_proj",
            config={"intermediate_size": "features"},
            bias_flag="use_bias",
        ),
        stream=replace(
            LLAMA,
            block=_block("input_layernorm", "post_attention_layernorm", "mlp.c_fc", "mlp.c_proj"),
        ),
    ),
)
