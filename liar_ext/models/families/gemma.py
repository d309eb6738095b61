"""Gemma: Llama's sites, embeddings scaled by the hidden size, norms also after the branches."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import MLP, ROW
from liar_ext.models.families.reasons import ADDED, SCALED

_GEMMA = replace(ROW, name="gemma", mlp=MLP, stream=None, without={"hidden": SCALED})
_BOTH = {"hidden": f"{SCALED}, and {ADDED}"}

# The rows of the table.
ROWS = (
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
