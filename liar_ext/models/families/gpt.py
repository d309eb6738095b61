"""Decoders of GPT's wiring: fused projections, or biases and learned positions."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, HEADS, LLAMA, ROW
from liar_ext.models.families.reasons import HEADS_OF_HIDDEN
from liar_ext.models.family import Family, Stack, Step, Stream, Wiring

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
FUSED_ROWS = (
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


_STREAM = Stream(
    start=(Step("write", ("wte", "wpe")),),
    block=(
        Step("norm", ("ln_1",)),
        Step("read", ("attn.c_attn",)),
        Step("write", ("attn.c_proj",)),
        Step("norm", ("ln_2",)),
        Step("read", ("mlp.c_fc",)),
        Step("write", ("mlp.c_proj",)),
    ),
    ends=(
        (
            Step("norm", ("ln_f",)),
            Step("read", ("lm_head", "score", "classifier", "qa_outputs")),
        ),
    ),
    config={"n_embd": "hidden", "n_head": "heads"},
    multiple_of="head_dim",
)

# The rows of the table.
GPT2_ROWS = (
    # GPT-2 computes [q; k; v] in one transposed layer and splits the result at split_size.
    Family(
        name="gpt2",
        blocks="h",
        attn=Wiring(
            producers=("attn.c_attn",),
            consumer="attn.c_proj",
            head_dim="attn.head_dim",
            stacked={"attn.c_attn": Stack(("query", "key", "value"))},
            transposed=True,
            numbers={
                "attn.num_heads": "heads",
                "attn.embed_dim": "features",
                "attn.split_size": "features",
            },
        ),
        mlp=Wiring(
            producers=("mlp.c_fc",),
            consumer="mlp.c_proj",
            transposed=True,
            config={"n_inner": "features"},
        ),
        stream=_STREAM,
        without={"stock": HEADS_OF_HIDDEN},
    ),
)


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
GPT_NEOX_ROWS = (
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


# The embeddings may be narrower than the blocks, as they are in OPT-350m, and that model also has
# its norms elsewhere.
OPT = Stream(
    start=(Step("write", ("decoder.embed_tokens", "decoder.embed_positions")),),
    block=(
        Step("norm", ("self_attn_layer_norm",)),
        Step("read", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Step("write", ("self_attn.out_proj",)),
        Step("norm", ("final_layer_norm",)),
        Step("read", ("fc1",)),
        Step("write", ("fc2",)),
    ),
    ends=(
        (
            Step("norm", ("decoder.final_layer_norm",)),
            Step("read", ("lm_head", "score", "qa_outputs")),
        ),
    ),
    config={
        "hidden_size": "hidden",
        "word_embed_proj_dim": "hidden",
        "num_attention_heads": "heads",
    },
    multiple_of="head_dim",
    requires={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
)


# The rows of the table.
OPT_ROWS = (
    Family(
        name="opt",
        blocks="decoder.layers",
        attn=Wiring(
            producers=("self_attn.q_proj",),
            key_value=("self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.out_proj",
            head_dim="self_attn.head_dim",
            numbers={"self_attn.num_heads": "heads", "self_attn.embed_dim": "features"},
        ),
        mlp=Wiring(producers=("fc1",), consumer="fc2", config={"ffn_dim": "features"}),
        stream=OPT,
        without={"stock": HEADS_OF_HIDDEN},
    ),
)

ROWS = (*FUSED_ROWS, *GPT2_ROWS, *GPT_NEOX_ROWS, *OPT_ROWS)
