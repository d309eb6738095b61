"""Tiny random models of every family, for exactness and never for quality."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
import transformers
from tiny_decoders import DECODERS, TEXT, VOCAB, Row, row
from tiny_encoders import ENCODERS
from tiny_moe import MOE_FAMILIES
from torch import Tensor

from liar_ext.models.sites import Site, sites

if TYPE_CHECKING:  # transformers itself imports its parts when they are asked for
    from transformers import PreTrainedConfig, PreTrainedModel

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 24}
_MHA = {**_SIZES, "num_attention_heads": 4}
_GQA = {
    **_SIZES,
    "hidden_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
_DECODER = {**TEXT, **_GQA, "max_position_embeddings": 64}
_ENCODER = {**TEXT, **_MHA, "max_position_embeddings": 64}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE = {**_MHA, "image_size": 8, "patch_size": 4, "num_labels": 5}

TINY: dict[str, Row] = {
    "llama": row("LlamaForCausalLM", _DECODER, tie_word_embeddings=True),
    "mistral": row("MistralForCausalLM", _DECODER),
    "qwen2": row("Qwen2ForCausalLM", _DECODER),
    "qwen3": row("Qwen3ForCausalLM", _DECODER),
    "smollm3": row("SmolLM3ForCausalLM", _DECODER),
    "gemma3_text": row("Gemma3ForCausalLM", _DECODER),
    "gemma3": row(
        "Gemma3ForConditionalGeneration",
        text_config=_DECODER,
        vision_config={**_MHA, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
    ),
    "bert": row("BertForSequenceClassification", _ENCODER),
    "roberta": row("RobertaForMaskedLM", _ENCODER),
    "distilbert": row("DistilBertModel", TEXT, dim=32, n_layers=3, n_heads=4, hidden_dim=24),
    # Not 32 features, which are also the buckets of its relative positions.
    "mpnet": row("MPNetModel", _ENCODER, hidden_size=40),
    "opt": row(
        "OPTForCausalLM",
        TEXT,
        _MHA,
        ffn_dim=24,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "gpt2": row(
        "GPT2LMHeadModel", TEXT, n_embd=32, n_layer=3, n_head=4, n_inner=24, n_positions=64
    ),
    "gpt_neox": row("GPTNeoXForCausalLM", _ENCODER),
    "vit": row("ViTForImageClassification", _IMAGE),
    "dinov2": row("Dinov2Model", _IMAGE, mlp_ratio=2),
    "dinov2_swiglu": row("Dinov2Model", _IMAGE, mlp_ratio=2, use_swiglu_ffn=True),
}
_MOE = {**_DECODER, "num_hidden_layers": 2, "intermediate_size": 32, "num_experts_per_tok": 2}
# Mixtures of experts; of qwen3_moe the second layer has an ordinary MLP.
MOE: dict[str, Row] = {
    "mixtral": row("MixtralForCausalLM", _MOE, num_local_experts=4),
    "qwen3_moe": row(
        "Qwen3MoeForCausalLM",
        _MOE,
        num_experts=4,
        moe_intermediate_size=32,
        intermediate_size=28,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "olmoe": row("OlmoeForCausalLM", _MOE, hidden_size=32, num_experts=4),
    "gpt_oss": row(
        "GptOssForCausalLM", _MOE, num_local_experts=4, sliding_window=8, rope_parameters=_ROPE
    ),
}
# Those that the tests of their kind go through, and not every other test.
MORE = {**DECODERS, **ENCODERS, **MOE, **MOE_FAMILIES}
CAUSAL = "llama mistral qwen2 qwen3 smollm3 gemma3_text gemma3 opt gpt2 gpt_neox".split()
NARROWABLE = (
    "llama mistral qwen2 qwen3 smollm3 opt gpt2 gpt_neox bert roberta mpnet distilbert".split()
)
GROUPED = "llama mistral qwen2 qwen3 smollm3 gemma3_text gemma3".split()


def class_of(name: str) -> type[PreTrainedModel]:
    return getattr(transformers, {**TINY, **MORE}[name][0])


def tiny_config(name: str, **fields) -> PreTrainedConfig:
    return class_of(name).config_class(**{**{**TINY, **MORE}[name][1], **fields})


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    """Build a tiny model with random weights and biases; ``fields`` override its config."""
    config = tiny_config(name, **fields)
    torch.manual_seed(seed)
    model = class_of(name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors are biases (zero) and norms (one): shake them, so that a bias that is
            # sliced wrongly shows.
            scale = 0.1 if parameter.ndim == 1 else 0.2
            base = parameter if parameter.ndim == 1 else torch.zeros_like(parameter)
            if not parameter.requires_grad:
                continue  # waves of positions, which are computed anew and not saved
            parameter.copy_(base + scale * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tiny_inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 9, seed: int = 1) -> dict:
    """Return random inputs for the model's forward."""
    generator, inputs = torch.Generator().manual_seed(seed), {}
    names = inspect.signature(model.forward).parameters
    if model.main_input_name == "input_features":
        shape = batch, model.config.num_mel_bins, 2 * model.config.max_source_positions
        inputs["input_features"] = torch.randn(shape, generator=generator).to(model.dtype)
    elif model.main_input_name == "input_values":  # of more frames than a tenth of a second has
        inputs["input_values"] = torch.randn(batch, 60, generator=generator).to(model.dtype)
    elif model.main_input_name == "pixel_values" or hasattr(model, "vision_model"):
        pixels = torch.randn(batch, 3, 8, 8, generator=generator)
        inputs["pixel_values"] = pixels.to(model.dtype)
    if model.main_input_name == "input_ids":
        ids = torch.randint(3, VOCAB - 1, (batch, tokens), generator=generator)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if type(model).__name__ == "BartForSequenceClassification":
        inputs["input_ids"][:, -1] = model.config.eos_token_id  # where it classifies
    elif model.config.is_encoder_decoder and "decoder_input_ids" in names:
        # More tokens than the encoder has: one that is masked by the other's mask would show.
        shape = batch, tokens + 2
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB - 1, shape, generator=generator)
    return inputs


def eager(name: str, **fields) -> PreTrainedModel:
    """Return a tiny mixture in float64 that computes one expert after another."""
    model = tiny(name, dtype=torch.float64, **fields)
    model.set_experts_implementation("eager")
    return model


def experts_of(model: PreTrainedModel) -> list[Site]:
    return [site for site in sites(model, ("mlp",)) if site.expert is not None]


@torch.no_grad()
def runs_at(model: PreTrainedModel, paths: list[str], data: list[dict]) -> dict[str, list[tuple]]:
    """Return what modules are called with and give, run by run, in the model's own forward."""
    seen: dict[str, list[tuple]] = {path: [] for path in paths}
    with ExitStack() as stack:
        for path, runs in seen.items():
            note = lambda _, *given, runs=runs: runs.append(given)  # noqa: E731
            stack.enter_context(model.get_submodule(path).register_forward_hook(note))
        for inputs in data:
            model(**inputs)
    return seen


def seen_at(model: PreTrainedModel, paths: list[str], inputs: dict) -> dict[str, tuple]:
    """Return what modules are called with and give in their last run, by path."""
    return {path: runs[-1] for path, runs in runs_at(model, paths, [inputs]).items() if runs}


def read_by_consumers(model: PreTrainedModel, data: list[dict]) -> dict[str, list[Tensor]]:
    """Return what the consumer of each site reads, run by run, by the name of the site."""
    seen = runs_at(model, [site.consumer for site in sites(model)], data)
    return {site.name: [args[0] for args, _ in seen[site.consumer]] for site in sites(model)}


def routes(model: PreTrainedModel, args: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each expert reads of each token, ``(tokens, experts, hidden)``, and the routes.

    These are the experts that tokens are sent to, and what their outputs are multiplied by,
    ``(tokens, top_k)``. ``args`` is what the module of all experts is called with.
    """
    if model.config.model_type != "llama4_text":
        hidden, chosen, weights = args[:3]
        return hidden[:, None].expand(-1, model.config.num_local_experts, -1), chosen, weights
    read = args[0].unflatten(0, (model.config.num_local_experts, -1)).transpose(0, 1)
    chosen = read.any(-1).int().topk(model.config.num_experts_per_tok).indices
    return read, chosen, torch.ones(chosen.shape, dtype=read.dtype)


def given(model: PreTrainedModel, output: Tensor) -> Tensor:
    """Return what all experts give a token together, of what their module does."""
    if model.config.model_type != "llama4_text":
        return output
    return output.unflatten(0, (model.config.num_local_experts, -1)).sum(0)


def batches(model: PreTrainedModel, count: int = 6) -> list[dict]:
    """Return batches of random inputs."""
    return [tiny_inputs(model, batch=8, tokens=16, seed=seed) for seed in range(count)]


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict | None = None) -> Tensor:
    """Return logits, or the last hidden state of a model without a head."""
    result = model(**(inputs or tiny_inputs(model)))
    if "text_embeds" in result:
        return torch.cat([result["image_embeds"], result["text_embeds"]])
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Tell whether two models have the same parameters and buffers, bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    equal = (torch.equal(value, theirs[name]) for name, value in ours.items())
    return ours.keys() == theirs.keys() and all(equal)
