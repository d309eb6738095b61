"""CLIP and SigLIP: a tower of images and one of texts, together or alone."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, Part, Wiring

_HEADS = "heads: its config derives the size of a head from the hidden size"
_TOWER = Part(
    name="",
    blocks="encoder.layers",
    attn=Wiring(
        producers=("self_attn.q_proj",),
        key_value=("self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.out_proj",
        head_dim="self_attn.head_dim",
        numbers={"self_attn.num_heads": "heads", "self_attn.embed_dim": "features"},
    ),
    mlp=Wiring(
        producers=("mlp.fc1",), consumer="mlp.fc2", config={"intermediate_size": "features"}
    ),
)
_IMAGES = replace(
    _TOWER,
    name="vision",
    blocks="vision_model.encoder.layers",
    config="vision_config",
    input="pixel_values",
    mask="",
)
_TEXTS = replace(
    _TOWER,
    name="text",
    blocks="text_model.encoder.layers",
    config="text_config",
    input="input_ids",
)


def _alone(name: str, hidden: str) -> Family:
    """Return the row of one tower, which is a model by itself."""
    return Family(
        name=name,
        blocks=_TOWER.blocks,
        attn=_TOWER.attn,
        mlp=_TOWER.mlp,
        without={"hidden": hidden, "stock": _HEADS},
    )


def _rows(name: str) -> tuple[Family, ...]:
    """Return the rows of both towers together, and of each alone."""
    without = {
        "hidden": "each tower has a hidden size of its own",
        "stock": _HEADS,
    }
    return (
        Family(name=name, parts=(_IMAGES, _TEXTS), without=without),
        _alone(f"{name}_vision_model", "patches are embedded by a convolution"),
        _alone(f"{name}_text_model", "no stream is described yet"),
    )


# The rows of the table.
ROWS = (*_rows("clip"), *_rows("siglip"))
