"""Encoders with rotary positions: ModernBERT and NomicBERT."""

from __future__ import annotations

from liar_ext.models.families.bert import BERT
from liar_ext.models.family import Family, Stack, Step, Stream, Wiring

_STREAM = Stream(
    start=(
        Step("write", ("embeddings.tok_embeddings",)),
        Step("norm", ("embeddings.norm",)),
    ),
    block=(
        Step("norm_if", ("attn_norm",)),  # the first block reads the embeddings as they are
        Step("read", ("attn.Wqkv",)),
        Step("write", ("attn.Wo",)),
        Step("norm", ("mlp_norm",)),
        Step("read", ("mlp.Wi",)),
        Step("write", ("mlp.Wo",)),
    ),
    ends=(
        (
            Step("norm", ("final_norm",)),
            Step("read", ("head.dense",)),
            Step("write", ("head.dense",)),
            Step("norm", ("head.norm",)),
            Step("read", ("decoder", "classifier")),
        ),
    ),
    config={"hidden_size": "hidden", "num_attention_heads": "heads"},
    multiple_of="head_dim",
)

# The rows of the table.
MODERNBERT_ROWS = (
    # Global and local attention alternate, which the masks that the model makes say of each block.
    Family(
        name="modernbert",
        blocks="layers",
        attn=Wiring(
            producers=("attn.Wqkv",),
            consumer="attn.Wo",
            head_dim="attn.head_dim",
            stacked={"attn.Wqkv": Stack(("query", "key", "value"))},
            bias_flag="attention_bias",
        ),
        mlp=Wiring(
            producers=("mlp.Wi",),
            consumer="mlp.Wo",
            stacked={"mlp.Wi": Stack(("gate", "up"))},
            config={"intermediate_size": "features"},
            bias_flag="mlp_bias",
        ),
        stream=_STREAM,
        without={
            "stock": "heads: its config derives the size of a head from the hidden size",
        },
    ),
)


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
NOMIC_BERT_ROWS = (
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

ROWS = (*MODERNBERT_ROWS, *NOMIC_BERT_ROWS)
