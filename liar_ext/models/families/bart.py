"""BART and its kin: an encoder, and a decoder that reads it; Whisper, whose encoder reads sound."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, Part, Wiring

_WITHOUT = {
    "hidden": "encoder and decoder have a residual stream each",
    "stock": "heads: its config derives the size of a head from the hidden size",
}


def _attention(module: str) -> Wiring:
    return Wiring(
        producers=(f"{module}.q_proj",),
        key_value=(f"{module}.k_proj", f"{module}.v_proj"),
        consumer=f"{module}.out_proj",
        head_dim=f"{module}.head_dim",
        numbers={f"{module}.num_heads": "heads", f"{module}.embed_dim": "features"},
    )


def _part(name: str, **more: object) -> Part:
    return Part(
        name=name,
        blocks=f"{name}.layers",
        attn=_attention("self_attn"),
        mlp=Wiring(producers=("fc1",), consumer="fc2", config={f"{name}_ffn_dim": "features"}),
        **more,
    )


_ENCODER = _part("encoder", input="input_ids")
_DECODER = _part(
    "decoder",
    cross_attn=_attention("encoder_attn"),
    input="decoder_input_ids",
    mask="decoder_attention_mask",
)
_BART = Family(name="bart", parts=(_ENCODER, _DECODER), without=_WITHOUT)
_ALIKE = ("mbart", "plbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small")

# The rows of the table.
ROWS = (
    _BART,
    *(replace(_BART, name=name) for name in _ALIKE),
    # Every frame of the sound counts.
    replace(
        _BART,
        name="whisper",
        parts=(replace(_ENCODER, input="input_features", mask=""), _DECODER),
    ),
)
