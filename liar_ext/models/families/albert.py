"""ALBERT: one block, or a few, that run again and again."""

from __future__ import annotations

from liar_ext.models.family import Family, Wiring

# The rows of the table.
ROWS = (
    # What a block has is sliced once for all of its runs; its sums are those of all of them.
    Family(
        name="albert",
        blocks="encoder.albert_layer_groups.*.albert_layers",
        attn=Wiring(
            producers=("attention.query",),
            key_value=("attention.key", "attention.value"),
            consumer="attention.dense",
            head_dim="attention.attention_head_size",
            numbers={
                "attention.num_attention_heads": "heads",
                "attention.all_head_size": "features",
            },
        ),
        mlp=Wiring(
            producers=("ffn",), consumer="ffn_output", config={"intermediate_size": "features"}
        ),
        repeats=True,
        without={
            "hidden": "its embeddings have a size of their own, and its blocks run several times",
            "stock": "heads: its config derives the size of a head from the hidden size",
            "layerwise": "a block runs several times, and each run reads what the last one wrote; "
            "one pass sums all of its runs",
        },
    ),
)
