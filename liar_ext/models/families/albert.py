"""ALBERT: one block, or a few, that run again and again."""

from __future__ import annotations

from liar_ext.models.family import Family, Step, Stream, Wiring

# What a block reads is now what is put into it, then what a block before it or itself put out; what
# reads its last run alone is asked itself, too.
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
_STREAM = Stream(
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
ROWS = (
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
        stream=_STREAM,
        repeats=True,
        without={
            "stock": "heads: its config derives the size of a head from the hidden size",
            "layerwise": "a block runs several times, and each run reads what the last one wrote; "
            "one pass sums all of its runs",
        },
    ),
)
