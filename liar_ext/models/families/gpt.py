"""Decoders of GPT's kind: norms with biases, MLPs without a gate, heads that share no keys."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.decoders import NORMS, TASKS
from liar_ext.models.family import (
    NO_STOCK,
    QKV,
    QKV_BY_GROUP,
    Family,
    attention,
    mlp,
    steps,
    stream,
)

_QKV_OUT = "q_proj k_proj v_proj out_proj"

# GPT-2 computes [q; k; v] in one transposed layer and splits the result at split_size.
_GPT2 = attention(
    "attn",
    "c_attn c_proj",
    numbers={"num_heads": "heads", "embed_dim": "features", "split_size": "features"},
    stack=QKV,
    transposed=True,
)
_GPT2_MLP = mlp("mlp.c_fc mlp.c_proj", "n_inner", transposed=True)
_GPT2_STREAM = stream(
    ["write wte wpe"],
    ["norm ln_1", "site attn", "norm ln_2", "site mlp"],
    ["norm ln_f", TASKS],
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
    [NORMS[0], "site attn", NORMS[1], "site mlp"],
    ["norm final_layer_norm", TASKS],
)
_OPT = attention("self_attn", _QKV_OUT, numbers={"num_heads": "heads", "embed_dim": "features"})
_OPT_MLP = mlp("fc1 fc2", "ffn_dim")
# The embeddings may be narrower than the blocks, as they are in OPT-350m, and that model also has
# its norms elsewhere.
_OPT_STREAM = stream(
    ["write decoder.embed_tokens decoder.embed_positions"],
    ["norm self_attn_layer_norm", "site attn", "norm final_layer_norm", "site mlp"],
    ["norm decoder.final_layer_norm", TASKS],
    config={
        **{"hidden_size": "hidden", "word_embed_proj_dim": "hidden"},
        "num_attention_heads": "heads",
    },
    requires={
        **{"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        "layer_norm_elementwise_affine": True,
    },
)
ROWS = [
    Family("gpt2", "h", _GPT2, _GPT2_MLP, stream=_GPT2_STREAM, without=NO_STOCK),
    Family("gpt_neox", "layers", _NEOX, _NEOX_MLP, stream=_NEOX_STREAM, without=NO_STOCK),
    Family("opt", "decoder.layers", _OPT, _OPT_MLP, stream=_OPT_STREAM, without=NO_STOCK),
]

_NEO = attention("attn.attention", _QKV_OUT, numbers={"num_heads": "heads"})
_NEO_MLP = mlp("mlp.c_fc mlp.c_proj")
_NEO_STREAM = replace(_GPT2_STREAM, config={"hidden_size": "hidden", "num_heads": "heads"})
# One norm for both branches.
_GPTJ = attention("attn", _QKV_OUT, numbers={"num_attention_heads": "heads"})
_GPTJ_MLP = mlp("mlp.fc_in mlp.fc_out", "n_inner")
_GPTJ_STREAM = replace(
    _GPT2_STREAM, start=steps("write wte"), block=steps("norm ln_1", "site attn mlp")
)
_CODEGEN = replace(_GPTJ, producers=("attn.qkv_proj",), key_value=())
_CODEGEN_STREAM = replace(
    _GPTJ_STREAM,
    block=steps("norm ln_1", _CODEGEN, "site mlp"),
    config={"n_embd": "hidden"},
    multiple_of=None,
)
# All query heads read one key and one value.
_BIGCODE = attention(
    "attn",
    "c_attn c_proj",
    numbers={"num_heads": "heads", "num_key_value_groups": "heads", "embed_dim": "features"},
    stack=QKV,
    requires={"multi_query": True},
)
_BIGCODE_MLP = mlp("mlp.c_fc mlp.c_proj", "n_inner")
# Slopes of ALiBi are made for all heads at once.
_ALIBI = {"attn": "its attention gets slopes that are made for all heads at once"}
_BLOOM = attention("self_attention", "query_key_value dense")
_BLOOM_MLP = replace(_NEOX_MLP, config=None)
_BLOOM_STREAM = stream(
    ["write word_embeddings", "norm word_embeddings_layernorm"],
    [NORMS[0], _BLOOM, NORMS[1], "site mlp"],
    ["norm ln_f", TASKS],
    config={"hidden_size": "hidden"},
    multiple_of=None,
    requires={"apply_residual_connection_post_layernorm": False},
)
_MPT, _MPT_MLP = attention("attn", "Wqkv out_proj"), mlp("ffn.up_proj ffn.down_proj", "")
_MPT_STREAM = stream(
    ["write wte"],
    ["norm norm_1", _MPT, "norm norm_2", "site mlp"],
    ["norm norm_f", TASKS],
    config={"d_model": "hidden"},
    multiple_of=None,
)
_SCALED = "its embeddings are multiplied by the root of the hidden size"
_BIOGPT = attention("self_attn", _QKV_OUT, numbers={"num_heads": "heads"})
ROWS += [
    Family("gpt_neo", "h", _NEO, _NEO_MLP, stream=_NEO_STREAM, without=NO_STOCK),
    Family("gptj", "h", _GPTJ, _GPTJ_MLP, stream=_GPTJ_STREAM, without=NO_STOCK),
    Family(
        *("codegen", "h", None, _GPTJ_MLP),
        stream=_CODEGEN_STREAM,
        without={"attn": "its queries, keys and values are stacked by quarters of the heads"},
    ),
    Family(*("gpt_bigcode", "h", _BIGCODE, _BIGCODE_MLP), stream=_GPT2_STREAM, without=NO_STOCK),
    Family("bloom", "h", None, _BLOOM_MLP, stream=_BLOOM_STREAM, without=_ALIBI),
    Family("mpt", "blocks", None, _MPT_MLP, stream=_MPT_STREAM, without=_ALIBI),
    Family(*("biogpt", "layers", _BIOGPT, mlp("fc1 fc2")), without={"hidden": _SCALED, **NO_STOCK}),
]
