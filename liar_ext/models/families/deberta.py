"""DeBERTa: attention to what tokens are and, by projections of their own, to where they are."""

from __future__ import annotations

from liar_ext.models.family import Family, Wiring


def _attention(*positions: str) -> Wiring:
    """Return the wiring of attention with some projections of relative positions."""
    layers = ("query_proj", *positions)
    return Wiring(
        producers=tuple(f"attention.self.{layer}" for layer in layers),
        key_value=("attention.self.key_proj", "attention.self.value_proj"),
        consumer="attention.output.dense",
        head_dim="attention.self.attention_head_size",
        numbers={
            "attention.self.num_attention_heads": "heads",
            "attention.self.all_head_size": "features",
        },
    )


# The rows of the table.
ROWS = (
    Family(
        name="deberta-v2",
        blocks="encoder.layer",
        # With share_att_key the layers of query and key read the positions, too.
        attn=(
            _attention("pos_key_proj", "pos_query_proj"),
            _attention("pos_key_proj"),
            _attention("pos_query_proj"),
            _attention(),
        ),
        mlp=Wiring(
            producers=("intermediate.dense",),
            consumer="output.dense",
            config={"intermediate_size": "features"},
        ),
        without={
            "hidden": "its query and key layers also read embeddings of relative positions",
            "stock": "heads: its config derives the size of a head from the hidden size",
        },
    ),
)
