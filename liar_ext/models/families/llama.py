"""Llama and its kin: RMSNorm before each branch, grouped-query attention, gated MLP."""

from __future__ import annotations

from dataclasses import replace

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

# Llama and its kin compute head counts from the shapes of q, k and v; only the eager kernel reads
# num_key_value_groups.
_HEADS = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
_LLAMA = Family(
    name="llama",
    blocks="layers",
    attn=Wiring(
        producers=("self_attn.q_proj",),
        key_value=("self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.o_proj",
        head_dim="self_attn.head_dim",
        numbers={"self_attn.num_key_value_groups": "group_size"},
        config=_HEADS,
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
_NO_ATTN_FLAG = replace(_LLAMA.attn, bias_flag=None)
_NO_MLP_FLAG = replace(_LLAMA.mlp, bias_flag=None)

# The rows of the table.
ROWS = (
    _LLAMA,
    replace(_LLAMA, name="smollm3"),
    replace(_LLAMA, name="qwen3", mlp=_NO_MLP_FLAG),
    replace(_LLAMA, name="gemma3_text", mlp=_NO_MLP_FLAG, stream=None),
    replace(_LLAMA, name="mistral", attn=_NO_ATTN_FLAG, mlp=_NO_MLP_FLAG),
    replace(_LLAMA, name="qwen2", attn=_NO_ATTN_FLAG, mlp=_NO_MLP_FLAG),
    replace(
        _LLAMA,
        name="gemma3",
        blocks="language_model.layers",
        mlp=_NO_MLP_FLAG,
        config="text_config",
        stream=None,
    ),
)
