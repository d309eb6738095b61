"""Gemma: Llama's sites, embeddings scaled by the hidden size, norms also after the branches."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN_AFTER, LLAMA, MLP, MLP_AFTER, ROW
from liar_ext.models.families.reasons import BORROWED, PICTURES
from liar_ext.models.family import Step

# Its norms scale by their weights and one.
_SCALED = replace(LLAMA, norm_offset=1.0, scaled=True)
_BEFORE = Step("norm", ("pre_feedforward_layernorm",))
_READ, _WRITTEN = LLAMA.block[4:6]
_BOTH = replace(
    _SCALED,
    block=(
        *LLAMA.block[:3],
        Step("branch_norm", ("post_attention_layernorm",)),
        *(_BEFORE, _READ, _WRITTEN),
        Step("branch_norm", ("post_feedforward_layernorm",)),
    ),
)
_GEMMA = replace(ROW, name="gemma", mlp=MLP, stream=_SCALED)
_GEMMA3 = replace(
    _GEMMA,
    name="gemma3_text",
    attn=replace(ROW.attn, output_norm=ATTN_AFTER.output_norm),
    mlp=MLP_AFTER,
    stream=_BOTH,
)

# Layers of Gemma 4 have sizes of their own in the dense config, and wider MLPs where they borrow.
_GEMMA4 = replace(
    _GEMMA,
    name="gemma4_text",
    attn=None,
    mlp=replace(MLP_AFTER, config=None),
    stream=None,
    lends=True,
    without={
        **{"attn": BORROWED, "kv_group": BORROWED, "layerwise": BORROWED},
        "hidden": "every block reads embeddings of its own beside the stream",
        "stock": "channels: its config has sizes of single layers of its own",
    },
)

# The rows of the table.
ROWS = (
    _GEMMA4,
    replace(_GEMMA4, name="gemma4", blocks="language_model.layers", config="text_config"),
    _GEMMA,
    replace(_GEMMA3, name="gemma2"),
    replace(
        _GEMMA,
        name="vaultgemma",
        stream=replace(_SCALED, block=(*LLAMA.block[:3], _BEFORE, _READ, _WRITTEN)),
    ),
    _GEMMA3,
    replace(
        _GEMMA3,
        name="gemma3",
        blocks="language_model.layers",
        config="text_config",
        stream=None,
        without={"hidden": PICTURES},
    ),
)
