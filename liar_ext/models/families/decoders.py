"""Decoders, of Llama's and of GPT's kind."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import (
    GATE_UP,
    JOINT,
    NO_STOCK,
    PICTURES,
    QKV,
    QKV_BY_GROUP,
    TIED,
    Family,
    Step,
    Stream,
    Wiring,
    attention,
    like,
    mlp,
    steps,
    stream,
)


def gated(module: str, field: str = "intermediate_size", **more: object) -> Wiring:
    """Return an MLP with a gate by its module, and its config field."""
    layers = f"{module}.gate_proj {module}.up_proj {module}.down_proj"
    return mlp(layers, field, numbers={f"{module}.intermediate_size": "features"}, **more)


# Llama and its kin compute head counts from the shapes of q, k and v; only the eager kernel reads
# num_key_value_groups.
HEADS = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
GROUPS = {"num_key_value_groups": "group_size"}
QKVO = "q_proj k_proj v_proj o_proj"
TASKS = "read lm_head score classifier qa_outputs"
# Where no flag of the config governs all layers of a site.
ATTN = attention("self_attn", QKVO, numbers=GROUPS, config=HEADS)
MLP = gated("mlp")
_FLAGGED = replace(MLP, bias_flag="mlp_bias")
SINKS = {"per_head": ("self_attn.sinks",)}  # a number of each head in its softmax
NORMS = ("norm input_layernorm", "norm post_attention_layernorm")
LLAMA = stream(
    ["write embed_tokens"],
    [NORMS[0], "site attn", NORMS[1], "site mlp"],
    ["norm norm", TASKS],
    config={"hidden_size": "hidden"},
    multiple_of="heads",  # which LlamaConfig insists on, even where head_dim is given
)
OFFSET = replace(LLAMA, norm_offset=1.0)
FLAG = {"bias_flag": "attention_bias"}
ROW = Family("llama", "layers", replace(ATTN, **FLAG), _FLAGGED, stream=LLAMA)


def with_block(*items: str | Step, **more: object) -> Stream:
    """Return Llama's stream with other steps in a block."""
    return replace(LLAMA, block=steps(*items), **more)


def counted(heads: str = "num_heads", **more: object) -> Wiring:
    """Return Llama's attention that keeps head counts, which its forward doesn't read."""
    numbers = {**GROUPS, heads: "heads", "num_key_value_heads": "kv_heads"}
    return attention("self_attn", QKVO, numbers=numbers, **more)


def in_pictures(row: Family, name: str) -> Family:
    """Return the row of a model that reads pictures, too, from that of its text model."""
    why = row.without.get("hidden")
    without = {**row.without, "hidden": f"{why}, and {PICTURES}" if why else PICTURES}
    text = {"blocks": "language_model.layers", "config": "text_config", "stream": None}
    return replace(row, name=name, without=without, **text)


# With a norm over what they write, and none before they read.
_NORMED = {"output_norm": "post_attention_layernorm"}
_MLP_AFTER = replace(MLP, output_norm="post_feedforward_layernorm")
_AFTER = with_block(
    *(Step("take", ATTN.layers[:-1]), "aside self_attn.q_norm self_attn.k_norm"),
    *("write self_attn.o_proj", "branch_norm post_attention_layernorm"),
    *(Step("take", MLP.layers[:-1]), "write mlp.down_proj"),
    "branch_norm post_feedforward_layernorm",
)
ATTN_COUNTED = counted("num_attention_heads", config=HEADS)
_OLMO2 = replace(
    ROW,
    attn=None,
    mlp=_MLP_AFTER,
    stream=replace(_AFTER, config={"hidden_size": "hidden", "head_dim": "head_dim"}),
    without={"attn": JOINT, "kv_group": JOINT},
)
_BIAS = {"bias_flag": "use_bias"}
ROWS = [
    # Granite's multipliers are numbers of the config, whatever the sizes.
    *like(ROW, "llama smollm3 granite"),
    # OLMo's norms have no weights: their readers alone are solved.
    *like(ROW, "qwen3 hunyuan_v1_dense olmo", mlp=MLP),
    *like(ROW, "mistral qwen2 ministral ministral3", attn=ATTN, mlp=MLP),
    *like(ROW, "granite_swa", attn=replace(ROW.attn, **SINKS)),
    *like(ROW, "cwm", attn=ATTN),
    *like(ROW, "seed_oss", attn=ATTN_COUNTED),
    *like(ROW, "ernie4_5", attn=replace(ATTN, **_BIAS), mlp=replace(MLP, **_BIAS)),
    *like(
        *(ROW, "helium"),
        attn=replace(ATTN, config=None),
        without={"stock": "heads: o_proj of its class is as wide as the hidden size"},
    ),
    *like(ROW, "exaone4", attn=replace(ATTN_COUNTED, **_NORMED), mlp=_MLP_AFTER, stream=_AFTER),
    *like(_OLMO2, "olmo2 olmo3"),
]

# Gemma's norms scale by their weights and one.
_SCALED = replace(OFFSET, scaled=True)
_BEFORE = steps(NORMS[0], "site attn", "norm pre_feedforward_layernorm", "site mlp")
_GEMMA = replace(ROW, name="gemma", mlp=MLP, stream=_SCALED)
_GEMMA3 = replace(
    _GEMMA,
    attn=replace(ROW.attn, **_NORMED),
    mlp=_MLP_AFTER,
    stream=replace(_SCALED, block=_BEFORE),
)
# Layers of Gemma 4 have sizes of their own in the dense config, and wider MLPs where they borrow.
# The values of some are their keys.
_LENT = "num_kv_shared_layers"
_KEPT = replace(_GEMMA3.attn, config=None, requires={_LENT: 0})
_GEMMA4 = replace(
    _GEMMA3,
    name="gemma4_text",
    attn=(_KEPT, replace(_KEPT, key_value=_KEPT.key_value[:1])),
    stream=None,
    lends=_LENT,
    without={
        "hidden": "every block reads embeddings of its own beside the stream",
        "stock": "an MLP of twice the width, unless it keeps twice as many",
    },
)
_UP = replace(_FLAGGED, producers=("mlp.up_proj",))
ROWS += [
    *(_GEMMA4, in_pictures(_GEMMA4, "gemma4")),
    *(_GEMMA, replace(_GEMMA, name="vaultgemma", stream=_GEMMA3.stream)),
    *(*like(_GEMMA3, "gemma2 gemma3_text"), in_pictures(_GEMMA3, "gemma3")),
    *like(ROW, "arcee jais2", mlp=_UP),
    # Squared ReLU.
    *like(ROW, "nemotron", attn=counted(config=HEADS, **FLAG), mlp=_UP, stream=OFFSET),
    *like(
        *(ROW, "apertus"),
        mlp=replace(_UP, numbers={}, bias_flag=None),
        stream=with_block(
            "norm attention_layernorm", "site attn", "norm feedforward_layernorm", "site mlp"
        ),
    ),
    *like(
        *(ROW, "nanochat"),
        mlp=mlp("mlp.fc1 mlp.fc2"),
        stream=None,
        without={"hidden": "its stream begins as what a norm without weights puts out"},
    ),
    *like(ROW, "starcoder2", attn=replace(ATTN, **_BIAS), mlp=mlp("mlp.c_fc mlp.c_proj", **_BIAS)),
]

# Where q ends, Phi's forward computes by the config's number of heads.
_PHI3 = attention(
    "self_attn",
    "qkv_proj o_proj",
    numbers={**GROUPS, "num_key_value_heads": "kv_heads", "config.num_attention_heads": "heads"},
    stack=QKV,
    config=HEADS,
)
_FUSED = mlp("mlp.gate_up_proj mlp.down_proj", stack=GATE_UP)
_GLM = replace(ROW, name="glm", attn=ATTN, mlp=_FUSED)
# Norms of q and k, which Command R+ has, keep weights of every head.
_NO_NORMS = {"use_qk_norm": False}
_SIDE_BY_SIDE = with_block(NORMS[0], "site attn mlp")
_COHERE = replace(ROW, name="cohere2", mlp=MLP, stream=_SIDE_BY_SIDE)
_PHI, _PHI_MLP = replace(ATTN, consumer="self_attn.dense"), mlp("mlp.fc1 mlp.fc2")
_PHI_STREAM = replace(_SIDE_BY_SIDE, ends=(steps("norm final_layernorm", TASKS),))
_STABLELM = counted(requires={"qk_layernorm": False})  # else a module per head
_STABLELM_STREAM = with_block(
    *(NORMS[0], "site attn", "norm_if post_attention_layernorm", "site mlp"),
    config={**TIED, "num_key_value_heads": "kv_heads"},
    multiple_of="head_dim",
)
# q, k and v of a KV group together: of a head in the first models, of all heads in those with one
# key and value, of some in those with the new architecture.
_FALCON = attention(
    "self_attention",
    "query_key_value dense",
    # The last one came with transformers 5.25.
    numbers={
        "num_heads": "heads",
        "num_kv_heads": "kv_heads",
        "num_key_value_groups?": "group_size",
    },
    stack=QKV_BY_GROUP,
    requires={"alibi": False},  # slopes are made for all heads at once
)
_FALCON_MLP = mlp("mlp.dense_h_to_4h mlp.dense_4h_to_h", "ffn_hidden_size")
# A norm before each branch, one for both, or one after the other.
_FALCON_STREAM = stream(
    ["write word_embeddings"],
    [
        *("norm_if input_layernorm", "norm_if ln_attn", "site attn"),
        *("norm_if post_attention_layernorm", "norm_if ln_mlp", "site mlp"),
    ],
    ["norm ln_f", TASKS],
    config={**TIED, "num_kv_heads": "kv_heads"},
)
ROWS += [
    # Also of Phi-4.
    *(replace(_GLM, name="phi3", attn=_PHI3), _GLM),
    *like(
        *(_GLM, "glm4"),
        attn=replace(ATTN, output_norm="post_self_attn_layernorm"),
        mlp=replace(_FUSED, output_norm="post_mlp_layernorm"),
    ),
    *like(
        *(_COHERE, "cohere"),
        attn=replace(ROW.attn, requires=_NO_NORMS),
        stream=replace(_SIDE_BY_SIDE, requires=_NO_NORMS),
    ),
    _COHERE,
    Family("phi", "layers", _PHI, _PHI_MLP, stream=_PHI_STREAM),
    Family("stablelm", "layers", _STABLELM, MLP, stream=_STABLELM_STREAM, without=NO_STOCK),
    Family("falcon", "h", _FALCON, _FALCON_MLP, stream=_FALCON_STREAM, without=NO_STOCK),
]

# Of GPT's kind: norms with biases, MLPs without a gate, heads that share no keys. GPT-2 computes
# [q; k; v] in one transposed layer and splits the result at split_size.
_QKV_OUT = "q_proj k_proj v_proj out_proj"
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
_NEOX = attention(*("attention", "query_key_value dense", "head_size"), stack=QKV_BY_GROUP, **FLAG)
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
    config={**TIED, "word_embed_proj_dim": "hidden"},
    requires={
        **{"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        "layer_norm_elementwise_affine": True,
    },
)
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
_QUARTERS = {"attn": "its queries, keys and values are stacked by quarters of the heads"}
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
_BIOGPT = attention("self_attn", _QKV_OUT, numbers={"num_heads": "heads"})
_ROOT = {"hidden": "its embeddings are multiplied by the root of the hidden size"}
ROWS += [
    Family("gpt2", "h", _GPT2, _GPT2_MLP, stream=_GPT2_STREAM, without=NO_STOCK),
    Family("gpt_neox", "layers", _NEOX, _NEOX_MLP, stream=_NEOX_STREAM, without=NO_STOCK),
    Family("opt", "decoder.layers", _OPT, _OPT_MLP, stream=_OPT_STREAM, without=NO_STOCK),
    Family("gpt_neo", "h", _NEO, _NEO_MLP, stream=_NEO_STREAM, without=NO_STOCK),
    Family("gptj", "h", _GPTJ, _GPTJ_MLP, stream=_GPTJ_STREAM, without=NO_STOCK),
    Family("codegen", "h", None, _GPTJ_MLP, stream=_CODEGEN_STREAM, without=_QUARTERS),
    Family("gpt_bigcode", "h", _BIGCODE, _BIGCODE_MLP, stream=_GPT2_STREAM, without=NO_STOCK),
    Family("bloom", "h", None, _BLOOM_MLP, stream=_BLOOM_STREAM, without=_ALIBI),
    Family("mpt", "blocks", None, _MPT_MLP, stream=_MPT_STREAM, without=_ALIBI),
    Family("biogpt", "layers", _BIOGPT, mlp("fc1 fc2"), without={**_ROOT, **NO_STOCK}),
]
