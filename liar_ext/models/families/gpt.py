"""Decoders of other wiring than Llama's: fused layers, branches side by side, other mixers."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import (
    ATTN,
    GROUPS,
    HEADS,
    MLP,
    NORMS,
    QKVO,
    ROW,
    counts,
    with_block,
)
from liar_ext.models.family import (
    GATE_UP,
    NO_STOCK,
    QKV,
    QKV_BY_GROUP,
    TIED,
    Family,
    attention,
    mlp,
    steps,
    stream,
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
_GLM4 = with_block(
    *(NORMS[0], ATTN, "branch_norm post_self_attn_layernorm"),
    *(NORMS[1], _FUSED, "branch_norm post_mlp_layernorm"),
)
_GLM = replace(
    ROW, name="glm", attn=ATTN, mlp=_FUSED, stream=with_block(NORMS[0], ATTN, NORMS[1], _FUSED)
)
FUSED_ROWS = (
    # Also of Phi-4.
    replace(_GLM, name="phi3", attn=_PHI3, stream=with_block(NORMS[0], _PHI3, NORMS[1], _FUSED)),
    _GLM,
    replace(
        _GLM,
        name="glm4",
        attn=replace(ATTN, output_norm="post_self_attn_layernorm"),
        mlp=replace(_FUSED, output_norm="post_mlp_layernorm"),
        stream=_GLM4,
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
_TASKS = "read lm_head score classifier qa_outputs"
_GPT2_STREAM = stream(
    ["write wte wpe"],
    ["norm ln_1", _GPT2, "norm ln_2", _GPT2_MLP],
    ["norm ln_f", _TASKS],
    config={"n_embd": "hidden", "n_head": "heads"},
)
_NEOX = attention(
    *("attention", "query_key_value dense", "head_size"),
    stack=QKV_BY_GROUP,
    bias_flag="attention_bias",
)
_NEOX_MLP = mlp("mlp.dense_h_to_4h mlp.dense_4h_to_h")
# Both norms read the same stream where the two branches are parallel, and each its own else.
_NEOX_STREAM = stream(
    ["write embed_in"],
    [NORMS[0], _NEOX, NORMS[1], _NEOX_MLP],
    ["norm final_layer_norm", _TASKS],
)
_OPT = attention(
    "self_attn",
    "q_proj k_proj v_proj out_proj",
    numbers={"num_heads": "heads", "embed_dim": "features"},
)
_OPT_MLP = mlp("fc1 fc2", "ffn_dim")
# The embeddings may be narrower than the blocks, as they are in OPT-350m, and that model also has
# its norms elsewhere.
_OPT_STREAM = stream(
    ["write decoder.embed_tokens decoder.embed_positions"],
    ["norm self_attn_layer_norm", _OPT, "norm final_layer_norm", _OPT_MLP],
    ["norm decoder.final_layer_norm", "read lm_head score qa_outputs"],
    config={
        **{"hidden_size": "hidden", "word_embed_proj_dim": "hidden"},
        "num_attention_heads": "heads",
    },
    requires={
        **{"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        "layer_norm_elementwise_affine": True,
    },
)
GPT_ROWS = (
    Family("gpt2", "h", _GPT2, _GPT2_MLP, stream=_GPT2_STREAM, without=NO_STOCK),
    Family("gpt_neox", "layers", _NEOX, _NEOX_MLP, stream=_NEOX_STREAM, without=NO_STOCK),
    Family("opt", "decoder.layers", _OPT, _OPT_MLP, stream=_OPT_STREAM, without=NO_STOCK),
)

# Norms of q and k, which Command R+ has, keep weights of every head.
_NO_NORMS = {"use_qk_norm": False}
_SIDE_BY_SIDE = with_block(NORMS[0], ATTN, MLP)
_COHERE = replace(
    ROW,
    name="cohere",
    attn=replace(ROW.attn, requires=_NO_NORMS),
    mlp=MLP,
    stream=replace(_SIDE_BY_SIDE, requires=_NO_NORMS),
)
_PHI, _PHI_MLP = replace(ATTN, consumer="self_attn.dense"), mlp("mlp.fc1 mlp.fc2")
_PHI_STREAM = replace(
    with_block(NORMS[0], _PHI, _PHI_MLP),
    ends=(steps("norm final_layernorm", "read lm_head score"),),
)
_STABLELM = attention(
    "self_attn",
    QKVO,
    numbers=counts("num_heads"),
    requires={"qk_layernorm": False},  # else a module per head
)
_STABLELM_STREAM = replace(
    with_block(NORMS[0], ATTN, "norm_if post_attention_layernorm", MLP),
    config={**TIED, "num_key_value_heads": "kv_heads"},
    multiple_of="head_dim",
)
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
# A norm before each branch, one for both, or one after the other.
_FALCON_STREAM = stream(
    ["write word_embeddings"],
    [
        *("norm_if input_layernorm", "norm_if ln_attn", _FALCON),
        *("norm_if post_attention_layernorm", "norm_if ln_mlp", _FALCON_MLP),
    ],
    ["norm ln_f", _TASKS],
    config={**TIED, "num_kv_heads": "kv_heads"},
)
PARALLEL_ROWS = (
    _COHERE,
    replace(_COHERE, name="cohere2", attn=ROW.attn, stream=_SIDE_BY_SIDE),
    Family("phi", "layers", _PHI, _PHI_MLP, stream=_PHI_STREAM),
    Family("stablelm", "layers", _STABLELM, MLP, stream=_STABLELM_STREAM, without=NO_STOCK),
    Family("falcon", "h", _FALCON, _FALCON_MLP, stream=_FALCON_STREAM, without=NO_STOCK),
)

ROWS = (*FUSED_ROWS, *GPT_ROWS, *PARALLEL_ROWS)
