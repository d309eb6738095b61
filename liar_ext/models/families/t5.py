"""T5 and mT5: RMSNorm, no biases, a table of relative positions in the first block."""

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
ROWS = (_T5, replace(_T5, name="mt5"))
