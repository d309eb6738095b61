"""ModernBERT: norms before each branch, q, k and v in one layer, gate and up in another."""

from __future__ import annotations

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
ROWS = (
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
