"""Where a model keeps blocks and layers, what it reads, and how it is run for its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.models.family import Family, Part, Wiring
from liar_ext.models.registry import FAMILIES, is_diffusion, type_of
from liar_ext.system.errors import InputError

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
IGNORED = -100  # a label that no loss asks for
Block = tuple[str, nn.Module]


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


def complete_inputs(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the inputs of a batch, with what the decoder reads where an encoder is there, too.

    Without ``decoder_input_ids`` it reads the labels, or else the text that the encoder reads,
    shifted right by one token, as in training. InputError is raised if an input is missing, a token
    unknown, or a sequence longer than the table of positions.
    """
    found, needed = dict(inputs), inputs_read(model)
    config = needed.get("input_ids")  # of a model of transformers; images have tokens of their own
    if "input_ids" in found and hasattr(config, "get_text_config") and "pixel_values" not in found:
        _check_tokens(model, found["input_ids"], known_tokens(model, config))
        _check_length(model, found)
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


def _check_tokens(model: nn.Module, ids: Tensor, rows: int) -> None:
    """Raise InputError for a token that a model has no embedding for: a GPU would name no cause."""
    least, most = (int(each) for each in ids.aminmax())
    if not 0 <= least <= most < rows:
        raise InputError(
            f"batches: input_ids has token {most if least >= 0 else least}, and the tokens of "
            f"{type(model).__name__} are 0 to {rows - 1}; use the model's own tokenizer"
        )


def _check_length(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Raise InputError for a sequence of more tokens than a table of positions has rows for."""
    tokens, most = inputs["input_ids"].shape[1], positions_of(model) or 0
    if tokens <= most or "position_ids" in inputs:
        return
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        tokens = int(mask.sum(1).max())
    named = (m for n, m in model.named_modules() if "position" in n or n.endswith("wpe"))
    rows = (table.num_embeddings for table in named if isinstance(table, nn.Embedding))
    # A table may begin with rows of padding. Others are of images, or count relative positions.
    if tokens > most and any(0 <= n - most <= 2 for n in rows):
        raise InputError(
            f"batches: input_ids has {tokens} tokens in a sequence, and {type(model).__name__} has "
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


def known_tokens(model: nn.Module, config: Any) -> int:
    """Return how many tokens a model has embeddings for."""
    text = config.get_text_config()
    if len(inputs_read(model)) > 1 and hasattr(text, "vocab_size"):
        return text.vocab_size
    return model.get_input_embeddings().weight.shape[0]


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
    """Switch dropout and the key-value cache off while the context is open."""
    modes = [(module, module.training) for module in model.modules()]
    # Parts of a model may have a config of their own.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    caching = [each for each in configs.values() if getattr(each, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config in caching:
            config.use_cache = True


def block_config(part: Part, config: Any) -> Any:
    """Return the part of a model's config that describes the blocks."""
    return get_path(config, part.config) if part.config else config


def get_path(root: Any, path: str) -> Any:
    """Return the attribute of ``root`` at a dotted path."""
    return reduce(getattr, path.split("."), root)


def has_path(root: Any, path: str, kind: type) -> bool:
    """Tell whether ``root`` has an attribute of this kind at a dotted path."""
    try:
        return isinstance(get_path(root, path), kind)
    except AttributeError:
        return False


def owner_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that has the parameter, buffer or number at a path, and its name there."""
    owner, _, name = path.rpartition(".")
    return root.get_submodule(owner), name


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module itself that its state dict holds."""
    both, dropped = {**module._parameters, **module._buffers}, module._non_persistent_buffers_set
    return {n: value for n, value in both.items() if value is not None and n not in dropped}


class ExpertLayer:
    """The linear layer of an expert: its slice of the parameters ``name`` and ``name_bias``."""

    def __init__(self, owner: nn.Module, name: str, expert: int) -> None:
        self.owner, self.name, self.expert = owner, name, expert

    @property
    def weight(self) -> Tensor:
        """A view of two dimensions; writing to it writes to the model."""
        return getattr(self.owner, self.name)[self.expert]

    @property
    def bias(self) -> Tensor | None:
        """A view, or None."""
        biases = getattr(self.owner, bias_name(self.name), None)
        return None if biases is None else biases[self.expert]


class UnitColumns:
    """What several linear layers, or columns of one, read of the units of a site, as one layer.

    Its weight has the columns of all of them unit by unit; each layer keeps its own bias::

        W₁ of unit 0, W₂ of unit 0, W₁ of unit 1, ...        (d_out, site.d_in)
    """

    bias = None

    def __init__(self, root: nn.Module, site: Any) -> None:
        self.parts = [(root.get_submodule(path), *where) for path, *where in site.reads]
        self.d_in = site.d_in

    @property
    def weight(self) -> Tensor:
        """A copy; :meth:`filled` is for other values."""
        first = self.parts[0][0].weight.detach()
        found = first.new_empty(len(first), self.d_in)
        for layer, features, columns in self.parts:
            found[:, features] = layer.weight.detach()[:, columns]
        return found

    def filled(self, weight: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Return each layer with its weight, of which the columns of the units have new values."""
        both = []
        for layer, features, columns in self.parts:
            both.append((layer, layer.weight.detach().clone()))
            both[-1][1][:, columns] = weight[:, features].to(layer.weight)
        return both


def layer_of(root: nn.Module, site: Any) -> nn.Module | ExpertLayer | UnitColumns:
    """Return what reads the units of a site."""
    return UnitColumns(root, site) if site.shared else layer_at(root, site.consumer, site.expert)


def bias_name(name: str) -> str:
    """Return what the biases of a layer of all experts are called."""
    return f"{name}_bias"


def layer_at(root: nn.Module, path: str, expert: int | None) -> nn.Module | ExpertLayer:
    """Return the linear layer at a path: a module, or an expert's slice of a parameter there."""
    if expert is None:
        return root.get_submodule(path)
    return ExpertLayer(*owner_of(root, path), expert)


def out_in(site: str, path: str, layer: Any, wiring: Wiring) -> tuple[int, int]:
    """Return how many features a linear layer writes, and how many it reads."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(
            f"sites: {path} of {site} must be a linear layer with floating-point weights, got "
            f"{type(layer).__name__}; load the model dequantised"
        )
    return tuple(weight.shape[::-1] if wiring.transposed else weight.shape)


def count_kv_heads(site: str, wiring: Wiring, rows: Mapping[str, int], sizes: Sequence[int]) -> int:
    """Return the number of key/value heads, by the rows of the layers of an attention site.

    ``sizes`` are the number of query heads, the size of a head, and that of a key head.
    """
    heads, head_dim, key_dim = sizes
    if wiring.key_value:
        return rows[wiring.key_value[0]] // head_dim
    for layer, stack in wiring.stacked.items():
        if stack.shared and layer in rows:
            each = stack.rows(rows[layer], heads * head_dim, heads)
            kv_heads, left = divmod(min(each[m] for m in stack.grouped if m in each), key_dim)
            if sum(each.values()) != rows[layer] or left or kv_heads < 1:
                raise InputError(
                    f"sites: {layer} of {site} must stack {', '.join(stack.matrices)} of {heads} "
                    f"query heads of {head_dim} rows, got {rows[layer]} rows; register a family "
                    "that fits"
                )
            return kv_heads
    return heads


def parts_of(model: nn.Module, family: Family) -> list[tuple[Part, list[Block]]]:
    """Return those parts of a family that a model has, with path and module of each block."""
    base = base_path(model)
    found = [
        (part, blocks)
        for part in family.all_parts
        if (blocks := list(_expand(model, base + part.blocks)))
    ]
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
