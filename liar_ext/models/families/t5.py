"""Encoder-decoders: T5 and BART."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, HeadInput, Part, Wiring


def _attention(module: str, head_input: HeadInput) -> Wiring:
    return Wiring(
        producers=(f"{module}.q",),
        key_value=(f"{module}.k", f"{module}.v"),
        consumer=f"{module}.o",
        head_dim=f"{module}.key_value_proj_dim",
        numbers={f"{module}.n_heads": "heads", f"{module}.inner_dim": "features"},
        head_input=head_input,
    )


def _mlp(layer: int) -> tuple[Wiring, ...]:
    """Return the wirings of an MLP, with a gate and without."""
    dense = f"layer.{layer}.DenseReluDense"
    return tuple(
        Wiring(
            producers=tuple(f"{dense}.{name}" for name in names),
            consumer=f"{dense}.wo",
            config={"d_ff": "features"},
        )
        for names in (("wi_0", "wi_1"), ("wi",))
    )


# The first block makes the bias of all heads from its table, and every block passes it on. To
# another text there are no relative positions: each module makes zeros for its own heads.
_SELF = "layer.0.SelfAttention"
_BIAS = HeadInput(_SELF, 3, "position_bias", output=1, table="relative_attention_bias")
_CROSS = "layer.1.EncDecAttention"
_ZEROS = HeadInput(_CROSS, 3, "position_bias", output=1, own=True)
_T5 = Family(
    name="t5",
    parts=(
        Part(
            name="encoder",
            blocks="encoder.block",
            attn=_attention(_SELF, _BIAS),
            mlp=_mlp(1),
            input="input_ids",
        ),
        Part(
            name="decoder",
            blocks="decoder.block",
            attn=_attention(_SELF, _BIAS),
            cross_attn=_attention(_CROSS, _ZEROS),
            mlp=_mlp(2),
            input="decoder_input_ids",
            mask="decoder_attention_mask",
        ),
    ),
    without={
        "hidden": "encoder and decoder have a residual stream each",
        "stock": "heads: its table of relative positions has a column for every dense head",
    },
)

# The rows of the table.
T5_ROWS = (_T5, replace(_T5, name="mt5"))


_WITHOUT = {
    "hidden": "encoder and decoder have a residual stream each",
    "stock": "heads: its config derives the size of a head from the hidden size",
}


def _bart_attention(module: str) -> Wiring:
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
        attn=_bart_attention("self_attn"),
        mlp=Wiring(producers=("fc1",), consumer="fc2", config={f"{name}_ffn_dim": "features"}),
        **more,
    )


_ENCODER = _part("encoder", input="input_ids")
_DECODER = _part(
    "decoder",
    cross_attn=_bart_attention("encoder_attn"),
    input="decoder_input_ids",
    mask="decoder_attention_mask",
)
_BART = Family(name="bart", parts=(_ENCODER, _DECODER), without=_WITHOUT)
_ALIKE = ("mbart", "plbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small")

# The rows of the table.
BART_ROWS = (
    _BART,
    *(replace(_BART, name=name) for name in _ALIKE),
    # Every frame of the sound counts.
    replace(
        _BART,
        name="whisper",
        parts=(replace(_ENCODER, input="input_features", mask=""), _DECODER),
    ),
)

ROWS = (*T5_ROWS, *BART_ROWS)
