"""Mixtures of experts: their attention is Llama's, or DeepSeek's, which is compressed."""

from __future__ import annotations

from dataclasses import replace

from liar_ext.models.families.llama import ATTN, MLP, ROW
from liar_ext.models.families.reasons import JOINT, PICTURES, ROUTED
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


def _placed(wiring: Wiring, experts: Experts, config: dict[str, str]) -> Wiring:
    """Return the wiring of experts kept somewhere else, and named otherwise by the config."""
    producer, consumer = (f"{experts.module}.{name}" for name in ("gate_up_proj", "down_proj"))
    return replace(
        wiring,
        producers=(producer,),
        consumer=consumer,
        stacked={producer: Stack(("gate", "up"))},
        numbers={
            f"{experts.module}.intermediate_dim": "features",
            f"{experts.module}.num_experts": "experts",
            f"{experts.router}.num_experts": "experts",
        },
        config=config,
        experts=experts,
    )


_LFM2 = _placed(
    _STACKED,
    Experts("feed_forward.experts", "feed_forward.gate", choice="feed_forward.expert_bias"),
    _QWEN3.config,
)
# The router's weight is that of a linear layer inside of it; experts and the one beside them have
# one width.
_HUNYUAN = replace(
    _STACKED,
    config={"num_experts": "experts"},
    experts=Experts("mlp.experts", "mlp.gate", weight="wg.weight"),
)
_ERNIE = replace(
    _STACKED,
    numbers={**_STACKED.numbers, "mlp.num_experts": "experts"},
    config={"moe_num_experts": "experts"},
)
_GRANITE = _placed(
    _STACKED, Experts("block_sparse_moe.experts", "block_sparse_moe.router"), _STACKED.config
)


def _shared(module: str, **more: object) -> Wiring:
    """Return the wiring of an expert that every token passes, in the layers that have one."""
    return Wiring(
        producers=(f"{module}.gate_proj", f"{module}.up_proj"),
        consumer=f"{module}.down_proj",
        numbers={f"{module}.intermediate_size": "features"},
        optional=True,
        **more,
    )


_GATED = _shared(
    "mlp.shared_expert", config={"shared_expert_intermediate_size": "features"}
)  # what it gives is scaled, token by token
_SUMMED = _shared("mlp.shared_experts")
_PHI = _placed(_STACKED, Experts("mlp.experts", "mlp.router"), _STACKED.config)
# The config makes an expert that reads every token as wide as the others, or a multiple of that.
_ROUTED = replace(_STACKED, config={"n_routed_experts": "experts"})
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
_BESIDE = "channels: one field says how wide routed and shared experts are"
_WITHOUT = {"hidden": ROUTED}

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
    Family(
        name="qwen3_vl_moe",
        blocks="language_model.layers",
        attn=ROW.attn,
        mlp=(_QWEN3, MLP),
        config="text_config",
        without={"hidden": f"{_WITHOUT['hidden']}, and {PICTURES}"},
    ),
    # Blocks of linear attention have no sites of attention, and as many heads by the config.
    Family(
        name="minimax",
        blocks="layers",
        attn=replace(ATTN, optional=True, config=None),
        mlp=_STACKED,
        without={**_WITHOUT, "stock": "heads: one field also counts those of linear attention"},
    ),
    # The first layers have an ordinary MLP, some blocks convolutions in place of attention.
    Family(
        name="lfm2_moe",
        blocks="layers",
        attn=replace(ATTN, consumer="self_attn.out_proj", optional=True),
        mlp=(
            _LFM2,
            Wiring(
                producers=("feed_forward.w1", "feed_forward.w3"),
                consumer="feed_forward.w2",
                numbers={"feed_forward.intermediate_size": "features"},
                config={"intermediate_size": "features"},
            ),
        ),
        without=_WITHOUT,
    ),
    Family(
        name="hunyuan_v1_moe",
        blocks="layers",
        attn=ROW.attn,
        mlp=_HUNYUAN,
        shared_mlp=_shared("mlp.shared_mlp"),
        without={**_WITHOUT, "stock": _BESIDE},
    ),
    Family(
        name="ernie4_5_moe",
        blocks="layers",
        attn=replace(ATTN, bias_flag="use_bias"),
        mlp=(_ERNIE, replace(MLP, bias_flag="use_bias")),
        shared_mlp=replace(_SUMMED, bias_flag="use_bias"),
        without={**_WITHOUT, "stock": _BESIDE},
    ),
    Family(
        name="qwen2_moe",
        blocks="layers",
        attn=ATTN,
        mlp=(_QWEN3, MLP),
        shared_mlp=_GATED,
        without=_WITHOUT,
    ),
    Family(name="granitemoe", blocks="layers", attn=ROW.attn, mlp=_GRANITE, without=_WITHOUT),
    Family(name="phimoe", blocks="layers", attn=ROW.attn, mlp=_PHI, without=_WITHOUT),
    # The first layers of these have an ordinary MLP.
    *(
        Family(
            name=name,
            blocks="layers",
            attn=attn,
            mlp=(_ROUTED, MLP),
            shared_mlp=_SUMMED,
            without={**_WITHOUT, "stock": _BESIDE},
        )
        for name, attn in (
            ("glm4_moe", ATTN),
            ("dots1", ROW.attn),
            ("deepseek_v2", _LATENT),
            ("deepseek_v3", _LATENT),
        )
    ),
    Family(
        name="flex_olmo",
        blocks="layers",
        attn=None,
        mlp=_OLMOE,
        without={**_WITHOUT, "attn": JOINT, "kv_group": JOINT},
    ),
    # As in Qwen3.5, some blocks have another mixer of tokens in place of attention.
    Family(
        name="qwen3_next",
        blocks="layers",
        attn=replace(ROW.attn, optional=True),
        mlp=(_QWEN3, MLP),
        shared_mlp=_GATED,
        without=_WITHOUT,
    ),
    Family(
        name="qwen3_5_moe_text",
        blocks="layers",
        attn=replace(ROW.attn, optional=True),
        mlp=(_QWEN3, MLP),
        shared_mlp=_GATED,
        without=_WITHOUT,
    ),
)
