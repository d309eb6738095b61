"""Encoders: BERT, ALBERT and DeBERTa."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.family import Family, HeadInput, Step, Stream, Wiring


def _pooled(layer: str, *heads: str) -> tuple[Step, ...]:
    """Return the chain of a layer that reads the first token, and of heads that read the layer."""
    return Step("read_first", (layer,)), Step("write", (layer,)), Step("take", heads)


def _masked(dense: str, norm: str, decoder: str) -> tuple[Step, ...]:
    """Return the chain of a head that predicts masked tokens."""
    step = Step("read", (dense,)), Step("write", (dense,))
    return *step, Step("norm", (norm,)), Step("read", (decoder,))


def _embedded(*tables: str) -> tuple[Step, ...]:
    """Return the steps of embeddings that are normalised together."""
    written = Step("write", tuple(f"embeddings.{name}" for name in tables))
    return written, Step("norm", ("embeddings.LayerNorm",))


BERT = Stream(
    start=_embedded("word_embeddings", "position_embeddings", "token_type_embeddings"),
    block=(
        Step("read", ("attention.self.query", "attention.self.key", "attention.self.value")),
        Step("write", ("attention.output.dense",)),
        Step("norm", ("attention.output.LayerNorm",)),
        Step("read", ("intermediate.dense",)),
        Step("write", ("output.dense",)),
        Step("norm", ("output.LayerNorm",)),
    ),
    ends=(
        _pooled("pooler.dense", "classifier", "cls.seq_relationship"),
        _pooled("classifier.dense", "classifier.out_proj"),
        _masked(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
        ),
        _masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
        (Step("read", ("classifier", "qa_outputs")),),
    ),
    config={"hidden_size": "hidden", "num_attention_heads": "heads"},
    multiple_of="head_dim",
)
# Its embeddings have a size of their own, that of the stream in larger models.
ELECTRA = replace(
    BERT,
    ends=(
        _pooled("classifier.dense", "classifier.out_proj"),
        (
            *(Step(does, ("discriminator_predictions.dense",)) for does in ("read", "write")),
            Step("take", ("discriminator_predictions.dense_prediction",)),
        ),
        _masked(
            "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"
        ),
        (Step("read", ("classifier", "qa_outputs")),),
    ),
    config={**BERT.config, "embedding_size": "hidden"},
)
PROJECTED = replace(
    ELECTRA,
    start=(
        Step("write", ("embeddings_project",)),
        *(Step("aside", step.layers) for step in ELECTRA.start),
    ),
    ends=(
        *ELECTRA.ends[:2],
        (
            Step("read", ("generator_predictions.dense",)),
            Step("aside", ("generator_predictions.LayerNorm", "generator_lm_head")),
        ),
        ELECTRA.ends[3],
    ),
    config=BERT.config,
)
# No config says what is left: a head has hidden / heads features, and the table of relative
# positions a column for every head that there was.
MPNET = Stream(
    start=_embedded("word_embeddings", "position_embeddings"),
    block=(
        Step("read", ("attention.attn.q", "attention.attn.k", "attention.attn.v")),
        Step("write", ("attention.attn.o",)),
        Step("norm", ("attention.LayerNorm",)),
        Step("read", ("intermediate.dense",)),
        Step("write", ("output.dense",)),
        Step("norm", ("output.LayerNorm",)),
    ),
    ends=BERT.ends,
    config={"hidden_size": "hidden"},
    multiple_of=None,
)
DISTILBERT = Stream(
    start=_embedded("word_embeddings", "position_embeddings"),
    block=(
        Step("read", ("attention.q_lin", "attention.k_lin", "attention.v_lin")),
        Step("write", ("attention.out_lin",)),
        Step("norm", ("sa_layer_norm",)),
        Step("read", ("ffn.lin1",)),
        Step("write", ("ffn.lin2",)),
        Step("norm", ("output_layer_norm",)),
    ),
    ends=(
        _pooled("pre_classifier", "classifier"),
        _masked("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        (Step("read", ("classifier", "qa_outputs")),),
    ),
    config={"dim": "hidden", "n_heads": "heads"},
    multiple_of="head_dim",
)

# BERT derives the size of a head from hidden_size / num_attention_heads, so that no config builds
# fewer heads of the same size.
_BERT = Family(
    name="bert",
    blocks="encoder.layer",
    attn=Wiring(
        producers=("attention.self.query",),
        key_value=("attention.self.key", "attention.self.value"),
        consumer="attention.output.dense",
        head_dim="attention.self.attention_head_size",
        numbers={
            "attention.self.num_attention_heads": "heads",
            "attention.self.all_head_size": "features",
        },
    ),
    mlp=Wiring(
        producers=("intermediate.dense",),
        consumer="output.dense",
        config={"intermediate_size": "features"},
    ),
    stream=BERT,
    without={"stock": "heads: its config derives the size of a head from the hidden size"},
)

# The rows of the table.
BERT_ROWS = (
    _BERT,
    replace(_BERT, name="roberta"),
    replace(_BERT, name="xlm-roberta"),
    replace(_BERT, name="camembert"),
    replace(
        _BERT,
        name="electra",
        stream=(PROJECTED, ELECTRA),
    ),
    replace(
        _BERT,
        name="mpnet",
        attn=Wiring(
            producers=("attention.attn.q",),
            key_value=("attention.attn.k", "attention.attn.v"),
            consumer="attention.attn.o",
            head_dim="attention.attn.attention_head_size",
            numbers={
                "attention.attn.num_attention_heads": "heads",
                "attention.attn.all_head_size": "features",
            },
            # The encoder computes the relative position bias once, for all blocks and heads.
            head_input=HeadInput("attention.attn", 2, "position_bias"),
        ),
        stream=MPNET,
    ),
    Family(
        name="distilbert",
        blocks="transformer.layer",
        attn=Wiring(
            producers=("attention.q_lin",),
            key_value=("attention.k_lin", "attention.v_lin"),
            consumer="attention.out_lin",
            head_dim="attention.attention_head_size",
            numbers={"attention.n_heads": "heads"},
        ),
        mlp=Wiring(producers=("ffn.lin1",), consumer="ffn.lin2", config={"hidden_dim": "features"}),
        stream=DISTILBERT,
    ),
)


# What a block reads is now what is put into it, then what a block before it or itself put out; what
# reads its last run alone is asked itself, too.
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
_SHARED_STREAM = Stream(
    start=(
        Step("write", ("encoder.embedding_hidden_mapping_in",)),
        Step("aside", tuple(f"embeddings.{name}" for name in _TABLES)),
    ),
    block=(
        Step("take", ("attention.query", "attention.key", "attention.value")),
        Step("write", ("attention.dense",)),
        Step("norm", ("attention.LayerNorm",)),
        Step("read", ("ffn",)),
        Step("write", ("ffn_output",)),
        Step("norm", ("full_layer_layer_norm",)),
    ),
    ends=(
        (
            Step("take", ("pooler",)),
            Step("write", ("pooler",)),
            Step("take", ("classifier", "sop_classifier.classifier")),
        ),
        (
            Step("take", ("predictions.dense",)),
            Step("aside", ("predictions.LayerNorm", "predictions.decoder")),
        ),
        (Step("take", ("classifier", "qa_outputs")),),
    ),
    config={"hidden_size": "hidden", "num_attention_heads": "heads"},
    multiple_of="head_dim",
)

# The rows of the table.
ALBERT_ROWS = (
    # What a block has is sliced once for all of its runs; its sums are those of all of them.
    Family(
        name="albert",
        blocks="encoder.albert_layer_groups.*.albert_layers",
        attn=Wiring(
            producers=("attention.query",),
            key_value=("attention.key", "attention.value"),
            consumer="attention.dense",
            head_dim="attention.attention_head_size",
            numbers={
                "attention.num_attention_heads": "heads",
                "attention.all_head_size": "features",
            },
        ),
        mlp=Wiring(
            producers=("ffn",), consumer="ffn_output", config={"intermediate_size": "features"}
        ),
        stream=_SHARED_STREAM,
        repeats=True,
        without={
            "stock": "heads: its config derives the size of a head from the hidden size",
            "layerwise": "a block runs several times, and each run reads what the last one wrote; "
            "one pass sums all of its runs",
        },
    ),
)


def _attention(*positions: str) -> Wiring:
    """Return the wiring of attention with some projections of relative positions."""
    layers = ("query_proj", *positions)
    return Wiring(
        producers=tuple(f"attention.self.{layer}" for layer in layers),
        key_value=("attention.self.key_proj", "attention.self.value_proj"),
        consumer="attention.output.dense",
        head_dim="attention.self.attention_head_size",
        numbers={
            "attention.self.num_attention_heads": "heads",
            "attention.self.all_head_size": "features",
        },
    )


# The rows of the table.
DEBERTA_ROWS = (
    Family(
        name="deberta-v2",
        blocks="encoder.layer",
        # With share_att_key the layers of query and key read the positions, too.
        attn=(
            _attention("pos_key_proj", "pos_query_proj"),
            _attention("pos_key_proj"),
            _attention("pos_query_proj"),
            _attention(),
        ),
        mlp=Wiring(
            producers=("intermediate.dense",),
            consumer="output.dense",
            config={"intermediate_size": "features"},
        ),
        without={
            "hidden": "its query and key layers also read embeddings of relative positions",
            "stock": "heads: its config derives the size of a head from the hidden size",
        },
    ),
)

ROWS = (*BERT_ROWS, *ALBERT_ROWS, *DEBERTA_ROWS)
