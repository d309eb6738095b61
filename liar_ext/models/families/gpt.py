"""Decoders of other wiring than Llama's: fused layers, branches side by side, other mixers."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import (
    ATTN,
    GROUPS,
    HEADS,
    LLAMA,
    MLP,
    NORMS,
    QKVO,
    ROW,
    counts,
    in_pictures,
)
from liar_ext.models.family import (
    GATE_UP,
    HEADS_OF_HIDDEN,
    QKV,
    QKV_BY_GROUP,
    TIED,
    Family,
    Stream,
    attention,
    mlp,
    steps,
)

# Where q ends, Phi's forward computes by the config's number of heads.
_PHI3 = attention(
    "self_attn",
    "qkv_proj o_proj",
    numbers={**GROUPS, "num_key_value_heads": "kv_heads", "config.num_attention_heads": "heads"},
    stack=QKV,
    config=HEADS,
)
_FUSED = mlp("mlp.gate_up_proj mlp.down_proj", stack=GATE_UP)
_GLM = replace(
    ROW,
    name="glm",
    attn=ATTN,
    mlp=_FUSED,
    stream=replace(LLAMA, block=steps(NORMS[0], ATTN, NORMS[1], _FUSED)),
)
FUSED_ROWS = (
    # Also of Phi-4.
    replace(
        _GLM,
        name="phi3",
        attn=_PHI3,
        stream=replace(LLAMA, block=steps(NORMS[0], _PHI3, NORMS[1], _FUSED)),
    ),
    _GLM,
    replace(
        _GLM,
        name="glm4",
        attn=replace(ATTN, output_norm="post_self_attn_layernorm"),
        mlp=replace(_FUSED, output_norm="post_mlp_layernorm"),
        stream=replace(
            LLAMA,
            block=steps(
                *(NORMS[0], ATTN, "branch_norm post_self_attn_layernorm"),
                *(NORMS[1], _FUSED, "branch_norm post_mlp_layernorm"),
            ),
        ),
    ),
)

# GPT-2 computes [q; k; v] in one transposed layer and splits the result at split_size.
_GPT2 = attention(
    "attn",
    "c_attn c_proj",
    numbers={"num_heads": "heads", "embed_dim": "features", "split_size": "features"},
    stack=QKV,
    transposed=True,
)
_GPT2_MLP = mlp("mlp.c_fc mlp.c_proj", "n_inner", transposed=True)
_NEOX = attention(
    "attention",
    "query_key_value dense",
    "head_size",
    stack=QKV_BY_GROUP,
    bias_flag="attention_bias",
)
_NEOX_MLP = mlp("mlp.dense_h_to_4h mlp.dense_4h_to_h")
_OPT = attention(
    "self_attn",
    "q_proj k_proj v_proj out_proj",
    numbers={"num_heads": "heads", "embed_dim": "features"},
)
_OPT_MLP = mlp("fc1 fc2", "ffn_dim")
GPT_ROWS = (
    Family(
        name="gpt2",
        blocks="h",
        attn=_GPT2,
        mlp=_GPT2_MLP,
        stream=Stream(
            start=steps("write wte wpe"),
            block=steps("norm ln_1", _GPT2, "norm ln_2", _GPT2_MLP),
            ends=(steps("norm ln_f", "read lm_head score classifier qa_outputs"),),
            config={"n_embd": "hidden", "n_head": "heads"},
            multiple_of="head_dim",
        ),
        without={"stock": HEADS_OF_HIDDEN},
    ),
    # Both norms read the same stream where the two branches are parallel, and each its own else.
    Family(
        name="gpt_neox",
        blocks="layers",
        attn=_NEOX,
        mlp=_NEOX_MLP,
        stream=Stream(
            start=steps("write embed_in"),
            block=steps(NORMS[0], _NEOX, NORMS[1], _NEOX_MLP),
            ends=(steps("norm final_layer_norm", "read lm_head score classifier qa_outputs"),),
            config=TIED,
            multiple_of="head_dim",
        ),
        without={"stock": HEADS_OF_HIDDEN},
    ),
    # The embeddings may be narrower than the blocks, as they are in OPT-350m, and that model also
    # has its norms elsewhere.
    Family(
        name="opt",
        blocks="decoder.layers",
        attn=_OPT,
        mlp=_OPT_MLP,
        stream=Stream(
            start=steps("write decoder.embed_tokens decoder.embed_positions"),
            block=steps("norm self_attn_layer_norm", _OPT, "norm final_layer_norm", _OPT_MLP),
            ends=(steps("norm decoder.final_layer_norm", "read lm_head score qa_outputs"),),
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
        ),
        without={"stock": HEADS_OF_HIDDEN},
    ),
)

# Norms of q and k, which Command R+ has, keep weights of every head.
_NO_NORMS = {"use_qk_norm": False}
_SIDE_BY_SIDE = replace(LLAMA, block=steps(NORMS[0], ATTN, MLP))
_COHERE = replace(
    ROW,
    name="cohere",
    attn=replace(ROW.attn, requires=_NO_NORMS),
    mlp=MLP,
    stream=replace(_SIDE_BY_SIDE, requires=_NO_NORMS),
)
_PHI, _PHI_MLP = replace(ATTN, consumer="self_attn.dense"), mlp("mlp.fc1 mlp.fc2")
# q, k and v of a KV group together: of a head in the first models, of all heads in those with one
# key and value, of some in those with the new architecture.
_FALCON = attention(
    "self_attention",
    "query_key_value dense",
    numbers={"num_heads": "heads", "num_kv_heads": "kv_heads"},
    stack=QKV_BY_GROUP,
    requires={"alibi": False},  # slopes are made for all heads at once
)
_FALCON_MLP = mlp("mlp.dense_h_to_4h mlp.dense_4h_to_h", "ffn_hidden_size")
PARALLEL_ROWS = (
    _COHERE,
    replace(_COHERE, name="cohere2", attn=ROW.attn, stream=_SIDE_BY_SIDE),
    Family(
        name="phi",
        blocks="layers",
        attn=_PHI,
        mlp=_PHI_MLP,
        stream=replace(
            LLAMA,
            block=steps(NORMS[0], _PHI, _PHI_MLP),
            ends=(steps("norm final_layernorm", "read lm_head score"),),
        ),
    ),
    replace(
        ROW,
        name="stablelm",
        attn=attention(
            "self_attn",
            QKVO,
            numbers=counts("num_heads"),
            requires={"qk_layernorm": False},  # else a module per head
        ),
        mlp=MLP,
        stream=replace(
            LLAMA,
            block=steps(NORMS[0], ATTN, "norm_if post_attention_layernorm", MLP),
            config={**TIED, "num_key_value_heads": "kv_heads"},
            multiple_of="head_dim",
        ),
        without={"stock": HEADS_OF_HIDDEN},
    ),
    # A norm before each branch, one for both, or one after the other.
    Family(
        name="falcon",
        blocks="h",
        attn=_FALCON,
        mlp=_FALCON_MLP,
        stream=Stream(
            start=steps("write word_embeddings"),
            block=steps(
                *("norm_if input_layernorm", "norm_if ln_attn", _FALCON),
                *("norm_if post_attention_layernorm", "norm_if ln_mlp", _FALCON_MLP),
            ),
            ends=(steps("norm ln_f", "read lm_head score classifier qa_outputs"),),
            config={**TIED, "num_kv_heads": "kv_heads"},
            multiple_of="head_dim",
        ),
        without={"stock": HEADS_OF_HIDDEN},
    ),
)

# A head of q_proj is its query and the gate of its output, one after the other.
_LINEAR = " ".join(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a"))
_QWEN = replace(
    ROW,
    name="qwen3_5_text",
    attn=replace(ROW.attn, optional=True),
    mlp=MLP,
    stream=replace(
        LLAMA,
        block=steps(
            NORMS[0],
            f"read_if {' '.join(ATTN.layers[:-1])} {_LINEAR}",
            "write_if self_attn.o_proj linear_attn.out_proj",
            *(NORMS[1], MLP),
        ),
        norm_offset=1.0,
    ),
)
HYBRID_ROWS = (
    _QWEN,
    in_pictures(_QWEN, "qwen3_5"),
    Family(
        name="lfm2",
        blocks="layers",
        attn=replace(ATTN, consumer="self_attn.out_proj", optional=True),
        # Of intermediate_size the config takes two thirds, rounded, unless it is told not to.
        mlp=mlp("feed_forward.w1 feed_forward.w3 feed_forward.w2", ""),
        without={
            "hidden": "its convolutions are as wide as the hidden size",
            "stock": "channels: its config rounds their number",
        },
    ),
)

ROWS = (*FUSED_ROWS, *GPT_ROWS, *PARALLEL_ROWS, *HYBRID_ROWS)
