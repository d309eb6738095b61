"""Gemma: Llama's sites, embeddings scaled by the hidden size, norms also after the branches."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import MLP, ROW
from liar_ext.models.families.reasons import ADDED, BORROWED, SCALED

_GEMMA = replace(ROW, name="gemma", mlp=MLP, stream=None, without={"hidden": SCALED})
_BOTH = {"hidden": f"{SCALED}, and {ADDED}"}

# Layers of Gemma 4 have sizes of their own in the dense config, and wider MLPs where they borrow.
_GEMMA4 = replace(
    _GEMMA,
    name="gemma4_text",
    attn=None,
    mlp=replace(MLP, config=None),
    lends=True,
    without={
        **{"attn": BORROWED, "kv_group": BORROWED, "layerwise": BORROWED},
        "hidden": f"{SCALED}, and {ADDED}",
        "stock": "channels: its config has sizes of single layers of its own",
    },
)

# The rows of the table.
ROWS = (
    _GEMMA4,
    replace(_GEMMA4, name="gemma4", blocks="language_model.layers", config="text_config"),
    _GEMMA,
    replace(_GEMMA, name="gemma2", without=_BOTH),
    replace(_GEMMA, name="vaultgemma"),
    replace(_GEMMA, name="gemma3_text", without=_BOTH),
    replace(
        _GEMMA,
        name="gemma3",
        blocks="language_model.layers",
        config="text_config",
        without=_BOTH,
    ),
)
