"""Tiny mixtures of experts, for ``tests/models/test_moe_families.py``."""

from __future__ import annotations

from tiny_decoders import TEXT, Row, row

_SIZES = {
    **TEXT,
    **{"hidden_size": 40, "num_hidden_layers": 2, "intermediate_size": 24},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
    **{"max_position_embeddings": 64, "num_experts_per_tok": 2},
}
_EXPERTS = {**_SIZES, "num_experts": 4, "moe_intermediate_size": 16}
# The first layer has an ordinary MLP, the others an expert for every token beside the routed ones.
_SHARED = {
    **_SIZES,
    **{"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16},
    **{"first_k_dense_replace": 1, "num_hidden_layers": 3, "n_group": 1, "topk_group": 1},
    **{"routed_scaling_factor": 1.5, "norm_topk_prob": True},
}
_LATENT = {
    **{name: value for name, value in _SHARED.items() if name != "head_dim"},
    **{"num_key_value_heads": 8, "q_lora_rank": 12, "kv_lora_rank": 10},
    **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 5},
}
# An indexer, which has heads of its own, chooses the tokens that are attended to.
_INDEX = {"index_n_heads": 2, "index_head_dim": 8, "head_dim": 6}
_LINEAR = {
    **{"layer_types": ["full_attention", "linear_attention"]},
    **{"linear_key_head_dim": 6, "linear_value_head_dim": 4},
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8},
    **{"shared_expert_intermediate_size": 12, "norm_topk_prob": True},
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}

# Attention to chunks of the text, or to all of it without positions, and every other block with
# experts.
_LLAMA4 = {
    **{**_SIZES, "num_local_experts": 4, "intermediate_size_mlp": 32, "num_hidden_layers": 4},
    **{"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 8},
}
_VISION = {
    **{"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1},
    **{"hidden_size": 16, "out_hidden_size": 40, "intermediate_size": 16},
    "deepstack_visual_indexes": [0],
}

NEMOTRON = {
    **{**_EXPERTS, "num_hidden_layers": 5, "n_routed_experts": 4},
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    **{"moe_shared_expert_intermediate_size": 12, "ssm_state_size": 5, "n_groups": 4},
    **{"mamba_num_heads": 8, "mamba_head_dim": 3, "chunk_size": 4, "norm_topk_prob": True},
}

MOE_FAMILIES: dict[str, Row] = {
    "qwen2_moe": row(
        "Qwen2MoeForCausalLM",
        _EXPERTS,
        hidden_size=64,
        mlp_only_layers=[1],
        shared_expert_intermediate_size=12,
        norm_topk_prob=True,
    ),
    "qwen3_vl_moe": row(
        "Qwen3VLMoeForConditionalGeneration",
        text_config={
            **{**_EXPERTS, "mlp_only_layers": [1], "head_dim": 8},
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
        },
        vision_config=_VISION,
    ),
    "minimax": row(
        "MiniMaxForCausalLM",
        _SIZES,
        num_local_experts=4,
        block_size=8,
        layer_types=["full_attention", "linear_attention"],
        mlp_alpha_factor=0.9,
        mlp_beta_factor=0.8,
    ),
    "lfm2_moe": row(
        "Lfm2MoeForCausalLM",
        _EXPERTS,
        num_dense_layers=1,
        num_hidden_layers=3,
        hidden_size=32,
        layer_types=["full_attention", "conv", "full_attention"],
    ),
    "hunyuan_v1_moe": row("HunYuanMoEV1ForCausalLM", _SIZES, num_experts=4, moe_topk=2),
    "ernie4_5_moe": row(
        "Ernie4_5_MoeForCausalLM",
        _SIZES,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        num_hidden_layers=3,
    ),
    "granitemoe": row(
        "GraniteMoeForCausalLM",
        _SIZES,
        num_local_experts=4,
        residual_multiplier=0.5,
        hidden_size=64,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "phimoe": row("PhimoeForCausalLM", _SIZES, hidden_size=64, num_local_experts=4),
    "granitemoe_swa": row(
        "GraniteMoeSWAForCausalLM",
        _SIZES,
        num_local_experts=4,
        shared_intermediate_size=12,
        sliding_window=4,
        hidden_size=64,
    ),
    "mellum": row(
        "MellumForCausalLM",
        _EXPERTS,
        mlp_layer_types=["dense", "sparse"],
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "cohere2_moe": row(
        "Cohere2MoeForCausalLM",
        _SIZES,
        num_experts=4,
        num_shared_experts=1,
        num_hidden_layers=3,
        mlp_layer_types=["dense", "sparse", "sparse"],
        sliding_window=4,
        prefix_dense_intermediate_size=20,
    ),
    "exaone_moe": row(
        "ExaoneMoeForCausalLM",
        _EXPERTS,
        num_shared_experts=1,
        num_hidden_layers=3,
        sliding_window=4,
        mlp_layer_types=["dense", "sparse", "sparse"],
        routed_scaling_factor=1.5,
        sliding_window_pattern=2,
    ),
    "hy_v3": row(
        "HYV3ForCausalLM",
        _EXPERTS,
        num_shared_experts=1,
        num_hidden_layers=3,
        router_scaling_factor=1.5,
    ),
    "glm4_moe": row("Glm4MoeForCausalLM", _SHARED, use_qk_norm=True),
    "dots1": row("Dots1ForCausalLM", _SHARED),
    "deepseek_v2": row("DeepseekV2ForCausalLM", _LATENT),
    "deepseek_v2 lite": row("DeepseekV2ForCausalLM", _LATENT, q_lora_rank=None),
    "deepseek_v3": row("DeepseekV3ForCausalLM", _LATENT),
    "deepseek_v32": row("DeepseekV32ForCausalLM", _LATENT, _INDEX, index_topk=4),
    "glm_moe_dsa": row(
        "GlmMoeDsaForCausalLM",
        _LATENT,
        _INDEX,
        index_topk=4,
        indexer_types=["full", "shared", "full"],
    ),
    "kimi_k25": row(
        "Kimi_K25ForConditionalGeneration",
        text_config={"model_type": "deepseek_v3", **_LATENT},
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "patch_size": 4, "pos_emb_height": 2},
            "pos_emb_width": 2,
        },
        projection_hidden_size=16,
    ),
    "llama4_text": row("Llama4ForCausalLM", _LLAMA4),
    "glm4v_moe": row(
        "Glm4vMoeForConditionalGeneration",
        text_config={
            **_SHARED,
            "hidden_size": 32,
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]},
        },
        vision_config={**_VISION, "out_hidden_size": 32, "image_size": 8},
    ),
    "mistral4": row("Mistral4ForCausalLM", _LATENT),
    "flex_olmo": row(
        "FlexOlmoForCausalLM", _SIZES, num_experts=4, hidden_size=32, num_attention_heads=8
    ),
    "qwen3_next": row("Qwen3NextForCausalLM", _EXPERTS, _LINEAR, head_dim=8, rope_parameters=_ROPE),
    "qwen3_5_moe_text": row(
        "Qwen3_5MoeForCausalLM",
        _EXPERTS,
        _LINEAR,
        head_dim=8,
        rope_parameters={**_ROPE, "mrope_section": [1, 1, 2]},
    ),
    "granitemoehybrid": row(
        "GraniteMoeHybridForCausalLM",
        _SIZES,
        num_local_experts=4,
        residual_multiplier=0.5,
        shared_intermediate_size=12,
        position_embedding_type="rope",
        layer_types=["linear_attention", "full_attention"],
        mamba_n_heads=8,
        mamba_d_state=6,
        mamba_chunk_size=4,
    ),
    "nemotron_h": row("NemotronHForCausalLM", NEMOTRON),
    "granitemoeshared": row(
        "GraniteMoeSharedForCausalLM",
        _SIZES,
        hidden_size=64,
        num_local_experts=4,
        shared_intermediate_size=12,
    ),
    "minimax_m2": row("MiniMaxM2ForCausalLM", _SIZES, num_local_experts=4),
    "solar_open": row("SolarOpenForCausalLM", _SHARED),
    "glm4_moe_lite": row("Glm4MoeLiteForCausalLM", _LATENT),
    "qwen3_5_moe": row(
        "Qwen3_5MoeForConditionalGeneration",
        text_config={
            **{**_EXPERTS, **_LINEAR, "head_dim": 8},
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
        },
        vision_config=_VISION,
    ),
}
