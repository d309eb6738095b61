"""Where a model keeps its blocks, what it reads and puts out, and how it is run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from liar_ext.models.family import Family, Part
from liar_ext.models.layers import get_path
from liar_ext.models.registry import FAMILIES, is_diffusion, type_of
from liar_ext.system.errors import InputError

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
IGNORED = -100  # a label that no loss asks for
LOGITS = ("logits", "spans", "labels", "scores")  # outputs of a head
Block = tuple[str, nn.Module]


def parts_of(model: nn.Module, family: Family) -> list[tuple[Part, list[Block]]]:
    """Return those parts of a family that a model has, with path and module of each block."""
    base = base_path(model)
    every = [(part, list(_expand(model, base + part.blocks))) for part in family.all_parts]
    found = [(part, blocks) for part, blocks in every if blocks]
    if not found:
        paths = " or ".join(repr(base + part.blocks) for part in family.all_parts)
        raise InputError(
            f"sites: {type(model).__name__} has no {paths}, where family {family.name!r} keeps "
            "its blocks; pass the whole model, or register a family that fits"
        )
    if len(found) == 1 and family.parts:
        # Alone, it reads the main input of the model, whose mask has the usual name.
        (part, blocks) = found[0]
        found = [(replace(part, input="", mask=part.mask and "attention_mask"), blocks)]
    return found


def blocks_of(model: nn.Module, family: Family) -> Iterator[Block]:
    """Yield path and module of each block of a model."""
    for _, blocks in parts_of(model, family):
        yield from blocks


def _expand(model: nn.Module, path: str) -> Iterator[Block]:
    """Yield the modules of a list, or of the lists that a ``*`` in its path stands for."""
    first, star, rest = path.partition(".*.")
    try:
        children = model.get_submodule(first)
    except AttributeError:
        return
    for index, child in enumerate(children):
        if star:
            yield from _expand(model, f"{first}.{index}.{rest}")
        else:
            yield f"{first}.{index}", child


def block_config(part: Part, config: Any) -> Any:
    """Return the part of a model's config that describes the blocks."""
    return get_path(config, part.config) if part.config else config


def base_path(model: nn.Module) -> str:
    """Return what the paths inside the base model begin with: nothing, or a path and a dot."""
    base = getattr(model, "base_model", model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    return f"{prefix}." if prefix else ""


def body_of(model: nn.Module) -> nn.Module:
    """Return what to run where no head is needed: the base model, if it takes the batch itself."""
    base = getattr(model, "base_model", model)
    name = getattr(model, "main_input_name", "input_ids")
    # What DINOv3 calls its base model is the stack of blocks alone.
    return base if name in inspect.signature(base.forward).parameters else model


def inputs_read(model: nn.Module) -> dict[str, Any]:
    """Return the names of the inputs that a model needs, with the part of the config for each."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "input_ids")
    family = FAMILIES.get(type_of(model))
    if family is None or not family.parts:
        return {main: config}
    return {part.input or main: block_config(part, config) for part, _ in parts_of(model, family)}


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens of text a model reads at most, None if its config names no number."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [module for name, module in model.named_modules() if "position_emb" in name]
    padding = [getattr(table, "padding_idx", None) for table in tables]
    # RoBERTa's and MPNet's tables begin with padding's.
    return known and known - max((at + 1 for at in padding if at is not None), default=0)


def known_tokens(model: nn.Module, config: Any) -> int:
    """Return how many tokens a model has embeddings for."""
    text = config.get_text_config()
    if len(inputs_read(model)) > 1 and hasattr(text, "vocab_size"):
        return text.vocab_size
    return model.get_input_embeddings().weight.shape[0]


def complete_inputs(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the inputs of a batch, with what the decoder reads where an encoder is there, too.

    Without ``decoder_input_ids`` it reads the labels, or else the text that the encoder reads,
    shifted right by one token, as in training. InputError is raised if an input is missing, a token
    unknown, or a sequence longer than the table of positions.
    """
    found, needed = dict(inputs), inputs_read(model)
    if DECODER_IDS in needed and not any("decoder_input" in name for name in found):
        found |= _decoder_inputs(model.config, found, labels or {})
    for name, masked in (("input_ids", "attention_mask"), (DECODER_IDS, DECODER_MASK)):
        config = needed.get(name)  # of a model of transformers
        if name in found and hasattr(config, "get_text_config"):
            if "position_ids" not in found:
                _check_length(model, name, found[name], found.get(masked))
            if "pixel_values" not in found:  # images have tokens of their own
                rows = known_tokens(model, config)
                if name == DECODER_IDS:
                    rows = len(model.get_decoder().get_input_embeddings().weight)
                _check_tokens(model, name, found[name], rows)
    own_default = getattr(model.config, "decoder_start_token_id", None) is None
    optional = {DECODER_IDS} if own_default and "input_ids" in found else set()
    embedded = {name.replace("embeds", "ids").replace("inputs_", "input_") for name in found}
    missing = needed.keys() - found.keys() - optional - embedded
    if missing and not is_diffusion(model):  # one of diffusers says nothing of its inputs
        raise InputError(
            f"batches: {type(model).__name__} reads {' and '.join(needed)}, got "
            f"{', '.join(inputs)}; give batches with {', '.join(sorted(missing))}, too"
        )
    return found


def _check_tokens(model: nn.Module, name: str, ids: Tensor, rows: int) -> None:
    """Raise InputError for a token that a model has no embedding for: a GPU would name no cause."""
    least, most = (int(each) for each in ids.aminmax())
    if not 0 <= least <= most < rows:
        raise InputError(
            f"batches: {name} has token {most if least >= 0 else least}, and the tokens of "
            f"{type(model).__name__} are 0 to {rows - 1}; use the model's own tokenizer"
        )


def _check_length(model: nn.Module, name: str, ids: Tensor, mask: Tensor | None) -> None:
    """Raise InputError for a sequence of more tokens than a table of positions has rows for."""
    tokens, most = ids.shape[1], positions_of(model) or 0
    if tokens <= most:
        return
    if mask is not None and mask.dim() == 2:
        tokens = int(mask.sum(1).max())
    named = (m for n, m in model.named_modules() if "position" in n or n.endswith("wpe"))
    rows = [table.num_embeddings for table in named if isinstance(table, nn.Embedding)]
    # The rotations of GPT-J and CodeGen are a table, too.
    rows += [len(b) for n, b in model.named_buffers() if n.endswith(".embed_positions")]
    # A table may begin with rows of padding. Others are of images, or count relative positions.
    if tokens > most and any(0 <= n - most <= 2 for n in rows):
        raise InputError(
            f"batches: {name} has {tokens} tokens in a sequence, and {type(model).__name__} has "
            f"{most} positions; give sequences of at most {most}"
        )


def _decoder_inputs(
    config: Any, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    start, text = getattr(config, "decoder_start_token_id", None), labels.get("labels")
    if text is None or text.dim() != 2 or text.is_floating_point():
        text, mask = inputs.get("input_ids"), inputs.get("attention_mask")
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

    These are ``count`` sequences of so many ``tokens``, or images; tokens are below
    ``vocabulary``, by default below the number that the model knows.
    """
    needed, found = inputs_read(model), {}
    for name, config in needed.items():
        if name == "pixel_values":
            size = config.image_size
            channels = getattr(config, "num_channels", 3)
            shape = (channels, *(size if isinstance(size, list | tuple) else 2 * [size]))
        elif name == "input_features":  # two frames of a spectrogram for each position
            shape = config.num_mel_bins, 2 * config.max_source_positions
        elif name == "input_values":  # samples, of which convolutions make so many positions
            shape, layers = (tokens,), zip(config.conv_kernel, config.conv_stride, strict=True)
            for kernel, stride in reversed([*layers]):
                shape = ((shape[0] - 1) * stride + kernel,)
        else:
            known = vocabulary or known_tokens(model, config)
            ids = torch.randint(known, (count, tokens), generator=generator)
            end = getattr(config, "eos_token_id", None)
            if name == "input_ids" and isinstance(end, int) and len(needed) > 1:
                # Some heads read what is at the end of the text, which there has to be one of.
                ids = ids.masked_fill(ids == end, abs(end - 1))
                ids[:, -1] = end
            found[name] = ids
            continue
        found[name] = torch.randn((count, *shape), generator=generator)
    return found


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device | None:
    """Return the device of a module's first parameter: a model's is where its inputs go."""
    return next((parameter.device for parameter in module.parameters()), default)


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


def predicts_next_token(model: nn.Module) -> bool:
    """Tell whether a model predicts each token from those before it alone."""
    if is_diffusion(model) or not model.can_generate():
        return False
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    # BERT's family has classes with a language head that see both sides unless told not to.
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return any(causal) or not causal


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout, the key-value cache and autocast off while the context is open."""
    modes = [(module, module.training) for module in model.modules()]
    # Parts of a model may have a config of their own.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    caching = [each for each in configs.values() if getattr(each, "use_cache", False)]
    kinds = {parameter.device.type for parameter in model.parameters()}
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with ExitStack() as stack:
            for kind in filter(torch.amp.is_autocast_available, kinds):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for module, training in modes:
            module.training = training
        for config in caching:
            config.use_cache = True


def output_of(model: nn.Module, outputs: Any, mask: Tensor | None = None) -> tuple[str, Tensor]:
    """Return name and value of what a model puts out: logits, or what a head would read.

    That is the last hidden state, the embeddings of all towers in one, or of a diffusion
    transformer the noise, or velocity, of each sample. Spans are the logits of where an answer
    starts and ends, ``(sequences, 2, tokens)``; tokens that the ``mask`` leaves out are none of
    their classes. One of the classes of logits is right; labels are each right or not, and scores,
    those of a regression or a lone one, are no probabilities.
    """
    if outputs.get("sample") is not None:
        return "sample", outputs["sample"].flatten(1)
    if outputs.get("start_logits") is not None:
        spans = torch.stack([outputs["start_logits"], outputs["end_logits"]], 1)
        if mask is not None:
            unread = ~mask.bool().to(spans.device)[:, None]
            spans = spans.masked_fill(unread, -1e4)  # whose probability is zero
        return "spans", spans
    if (logits := outputs.get("logits")) is not None:
        problem = getattr(model.config, "problem_type", None) if logits.dim() == 2 else None
        if problem == "multi_label_classification":
            return "labels", logits
        return "scores" if problem == "regression" or logits.shape[-1] == 1 else "logits", logits
    if outputs.get("last_hidden_state") is not None:
        return "last_hidden_state", outputs["last_hidden_state"]
    embedded = [outputs[name] for name in ("image_embeds", "text_embeds") if name in outputs]
    if embedded:
        return "embeddings", torch.cat(embedded)
    raise InputError(
        f"outputs: {type(model).__name__} gives neither logits nor hidden states, got "
        f"{', '.join(outputs)}; give a model with another head, or its base model"
    )


def check_alike(
    model: nn.Module, own: tuple[str, Sequence[int]], dense: tuple[str, Sequence[int]]
) -> None:
    """Raise InputError if name and shape of a model's outputs are not those of the dense one."""
    if own != dense:
        found, needed = (f"{name} of shape {tuple(shape)}" for name, shape in (own, dense))
        raise InputError(
            f"evaluation: {type(model).__name__} gives {found}, and the dense model {needed}; give "
            "the model that was pruned as the dense one"
        )


def log_probabilities(name: str, logits: Tensor) -> Tensor:
    """Return log p of classes; of labels, ``(rows, 2 labels)``, log p and then log (1 − p)."""
    if name == "labels":
        return torch.cat([logsigmoid(logits), logsigmoid(-logits)], -1)
    return logits.log_softmax(-1)


def agree(name: str, p: Tensor, logits: Tensor) -> Tensor:
    """Tell by row whether :func:`log_probabilities` and logits choose one class, or all labels."""
    if name != "labels":
        return p.argmax(-1) == logits.argmax(-1)
    yes, no = p.chunk(2, -1)
    return ((yes > no) == (logits > 0)).all(-1)


def token_weights(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return what tokens weigh in the mean of their sequence, (sequences, tokens) float32.

    A mask of another shape, as of samples where states are of frames, leaves all tokens in.
    """
    weight = torch.ones(states.shape[:2], device=states.device)
    if mask is not None and mask.shape == weight.shape:
        weight = mask.to(weight)
    return weight / weight.sum(1, keepdim=True)
