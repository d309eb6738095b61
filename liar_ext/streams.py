"""How the residual stream of each family is written, normalised and read: part of its row.

Checked against the source of transformers 5.24, and by tests that narrowing loses nothing where
there is nothing to lose.
"""

from __future__ import annotations

from liar_ext.wiring import Step, Stream

LLAMA = Stream(
    start=(Step("write", ("embed_tokens",)),),
    block=(
        Step("norm", ("input_layernorm",)),
        Step("read", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Step("write", ("self_attn.o_proj",)),
        Step("norm", ("post_attention_layernorm",)),
        Step("read", ("mlp.gate_proj", "mlp.up_proj")),
        Step("write", ("mlp.down_proj",)),
    ),
    ends=((Step("norm", ("norm",)), Step("read", ("lm_head", "score", "qa_outputs"))),),
    config={"hidden_size": "hidden"},
    multiple_of="heads",  # which LlamaConfig insists on, even where head_dim is given
)
# The embeddings may be narrower than the blocks, as they are in OPT-350m, and that model also has
# its norms elsewhere.
OPT = Stream(
    start=(Step("write", ("decoder.embed_tokens", "decoder.embed_positions")),),
    block=(
        Step("norm", ("self_attn_layer_norm",)),
        Step("read", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Step("write", ("self_attn.out_proj",)),
        Step("norm", ("final_layer_norm",)),
        Step("read", ("fc1",)),
        Step("write", ("fc2",)),
    ),
    ends=(
        (
            Step("norm", ("decoder.final_layer_norm",)),
            Step("read", ("lm_head", "score", "qa_outputs")),
        ),
    ),
    config={
        "hidden_size": "hidden",
        "word_embed_proj_dim": "hidden",
        "num_attention_heads": "heads",
    },
    multiple_of="head_dim",
    requires={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
)
# Both norms read the same stream where the two branches are parallel, and each its own else.
GPT_NEOX = Stream(
    start=(Step("write", ("embed_in",)),),
    block=(
        Step("norm", ("input_layernorm",)),
        Step("read", ("attention.query_key_value",)),
        Step("write", ("attention.dense",)),
        Step("norm", ("post_attention_layernorm",)),
        Step("read", ("mlp.dense_h_to_4h",)),
        Step("write", ("mlp.dense_4h_to_h",)),
    ),
    ends=(
        (
            Step("norm", ("final_layer_norm",)),
            Step("read", ("lm_head", "score", "classifier", "qa_outputs")),
        ),
    ),
    config={"hidden_size": "hidden", "num_attention_heads": "heads"},
    multiple_of="head_dim",
)


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
