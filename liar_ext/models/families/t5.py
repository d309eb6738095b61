"""Encoder-decoders, T5 and BART, and encoders of speech."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import (
    NO_STOCK,
    TWO_STREAMS,
    Family,
    HeadInput,
    Part,
    Wiring,
    attention,
    like,
    mlp,
)


def _decoder(encoder: Part, cross_attn: Wiring, mlp: Wiring | tuple[Wiring, ...]) -> Part:
    return replace(
        encoder,
        name="decoder",
        blocks=encoder.blocks.replace("encoder", "decoder"),
        cross_attn=cross_attn,
        mlp=mlp,
        input="decoder_input_ids",
        mask="decoder_attention_mask",
    )


def _t5_attention(module: str, **more: object) -> Wiring:
    numbers = {"n_heads": "heads", "inner_dim": "features"}
    return attention(module, "q k v o", "key_value_proj_dim", numbers, **more)


def _t5_mlp(layer: int) -> tuple[Wiring, ...]:
    dense = f"layer.{layer}.DenseReluDense"
    return tuple(
        mlp(" ".join(f"{dense}.{name}" for name in names), "d_ff")
        for names in (("wi_0", "wi_1", "wo"), ("wi", "wo"))
    )


# The first block makes the bias of all heads from its table, and every block passes it on. To
# another text there are no relative positions: each module makes zeros for its own heads.
_SELF, _CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_BIAS = HeadInput(_SELF, 3, "position_bias", output=1, table="relative_attention_bias")
_ZEROS = HeadInput(_CROSS, 3, "position_bias", output=1, own=True)
_ENCODER = Part(
    *("encoder", "encoder.block", _t5_attention(_SELF, head_input=_BIAS), _t5_mlp(1)),
    input="input_ids",
)
_T5 = Family(
    name="t5",
    parts=(_ENCODER, _decoder(_ENCODER, _t5_attention(_CROSS, head_input=_ZEROS), _t5_mlp(2))),
    without={
        "hidden": TWO_STREAMS,
        "stock": "heads: its table of relative positions has a column for every dense head",
    },
)

# Every block has a table of its own, with a column for each head.
_TABLE = f"{_SELF}.relative_attention_bias.weight"
_HEADS = {"config": {"num_heads": "heads"}}
_OWN = replace(_ENCODER, attn=_t5_attention(_SELF, per_head=(_TABLE,), **_HEADS))
_UMT5 = Family(
    "umt5",
    parts=(_OWN, _decoder(_OWN, _t5_attention(_CROSS, **_HEADS), _t5_mlp(2))),
    without={"hidden": TWO_STREAMS},
)


def bart_attention(module: str) -> Wiring:
    """Return attention of BART's kind, which keeps its number of heads and their features."""
    numbers = {"num_heads": "heads", "embed_dim": "features"}
    return attention(module, "q_proj k_proj v_proj out_proj", numbers=numbers)


_BART_ENCODER = Part(
    "encoder",
    "encoder.layers",
    bart_attention("self_attn"),
    mlp("fc1 fc2", "encoder_ffn_dim"),
    input="input_ids",
)
_BART_DECODER = _decoder(
    _BART_ENCODER, bart_attention("encoder_attn"), mlp("fc1 fc2", "decoder_ffn_dim")
)
_BART = Family(
    name="bart", parts=(_BART_ENCODER, _BART_DECODER), without={"hidden": TWO_STREAMS, **NO_STOCK}
)
# Every frame of the sound counts.
_SOUND = replace(_BART_ENCODER, input="input_features", mask="")
_SPEECH = Family(
    *("wav2vec2", "encoder.layers", bart_attention("attention")),
    mlp("feed_forward.intermediate_dense feed_forward.output_dense"),
    mask="",  # that of their samples is no mask of frames
    without={"hidden": "a convolution over its positions adds to it", **NO_STOCK},
)

ROWS = (
    *(*like(_T5, "t5 mt5"), _UMT5),
    *like(_BART, "bart mbart plbart pegasus marian m2m_100 blenderbot blenderbot-small"),
    replace(_BART, name="whisper", parts=(_SOUND, _BART_DECODER)),
    *like(_SPEECH, "wav2vec2 hubert data2vec-audio unispeech unispeech-sat"),
)
