"""OPT: LayerNorm before each branch, positions learnt."""

from __future__ import annotations

from liar_ext.models.families.reasons import HEADS_OF_HIDDEN
from liar_ext.models.family import Family, Step, Stream, Wiring

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


# The rows of the table.
ROWS = (
    Family(
        name="opt",
        blocks="decoder.layers",
        attn=Wiring(
            producers=("self_attn.q_proj",),
            key_value=("self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.out_proj",
            head_dim="self_attn.head_dim",
            numbers={"self_attn.num_heads": "heads", "self_attn.embed_dim": "features"},
        ),
        mlp=Wiring(producers=("fc1",), consumer="fc2", config={"ffn_dim": "features"}),
        stream=OPT,
        without={"stock": HEADS_OF_HIDDEN},
    ),
)
