"""GPT-2: q, k and v stacked in one transposed layer."""

from __future__ import annotations

from liar_ext.models.families.reasons import HEADS_OF_HIDDEN
from liar_ext.models.family import Family, Stack, Step, Stream, Wiring

_STREAM = Stream(
    start=(Step("write", ("wte", "wpe")),),
    block=(
        Step("norm", ("ln_1",)),
        Step("read", ("attn.c_attn",)),
        Step("write", ("attn.c_proj",)),
        Step("norm", ("ln_2",)),
        Step("read", ("mlp.c_fc",)),
        Step("write", ("mlp.c_proj",)),
    ),
    ends=(
        (
            Step("norm", ("ln_f",)),
            Step("read", ("lm_head", "score", "classifier", "qa_outputs")),
        ),
    ),
    config={"n_embd": "hidden", "n_head": "heads"},
    multiple_of="head_dim",
)

# The rows of the table.
ROWS = (
    # GPT-2 computes [q; k; v] in one transposed layer and splits the result at split_size.
    Family(
        name="gpt2",
        blocks="h",
        attn=Wiring(
            producers=("attn.c_attn",),
            consumer="attn.c_proj",
            head_dim="attn.head_dim",
            stacked={"attn.c_attn": Stack(("query", "key", "value"))},
            transposed=True,
            numbers={
                "attn.num_heads": "heads",
                "attn.embed_dim": "features",
                "attn.split_size": "features",
            },
        ),
        mlp=Wiring(
            producers=("mlp.c_fc",),
            consumer="mlp.c_proj",
            transposed=True,
            config={"n_inner": "features"},
        ),
        stream=_STREAM,
        without={"stock": HEADS_OF_HIDDEN},
    ),
)
