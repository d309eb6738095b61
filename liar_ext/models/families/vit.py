"""Vision encoders, alone and with text."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.decoders import ATTN, MLP, QKVO, ROW, counts, in_pictures
from liar_ext.models.families.t5 import bart_attention
from liar_ext.models.family import (
    NO_STOCK,
    PICTURES,
    Family,
    Part,
    Stream,
    attention,
    like,
    mlp,
    steps,
    stream,
)

_ATTN = attention(
    "attention",
    QKVO,
    numbers={"num_attention_heads": "heads"},
    config={"num_attention_heads": "heads", "head_dim": "head_dim"},
)
_MLP = mlp("mlp.fc1 mlp.fc2")
_STREAM = stream(
    [
        "write embeddings.patch_embeddings.projection embeddings.position_embeddings",
        "write_if embeddings.cls_token embeddings.mask_token",
        "write_if embeddings.distillation_token embeddings.register_tokens",
    ],
    ["norm layernorm_before", "site attn", "norm layernorm_after", "site mlp"],
    ["norm layernorm", "read_first pooler.dense classifier cls_classifier"],
    ["norm layernorm", "read distillation_classifier"],
    config={"hidden_size": "hidden"},
    multiple_of="heads",
)
# What a branch writes is scaled, feature by feature.
_SCALED = steps(
    *("norm norm1", "site attn", "write layer_scale1.lambda1"),
    *("norm norm2", "site mlp", "write layer_scale2.lambda1"),
)
_MEAN = steps("norm layernorm", "read pooler.dense classifier")
# Its base model is the stack of blocks alone.
_DINOV3 = stream(
    [
        "write embeddings.patch_embeddings embeddings.cls_token",
        "write embeddings.register_tokens embeddings.mask_token",
    ],
    _SCALED,
    ["norm norm"],
)
_VIT = Family("vit", "layers", _ATTN, _MLP, stream=_STREAM)
# It sizes its MLP by a whole-numbered mlp_ratio, which no pruned size meets in practice.
_DINOV2 = replace(
    _VIT,
    blocks="encoder.layer",
    mlp=(replace(_MLP, config=None), replace(MLP, numbers={}, config=None)),
    stream=replace(_STREAM, block=_SCALED, ends=(_MEAN,)),
    without={"stock": "channels: its config says them by a whole number, mlp_ratio"},
)
ROWS = [
    *like(_VIT, "vit vit_msn deit"),
    replace(_VIT, name="ijepa", stream=replace(_STREAM, ends=(_MEAN,))),
    *like(_DINOV2, "dinov2 dinov2_with_registers"),
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
]

_TOWER_ATTN = bart_attention("self_attn")
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
# Of text or of images.
_TOWER = stream(
    [
        "write_if embeddings.token_embedding embeddings.class_embedding",
        "write_if embeddings.patch_embedding embeddings.position_embedding",
        "norm_if pre_layrnorm",  # as it is spelt there
    ],
    ["norm layer_norm1", "site attn", "norm layer_norm2", "site mlp"],
    ["norm final_layer_norm", "read text_projection head"],
    ["norm post_layernorm", "read visual_projection classifier"],
)


def _towers(name: str, vision: Stream = _TOWER, **without: str) -> tuple[Family, ...]:
    """Return the rows of both towers together, and of each alone."""
    whole = {"hidden": "each tower has a hidden size of its own", **NO_STOCK}
    alone = Family(
        *(f"{name}_vision_model", _BLOCKS, _TOWER_ATTN, _MLP),
        stream=vision,
        without={**without, **NO_STOCK},
    )
    text = replace(alone, name=f"{name}_text_model", stream=_TOWER, without=NO_STOCK)
    return Family(name, parts=(_IMAGES, _TEXTS), without=whole), alone, text


# torch's attention, which pools the patches, is as wide as the hidden size.
_POOLED = "its patches are pooled by attention that is as wide as the hidden size"
ROWS += [
    *(*_towers("clip"), *_towers("metaclip_2")),
    *_towers("siglip", replace(_TOWER, requires={"vision_use_head": False}), hidden=_POOLED),
]

_TEXT = replace(ROW, attn=ATTN, mlp=MLP)
_QWEN2 = replace(
    _TEXT,
    attn=attention("self_attn", QKVO, numbers=counts("num_heads")),
    without={"hidden": PICTURES, **NO_STOCK},
)
_LLAVA = in_pictures(_TEXT, "llava")
ROWS += [
    *like(_LLAVA, "mistral3 llava llava_next llava_onevision video_llava internvl paligemma"),
    *like(_LLAVA, "aya_vision cohere2_vision got_ocr2 qwen2_audio"),
    *like(_LLAVA, "idefics3 smolvlm", blocks="text_model.layers"),
    *like(in_pictures(_QWEN2, "qwen2_vl"), "qwen2_vl qwen2_5_vl"),
    in_pictures(replace(_TEXT, attn=ROW.attn), "qwen3_vl"),
]
