"""Decoders with attention and MLP side by side, and with other mixers than attention."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, LLAMA, MLP, ROW
from liar_ext.models.families.reasons import HEADS_OF_HIDDEN, PICTURES
from liar_ext.models.family import Family, Stack, Step, Stream, Wiring

_TIED = {
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
}
_COHERE = replace(
    ROW,
    name="cohere",
    # Norms of q and k, which Command R+ has, keep weights of every head.
    attn=replace(ROW.attn, requires={"use_qk_norm": False}),
    mlp=MLP,
    stream=replace(
        LLAMA,
        block=(*LLAMA.block[:3], *LLAMA.block[4:]),
        requires={"use_qk_norm": False},
    ),
)
_PHI = Stream(
    start=(Step("write", ("embed_tokens",)),),
    block=(
        Step("norm", ("input_layernorm",)),
        Step("read", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Step("write", ("self_attn.dense",)),
        Step("read", ("mlp.fc1",)),
        Step("write", ("mlp.fc2",)),
    ),
    ends=((Step("norm", ("final_layernorm",)), Step("read", ("lm_head", "score"))),),
    config={"hidden_size": "hidden"},
    multiple_of="heads",
)
# A norm before each branch, one for both, or one after the other.
_FALCON = Stream(
    start=(Step("write", ("word_embeddings",)),),
    block=(
        Step("norm_if", ("input_layernorm",)),
        Step("norm_if", ("ln_attn",)),
        Step("read", ("self_attention.query_key_value",)),
        Step("write", ("self_attention.dense",)),
        Step("norm_if", ("post_attention_layernorm",)),
        Step("norm_if", ("ln_mlp",)),
        Step("read", ("mlp.dense_h_to_4h",)),
        Step("write", ("mlp.dense_4h_to_h",)),
    ),
    ends=(
        (Step("norm", ("ln_f",)), Step("read", ("lm_head", "score", "classifier", "qa_outputs"))),
    ),
    config={
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "num_kv_heads": "kv_heads",
    },
    multiple_of="head_dim",
)

# The rows of the table.
PARALLEL_ROWS = (
    _COHERE,
    replace(
        _COHERE,
        name="cohere2",
        attn=ROW.attn,
        stream=replace(_COHERE.stream, requires={}),
    ),
    Family(
        name="phi",
        blocks="layers",
        attn=replace(ATTN, consumer="self_attn.dense"),
        mlp=Wiring(
            producers=("mlp.fc1",), consumer="mlp.fc2", config={"intermediate_size": "features"}
        ),
        stream=_PHI,
    ),
    replace(
        ROW,
        name="stablelm",
        attn=replace(
            ATTN,
            numbers={
                **ATTN.numbers,
                "self_attn.num_heads": "heads",
                "self_attn.num_key_value_heads": "kv_heads",
            },
            config=None,
            # Its norm of q and k is a module per head.
            requires={"qk_layernorm": False},
        ),
        mlp=MLP,
        stream=replace(
            LLAMA,
            block=(
                *LLAMA.block[:3],
                Step("norm_if", ("post_attention_layernorm",)),
                *LLAMA.block[4:],
            ),
            config=_TIED,
            multiple_of="head_dim",
        ),
        without={"stock": HEADS_OF_HIDDEN},
    ),
    # q, k and v of a KV group together: of a head in the first models, of all heads in those with
    # one key and value, of some in those with the new architecture.
    Family(
        name="falcon",
        blocks="h",
        attn=Wiring(
            producers=("self_attention.query_key_value",),
            consumer="self_attention.dense",
            head_dim="self_attention.head_dim",
            stacked={
                "self_attention.query_key_value": Stack(("query", "key", "value"), by_group=True)
            },
            numbers={
                "self_attention.num_heads": "heads",
                "self_attention.num_kv_heads": "kv_heads",
            },
            # Slopes of alibi are made for all heads at once.
            requires={"alibi": False},
        ),
        mlp=Wiring(
            producers=("mlp.dense_h_to_4h",),
            consumer="mlp.dense_4h_to_h",
            config={"ffn_hidden_size": "features"},
        ),
        stream=_FALCON,
        without={"stock": HEADS_OF_HIDDEN},
    ),
)


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
HYBRID_ROWS = (
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

ROWS = (*PARALLEL_ROWS, *HYBRID_ROWS)
