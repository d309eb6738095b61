"""Vision encoders, alone and with text, and diffusion transformers."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.decoders import ATTN, MLP, QKVO, ROW, counted, in_pictures
from liar_ext.models.families.encoders import bart_attention
from liar_ext.models.family import (
    NO_STOCK,
    PICTURES,
    Family,
    Part,
    Stream,
    Wiring,
    attention,
    like,
    mlp,
    steps,
    stream,
)

_HEADS = {"num_attention_heads": "heads"}
_ATTN = attention("attention", QKVO, numbers=_HEADS, config={**_HEADS, "head_dim": "head_dim"})
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
_QWEN2 = replace(_TEXT, attn=counted(), without={"hidden": PICTURES, **NO_STOCK})
_LLAVA = in_pictures(_TEXT, "llava")
ROWS += [
    *like(_LLAVA, "mistral3 llava llava_next llava_onevision video_llava internvl paligemma"),
    *like(_LLAVA, "aya_vision cohere2_vision got_ocr2 qwen2_audio"),
    *like(_LLAVA, "idefics3 smolvlm", blocks="text_model.layers"),
    *like(in_pictures(_QWEN2, "qwen2_vl"), "qwen2_vl qwen2_5_vl"),
    in_pictures(replace(_TEXT, attn=ROW.attn), "qwen3_vl"),
]

# Diffusion transformers of diffusers, by the names of their classes. Text and image have a stream
# each. Both meet in joint attention, whose heads two layers read:
#
#     image   to_q, to_k, to_v ─────────┐            ┌──▶ to_out.0      image tokens
#                                       ├─▶ heads ───┤
#     text    add_{q,k,v}_proj ─────────┘            └──▶ to_add_out    text tokens
_WITHOUT = {
    "hidden": "norms get their scale and shift from the timestep, feature by feature",
    "stock": "heads and channels: its config has one number of heads, and ties channels to it",
}
_APART = {**_WITHOUT, "layerwise": "a block passes on two streams, of text and of the image"}
_NUMBERS = {"heads": "heads", "inner_dim": "features", "inner_kv_dim": "features"}
_QKVO = "to_q to_k to_v to_out.0"


def _attention(module: str) -> Wiring:
    # The class keeps the size of all heads together, and their number.
    size = f"inner_dim // {module}.heads"
    return attention(module, _QKVO, size, _NUMBERS)


def _joint(wiring: Wiring) -> tuple[Wiring, Wiring]:
    """Return attention with the text, and that of a block that drops what the text reads."""
    added = tuple(f"attn.add_{name}_proj" for name in "qkv")
    alone = replace(
        wiring, producers=(*wiring.producers, added[0]), key_value=(*wiring.key_value, *added[1:])
    )
    return replace(alone, also=("attn.to_add_out",)), alone


def _net(module: str) -> Wiring:
    return mlp(f"{module}.net.0.proj {module}.net.2", "")


# The last block of SD3 drops the text.
_SD3 = Part(
    *("", "transformer_blocks", _joint(_attention("attn")), _net("ff")),
    context_mlp=replace(_net("ff_context"), optional=True),
    mask="",
)
_FLUX = attention("attn", _QKVO, numbers={"heads": "heads", "inner_dim": "features"})
# What a block reads is one sequence of text and image, and one layer reads its heads and channels.
_SINGLE = Part(
    *("single", "single_transformer_blocks"),
    replace(_FLUX, consumer="proj_out", columns="first"),
    replace(mlp("proj_mlp proj_out", ""), columns="last"),
    mask="",
)
ROWS += [
    Family(
        *("DiTTransformer2DModel", "transformer_blocks", _attention("attn1"), _net("ff")),
        without=_WITHOUT,
    ),
    Family("SD3Transformer2DModel", parts=(_SD3,), without=_APART),
    Family(
        "FluxTransformer2DModel",
        parts=(replace(_SD3, name="double", attn=_joint(_FLUX)), _SINGLE),
        without=_APART,
    ),
    Family(
        "QwenImageTransformer2DModel",
        parts=(replace(_SD3, mlp=_net("img_mlp"), context_mlp=_net("txt_mlp")),),
        without=_APART,
    ),
]
