"""Llama and its kin: RMSNorm before each branch, grouped-query attention, gated MLP."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.reasons import JOINT
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
ROWS = (
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
