"""The metadata of a GGUF file that say the sizes of a model, and its rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.export.gguf_architectures import Architecture, Layers, rope_parameters

# Scaling of rotary embeddings that llama.cpp computes as transformers does.
SCALINGS = ("default", "linear", "llama3")


def add_sizes(writer: Any, model: nn.Module, architecture: Architecture, layers: Layers) -> None:
    """Write the sizes; one number where all layers have it, else one per layer."""
    config = model.config

    def per_layer(sizes: tuple[int, ...]) -> int | list[int]:
        return list(sizes) if architecture.per_layer else sizes[0]

    writer.add_block_count(len(layers.heads))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(model.get_input_embeddings().weight.shape[1])
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_feed_forward_length(per_layer(layers.channels))
    writer.add_head_count(per_layer(layers.heads))
    writer.add_head_count_kv(per_layer(layers.kv_heads))
    writer.add_key_length(layers.head_dim)
    writer.add_value_length(layers.head_dim)
    if architecture.rms_norm:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        name = "layer_norm_epsilon" if hasattr(config, "layer_norm_epsilon") else "layer_norm_eps"
        writer.add_layer_norm_eps(getattr(config, name))
    if architecture.name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture.name == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if architecture.rotary:
        _add_rope(writer, config, architecture, layers.head_dim)


def _add_rope(writer: Any, config: Any, architecture: Architecture, head_dim: int) -> None:
    rope = rope_parameters(config)
    scaling = rope.get("rope_type", "default")
    partial = rope.get("partial_rotary_factor", 1.0)
    whole = partial == 1.0 or architecture.partial
    if scaling not in SCALINGS or not whole:
        what = f"rope_type {scaling!r}" if whole else f"partial_rotary_factor {partial}"
        raise InputError(
            f"export: --to gguf: rotary embeddings with {what} aren't written; those with "
            f"{', '.join(SCALINGS)} of whole heads are; use the folder itself"
        )
    writer.add_rope_dimension_count(int(head_dim * partial))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if scaling == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """Return what llama.cpp divides the rotary frequencies by, (head_dim / 2,): Llama 3 alone.

    Frequencies with a wavelength beyond the original context are divided by ``factor``, those with
    a short one by 1, with a linear passage (in the number of turns) between the two.
    """
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** steps
    turns = float(rope["original_max_position_embeddings"]) / wavelength
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / float(rope["factor"]) + share)).float()
