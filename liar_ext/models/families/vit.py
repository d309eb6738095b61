"""Vision encoders, alone and with text."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, MLP, ROW
from liar_ext.models.families.reasons import HEADS_OF_HIDDEN, PICTURES
from liar_ext.models.family import Family, Part, Step, Stream, Wiring

_START = Step(
    "write",
    (
        "embeddings.patch_embeddings.projection",
        *("embeddings.cls_token", "embeddings.position_embeddings"),
    ),
)
_MASK = Step("write_if", ("embeddings.mask_token",))
_BLOCK = (
    Step("norm", ("layernorm_before",)),
    Step("read", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    Step("write", ("attention.o_proj",)),
    Step("norm", ("layernorm_after",)),
    Step("read", ("mlp.fc1",)),
    Step("write", ("mlp.fc2",)),
)
_STREAM = Stream(
    start=(_START, _MASK),
    block=_BLOCK,
    ends=((Step("norm", ("layernorm",)), Step("read_first", ("pooler.dense", "classifier"))),),
    config={"hidden_size": "hidden"},
    multiple_of="heads",
)
# What a branch writes is scaled feature by feature before it is added.
_SCALED = replace(
    _STREAM,
    block=(
        Step("norm", ("norm1",)),
        *_BLOCK[1:3],
        Step("write", ("layer_scale1.lambda1",)),
        Step("norm", ("norm2",)),
        Step("read_if", ("mlp.fc1", "mlp.gate_proj", "mlp.up_proj")),
        Step("write_if", ("mlp.fc2", "mlp.down_proj")),
        Step("write", ("layer_scale2.lambda1",)),
    ),
    ends=((Step("norm", ("layernorm",)), Step("read", ("classifier",))),),
)
# Its base model is the stack of blocks alone.
_DINOV3 = replace(
    _SCALED,
    start=(
        Step(
            "write",
            tuple(
                f"embeddings.{name}"
                for name in ("patch_embeddings", "cls_token", "register_tokens", "mask_token")
            ),
        ),
    ),
    block=(
        *_SCALED.block[:5],
        Step("read_if", ("mlp.gate_proj", "mlp.up_proj")),
        Step("write", ("mlp.down_proj",)),
        _SCALED.block[7],
    ),
    ends=((Step("norm", ("norm",)),),),
    config={"hidden_size": "hidden", "num_attention_heads": "heads"},
    multiple_of="head_dim",
)

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
    stream=_STREAM,
)

# The rows of the table.
VIT_ROWS = (
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
        stream=_SCALED,
        without={"stock": "channels: its config says them by a whole number, mlp_ratio"},
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
        stream=_DINOV3,
        without={
            "stock": "heads: its config derives the size of a head from the hidden size",
        },
    ),
)


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


_CLIP_STREAM = Stream(
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
    _CLIP_STREAM,
    start=(
        Step("write", tuple(f"embeddings.{name}" for name in _PATCHES)),
        Step("norm", ("pre_layrnorm",)),  # as it is spelt there
    ),
    ends=((Step("norm", ("post_layernorm",)), Step("read", ("visual_projection", "classifier"))),),
)


_ALONE = replace(
    _CLIP_STREAM,
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
        _alone(f"{name}_text_model", _CLIP_STREAM),
    )


# The rows of the table.
CLIP_ROWS = (
    *_rows("clip", stream=_VISION),
    # torch's attention, which pools the patches, is as wide as the hidden size.
    *_rows(
        "siglip",
        stream=_ALONE,
        hidden="its patches are pooled by attention that is as wide as the hidden size",
    ),
)


_ROW = replace(
    ROW,
    name="mistral3",
    blocks="language_model.layers",
    attn=ATTN,
    mlp=MLP,
    config="text_config",
    stream=None,
    without={"hidden": PICTURES},
)
_QWEN2 = replace(
    _ROW,
    name="qwen2_vl",
    attn=replace(
        ATTN,
        numbers={
            **ATTN.numbers,
            "self_attn.num_heads": "heads",
            "self_attn.num_key_value_heads": "kv_heads",
        },
        config=None,
    ),
    without={"hidden": PICTURES, "stock": HEADS_OF_HIDDEN},
)

# The rows of the table.
VISION_LANGUAGE_ROWS = (
    _ROW,
    replace(_ROW, name="llava"),
    replace(_ROW, name="llava_onevision"),
    replace(_ROW, name="internvl"),
    replace(_ROW, name="paligemma"),
    replace(_ROW, name="idefics3", blocks="text_model.layers"),
    replace(_ROW, name="smolvlm", blocks="text_model.layers"),
    _QWEN2,
    replace(_QWEN2, name="qwen2_5_vl"),
    replace(_ROW, name="qwen3_vl", attn=ROW.attn),
)

ROWS = (*VIT_ROWS, *CLIP_ROWS, *VISION_LANGUAGE_ROWS)
