"""What the parts of a model read: completed where a batch lacks it, and drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.models.reading import block_config, parts_of
from liar_ext.models.registry import FAMILIES

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
IGNORED = -100  # a label that no loss asks for


def inputs_read(model: nn.Module) -> dict[str, Any]:
    """Return the names of the inputs that a model needs, with the part of the config for each."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "input_ids")
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or not family.parts:
        return {main: config}
    return {part.input or main: block_config(part, config) for part, _ in parts_of(model, family)}


def complete_inputs(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the inputs of a batch, with what the decoder reads where an encoder is there, too.

    Without ``decoder_input_ids`` it reads the labels, or else the text that the encoder reads,
    shifted right by one token, as in training.

    Raises
    ------
    InputError
        If the model reads something that the batch lacks.
    """
    found, needed = dict(inputs), inputs_read(model)
    if len(needed) > 1:
        if DECODER_IDS in needed and not any("decoder_input" in name for name in found):
            found |= _decoder_inputs(model.config, found, labels or {})
        own_default = getattr(model.config, "decoder_start_token_id", None) is None
        optional = {DECODER_IDS} if own_default and "input_ids" in found else set()
        embedded = {name.replace("embeds", "ids").replace("inputs_", "input_") for name in found}
        missing = needed.keys() - found.keys() - optional - embedded
        if missing:
            raise InputError(
                f"batches: {type(model).__name__} reads {' and '.join(needed)}, got "
                f"{', '.join(inputs)}; give batches with {', '.join(sorted(missing))}, too"
            )
    return found


def _decoder_inputs(
    config: Any, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what a decoder reads, and its mask, from labels or the text of the encoder."""
    start, text = getattr(config, "decoder_start_token_id", None), labels.get("labels")
    if text is None or text.dim() != 2 or text.is_floating_point():
        text = inputs.get("input_ids")
        mask = inputs.get("attention_mask")
    else:
        mask = (text != IGNORED).long()
    if text is None or start is None:
        return {}
    shifted = torch.cat([torch.full_like(text[:, :1], start), text[:, :-1]], 1)
    found = {DECODER_IDS: shifted.masked_fill(shifted == IGNORED, config.pad_token_id or 0)}
    if mask is not None and not bool(mask.all()):
        found[DECODER_MASK] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
    return found


def draw_inputs(
    model: nn.Module,
    count: int,
    tokens: int,
    generator: torch.Generator,
    vocabulary: int | None = None,
) -> dict[str, Tensor]:
    """Return random inputs for all parts of a model, on the CPU.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    count, tokens : int
        Sequences or images, and tokens of each sequence.
    generator : torch.Generator
        Where they are drawn from.
    vocabulary : int, optional
        Tokens are below it; by default below the number that the model knows.
    """
    return {
        name: _draw(name, model, config, (count, tokens), generator, vocabulary)
        for name, config in inputs_read(model).items()
    }


def _draw(
    name: str,
    model: nn.Module,
    config: Any,
    shape: tuple[int, int],
    generator: torch.Generator,
    vocabulary: int | None,
) -> Tensor:
    if name == "pixel_values":
        size = config.image_size
        size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return torch.randn(shape[0], config.num_channels, *size, generator=generator)
    if name == "input_features":  # two frames of a spectrogram for each position
        frames = 2 * config.max_source_positions
        return torch.randn(shape[0], config.num_mel_bins, frames, generator=generator)
    ids = torch.randint(vocabulary or known_tokens(model, config), shape, generator=generator)
    end = getattr(config, "eos_token_id", None)
    if name == "input_ids" and isinstance(end, int) and len(inputs_read(model)) > 1:
        # Some heads read what is at the end of the text, which there has to be one of.
        ids = ids.masked_fill(ids == end, abs(end - 1))
        ids[:, -1] = end
    return ids


def known_tokens(model: nn.Module, config: Any) -> int:
    """Return how many tokens a model has embeddings for."""
    text = config.get_text_config()
    if len(inputs_read(model)) > 1 and hasattr(text, "vocab_size"):
        return text.vocab_size
    return model.get_input_embeddings().weight.shape[0]
