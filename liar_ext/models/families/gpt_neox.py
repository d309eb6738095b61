"""GPT-NeoX: q, k and v of a head fused, branches in parallel or one after the other."""

from __future__ import annotations

from liar_ext.models.families.reasons import HEADS_OF_HIDDEN
from liar_ext.models.family import Family, Stack, Step, Stream, Wiring

# Both norms read the same stream where the two branches are parallel, and each its own else.
GPT_NEOX = Stream(
    start=(Step("write", ("embed_in",)),),
    block=(
        Step("norm", ("input_layernorm",)),
        Step("read", ("attention.query_key_value",)),
        Step("write", ("attention.dense",)),
        Step("norm", ("post_attention_layernorm",)),
        Step("read", ("mlp.dense_h_to_4h",)),
        Step("write", ("mlp.dense_4h_to_h",)),
    ),
    ends=(
        (
            Step("norm", ("final_layer_norm",)),
            Step("read", ("lm_head", "score", "classifier", "qa_outputs")),
        ),
    ),
    config={"hidden_size": "hidden", "num_attention_heads": "heads"},
    multiple_of="head_dim",
)


# The rows of the table.
ROWS = (
    Family(
        name="gpt_neox",
        blocks="layers",
        attn=Wiring(
            producers=("attention.query_key_value",),
            consumer="attention.dense",
            head_dim="attention.head_size",
            stacked={"attention.query_key_value": Stack(("query", "key", "value"), by_group=True)},
            bias_flag="attention_bias",
        ),
        mlp=Wiring(
            producers=("mlp.dense_h_to_4h",),
            consumer="mlp.dense_4h_to_h",
            config={"intermediate_size": "features"},
        ),
        stream=GPT_NEOX,
        without={"stock": HEADS_OF_HIDDEN},
    ),
)
