"""Vision transformers: ViT, DINOv2 and DINOv3."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, Wiring

_VIT = Family(
    name="vit",
    blocks="layers",
    attn=Wiring(
        producers=("attention.q_proj",),
        key_value=("attention.k_proj", "attention.v_proj"),
        consumer="attention.o_proj",
        head_dim="attention.head_dim",
        numbers={"attention.num_attention_heads": "heads"},
        config={"num_attention_heads": "heads", "head_dim": "head_dim"},
    ),
    mlp=Wiring(
        producers=("mlp.fc1",), consumer="mlp.fc2", config={"intermediate_size": "features"}
    ),
    without={"hidden": "patches are embedded by a convolution"},
)

# The rows of the table.
ROWS = (
    _VIT,
    # DINOv2 sizes its MLP by a whole-numbered mlp_ratio, which no pruned size meets in practice.
    replace(
        _VIT,
        name="dinov2",
        blocks="encoder.layer",
        mlp=(
            Wiring(producers=("mlp.fc1",), consumer="mlp.fc2"),
            Wiring(producers=("mlp.gate_proj", "mlp.up_proj"), consumer="mlp.down_proj"),
        ),
        without={
            **_VIT.without,
            "stock": "channels: its config says them by a whole number, mlp_ratio",
        },
    ),
    replace(
        _VIT,
        name="dinov3_vit",
        blocks="layer",
        attn=Wiring(
            producers=("attention.q_proj",),
            key_value=("attention.k_proj", "attention.v_proj"),
            consumer="attention.o_proj",
            head_dim="attention.head_dim",
            numbers={"attention.num_heads": "heads", "attention.embed_dim": "features"},
        ),
        mlp=tuple(
            Wiring(
                producers=producers,
                consumer="mlp.down_proj",
                numbers={"mlp.intermediate_size": "features"},
                config={"intermediate_size": "features"},
                bias_flag="mlp_bias",
            )
            for producers in (("mlp.gate_proj", "mlp.up_proj"), ("mlp.up_proj",))
        ),
        without={
            **_VIT.without,
            "stock": "heads: its config derives the size of a head from the hidden size",
        },
    ),
)
