"""Encoders of text and of speech, and encoder-decoders: T5 and BART."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.decoders import MLP, QKVO, ROW
from liar_ext.models.family import (
    GATE_UP,
    NO_STOCK,
    QKV,
    TIED,
    TWO_STREAMS,
    Family,
    HeadInput,
    Part,
    Step,
    Stream,
    Wiring,
    attention,
    like,
    mlp,
    steps,
    stream,
)

_HEADS = {"num_attention_heads": "heads"}
_SIZES = {**_HEADS, "all_head_size": "features"}
_SELF = {f"self.{name}": size for name, size in _SIZES.items()}


def _pooled(layer: str, *heads: str) -> tuple[Step, ...]:
    """Return the chain of a layer that reads the first token, and of heads that read the layer."""
    return steps(f"read_first {layer}", f"write {layer}", Step("take", heads))


def _masked(dense: str, norm: str, decoder: str) -> tuple[Step, ...]:
    return steps(f"read {dense}", f"write {dense}", f"norm {norm}", f"read {decoder}")


# BERT derives the size of a head from hidden_size / num_attention_heads, so that no config builds
# fewer heads of the same size.
_BERT_SELF = "self.query self.key self.value output.dense"
_ATTN = attention("attention", _BERT_SELF, "self.attention_head_size", numbers=_SELF)
_MLP = mlp("intermediate.dense output.dense")
_NORM, _HEAD = "output.LayerNorm", "cls.predictions.transform"
_LAST, _FIRST = "discriminator_predictions.dense", "generator_predictions"
_GENERATOR = (f"{_FIRST}.dense", f"{_FIRST}.LayerNorm", "generator_lm_head")
# With the tables and heads of its relatives, of which a model has some.
BERT = stream(
    (
        "write embeddings.word_embeddings",
        "write_if embeddings.position_embeddings embeddings.token_type_embeddings",
        "write_if embeddings.task_type_embeddings",
        "write_if embeddings.x_position_embeddings embeddings.y_position_embeddings",
        "write_if embeddings.h_position_embeddings embeddings.w_position_embeddings",
        "norm embeddings.LayerNorm",
    ),
    ("site attn", f"norm attention.{_NORM}", "site mlp", f"norm {_NORM}"),
    _masked(*_GENERATOR),
    _pooled("pooler.dense", "classifier", "cls.seq_relationship"),
    _pooled("classifier.dense", "classifier.out_proj"),
    _pooled("pre_classifier", "classifier"),
    (f"read {_LAST}", f"write {_LAST}", f"take {_LAST}_prediction"),
    _masked(f"{_HEAD}.dense", f"{_HEAD}.LayerNorm {_HEAD}.layer_norm", "cls.predictions.decoder"),
    _masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    _masked("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ("read classifier qa_outputs",),
)
_EMBEDDED = tuple(Step("aside_if", step.layers) for step in BERT.start)


def _norms_before(attn: str, mlp: str, last: str) -> Stream:
    """Return the stream of blocks with a norm before each branch, one after all, and none first."""
    return replace(
        BERT,
        start=BERT.start[:-1],
        block=steps(f"norm {attn}", "site attn", f"norm {mlp}", "site mlp"),
        ends=tuple((*steps(f"norm {last}"), *end) for end in BERT.ends),
    )


_BEFORE = _norms_before("attention.LayerNorm", "intermediate.LayerNorm", "LayerNorm")
# Its embeddings have a size of their own, that of the stream in larger models.
_ELECTRA = replace(BERT, config={**TIED, "embedding_size": "hidden"})
_PROJECTED = replace(
    BERT,
    start=(*steps("write embeddings_project"), *_EMBEDDED),
    ends=((Step("read", _GENERATOR[:1]), Step("aside", _GENERATOR[1:])), *BERT.ends[1:]),
)
_MPNET = attention(
    "attention",
    "attn.q attn.k attn.v attn.o",
    "attn.attention_head_size",
    numbers={f"attn.{name}": size for name, size in _SIZES.items()},
    # The encoder computes the relative position bias once, for all blocks and heads.
    head_input=HeadInput("attention.attn", 2, "position_bias"),
)
# No config says what is left: a head has hidden / heads features, and the table of relative
# positions a column for every head that there was.
_MPNET_STREAM = replace(
    BERT,
    block=steps("site attn", "norm attention.LayerNorm", "site mlp", f"norm {_NORM}"),
    config={"hidden_size": "hidden"},
    multiple_of=None,
)
_DISTIL = attention(
    "attention", "q_lin k_lin v_lin out_lin", "attention_head_size", numbers={"n_heads": "heads"}
)
_DISTIL_MLP = mlp("ffn.lin1 ffn.lin2", "hidden_dim")
_DISTIL_STREAM = replace(
    BERT,
    block=steps("site attn", "norm sa_layer_norm", "site mlp", "norm output_layer_norm"),
    config={"dim": "hidden", "n_heads": "heads"},
)
_BERT = Family("bert", "encoder.layer", _ATTN, _MLP, stream=BERT, without=NO_STOCK)
ROWS = [
    *like(_BERT, "bert roberta xlm-roberta camembert data2vec-text ernie layoutlm"),
    *like(_BERT, "roberta-prelayernorm", stream=replace(_BEFORE, start=BERT.start)),
    *like(_BERT, "megatron-bert", stream=_norms_before("attention.ln", "ln", "encoder.ln")),
    *like(
        *(_BERT, "xlm-roberta-xl"),
        stream=_norms_before("attention.self_attn_layer_norm", "LayerNorm", "encoder.LayerNorm"),
    ),
    *like(
        *(_BERT, "esm"),
        stream=None,
        without={"hidden": "its positions may be turned into its queries and keys", **NO_STOCK},
    ),
    *like(_BERT, "electra", stream=(_PROJECTED, _ELECTRA)),
    *like(_BERT, "mpnet", attn=_MPNET, stream=_MPNET_STREAM),
    Family("distilbert", "transformer.layer", _DISTIL, _DISTIL_MLP, stream=_DISTIL_STREAM),
]

_ALBERT = attention("attention", "query key value dense", "attention_head_size", numbers=_SIZES)
_ALBERT_MLP = mlp("ffn ffn_output")
# What a block reads is now what is put into it, then what a block before it or itself put out; what
# reads its last run alone is asked itself, too.
_ALBERT_STREAM = stream(
    ("write encoder.embedding_hidden_mapping_in", *_EMBEDDED),
    (
        *(Step("take", _ALBERT.layers[:-1]), "write attention.dense", "norm attention.LayerNorm"),
        *("site mlp", "norm full_layer_layer_norm"),
    ),
    ("take pooler", "write pooler", "take classifier sop_classifier.classifier"),
    ("take predictions.dense", "aside predictions.LayerNorm predictions.decoder"),
    ("take classifier qa_outputs",),
)
_RUNS = (
    "a block runs several times, and each run reads what the last one wrote; one pass sums all of "
    "its runs"
)
_PROJ = attention(
    "attention",
    "self.query_proj self.key_proj self.value_proj output.dense",
    "self.attention_head_size",
    numbers=_SELF,
)
_KEY, _QUERY = (f"attention.self.pos_{name}_proj" for name in ("key", "query"))
# With share_att_key the layers of query and key read the positions, too.
_DEBERTA = tuple(
    replace(_PROJ, producers=(*_PROJ.producers, *positions))
    for positions in ((_KEY, _QUERY), (_KEY,), (_QUERY,), ())
)
_POSITIONS = {"hidden": "its query and key layers also read embeddings of relative positions"}
_ONE = {"attn": "its queries, keys and values are one layer, with biases outside of it"}
ROWS += [
    # What a block has is sliced once for all of its runs; its sums are those of all of them.
    Family(
        *("albert", "encoder.albert_layer_groups.*.albert_layers", _ALBERT, _ALBERT_MLP),
        stream=_ALBERT_STREAM,
        repeats=True,
        without={**NO_STOCK, "layerwise": _RUNS},
    ),
    Family("deberta", "encoder.layer", None, _MLP, without={**_ONE, **_POSITIONS}),
    Family("deberta-v2", "encoder.layer", _DEBERTA, _MLP, without={**_POSITIONS, **NO_STOCK}),
]

_MODERN = attention("attn", "Wqkv Wo", stack=QKV, bias_flag="attention_bias")
_MODERN_MLP = mlp("mlp.Wi mlp.Wo", stack=GATE_UP, bias_flag="mlp_bias")
_MODERN_STREAM = stream(
    ("write embeddings.tok_embeddings", "norm embeddings.norm"),
    # The first block reads the embeddings as they are.
    ("norm_if attn_norm", "site attn", "norm mlp_norm", "site mlp"),
    ("norm final_norm", *_masked("head.dense", "head.norm", "decoder classifier")),
)
_NOMIC = attention("self_attn", QKVO, config={**_HEADS, "head_dim": "head_dim"})
_NOMIC_NORMS = ("norm post_attention_layernorm", "norm post_mlp_layernorm")
_NOMIC_STREAM = replace(
    BERT,
    block=steps("site attn", _NOMIC_NORMS[0], "site mlp", _NOMIC_NORMS[1]),
    config={"hidden_size": "hidden"},
    multiple_of="heads",
)
_NOMIC_BERT = Family("nomic_bert", "layers", _NOMIC, MLP, stream=_NOMIC_STREAM)
_DECODING = attention(
    "attn", "q_proj k_proj v_proj Wo", numbers={"num_heads": "heads"}, bias_flag="attention_bias"
)
_DECODING_STREAM = replace(
    _MODERN_STREAM,
    ends=tuple(
        steps("norm final_norm", *_masked(f"{head}.dense", f"{head}.norm", reader))
        for head, reader in (("lm_head", "decoder"), ("head", "classifier"))
    ),
)
# Global and local attention alternate, which the masks that the model makes say of each block.
_MODERN_BERT = Family(
    *("modernbert", "layers", _MODERN, _MODERN_MLP), stream=_MODERN_STREAM, without=NO_STOCK
)
ROWS += [
    _MODERN_BERT,
    *like(_MODERN_BERT, "modernbert-decoder", attn=_DECODING, stream=_DECODING_STREAM),
    *like(_NOMIC_BERT, "nomic_bert gte"),
    *like(_NOMIC_BERT, "jina_embeddings_v3", mlp=mlp("mlp.fc1 mlp.fc2")),
    # Its mlp_bias is also one of its head.
    *like(
        *(ROW, "eurobert"),
        mlp=MLP,
        stream=None,
        without={"hidden": "heads of its tasks read the stream in different ways"},
    ),
]


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
_OWN_TEXT, _CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_BIAS = HeadInput(_OWN_TEXT, 3, "position_bias", output=1, table="relative_attention_bias")
_ZEROS = HeadInput(_CROSS, 3, "position_bias", output=1, own=True)
_ENCODER = Part(
    *("encoder", "encoder.block", _t5_attention(_OWN_TEXT, head_input=_BIAS), _t5_mlp(1)),
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
_TABLE = f"{_OWN_TEXT}.relative_attention_bias.weight"
_STOCK = {"config": {"num_heads": "heads"}}
_OWN = replace(_ENCODER, attn=_t5_attention(_OWN_TEXT, per_head=(_TABLE,), **_STOCK))
_UMT5 = Family(
    "umt5",
    parts=(_OWN, _decoder(_OWN, _t5_attention(_CROSS, **_STOCK), _t5_mlp(2))),
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

SEQUENCES = (
    *(*like(_T5, "t5 mt5"), _UMT5),
    *like(_BART, "bart mbart plbart pegasus marian m2m_100 blenderbot blenderbot-small"),
    replace(_BART, name="whisper", parts=(_SOUND, _BART_DECODER)),
    *like(_SPEECH, "wav2vec2 hubert data2vec-audio unispeech unispeech-sat"),
)
