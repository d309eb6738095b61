"""Tiny decoders, for ``tests/models/test_decoder_families.py``, and the form of a row."""

from __future__ import annotations

from collections import ChainMap

Row = tuple[str, dict]  # class of the model, and fields of its config
VOCAB = 61
TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    **{"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 20},
    **{"num_attention_heads": 8, "num_key_value_heads": 4},
    "max_position_embeddings": 64,
}
_GQA = {**TEXT, **_SIZES, "head_dim": 4}
# Heads of which the hidden size is made.
_SQUARE = {**TEXT, **_SIZES, "hidden_size": 64}
_FALCON = {
    **TEXT,
    **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8},
    "ffn_hidden_size": 24,
}
_GPT = {**{**TEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 24}, "n_positions": 64}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1}
_PIXTRAL = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 16, "image_size": 8, "patch_size": 4},
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
# Layers with heads of another size, of which the last one has the keys and values of the second.
_GEMMA4 = {
    **_GQA,
    **{"num_hidden_layers": 3, "global_head_dim": 8, "sliding_window": 4},
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    **{"num_kv_shared_layers": 1, "use_double_wide_mlp": True},
    **{"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": VOCAB},
}

# Blocks with attention between blocks with another mixer of tokens.
_LINEAR = {
    **_GQA,
    **{"head_dim": 8, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **{"linear_key_head_dim": 6, "linear_value_head_dim": 4},
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8},
}


def row(model_class: str, *some: dict, **fields: object) -> Row:
    """Return a row with the fields of some dicts, and more, the later ones on top."""
    return model_class, dict(ChainMap(fields, *reversed(some)))


def _seeing(name: str, text: str, vision: str) -> Row:
    return row(
        f"{name}ForConditionalGeneration",
        text_config={"model_type": text, **_GQA},
        vision_config={"model_type": vision, **_PIXTRAL},
    )


DECODERS: dict[str, Row] = {
    "phi3": row("Phi3ForCausalLM", _GQA),
    "phi3_mha": row("Phi3ForCausalLM", _SQUARE, num_key_value_heads=8),
    "glm": row("GlmForCausalLM", _GQA, attention_bias=True),
    "glm4": row("Glm4ForCausalLM", _GQA, attention_bias=True),
    "gemma": row("GemmaForCausalLM", _GQA),
    "gemma2": row("Gemma2ForCausalLM", _GQA, query_pre_attn_scalar=7, sliding_window=4),
    "vaultgemma": row("VaultGemmaForCausalLM", _GQA, query_pre_attn_scalar=7),
    "gemma4_text": row("Gemma4ForCausalLM", _GEMMA4),
    # As the larger ones: each layer has keys of its own, which are the values of some.
    "gemma4_text_whole": row(
        "Gemma4ForCausalLM",
        _GEMMA4,
        num_kv_shared_layers=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        hidden_size_per_layer_input=0,
    ),
    "gemma4": row(
        "Gemma4ForConditionalGeneration",
        text_config=_GEMMA4,
        vision_config={**_PIXTRAL, "head_dim": 8},
        audio_config=None,
    ),
    "olmo": row("OlmoForCausalLM", _SQUARE, clip_qkv=0.5),
    "olmo2": row("Olmo2ForCausalLM", _SQUARE),
    "olmo3": row("Olmo3ForCausalLM", _SQUARE),
    "granite": row(
        "GraniteForCausalLM",
        _SQUARE,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        attention_multiplier=0.2,
    ),
    "starcoder2": row("Starcoder2ForCausalLM", _SQUARE),
    "stablelm": row("StableLmForCausalLM", _SQUARE, use_qkv_bias=True),
    "stablelm_parallel": row("StableLmForCausalLM", _SQUARE, use_parallel_residual=True),
    "falcon": row("FalconForCausalLM", _FALCON),
    "falcon_mha": row(
        "FalconForCausalLM", _FALCON, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon_new": row("FalconForCausalLM", _FALCON, new_decoder_architecture=True, num_kv_heads=4),
    "cohere": row("CohereForCausalLM", _SQUARE),
    "cohere2": row("Cohere2ForCausalLM", _GQA, sliding_window=4),
    "nemotron": row("NemotronForCausalLM", _GQA),
    "arcee": row("ArceeForCausalLM", _GQA),
    "jais2": row("Jais2ForCausalLM", _GQA),
    "apertus": row("ApertusForCausalLM", _SQUARE),
    "phi": row("PhiForCausalLM", _SQUARE),
    "ministral": row("MinistralForCausalLM", _GQA),
    "ministral3": row("Ministral3ForCausalLM", _GQA),
    "exaone4": row("Exaone4ForCausalLM", _SQUARE),
    "seed_oss": row("SeedOssForCausalLM", _GQA),
    "hunyuan_v1_dense": row("HunYuanDenseV1ForCausalLM", _GQA),
    "ernie4_5": row("Ernie4_5ForCausalLM", _GQA),
    "helium": row("HeliumForCausalLM", _SQUARE, head_dim=8),
    "nanochat": row("NanoChatForCausalLM", _SQUARE),
    "qwen3_5_text": row("Qwen3_5ForCausalLM", _LINEAR),
    "qwen3_5": row(
        "Qwen3_5ForConditionalGeneration",
        text_config=_LINEAR,
        vision_config={
            **_QWEN_VISION,
            **{"hidden_size": 16, "out_hidden_size": 48, "intermediate_size": 16},
        },
    ),
    "bamba": row(
        "BambaForCausalLM",
        _SQUARE,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_state=6,
        mamba_chunk_size=4,
    ),
    "lfm2": row(
        "Lfm2ForCausalLM",
        _GQA,
        block_auto_adjust_ff_dim=False,
        layer_types=["full_attention", "conv", "full_attention"],
    ),
    "cwm": row("CwmForCausalLM", _GQA),
    "qwen2_vl": row(
        "Qwen2VLForConditionalGeneration",
        text_config={**_SQUARE, "rope_parameters": _MROPE},
        vision_config={**_QWEN_VISION, "embed_dim": 16, "hidden_size": 64},
    ),
    "qwen2_5_vl": row(
        "Qwen2_5_VLForConditionalGeneration",
        text_config={**_SQUARE, "rope_parameters": _MROPE},
        vision_config={
            **_QWEN_VISION,
            **{"hidden_size": 16, "out_hidden_size": 64, "intermediate_size": 16},
        },
    ),
    "qwen3_vl": row(
        "Qwen3VLForConditionalGeneration",
        text_config={**_SQUARE, "head_dim": 8, "rope_parameters": _MROPE},
        vision_config={
            **_QWEN_VISION,
            **{"hidden_size": 16, "out_hidden_size": 64, "intermediate_size": 16},
            "deepstack_visual_indexes": [0],
        },
    ),
    "mistral3": _seeing("Mistral3", "ministral3", "pixtral"),
    "llava": _seeing("Llava", "llama", "clip_vision_model"),
    "llava_onevision": _seeing("LlavaOnevision", "qwen2", "siglip_vision_model"),
    "internvl": _seeing("InternVL", "qwen2", "internvl_vision"),
    "paligemma": _seeing("PaliGemma", "gemma", "siglip_vision_model"),
    "idefics3": _seeing("Idefics3", "llama", "idefics3_vision"),
    "smolvlm": _seeing("SmolVLM", "llama", "smolvlm_vision"),
    "granite_swa": row(
        "GraniteSWAForCausalLM",
        _GQA,
        sliding_window=4,
        residual_multiplier=0.5,
        attention_bias=True,
    ),
    "modernbert-decoder": row(
        "ModernBertDecoderForCausalLM",
        _SQUARE,
        local_attention=6,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "gpt_neo": row(
        "GPTNeoForCausalLM",
        TEXT,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=4,
        intermediate_size=24,
        max_position_embeddings=64,
    ),
    "gptj": row("GPTJForCausalLM", _GPT, rotary_dim=4),
    "codegen": row("CodeGenForCausalLM", _GPT, rotary_dim=4),
    "gpt_bigcode": row("GPTBigCodeForCausalLM", _GPT),
    "bloom": row("BloomForCausalLM", TEXT, hidden_size=32, n_layer=3, n_head=4),
    "mpt": row("MptForCausalLM", TEXT, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
    "biogpt": row("BioGptForCausalLM", _SQUARE, hidden_size=32, intermediate_size=24),
    "llava_next": _seeing("LlavaNext", "llama", "clip_vision_model"),
    "video_llava": _seeing("VideoLlava", "llama", "clip_vision_model"),
    "aya_vision": _seeing("AyaVision", "cohere2", "siglip_vision_model"),
    "cohere2_vision": _seeing("Cohere2Vision", "cohere2", "siglip_vision_model"),
    "got_ocr2": row(
        "GotOcr2ForConditionalGeneration",
        text_config={"model_type": "qwen2", **_GQA},
        vision_config={
            **{**_PIXTRAL, "mlp_dim": 16, "output_channels": 8, "global_attn_indexes": [0]},
            "window_size": 2,
        },
    ),
    "qwen2_audio": row(
        "Qwen2AudioForConditionalGeneration",
        text_config={"model_type": "qwen2", **_GQA},
        audio_config={
            **{"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_ffn_dim": 16},
            **{"encoder_attention_heads": 2, "max_source_positions": 6},
        },
    ),
    "eurobert": row("EuroBertForMaskedLM", _GQA),
}
