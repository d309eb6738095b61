"""Vision transformers: ViT, DINOv2 and DINOv3."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, Step, Stream, Wiring

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
