"""Tiny encoders, encoder-decoders and towers, for ``tests/models/test_encoder_families.py``."""

from __future__ import annotations

VOCAB = 61
_TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 24},
    "num_attention_heads": 4,
}
_ENCODER = {**_TEXT, **_SIZES, "max_position_embeddings": 64}
_IMAGE = {**_SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}
# Two blocks are enough for a tower, and a part of an encoder-decoder.
_TEXT_TOWER = {**_ENCODER, "num_hidden_layers": 2}
_IMAGE_TOWER = {**_IMAGE, "num_hidden_layers": 2, "intermediate_size": 20}
_SEQ2SEQ = {
    **_TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
_T5 = {
    **_TEXT,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}

_SPEECH = {
    **{**_SIZES, "vocab_size": VOCAB, "num_labels": 5},
    **{"conv_dim": [8, 8], "conv_kernel": [4, 3], "conv_stride": [2, 2]},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "conv_pos_kernel_size": 3},
    **{"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8},
}

# name: (model class, config class, config fields)
ENCODERS: dict[str, tuple[str, str, dict]] = {
    "dinov3_vit": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**_IMAGE, "num_register_tokens": 2, "layerscale_value": 0.5},
    ),
    "nomic_bert": ("NomicBertForMaskedLM", "NomicBertConfig", {**_ENCODER, "hidden_size": 40}),
    "gte": ("GteForMaskedLM", "GteConfig", {**_ENCODER, "hidden_size": 40}),
    "jina_embeddings_v3": (
        "JinaEmbeddingsV3ForSequenceClassification",
        "JinaEmbeddingsV3Config",
        {**_ENCODER, "hidden_size": 40},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            **_ENCODER,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "albert": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        {
            **_ENCODER,
            "embedding_size": 16,
            "num_hidden_layers": 6,
            "num_hidden_groups": 3,
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _TEXT_TOWER, "vision_config": _IMAGE_TOWER, "projection_dim": 16},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 64},
    ),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", _ENCODER),
    "camembert": ("CamembertForMaskedLM", "CamembertConfig", _ENCODER),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_ENCODER, "embedding_size": 16},
    ),
    "deberta-v2 shared": (
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "conv_kernel_size": 3,
        },
    ),
    "deberta-v2 c2p": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p"]},
    ),
    "deberta-v2 plain": ("DebertaV2Model", "DebertaV2Config", _ENCODER),
    "albert one": (
        "AlbertModel",
        "AlbertConfig",
        {**_ENCODER, "embedding_size": 16, "inner_group_num": 2, "num_hidden_layers": 3},
    ),
    "dinov3_vit gated": ("DINOv3ViTModel", "DINOv3ViTConfig", {**_IMAGE, "use_gated_mlp": True}),
    "clip_text_model": ("CLIPTextModel", "CLIPTextConfig", _TEXT_TOWER),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _IMAGE_TOWER),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": _TEXT_TOWER, "vision_config": _IMAGE_TOWER},
    ),
    "siglip image classes": (
        "SiglipForImageClassification",
        "SiglipConfig",
        {"text_config": _TEXT_TOWER, "vision_config": _IMAGE_TOWER, "num_labels": 5},
    ),
    "siglip_text_model": ("SiglipTextModel", "SiglipTextConfig", _TEXT_TOWER),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE_TOWER),
    "bart classes": ("BartForSequenceClassification", "BartConfig", _SEQ2SEQ),
    "bart decoder": ("BartForCausalLM", "BartConfig", _SEQ2SEQ),
    **{
        name: (f"{prefix}ForConditionalGeneration", f"{prefix}Config", _SEQ2SEQ)
        for name, prefix in {
            "mbart": "MBart",
            "plbart": "PLBart",
            "pegasus": "Pegasus",
            "m2m_100": "M2M100",
            "blenderbot": "Blenderbot",
            "blenderbot-small": "BlenderbotSmall",
        }.items()
    },
    "marian": ("MarianMTModel", "MarianConfig", _SEQ2SEQ),
    "t5 plain": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "relu"}),
    "t5 encoder": ("T5EncoderModel", "T5Config", _T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
    "whisper classes": (
        "WhisperForAudioClassification",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 64},
    ),
    **{
        name: (f"{prefix}ForMaskedLM", f"{prefix}Config", _ENCODER)
        for name, prefix in {
            "data2vec-text": "Data2VecText",
            "deberta": "Deberta",
            "layoutlm": "LayoutLM",
            "megatron-bert": "MegatronBert",
            "roberta-prelayernorm": "RobertaPreLayerNorm",
            "xlm-roberta-xl": "XLMRobertaXL",
        }.items()
    },
    "ernie": ("ErnieForMaskedLM", "ErnieConfig", {**_ENCODER, "use_task_id": True}),
    "esm": (
        "EsmForMaskedLM",
        "EsmConfig",
        {**_ENCODER, "position_embedding_type": "rotary", "token_dropout": False},
    ),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", _IMAGE),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNConfig", _IMAGE),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", _IMAGE),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_IMAGE, "mlp_ratio": 2, "num_register_tokens": 2},
    ),
    "metaclip_2": (
        "MetaClip2Model",
        "MetaClip2Config",
        {"text_config": _TEXT_TOWER, "vision_config": _IMAGE_TOWER, "projection_dim": 16},
    ),
    "metaclip_2_text_model": ("MetaClip2TextModel", "MetaClip2TextConfig", _TEXT_TOWER),
    "metaclip_2_vision_model": (
        "MetaClip2VisionModelWithProjection",
        "MetaClip2VisionConfig",
        _IMAGE_TOWER,
    ),
    **{
        name: (f"{prefix}{head}", f"{prefix}Config", _SPEECH)
        for name, prefix, head in (
            ("wav2vec2", "Wav2Vec2", "ForCTC"),
            ("hubert", "Hubert", "ForCTC"),
            ("data2vec-audio", "Data2VecAudio", "ForCTC"),
            ("unispeech", "UniSpeech", "ForCTC"),
            ("unispeech-sat", "UniSpeechSat", "ForSequenceClassification"),
        )
    },
}
SEQ2SEQ = "bart t5 whisper".split()  # of each kind one
