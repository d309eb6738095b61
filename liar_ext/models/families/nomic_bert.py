"""Nomic BERT: BERT with rotary positions and a gated MLP, norms after the sums."""

from __future__ import annotations

from liar_ext.models.families.bert import BERT
from liar_ext.models.family import Family, Step, Stream, Wiring

NOMIC_BERT = Stream(
    start=(
        Step("write", ("embeddings.word_embeddings", "embeddings.token_type_embeddings")),
        Step("norm", ("embeddings.LayerNorm",)),
    ),
    block=(
        Step("read", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Step("write", ("self_attn.o_proj",)),
        Step("norm", ("post_attention_layernorm",)),
        Step("read", ("mlp.gate_proj", "mlp.up_proj")),
        Step("write", ("mlp.down_proj",)),
        Step("norm", ("post_mlp_layernorm",)),
    ),
    ends=(
        BERT.ends[0],
        (
            Step("read", ("cls.predictions.transform.dense",)),
            Step("write", ("cls.predictions.transform.dense",)),
            Step("norm", ("cls.predictions.transform.layer_norm",)),
            Step("read", ("cls.predictions.decoder",)),
        ),
        BERT.ends[-1],
    ),
    config={"hidden_size": "hidden"},
    multiple_of="heads",
)

# The rows of the table.
ROWS = (
    Family(
        name="nomic_bert",
        blocks="layers",
        attn=Wiring(
            producers=("self_attn.q_proj",),
            key_value=("self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.o_proj",
            head_dim="self_attn.head_dim",
            config={"num_attention_heads": "heads", "head_dim": "head_dim"},
        ),
        mlp=Wiring(
            producers=("mlp.gate_proj", "mlp.up_proj"),
            consumer="mlp.down_proj",
            numbers={"mlp.intermediate_size": "features"},
            config={"intermediate_size": "features"},
        ),
        stream=NOMIC_BERT,
    ),
)
