"""Vision transformers: ViT and DINOv2."""

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
    ),
)
