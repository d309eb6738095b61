"""Decoders of Llama's wiring, Gemma's norms, and MLPs without a gate."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.reasons import BORROWED, JOINT, PICTURES
from liar_ext.models.family import Family, Step, Stream, Wiring

LLAMA = Stream(
    start=(Step("write", ("embed_tokens",)),),
    block=(
        Step("norm", ("input_layernorm",)),
        Step("read", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Step("write", ("self_attn.o_proj",)),
        Step("norm", ("post_attention_layernorm",)),
        Step("read", ("mlp.gate_proj", "mlp.up_proj")),
        Step("write", ("mlp.down_proj",)),
    ),
    ends=((Step("norm", ("norm",)), Step("read", ("lm_head", "score", "qa_outputs"))),),
    config={"hidden_size": "hidden"},
    multiple_of="heads",  # which LlamaConfig insists on, even where head_dim is given
)

# A norm over what each branch writes, and none before it reads.
AFTER = replace(
    LLAMA,
    block=(
        Step("take", LLAMA.block[1].layers),
        Step("aside", ("self_attn.q_norm", "self_attn.k_norm")),
        LLAMA.block[2],
        Step("branch_norm", ("post_attention_layernorm",)),
        Step("take", LLAMA.block[4].layers),
        LLAMA.block[5],
        Step("branch_norm", ("post_feedforward_layernorm",)),
    ),
)

# Llama and its kin compute head counts from the shapes of q, k and v; only the eager kernel reads
# num_key_value_groups.
HEADS = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
ROW = Family(
    name="llama",
    blocks="layers",
    attn=Wiring(
        producers=("self_attn.q_proj",),
        key_value=("self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.o_proj",
        head_dim="self_attn.head_dim",
        numbers={"self_attn.num_key_value_groups": "group_size"},
        config=HEADS,
        bias_flag="attention_bias",
    ),
    mlp=Wiring(
        producers=("mlp.gate_proj", "mlp.up_proj"),
        consumer="mlp.down_proj",
        numbers={"mlp.intermediate_size": "features"},
        config={"intermediate_size": "features"},
        bias_flag="mlp_bias",
    ),
    stream=LLAMA,
)
# Where no flag of the config governs all layers of a site.
ATTN = replace(ROW.attn, bias_flag=None)
MLP = replace(ROW.mlp, bias_flag=None)

# With a norm over what they write.
ATTN_AFTER = replace(ATTN, output_norm="post_attention_layernorm")
MLP_AFTER = replace(MLP, output_norm="post_feedforward_layernorm")

# Attention modules of some keep head counts, which their forward doesn't read.
_COUNTS = {
    **ATTN.numbers,
    "self_attn.num_attention_heads": "heads",
    "self_attn.num_key_value_heads": "kv_heads",
}

# The rows of the table.
LLAMA_ROWS = (
    ROW,
    replace(ROW, name="smollm3"),
    replace(ROW, name="qwen3", mlp=MLP),
    replace(ROW, name="mistral", attn=ATTN, mlp=MLP),
    replace(ROW, name="qwen2", attn=ATTN, mlp=MLP),
    replace(ROW, name="ministral", attn=ATTN, mlp=MLP),
    replace(ROW, name="ministral3", attn=ATTN, mlp=MLP),
    # Its multipliers are numbers of the config, whatever the sizes.
    replace(ROW, name="granite"),
    replace(ROW, name="cwm", attn=ATTN),
    replace(ROW, name="hunyuan_v1_dense", mlp=MLP),
    replace(ROW, name="seed_oss", attn=replace(ATTN, numbers=_COUNTS)),
    replace(
        ROW,
        name="ernie4_5",
        attn=replace(ATTN, bias_flag="use_bias"),
        mlp=replace(MLP, bias_flag="use_bias"),
    ),
    # o_proj of its stock class is square.
    replace(
        ROW,
        name="helium",
        attn=replace(ATTN, config=None),
        without={"stock": "heads: o_proj of its class is as wide as the hidden size"},
    ),
    replace(
        ROW,
        name="exaone4",
        attn=replace(ATTN_AFTER, numbers=_COUNTS),
        mlp=MLP_AFTER,
        stream=AFTER,
    ),
    # Its norms have no weights: their readers alone are solved.
    replace(ROW, name="olmo", mlp=MLP),
    *(
        replace(
            ROW,
            name=name,
            attn=None,
            mlp=MLP_AFTER,
            stream=replace(AFTER, config={"hidden_size": "hidden", "head_dim": "head_dim"}),
            without={"attn": JOINT, "kv_group": JOINT},
        )
        for name in ("olmo2", "olmo3")
    ),
)


# Its norms scale by their weights and one.
_SCALED = replace(LLAMA, norm_offset=1.0, scaled=True)
_BEFORE = Step("norm", ("pre_feedforward_layernorm",))
_READ, _WRITTEN = LLAMA.block[4:6]
_BOTH = replace(
    _SCALED,
    block=(
        *LLAMA.block[:3],
        Step("branch_norm", ("post_attention_layernorm",)),
        *(_BEFORE, _READ, _WRITTEN),
        Step("branch_norm", ("post_feedforward_layernorm",)),
    ),
)
_GEMMA = replace(ROW, name="gemma", mlp=MLP, stream=_SCALED)
_GEMMA3 = replace(
    _GEMMA,
    name="gemma3_text",
    attn=replace(ROW.attn, output_norm=ATTN_AFTER.output_norm),
    mlp=MLP_AFTER,
    stream=_BOTH,
)

# Layers of Gemma 4 have sizes of their own in the dense config, and wider MLPs where they borrow.
_GEMMA4 = replace(
    _GEMMA,
    name="gemma4_text",
    attn=None,
    mlp=replace(MLP_AFTER, config=None),
    stream=None,
    lends=True,
    without={
        **{"attn": BORROWED, "kv_group": BORROWED, "layerwise": BORROWED},
        "hidden": "every block reads embeddings of its own beside the stream",
        "stock": "channels: its config has sizes of single layers of its own",
    },
)

# The rows of the table.
GEMMA_ROWS = (
    _GEMMA4,
    replace(_GEMMA4, name="gemma4", blocks="language_model.layers", config="text_config"),
    _GEMMA,
    replace(_GEMMA3, name="gemma2"),
    replace(
        _GEMMA,
        name="vaultgemma",
        stream=replace(_SCALED, block=(*LLAMA.block[:3], _BEFORE, _READ, _WRITTEN)),
    ),
    _GEMMA3,
    replace(
        _GEMMA3,
        name="gemma3",
        blocks="language_model.layers",
        config="text_config",
        stream=None,
        without={"hidden": PICTURES},
    ),
)


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
UNGATED_ROWS = (
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

ROWS = (*LLAMA_ROWS, *GEMMA_ROWS, *UNGATED_ROWS)
