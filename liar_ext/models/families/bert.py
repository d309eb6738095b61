"""Encoders of text: BERT, ALBERT, DeBERTa, ModernBERT and NomicBERT."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.decoders import MLP, ROW
from liar_ext.models.family import (
    GATE_UP,
    NO_STOCK,
    QKV,
    TIED,
    Family,
    HeadInput,
    Step,
    Stream,
    attention,
    like,
    mlp,
    steps,
    stream,
)

_SIZES = {"num_attention_heads": "heads", "all_head_size": "features"}
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
_LAST = "discriminator_predictions.dense"
_GENERATOR = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head")
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
    replace(_BERT, name="roberta-prelayernorm", stream=replace(_BEFORE, start=BERT.start)),
    replace(_BERT, name="megatron-bert", stream=_norms_before("attention.ln", "ln", "encoder.ln")),
    replace(
        _BERT,
        name="xlm-roberta-xl",
        stream=_norms_before("attention.self_attn_layer_norm", "LayerNorm", "encoder.LayerNorm"),
    ),
    replace(
        _BERT,
        name="esm",
        stream=None,
        without={"hidden": "its positions may be turned into its queries and keys", **NO_STOCK},
    ),
    replace(_BERT, name="electra", stream=(_PROJECTED, _ELECTRA)),
    replace(_BERT, name="mpnet", attn=_MPNET, stream=_MPNET_STREAM),
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
ROWS += [
    # What a block has is sliced once for all of its runs; its sums are those of all of them.
    Family(
        "albert",
        "encoder.albert_layer_groups.*.albert_layers",
        _ALBERT,
        _ALBERT_MLP,
        stream=_ALBERT_STREAM,
        repeats=True,
        without={**NO_STOCK, "layerwise": _RUNS},
    ),
]

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
_POSITIONS = "its query and key layers also read embeddings of relative positions"
ROWS += [
    Family(
        *("deberta", "encoder.layer", None, _MLP),
        without={
            "attn": "its queries, keys and values are one layer, with biases outside of it",
            "hidden": _POSITIONS,
        },
    ),
    Family(
        *("deberta-v2", "encoder.layer", _DEBERTA, _MLP), without={"hidden": _POSITIONS, **NO_STOCK}
    ),
]

_MODERN = attention("attn", "Wqkv Wo", stack=QKV, bias_flag="attention_bias")
_MODERN_MLP = mlp("mlp.Wi mlp.Wo", stack=GATE_UP, bias_flag="mlp_bias")
_MODERN_STREAM = stream(
    ("write embeddings.tok_embeddings", "norm embeddings.norm"),
    # The first block reads the embeddings as they are.
    ("norm_if attn_norm", "site attn", "norm mlp_norm", "site mlp"),
    ("norm final_norm", *_masked("head.dense", "head.norm", "decoder classifier")),
)
_NOMIC = attention(
    "self_attn",
    "q_proj k_proj v_proj o_proj",
    config={"num_attention_heads": "heads", "head_dim": "head_dim"},
)
_NOMIC_STREAM = replace(
    BERT,
    block=steps(
        *("site attn", "norm post_attention_layernorm", "site mlp", "norm post_mlp_layernorm")
    ),
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
ROWS += [
    # Global and local attention alternate, which the masks that the model makes say of each block.
    Family("modernbert", "layers", _MODERN, _MODERN_MLP, stream=_MODERN_STREAM, without=NO_STOCK),
    Family(
        *("modernbert-decoder", "layers", _DECODING, _MODERN_MLP),
        stream=_DECODING_STREAM,
        without=NO_STOCK,
    ),
    *like(_NOMIC_BERT, "nomic_bert gte"),
    replace(_NOMIC_BERT, name="jina_embeddings_v3", mlp=mlp("mlp.fc1 mlp.fc2")),
    # Its mlp_bias is also one of its head.
    replace(
        ROW,
        name="eurobert",
        mlp=MLP,
        stream=None,
        without={"hidden": "heads of its tasks read the stream in different ways"},
    ),
]
