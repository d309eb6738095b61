"""Vision encoders, alone and with text."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.decoders import ATTN, MLP, QKVO, ROW, counts, in_pictures
from liar_ext.models.family import (
    NO_STOCK,
    PICTURES,
    Family,
    Part,
    Step,
    Stream,
    attention,
    mlp,
    steps,
    stream,
)


def _embedded(*names: str) -> Step:
    return Step("write", tuple(f"embeddings.{name}" for name in names))


_ATTN = attention(
    "attention",
    QKVO,
    numbers={"num_attention_heads": "heads"},
    config={"num_attention_heads": "heads", "head_dim": "head_dim"},
)
_MLP = mlp("mlp.fc1 mlp.fc2")
_STREAM = stream(
    [
        _embedded("patch_embeddings.projection", "position_embeddings"),
        "write_if embeddings.cls_token embeddings.mask_token",
        "write_if embeddings.distillation_token embeddings.register_tokens",
    ],
    ["norm layernorm_before", _ATTN, "norm layernorm_after", _MLP],
    ["norm layernorm", "read_first pooler.dense classifier cls_classifier"],
    config={"hidden_size": "hidden"},
    multiple_of="heads",
)


def _scaled(*mlp_steps: str) -> tuple[Step, ...]:
    """Return the steps of a block that scales what a branch writes, feature by feature."""
    return steps(
        *("norm norm1", _ATTN, "write layer_scale1.lambda1"),
        *("norm norm2", *mlp_steps, "write layer_scale2.lambda1"),
    )


_SCALED = replace(
    _STREAM,
    block=_scaled("read_if mlp.fc1 mlp.gate_proj mlp.up_proj", "write_if mlp.fc2 mlp.down_proj"),
    ends=(steps("norm layernorm", "read classifier"),),
)
# Its base model is the stack of blocks alone.
_DINOV3 = stream(
    [_embedded("patch_embeddings", "cls_token", "register_tokens", "mask_token")],
    _scaled("read_if mlp.gate_proj mlp.up_proj", "write mlp.down_proj"),
    ["norm norm"],
)
_VIT = Family("vit", "layers", _ATTN, _MLP, stream=_STREAM)
# It sizes its MLP by a whole-numbered mlp_ratio, which no pruned size meets in practice.
_DINOV2 = replace(
    _VIT,
    name="dinov2",
    blocks="encoder.layer",
    mlp=(replace(_MLP, config=None), replace(MLP, numbers={}, config=None)),
    stream=_SCALED,
    without={"stock": "channels: its config says them by a whole number, mlp_ratio"},
)
_MEAN = ("norm layernorm", "read pooler.dense classifier")
_DISTILLED = ("norm layernorm", "read distillation_classifier")
VIT_ROWS = (
    *(_VIT, replace(_VIT, name="vit_msn")),
    replace(_VIT, name="deit", stream=replace(_STREAM, ends=(*_STREAM.ends, steps(*_DISTILLED)))),
    replace(_VIT, name="ijepa", stream=replace(_STREAM, ends=(steps(*_MEAN),))),
    *(_DINOV2, replace(_DINOV2, name="dinov2_with_registers")),
    Family(
        "dinov3_vit",
        "layer",
        attention("attention", QKVO, numbers={"num_heads": "heads", "embed_dim": "features"}),
        tuple(
            replace(MLP, producers=producers, bias_flag="mlp_bias")
            for producers in (MLP.producers, MLP.producers[1:])
        ),
        stream=_DINOV3,
        without=NO_STOCK,
    ),
)

_TOWER_ATTN = attention(
    "self_attn",
    "q_proj k_proj v_proj out_proj",
    numbers={"num_heads": "heads", "embed_dim": "features"},
)
_BLOCKS = "encoder.layers"
_IMAGES = Part(
    *("vision", f"vision_model.{_BLOCKS}", _TOWER_ATTN, _MLP),
    config="vision_config",
    input="pixel_values",
    mask="",
)
_TEXTS = Part(
    *("text", f"text_model.{_BLOCKS}", _TOWER_ATTN, _MLP), config="text_config", input="input_ids"
)
_TEXT_STREAM = stream(
    [_embedded("token_embedding", "position_embedding")],
    ["norm layer_norm1", _TOWER_ATTN, "norm layer_norm2", _MLP],
    ["norm final_layer_norm", "read text_projection head"],
)
_CLIP = replace(
    _TEXT_STREAM,
    start=steps(
        _embedded("class_embedding", "patch_embedding", "position_embedding"),
        "norm pre_layrnorm",  # as it is spelt there
    ),
    ends=(steps("norm post_layernorm", "read visual_projection classifier"),),
)
_SIGLIP = replace(
    _TEXT_STREAM,
    start=(_embedded("patch_embedding", "position_embedding"),),
    ends=(steps("norm post_layernorm"),),
    requires={"vision_use_head": False},
)


def _towers(name: str, vision: Stream, **without: str) -> tuple[Family, ...]:
    """Return the rows of both towers together, and of each alone."""
    whole = {"hidden": "each tower has a hidden size of its own", **NO_STOCK}
    alone = Family(
        *(f"{name}_vision_model", _BLOCKS, _TOWER_ATTN, _MLP),
        stream=vision,
        without={**without, **NO_STOCK},
    )
    text = replace(alone, name=f"{name}_text_model", stream=_TEXT_STREAM, without=NO_STOCK)
    return Family(name, parts=(_IMAGES, _TEXTS), without=whole), alone, text


# torch's attention, which pools the patches, is as wide as the hidden size.
_POOLED = "its patches are pooled by attention that is as wide as the hidden size"
CLIP_ROWS = (
    *(*_towers("clip", _CLIP), *_towers("metaclip_2", _CLIP)),
    *_towers("siglip", _SIGLIP, hidden=_POOLED),
)

_TEXT = replace(ROW, attn=ATTN, mlp=MLP)
_QWEN2 = replace(
    _TEXT,
    attn=attention("self_attn", QKVO, numbers=counts("num_heads")),
    without={"hidden": PICTURES, **NO_STOCK},
)
VISION_LANGUAGE_ROWS = (
    *(
        in_pictures(_TEXT, name)
        for name in (
            *("mistral3", "llava", "llava_next", "llava_onevision", "video_llava"),
            *("internvl", "paligemma", "aya_vision", "cohere2_vision", "got_ocr2", "qwen2_audio"),
        )
    ),
    *(in_pictures(_TEXT, name, "text_model.layers") for name in ("idefics3", "smolvlm")),
    *(in_pictures(_QWEN2, name) for name in ("qwen2_vl", "qwen2_5_vl")),
    in_pictures(replace(_TEXT, attn=ROW.attn), "qwen3_vl"),
)

ROWS = (*VIT_ROWS, *CLIP_ROWS, *VISION_LANGUAGE_ROWS)
