"""Hybrids: some blocks have linear attention, Mamba or a convolution in place of attention.

Linear attention and Mamba keep one state for all tokens. A *key head* writes it with its key and
reads it with its query, and the value heads that share these have a state each::

    projections ──▶ depthwise convolution ──▶ state ──▶ norm ──▶ gate ──▶ out_proj

Heads are independent up to that norm. If it runs over single heads, as in Gated DeltaNet, any of
them may leave; if it runs over a group of them, as in Mamba-2, whole groups alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from liar_ext.models.families.decoders import (
    ATTN,
    GROUPS,
    HEADS,
    LLAMA,
    MLP,
    NORMS,
    QKVO,
    ROW,
    TASKS,
    gated,
    in_pictures,
    with_block,
)
from liar_ext.models.families.moe import (
    GATED,
    GRANITE_EXPERTS,
    GRANITE_SHARED,
    OWN_WIDTH,
    QWEN3_EXPERTS,
    experts,
    mixture,
)
from liar_ext.models.family import Family, Stack, Wiring, attention, mlp, steps

_KEYS = ("query", "key")  # of which a value head has none of its own


def _delta(projections: Mapping[str, Stack | None]) -> Wiring:
    """Return Gated DeltaNet by its projections; those of one matrix have no Stack."""
    module = "linear_attn"
    stacks = {f"in_proj_{name}": stack for name, stack in projections.items() if stack}
    stacks["conv1d.weight"] = Stack(("query", "key", "value"), grouped=_KEYS)
    sizes = {
        **{"num_v_heads": "heads", "num_k_heads": "kv_heads"},
        **{"value_dim": "features", "key_dim": "key_features", "conv_dim": "conv_features"},
    }
    return Wiring(
        producers=tuple(f"{module}.in_proj_{name}" for name in projections),
        consumer=f"{module}.out_proj",
        head_dim=f"{module}.head_v_dim",
        key_dim=f"{module}.head_k_dim",
        stacked={f"{module}.{name}": stack for name, stack in stacks.items()},
        numbers={f"{module}.{name}": size for name, size in sizes.items()},
        config={"linear_num_value_heads": "heads", "linear_num_key_heads": "kv_heads"},
        per_head=tuple(f"{module}.{name}" for name in ("conv1d.weight", "dt_bias", "A_log")),
    )


_DELTA = _delta(
    {"qkv": Stack(("query", "key", "value"), grouped=_KEYS), "z": None, "b": None, "a": None}
)
# The same, key head by key head; b and a are a number for each value head.
_DELTA_NEXT = _delta(
    {
        "qkvz": Stack(("query", "key", "value", "gate"), by_group=True, grouped=_KEYS),
        "ba": Stack(("b", "a"), by_group=True, single=("b", "a")),
    }
)
# A head of q_proj is its query and the gate of its output, one after the other.
_QWEN = replace(
    ROW,
    name="qwen3_5_text",
    attn=(ROW.attn, _DELTA),
    mlp=MLP,
    stream=replace(LLAMA, norm_offset=1.0),
)
_NEXT = mixture("qwen3_next", (ROW.attn, _DELTA_NEXT), (QWEN3_EXPERTS, MLP), GATED)
_QWEN_MOE = replace(_NEXT, name="qwen3_5_moe_text", attn=(ROW.attn, _DELTA))
ROWS = [
    *(_QWEN, in_pictures(_QWEN, "qwen3_5")),
    *(_NEXT, _QWEN_MOE, in_pictures(_QWEN_MOE, "qwen3_5_moe")),
]

# Of Mamba-2 B, C and x are keys, queries and values, and dt is a number for each head.
_CONV = Stack(("value", "key", "query"), grouped=_KEYS)
# Its norm runs over a group of heads: those that share B and C.
_MAMBA = Wiring(
    producers=("mixer.in_proj",),
    consumer="mixer.out_proj",
    head_dim="mixer.head_dim",
    key_dim="mixer.ssm_state_size",
    whole_groups=True,
    stacked={
        "mixer.in_proj": Stack(
            ("gate", "value", "key", "query", "dt"), grouped=_KEYS, single=("dt",)
        ),
        **{"mixer.conv1d.weight": _CONV, "mixer.conv1d.bias": _CONV},
    },
    numbers={
        **{"mixer.num_heads": "heads", "mixer.n_groups": "kv_heads"},
        **{"mixer.intermediate_size": "features", "mixer.conv_dim": "conv_features"},
    },
    config={"mamba_num_heads": "heads", "n_groups": "kv_heads"},
    optional=True,
    per_head=(
        *("mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_bias", "mixer.A_log"),
        *("mixer.D", "mixer.norm.weight"),
    ),
)
_OPTIONAL = replace(ROW.attn, optional=True)
# A block is attention, Mamba, an MLP or a mixture of experts, which have no gate.
_NEMOTRON_EXPERTS = replace(
    experts(
        {"moe_intermediate_size": "features", "n_routed_experts": "experts"},
        *("mixer.experts", "mixer.gate"),
    ),
    producers=("mixer.experts.up_proj",),
    stacked={},
    requires={"moe_latent_size": None},  # else they write other features than the stream's
)
# Heads of Mamba of the first two are one group, unless a config says otherwise, and stay.
ROWS += [
    mixture(
        "granitemoehybrid",
        _OPTIONAL,
        # Its smallest models have no experts but the one that every token passes.
        replace(GRANITE_EXPERTS, optional=True),
        GRANITE_SHARED,
    ),
    Family(
        "bamba",
        "layers",
        _OPTIONAL,
        gated("feed_forward", bias_flag="mlp_bias"),
        stream=with_block(
            *(NORMS[0], "site attn", "read_if mamba.in_proj", "write_if mamba.out_proj"),
            *("aside_if mamba.conv1d mamba.norm", "norm pre_ff_layernorm", "site mlp"),
            ends=(steps("norm final_layernorm", TASKS),),
            multiple_of=None,  # its config makes Mamba a multiple of it
        ),
    ),
    mixture(
        "nemotron_h",
        (attention("mixer", QKVO, numbers=GROUPS, config=HEADS, optional=True), _MAMBA),
        (
            _NEMOTRON_EXPERTS,
            mlp(
                "mixer.up_proj mixer.down_proj",
                numbers={"mixer.intermediate_size": "features"},
                optional=True,
            ),
        ),
        replace(
            gated("mixer.shared_experts", "moe_shared_expert_intermediate_size", optional=True),
            producers=("mixer.shared_experts.up_proj",),
        ),
    ),
]

# Channels of a short convolution, gated before and after: C · conv(B · x).
_SHORT = Wiring(
    producers=("conv.in_proj",),
    consumer="conv.out_proj",
    stacked={"conv.in_proj": Stack(("B", "C", "x"))},
    per_head=("conv.conv.weight", "conv.conv.bias"),
)
_LFM2 = (replace(ATTN, consumer="self_attn.out_proj"), _SHORT)
# Of intermediate_size the config takes two thirds, rounded, unless it is told not to.
_SWIGLU = mlp("feed_forward.w1 feed_forward.w3 feed_forward.w2", "")
_AS_WIDE = "convolutions: the config has no width of theirs but the hidden size"
ROWS += [
    Family(
        "lfm2",
        "layers",
        _LFM2,
        _SWIGLU,
        stream=with_block(
            *("norm operator_norm", "site attn", "norm ffn_norm", "site mlp"),
            ends=(steps("norm embedding_norm", TASKS),),
            multiple_of=None,
        ),
        without={"stock": f"channels: its config rounds their number; {_AS_WIDE}"},
    ),
    # The first layers have an ordinary MLP.
    mixture(
        "lfm2_moe",
        _LFM2,
        (
            experts(
                OWN_WIDTH,
                *("feed_forward.experts", "feed_forward.gate"),
                choice="feed_forward.expert_bias",
            ),
            mlp(
                "feed_forward.w1 feed_forward.w3 feed_forward.w2",
                numbers={"feed_forward.intermediate_size": "features"},
            ),
        ),
        without={"stock": _AS_WIDE},
    ),
]
