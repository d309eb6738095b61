"""Mixtures of experts: their attention is Llama's, or DeepSeek's, which is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from liar_ext.models.families.decoders import (
    ATTN,
    ATTN_COUNTED,
    MLP,
    ROW,
    SINKS,
    gated,
    in_pictures,
)
from liar_ext.models.family import GATE_UP, JOINT, ROUTED, Experts, Family, Stack, Wiring, like, mlp


def experts(
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
            f"{module}.{width}": "features",
            f"{module}.num_experts": "experts",
            f"{router}.num_experts": "experts",
        },
        config=config,
        experts=Experts(module, router, **more),
    )


LOCAL = {"intermediate_size": "features", "num_local_experts": "experts"}
OWN_WIDTH = {"moe_intermediate_size": "features", "num_experts": "experts"}
_ALONE = {"num_experts": "experts"}
QWEN3_EXPERTS = experts(OWN_WIDTH)
# gpt-oss has columns for rows, with gate and up of a channel side by side.
_GPT_OSS = replace(
    experts(LOCAL, router="mlp.router", width="intermediate_size"),
    stacked={"mlp.experts.gate_up_proj": Stack(("gate", "up"), by_group=True)},
    transposed=True,
)
# The router's weight is that of a linear layer inside of it; experts and the one beside them have
# one width.
_HUNYUAN = experts(_ALONE, weight="wg.weight")
_ERNIE = experts({"moe_num_experts": "experts"})
# The config makes an expert that reads every token as wide as the others, or a multiple of that.
_ROUTED = experts({"n_routed_experts": "experts"})
_COUNTED = experts(_ALONE)
_CHOICE = "mlp.e_score_correction_bias"
_PREFIX = replace(MLP, config={"prefix_dense_intermediate_size": "features"})
GRANITE_EXPERTS = experts(LOCAL, "block_sparse_moe.experts", "block_sparse_moe.router")
# Every token passes these, in the layers that have one.
GRANITE_SHARED = mlp(
    "shared_mlp.input_linear shared_mlp.output_linear",
    "shared_intermediate_size",
    GATE_UP,
    numbers={"shared_mlp.hidden_size": "features"},
    optional=True,
)
# What it gives is scaled, token by token.
GATED = gated("mlp.shared_expert", "shared_expert_intermediate_size", optional=True)
_SUMMED = gated("mlp.shared_experts", "", optional=True)
# Queries, and keys and values together, of all heads are made from a few numbers of a token, which
# all heads share; v2-lite makes queries from the token itself.
_LATENT = tuple(
    Wiring(
        producers=(f"self_attn.{queries}", "self_attn.kv_b_proj"),
        consumer="self_attn.o_proj",
        head_dim="self_attn.v_head_dim",
        numbers={"self_attn.num_heads": "heads"},
        config={"num_attention_heads": "heads", "num_key_value_heads": "heads"},
    )
    for queries in ("q_b_proj", "q_proj")
)
_FLAG = {"bias_flag": "use_bias"}
_JOINT = {"attn": JOINT, "kv_group": JOINT}
_BESIDE = {"stock": "channels: one field says how wide routed and shared experts are"}


def mixture(
    name: str,
    attn: Wiring | tuple[Wiring, ...] | None,
    mlp: Wiring | tuple[Wiring, ...],
    shared_mlp: Wiring | None = None,
    without: Mapping[str, str] | None = None,
) -> Family:
    """Return the row of a mixture, whose hidden size stays as its routers read it."""
    without = {"hidden": ROUTED, **(without or {})}
    return Family(name, "layers", attn, mlp, shared_mlp=shared_mlp, without=without)


_LLAMA4_EXPERTS = experts(
    {"num_local_experts": "experts"},
    *("feed_forward.experts", "feed_forward.router", "expert_dim"),
    scales_input=True,
)
_LLAMA4 = replace(
    mixture(
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
_QWEN3 = mixture("qwen3_moe", ROW.attn, (QWEN3_EXPERTS, MLP))
_OLMOE = mixture("olmoe", None, experts({"intermediate_size": "features", **_ALONE}), None, _JOINT)
_GLM4 = mixture("glm4_moe", ATTN, (_ROUTED, MLP), _SUMMED, _BESIDE)
_DEEPSEEK = mixture("deepseek_v3", _LATENT, (_ROUTED, MLP), _SUMMED, _BESIDE)
ROWS = (
    mixture("mixtral", ATTN, experts(LOCAL)),
    # Layers that mlp_only_layers names have an ordinary MLP.
    *(*like(_QWEN3, "qwen3_moe mellum"), in_pictures(_QWEN3, "qwen3_vl_moe")),
    *like(_OLMOE, "olmoe flex_olmo"),
    mixture("gpt_oss", replace(ROW.attn, **SINKS), _GPT_OSS),
    # Blocks of linear attention have no sites of attention, and as many heads by the config.
    mixture(
        "minimax",
        replace(ATTN, optional=True, config=None),
        experts(LOCAL),
        without={"stock": "heads: one field also counts those of linear attention"},
    ),
    mixture(
        *("hunyuan_v1_moe", ROW.attn, _HUNYUAN),
        *(gated("mlp.shared_mlp", "", optional=True), _BESIDE),
    ),
    mixture(
        "ernie4_5_moe",
        replace(ATTN, **_FLAG),
        (
            replace(_ERNIE, numbers={**_ERNIE.numbers, "mlp.num_experts": "experts"}),
            replace(MLP, **_FLAG),
        ),
        replace(_SUMMED, **_FLAG),
        _BESIDE,
    ),
    mixture("qwen2_moe", ATTN, (QWEN3_EXPERTS, MLP), GATED),
    mixture("granitemoe", ROW.attn, GRANITE_EXPERTS),
    mixture("granitemoeshared", ROW.attn, GRANITE_EXPERTS, GRANITE_SHARED),
    mixture("granitemoe_swa", replace(ROW.attn, **SINKS), GRANITE_EXPERTS, GRANITE_SHARED),
    mixture("phimoe", ROW.attn, experts(LOCAL, router="mlp.router")),
    # The first layers of these have an ordinary MLP.
    *(_GLM4, in_pictures(_GLM4, "glm4v_moe")),
    mixture("dots1", ROW.attn, (_ROUTED, MLP), _SUMMED, _BESIDE),
    mixture("solar_open", ATTN, _ROUTED, _SUMMED, _BESIDE),
    mixture("cohere2_moe", ROW.attn, (_COUNTED, _PREFIX), _SUMMED, _BESIDE),
    mixture("exaone_moe", ATTN_COUNTED, (_COUNTED, MLP), _SUMMED, _BESIDE),
    mixture("hy_v3", ROW.attn, (experts(_ALONE, choice=_CHOICE), MLP), _SUMMED, _BESIDE),
    *like(_DEEPSEEK, "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite mistral4"),
    in_pictures(_DEEPSEEK, "kimi_k25"),
    replace(
        _DEEPSEEK,
        name="glm_moe_dsa",
        without={
            **_DEEPSEEK.without,
            "layerwise": "some layers attend to the tokens that an earlier one chose",
        },
    ),
    _LLAMA4,
    mixture("minimax_m2", None, experts(LOCAL, choice=_CHOICE), without=_JOINT),
)
