"""ModernBERT: norms before each branch, q, k and v in one layer, gate and up in another."""

from __future__ import annotations

from liar_ext.models.family import Family, Stack, Wiring

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
        without={
            "hidden": "the first block reads the embeddings through no norm of its own",
            "stock": "heads: its config derives the size of a head from the hidden size",
        },
    ),
)
