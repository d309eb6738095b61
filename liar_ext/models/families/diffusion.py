"""Diffusion transformers of diffusers, by the names of their classes.

Text and image have a stream each. Both meet in joint attention, whose heads two layers read::

    image   to_q, to_k, to_v ─────────┐            ┌──▶ to_out.0      image tokens
                                      ├─▶ heads ───┤
    text    add_{q,k,v}_proj ─────────┘            └──▶ to_add_out    text tokens
"""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, Part, Wiring, attention, mlp

_WITHOUT = {
    "hidden": "norms get their scale and shift from the timestep, feature by feature",
    "stock": "heads and channels: its config has one number of heads, and ties channels to it",
}
_STREAMS = {"layerwise": "a block passes on two streams, of text and of the image"}
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


def _mlp(module: str) -> Wiring:
    return mlp(f"{module}.net.0.proj {module}.net.2", "")


# The last block of SD3 drops the text.
_SD3 = Part(
    *("", "transformer_blocks", _joint(_attention("attn")), _mlp("ff")),
    context_mlp=replace(_mlp("ff_context"), optional=True),
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
ROWS = (
    Family(
        "DiTTransformer2DModel",
        *("transformer_blocks", _attention("attn1"), _mlp("ff")),
        without=_WITHOUT,
    ),
    Family("SD3Transformer2DModel", parts=(_SD3,), without={**_WITHOUT, **_STREAMS}),
    Family(
        "FluxTransformer2DModel",
        parts=(replace(_SD3, name="double", attn=_joint(_FLUX)), _SINGLE),
        without={**_WITHOUT, **_STREAMS},
    ),
    Family(
        "QwenImageTransformer2DModel",
        parts=(replace(_SD3, mlp=_mlp("img_mlp"), context_mlp=_mlp("txt_mlp")),),
        without={**_WITHOUT, **_STREAMS},
    ),
)
