"""Mixtures of experts, and hybrids: linear attention, Mamba or a convolution in some blocks.

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
    ATTN_COUNTED,
    GROUPS,
    HEADS,
    MLP,
    NORMS,
    OFFSET,
    QKVO,
    ROW,
    SINKS,
    TASKS,
    gated,
    in_pictures,
    with_block,
)
from liar_ext.models.family import (
    GATE_UP,
    JOINT,
    Experts,
    Family,
    Stack,
    Wiring,
    attention,
    like,
    mlp,
    steps,
)


def _experts(
    config: dict[str, str],
    module: str = "mlp.experts",
    router: str = "mlp.gate",
    width: str = "intermediate_dim",
    **more: str | bool,
) -> Wiring:
    """Return the wiring of experts in a module, with rows of all gates, then of all ups."""
    producer = f"{module}.gate_up_proj"
    return Wiring(
        producers=(producer,),
        consumer=f"{module}.down_proj",
        stacked={producer: GATE_UP},
        numbers={
            **{f"{module}.{width}": "features", f"{module}.num_experts": "experts"},
            f"{router}.num_experts": "experts",
        },
        config=config,
        experts=Experts(module, router, **more),
    )


_LOCAL = {"intermediate_size": "features", "num_local_experts": "experts"}
_OWN_WIDTH = {"moe_intermediate_size": "features", "num_experts": "experts"}
_ALONE = {"num_experts": "experts"}
_OWN = _experts(_OWN_WIDTH)
# gpt-oss has columns for rows, with gate and up of a channel side by side.
_GPT_OSS = replace(
    _experts(_LOCAL, router="mlp.router", width="intermediate_size"),
    stacked={"mlp.experts.gate_up_proj": Stack(("gate", "up"), by_group=True)},
    transposed=True,
)
# The router's weight is that of a linear layer inside of it; experts and the one beside them have
# one width.
_HUNYUAN = _experts(_ALONE, weight="wg.weight")
_ERNIE = _experts({"moe_num_experts": "experts"})
_ERNIE = replace(_ERNIE, numbers={**_ERNIE.numbers, "mlp.num_experts": "experts"})
# The config makes an expert that reads every token as wide as the others, or a multiple of that.
_ROUTED, _COUNTED = _experts({"n_routed_experts": "experts"}), _experts(_ALONE)
_CHOICE = "mlp.e_score_correction_bias"
_PREFIX = replace(MLP, config={"prefix_dense_intermediate_size": "features"})
_GRANITE = _experts(_LOCAL, "block_sparse_moe.experts", "block_sparse_moe.router")
# Every token passes these, in the layers that have one.
_GRANITE_SHARED = mlp(
    "shared_mlp.input_linear shared_mlp.output_linear",
    "shared_intermediate_size",
    GATE_UP,
    numbers={"shared_mlp.hidden_size": "features"},
    optional=True,
)
# What it gives is scaled, token by token.
_SCALED = gated("mlp.shared_expert", "shared_expert_intermediate_size", optional=True)
_SUMMED = gated("mlp.shared_experts", "", optional=True)
# Queries, and keys and values together, of all heads are made from a few numbers of a token, which
# all heads share; v2-lite makes queries from the token itself.
_COMPRESSED = Wiring(
    producers=("self_attn.q_b_proj", "self_attn.kv_b_proj"),
    consumer="self_attn.o_proj",
    head_dim="self_attn.v_head_dim",
    numbers={"self_attn.num_heads": "heads"},
    config={"num_attention_heads": "heads", "num_key_value_heads": "heads"},
)
_LATENT = (_COMPRESSED, replace(_COMPRESSED, producers=("self_attn.q_proj", "self_attn.kv_b_proj")))
_FLAG = {"bias_flag": "use_bias"}
_JOINT = {"attn": JOINT, "kv_group": JOINT}
_BESIDE = {"stock": "channels: one field says how wide routed and shared experts are"}


def _mixture(
    name: str,
    attn: Wiring | tuple[Wiring, ...] | None,
    mlp: Wiring | tuple[Wiring, ...],
    shared_mlp: Wiring | None = None,
    without: Mapping[str, str] | None = None,
) -> Family:
    """Return the row of a mixture, whose hidden size stays as its routers read it."""
    routed = {"hidden": "its routers read it, and a narrower one sends tokens elsewhere"}
    without = {**routed, **(without or {})}
    return Family(name, "layers", attn, mlp, shared_mlp=shared_mlp, without=without)


_LLAMA4_EXPERTS = _experts(
    {"num_local_experts": "experts"},
    *("feed_forward.experts", "feed_forward.router", "expert_dim"),
    scales_input=True,
)
_LLAMA4 = replace(
    _mixture(
        "llama4_text",
        replace(ATTN_COUNTED, bias_flag="attention_bias"),
        # Where a block has no experts, its MLP has a width of its own.
        (
            replace(_LLAMA4_EXPERTS, transposed=True),
            replace(gated("feed_forward", "intermediate_size_mlp"), numbers={}),
        ),
        replace(gated("feed_forward.shared_expert", "", optional=True), numbers={}),
        {**_BESIDE, "experts": "its router scales what an expert reads, not what it gives"},
    ),
    blocks="model.layers",  # transformers takes the model with its head for its own base model
)
_QWEN3 = _mixture("qwen3_moe", ROW.attn, (_OWN, MLP))
_OLMOE_EXPERTS = _experts({"intermediate_size": "features", **_ALONE})
_OLMOE = _mixture("olmoe", None, _OLMOE_EXPERTS, None, _JOINT)
_GLM4 = _mixture("glm4_moe", ATTN, (_ROUTED, MLP), _SUMMED, _BESIDE)
_LENT_TOKENS = {"layerwise": "some layers attend to the tokens that an earlier one chose"}
_DEEPSEEK = _mixture("deepseek_v3", _LATENT, (_ROUTED, MLP), _SUMMED, _BESIDE)
ROWS = (
    _mixture("mixtral", ATTN, _experts(_LOCAL)),
    # Layers that mlp_only_layers names have an ordinary MLP.
    *(*like(_QWEN3, "qwen3_moe mellum"), in_pictures(_QWEN3, "qwen3_vl_moe")),
    *like(_OLMOE, "olmoe flex_olmo"),
    _mixture("gpt_oss", replace(ROW.attn, **SINKS), _GPT_OSS),
    # Blocks of linear attention have no sites of attention, and as many heads by the config.
    _mixture(
        "minimax",
        replace(ATTN, optional=True, config=None),
        _experts(_LOCAL),
        without={"stock": "heads: one field also counts those of linear attention"},
    ),
    _mixture(
        *("hunyuan_v1_moe", ROW.attn, _HUNYUAN),
        *(gated("mlp.shared_mlp", "", optional=True), _BESIDE),
    ),
    _mixture(
        *("ernie4_5_moe", replace(ATTN, **_FLAG), (_ERNIE, replace(MLP, **_FLAG))),
        *(replace(_SUMMED, **_FLAG), _BESIDE),
    ),
    _mixture("qwen2_moe", ATTN, (_OWN, MLP), _SCALED),
    _mixture("granitemoe", ROW.attn, _GRANITE),
    _mixture("granitemoeshared", ROW.attn, _GRANITE, _GRANITE_SHARED),
    _mixture("granitemoe_swa", replace(ROW.attn, **SINKS), _GRANITE, _GRANITE_SHARED),
    _mixture("phimoe", ROW.attn, _experts(_LOCAL, router="mlp.router")),
    # The first layers of these have an ordinary MLP.
    *(_GLM4, in_pictures(_GLM4, "glm4v_moe")),
    _mixture("dots1", ROW.attn, (_ROUTED, MLP), _SUMMED, _BESIDE),
    _mixture("solar_open", ATTN, _ROUTED, _SUMMED, _BESIDE),
    _mixture("cohere2_moe", ROW.attn, (_COUNTED, _PREFIX), _SUMMED, _BESIDE),
    _mixture("exaone_moe", ATTN_COUNTED, (_COUNTED, MLP), _SUMMED, _BESIDE),
    _mixture("hy_v3", ROW.attn, (_experts(_ALONE, choice=_CHOICE), MLP), _SUMMED, _BESIDE),
    *like(_DEEPSEEK, "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite mistral4"),
    in_pictures(_DEEPSEEK, "kimi_k25"),
    *like(_DEEPSEEK, "glm_moe_dsa", without={**_DEEPSEEK.without, **_LENT_TOKENS}),
    _LLAMA4,
    _mixture("minimax_m2", None, _experts(_LOCAL, choice=_CHOICE), without=_JOINT),
)

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
_QWEN = replace(ROW, name="qwen3_5_text", attn=(ROW.attn, _DELTA), mlp=MLP, stream=OFFSET)
_NEXT = _mixture("qwen3_next", (ROW.attn, _DELTA_NEXT), (_OWN, MLP), _SCALED)
_QWEN_MOE = replace(_NEXT, name="qwen3_5_moe_text", attn=(ROW.attn, _DELTA))
HYBRIDS = [
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
    per_head=tuple(
        f"mixer.{name}"
        for name in ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight")
    ),
)
_OPTIONAL = replace(ROW.attn, optional=True)
# A block is attention, Mamba, an MLP or a mixture of experts, which have no gate.
_NEMOTRON_EXPERTS = replace(
    _experts(
        {"moe_intermediate_size": "features", "n_routed_experts": "experts"},
        *("mixer.experts", "mixer.gate"),
    ),
    producers=("mixer.experts.up_proj",),
    stacked={},
    requires={"moe_latent_size": None},  # else they write other features than the stream's
)
# Heads of Mamba of the first two are one group, unless a config says otherwise, and stay.
HYBRIDS += [
    _mixture(
        "granitemoehybrid",
        _OPTIONAL,
        # Its smallest models have no experts but the one that every token passes.
        replace(_GRANITE, optional=True),
        _GRANITE_SHARED,
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
    _mixture(
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
_SIZED = replace(_SWIGLU, numbers={"feed_forward.intermediate_size": "features"})
_AS_WIDE = "convolutions: the config has no width of theirs but the hidden size"
HYBRIDS += [
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
    _mixture(
        "lfm2_moe",
        _LFM2,
        (
            _experts(
                *(_OWN_WIDTH, "feed_forward.experts", "feed_forward.gate"),
                choice="feed_forward.expert_bias",
            ),
            replace(_SIZED, config={"intermediate_size": "features"}),
        ),
        without={"stock": _AS_WIDE},
    ),
]
