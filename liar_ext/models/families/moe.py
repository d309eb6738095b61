"""Mixtures of experts: Mixtral, Qwen3-MoE, OLMoE and gpt-oss, attention as in Llama."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, MLP, ROW
from liar_ext.models.families.reasons import JOINT
from liar_ext.models.family import Experts, Family, Stack, Wiring

# Rows of gate_up_proj: those of all gates, then those of all ups.
_STACKED = Wiring(
    producers=("mlp.experts.gate_up_proj",),
    consumer="mlp.experts.down_proj",
    stacked={"mlp.experts.gate_up_proj": Stack(("gate", "up"))},
    numbers={
        "mlp.experts.intermediate_dim": "features",
        "mlp.experts.num_experts": "experts",
        "mlp.gate.num_experts": "experts",
    },
    config={"intermediate_size": "features", "num_local_experts": "experts"},
    experts=Experts("mlp.experts", "mlp.gate"),
)
_OLMOE = replace(_STACKED, config={"intermediate_size": "features", "num_experts": "experts"})
_QWEN3 = replace(_STACKED, config={"moe_intermediate_size": "features", "num_experts": "experts"})
# gpt-oss has columns for rows, with gate and up of a channel side by side.
_GPT_OSS = replace(
    _STACKED,
    stacked={"mlp.experts.gate_up_proj": Stack(("gate", "up"), by_group=True)},
    transposed=True,
    numbers={
        "mlp.experts.intermediate_size": "features",
        "mlp.experts.num_experts": "experts",
        "mlp.router.num_experts": "experts",
    },
    experts=Experts("mlp.experts", "mlp.router"),
)
_WITHOUT = {"hidden": "its routers read it, and a narrower one sends tokens elsewhere"}

# The rows of the table.
ROWS = (
    Family(
        name="mixtral",
        blocks="layers",
        attn=ATTN,
        mlp=_STACKED,
        without=_WITHOUT,
    ),
    # Layers that mlp_only_layers names have an ordinary MLP.
    Family(
        name="qwen3_moe",
        blocks="layers",
        attn=ROW.attn,
        mlp=(_QWEN3, MLP),
        without=_WITHOUT,
    ),
    Family(
        name="olmoe",
        blocks="layers",
        attn=None,
        mlp=_OLMOE,
        without={**_WITHOUT, "attn": JOINT, "kv_group": JOINT},
    ),
    Family(
        name="gpt_oss",
        blocks="layers",
        attn=replace(ROW.attn, per_head=("self_attn.sinks",)),
        mlp=_GPT_OSS,
        without=_WITHOUT,
    ),
)
