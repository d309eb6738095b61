"""The language half of models that also see; what reads pictures stays whole."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, MLP, ROW
from liar_ext.models.families.reasons import HEADS_OF_HIDDEN, PICTURES

_ROW = replace(
    ROW,
    name="mistral3",
    blocks="language_model.layers",
    attn=ATTN,
    mlp=MLP,
    config="text_config",
    stream=None,
    without={"hidden": PICTURES},
)
_QWEN2 = replace(
    _ROW,
    name="qwen2_vl",
    attn=replace(
        ATTN,
        numbers={
            **ATTN.numbers,
            "self_attn.num_heads": "heads",
            "self_attn.num_key_value_heads": "kv_heads",
        },
        config=None,
    ),
    without={"hidden": PICTURES, "stock": HEADS_OF_HIDDEN},
)

# The rows of the table.
ROWS = (
    _ROW,
    replace(_ROW, name="llava"),
    replace(_ROW, name="llava_onevision"),
    replace(_ROW, name="internvl"),
    replace(_ROW, name="paligemma"),
    replace(_ROW, name="idefics3", blocks="text_model.layers"),
    replace(_ROW, name="smolvlm", blocks="text_model.layers"),
    _QWEN2,
    replace(_QWEN2, name="qwen2_5_vl"),
    replace(_ROW, name="qwen3_vl", attn=ROW.attn),
)
