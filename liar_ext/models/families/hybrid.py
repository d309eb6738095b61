"""Decoders of which some blocks mix tokens by other means than attention; these stay whole."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, LLAMA, MLP, ROW
from liar_ext.models.families.reasons import PICTURES
from liar_ext.models.family import Family, Step, Wiring

# A head of q_proj is its query and the gate of its output, one after the other.
_QWEN = replace(
    ROW,
    name="qwen3_5_text",
    attn=replace(ROW.attn, optional=True),
    mlp=MLP,
    stream=replace(
        LLAMA,
        block=(
            LLAMA.block[0],
            Step(
                "read_if",
                (
                    *LLAMA.block[1].layers,
                    *(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")),
                ),
            ),
            Step("write_if", ("self_attn.o_proj", "linear_attn.out_proj")),
            *LLAMA.block[3:],
        ),
        norm_offset=1.0,
    ),
)

# The rows of the table.
ROWS = (
    _QWEN,
    replace(
        _QWEN,
        name="qwen3_5",
        blocks="language_model.layers",
        config="text_config",
        stream=None,
        without={"hidden": PICTURES},
    ),
    Family(
        name="lfm2",
        blocks="layers",
        attn=replace(ATTN, consumer="self_attn.out_proj", optional=True),
        # Of intermediate_size the config takes two thirds, rounded, unless it is told not to.
        mlp=Wiring(producers=("feed_forward.w1", "feed_forward.w3"), consumer="feed_forward.w2"),
        without={
            "hidden": "its convolutions are as wide as the hidden size",
            "stock": "channels: its config rounds their number",
        },
    ),
)
