"""Tiny encoders, encoder-decoders and towers, for ``tests/models/test_encoder_families.py``."""

from __future__ import annotations

from tiny_decoders import TEXT, VOCAB, Row, row

_SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 24},
    "num_attention_heads": 4,
}
_ENCODER = {**TEXT, **_SIZES, "max_position_embeddings": 64}
_IMAGE = {**_SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}
# Two blocks are enough for a tower, and a part of an encoder-decoder.
_TEXT_TOWER = {**_ENCODER, "num_hidden_layers": 2}
_IMAGE_TOWER = {**_IMAGE, "num_hidden_layers": 2, "intermediate_size": 20}
_SEQ2SEQ = {
    **TEXT,
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
    **TEXT,
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

ENCODERS: dict[str, Row] = {
    "dinov3_vit": row("DINOv3ViTModel", _IMAGE, num_register_tokens=2, layerscale_value=0.5),
    "nomic_bert": row("NomicBertForMaskedLM", _ENCODER, hidden_size=40),
    "gte": row("GteForMaskedLM", _ENCODER, hidden_size=40),
    "jina_embeddings_v3": row(
        "JinaEmbeddingsV3ForSequenceClassification", _ENCODER, hidden_size=40
    ),
    "modernbert": row(
        "ModernBertForMaskedLM",
        _ENCODER,
        local_attention=6,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "deberta-v2": row(
        "DebertaV2ForSequenceClassification",
        _ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    ),
    "albert": row(
        "AlbertForMaskedLM", _ENCODER, embedding_size=16, num_hidden_layers=6, num_hidden_groups=3
    ),
    "clip": row(
        "CLIPModel", text_config=_TEXT_TOWER, vision_config=_IMAGE_TOWER, projection_dim=16
    ),
    "bart": row("BartForConditionalGeneration", _SEQ2SEQ),
    "umt5": row("UMT5ForConditionalGeneration", _T5),
    "t5": row("T5ForConditionalGeneration", _T5),
    "whisper": row(
        "WhisperForConditionalGeneration",
        _SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=64,
    ),
    "xlm-roberta": row("XLMRobertaForMaskedLM", _ENCODER),
    "camembert": row("CamembertForMaskedLM", _ENCODER),
    "electra": row("ElectraForSequenceClassification", _ENCODER, embedding_size=16),
    "deberta-v2 shared": row(
        "DebertaV2Model",
        _ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        conv_kernel_size=3,
    ),
    "deberta-v2 c2p": row(
        "DebertaV2Model", _ENCODER, relative_attention=True, pos_att_type=["c2p"]
    ),
    "deberta-v2 plain": row("DebertaV2Model", _ENCODER),
    "albert one": row(
        "AlbertModel", _ENCODER, embedding_size=16, inner_group_num=2, num_hidden_layers=3
    ),
    "dinov3_vit gated": row("DINOv3ViTModel", _IMAGE, use_gated_mlp=True),
    "clip_text_model": row("CLIPTextModel", _TEXT_TOWER),
    "clip_vision_model": row("CLIPVisionModelWithProjection", _IMAGE_TOWER),
    "siglip": row("SiglipModel", text_config=_TEXT_TOWER, vision_config=_IMAGE_TOWER),
    "siglip image classes": row(
        "SiglipForImageClassification",
        text_config=_TEXT_TOWER,
        vision_config=_IMAGE_TOWER,
        num_labels=5,
    ),
    "siglip_text_model": row("SiglipTextModel", _TEXT_TOWER),
    "siglip_vision_model": row("SiglipVisionModel", _IMAGE_TOWER),
    "bart classes": row("BartForSequenceClassification", _SEQ2SEQ),
    "bart decoder": row("BartForCausalLM", _SEQ2SEQ),
    **{
        name: row(f"{prefix}ForConditionalGeneration", _SEQ2SEQ)
        for name, prefix in {
            "mbart": "MBart",
            "plbart": "PLBart",
            "pegasus": "Pegasus",
            "m2m_100": "M2M100",
            "blenderbot": "Blenderbot",
            "blenderbot-small": "BlenderbotSmall",
        }.items()
    },
    "marian": row("MarianMTModel", _SEQ2SEQ),
    "t5 plain": row("T5ForConditionalGeneration", _T5, feed_forward_proj="relu"),
    "t5 encoder": row("T5EncoderModel", _T5),
    "mt5": row("MT5ForConditionalGeneration", _T5),
    "whisper classes": row(
        "WhisperForAudioClassification",
        _SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=64,
    ),
    **{
        name: row(f"{prefix}ForMaskedLM", _ENCODER)
        for name, prefix in {
            "data2vec-text": "Data2VecText",
            "deberta": "Deberta",
            "layoutlm": "LayoutLM",
            "megatron-bert": "MegatronBert",
            "roberta-prelayernorm": "RobertaPreLayerNorm",
            "xlm-roberta-xl": "XLMRobertaXL",
        }.items()
    },
    "ernie": row("ErnieForMaskedLM", _ENCODER, use_task_id=True),
    "esm": row("EsmForMaskedLM", _ENCODER, position_embedding_type="rotary", token_dropout=False),
    "deit": row("DeiTForImageClassificationWithTeacher", _IMAGE),
    "vit_msn": row("ViTMSNForImageClassification", _IMAGE),
    "ijepa": row("IJepaForImageClassification", _IMAGE),
    "dinov2_with_registers": row(
        "Dinov2WithRegistersModel", _IMAGE, mlp_ratio=2, num_register_tokens=2
    ),
    "metaclip_2": row(
        "MetaClip2Model", text_config=_TEXT_TOWER, vision_config=_IMAGE_TOWER, projection_dim=16
    ),
    "metaclip_2_text_model": row("MetaClip2TextModel", _TEXT_TOWER),
    "metaclip_2_vision_model": row("MetaClip2VisionModelWithProjection", _IMAGE_TOWER),
    **{
        name: row(f"{prefix}{head}", _SPEECH)
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
