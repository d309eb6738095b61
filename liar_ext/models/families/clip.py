"""CLIP and SigLIP: a tower of images and one of texts, together or alone."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, Part, Step, Stream, Wiring

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


_STREAM = Stream(
    start=(Step("write", ("embeddings.token_embedding", "embeddings.position_embedding")),),
    block=(
        Step("norm", ("layer_norm1",)),
        Step("read", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Step("write", ("self_attn.out_proj",)),
        Step("norm", ("layer_norm2",)),
        Step("read", ("mlp.fc1",)),
        Step("write", ("mlp.fc2",)),
    ),
    ends=((Step("norm", ("final_layer_norm",)), Step("read", ("text_projection", "head"))),),
    config={"hidden_size": "hidden", "num_attention_heads": "heads"},
    multiple_of="head_dim",
)


_PATCHES = ("class_embedding", "patch_embedding", "position_embedding")
_VISION = replace(
    _STREAM,
    start=(
        Step("write", tuple(f"embeddings.{name}" for name in _PATCHES)),
        Step("norm", ("pre_layrnorm",)),  # as it is spelt there
    ),
    ends=((Step("norm", ("post_layernorm",)), Step("read", ("visual_projection", "classifier"))),),
)


_ALONE = replace(
    _STREAM,
    start=(Step("write", ("embeddings.patch_embedding", "embeddings.position_embedding")),),
    ends=((Step("norm", ("post_layernorm",)),),),
    requires={"vision_use_head": False},
)


def _alone(name: str, stream: Stream | None = None, **without: str) -> Family:
    """Return the row of one tower, which is a model by itself."""
    return Family(
        name=name,
        blocks=_TOWER.blocks,
        attn=_TOWER.attn,
        mlp=_TOWER.mlp,
        stream=stream,
        without={**without, "stock": _HEADS},
    )


def _rows(name: str, **vision: Stream | str) -> tuple[Family, ...]:
    """Return the rows of both towers together, and of each alone."""
    without = {
        "hidden": "each tower has a hidden size of its own",
        "stock": _HEADS,
    }
    return (
        Family(name=name, parts=(_IMAGES, _TEXTS), without=without),
        _alone(f"{name}_vision_model", **vision),
        _alone(f"{name}_text_model", _STREAM),
    )


# The rows of the table.
ROWS = (
    *_rows("clip", stream=_VISION),
    # torch's attention, which pools the patches, is as wide as the hidden size.
    *_rows(
        "siglip",
        stream=_ALONE,
        hidden="its patches are pooled by attention that is as wide as the hidden size",
    ),
)
