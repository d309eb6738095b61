"""Tiny instances of a model class.

Names of config fields say what they are (``num_hidden_layers``, ``n_head``, ``ffn_dim``, ...).
They are made small, so that sizes can be told apart, and equal widths stay equal.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as registration

from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.stock_config import model_class, shapes_of
from liar_ext.models.registry import config_parts
from liar_ext.models.running import draw_inputs, evaluating
from liar_ext.system.errors import one_line
from liar_ext.system.progress import quiet

MOST_NUMBERS, MOST_MODULES = 20_000_000, 5_000  # 160 MB of float64; a second to build
MOST_VARIANTS = 24
BATCH, TOKENS, DECODER_TOKENS = 2, 11, 9

LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|depth|(en|de)coder_layers")
HEADS = re.compile(r"(num|n)_(\w+_)?heads?|heads|\w*attention_heads")
KV_HEADS = re.compile(r"\w*(key_value|kv)_heads|n_head_kv|num_query_groups|multi_query_group_num")
HEAD_DIM = re.compile(r"(\w+_)?(head_dim|head_size)|kv_channels|d_kv|d_head")
HIDDEN = re.compile(r"hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim")
CHANNELS = re.compile(r"\w*(intermediate|ffn|inner)\w*")
WIDTH = re.compile(r"(\w+_)?(size|dim|width|rank|inner)|d_ff")
NO_WIDTH = re.compile(
    r"\w*(vocab|patch|image|kernel|window|chunk|block|buffer|cache|batch|type|stride|frame|tile|"
    r"beam|pool|group|grid|pad|context|output|codebook)\w*_size|\w*conv\w*|output_dim"
)
POSITIONS = re.compile(r"max_\w*(position|seq|len)\w*|n_positions|n_ctx|seq_length")
TOKEN = re.compile(r"\w*token_(id|index)|\w*_token")
LABELS = ("id2label", "label2id", "num_labels")
ROPE = ("rope_scaling", "rope_parameters")
VOCAB, MOST_POSITIONS, LAYERS_KEPT, MOST_LAYERS = 67, 64, 3, 6
Fields = Mapping[str, Any]
Names = Mapping[str, str]  # of fields with names of their own: what other configs call them


class Sizes(NamedTuple):
    """Sizes that a small model is to have; no two are equal, so that each is known."""

    heads: int
    grouped: int  # heads, where two share a key
    head_dim: int
    channels: int


# A number that a module keeps is compared in both instances with what it may mean.
FIRST, SECOND = Sizes(4, 6, 8, 20), Sizes(5, 5, 16, 28)
# For classes whose heads share no keys, and for heads of which a part alone is rotated.
ALONE, WIDE = Sizes(4, 4, 8, 20), Sizes(4, 6, 32, 20)
# Sizes, and whether heads have one of their own where a field names it, so that the features that
# heads have together aren't the hidden size; some classes refuse that.
TRIED = ((FIRST, True), (FIRST, False), (ALONE, False), (WIDE, False))
SECONDS = ((SECOND, True), (SECOND, False))
CANDIDATES = (*TRIED, (None, False), (None, False, True))  # the last is the config itself


class Refused(Exception):
    """A reason for which no row, or a part of one, can be proposed."""


class Instance(NamedTuple):
    """A tiny model with random weights in float64, and the arguments of its forward pass."""

    model: nn.Module
    inputs: dict[str, Tensor]


class Tried(NamedTuple):
    """The tiny models that a row is read from and proved on.

    ``instances`` is one, or two of sizes that differ; ``models`` are theirs, or the one and
    variants of it without weights; ``whole`` has all blocks and no weights, or is None.
    """

    instances: list[Instance]
    models: list[nn.Module]
    whole: nn.Module | None


def class_of(model: Any) -> type[nn.Module]:
    """Return the class of a model, or the one that a config is of."""
    if isinstance(model, nn.Module):
        return type(model)
    names = getattr(model, "architectures", None) or [""]
    if stock := model_class(str(names[0])):
        return stock
    mapping = transformers.AutoModel._model_mapping
    if type(model) in mapping:
        found = mapping[type(model)]
        return found[0] if isinstance(found, tuple | list) else found
    raise Refused(
        f"transformers {transformers.__version__} has no model class for {type(model).__name__}; "
        "build the model, and give that to liar_ext.suggest_family"
    )


def prepare(model_class: type[nn.Module], config: Any) -> Tried:
    """Build the tiny models of a class, from a config of any sizes."""
    first = make_instance(model_class, config)
    shapes = shapes_of(first.model)
    others = _possible(lambda each: _instance(model_class, shrink(config, *each)), SECONDS)
    other = next((each for each in others if shapes != shapes_of(each.model)), None)
    instances = [first] if other is None else [first, other]
    models = [each.model for each in instances]
    if len(models) == 1:  # then these tell numbers apart where no name of a field says what it is
        fields = first.model.config.to_dict()
        names = [name for name, value in fields.items() if type(value) is int and value > 1]
        vary = partial(with_field, first.model)
        models += _possible(lambda name: vary(name, 2 * fields[name]), names[:MOST_VARIANTS])
    whole = _possible(
        lambda each: build(model_class, shrink(config, *each, layers=True), "meta"), TRIED
    )
    return Tried(instances, models, next(whole, None))


def attempt(make: Callable[[], Any]) -> Any:
    """Return what is made; None if it fails, as a stranger's class and config have own rules."""
    with suppress(Exception), quiet():
        return make()
    return None


def _possible(make: Callable[[Any], Any], options: Iterable[Any]) -> Iterator[Any]:
    made = (attempt(partial(make, option)) for option in options)
    return (each for each in made if each is not None)


def with_field(
    model: nn.Module, name: str, value: Any, part_of: Callable[[Any], Any] = lambda config: config
) -> nn.Module:
    """Return a model without weights, one field of whose config, or of a part of it, differs."""
    config = copy.deepcopy(model.config)
    setattr(part_of(config), name, value)
    return build(type(model), config, "meta")


def make_instance(model_class: type[nn.Module], config: Any) -> Instance:
    """Return the first small version of a model that can be built and run."""
    reasons: list[str] = []
    for each in CANDIDATES:
        try:
            with quiet():
                return _instance(model_class, shrink(config, *each))
        except Exception as error:  # whatever a stranger's code raises
            kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
            reasons.append(kind + one_line(error, 160))
    raise Refused(f"no tiny instance could be built and run ({reasons[0]})")


def _instance(model_class: type[nn.Module], config: Any) -> Instance:
    model = build(model_class, config, "cpu")
    found = Instance(model, _inputs(model))
    outputs(found)
    return found


def build(model_class: type[nn.Module], config: Any, device: str) -> nn.Module:
    """Return a model of a config, with random weights in float64."""
    config = copy.deepcopy(config)
    make_plain(config)
    with _bounded(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = model_class(config)
    if device == "meta":
        return model.eval()
    if (numbers := count_params(model)) > MOST_NUMBERS:
        raise Refused(f"its config can't be made smaller, and it has {numbers:,} weights")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(copy.deepcopy(config))
        for parameter in model.parameters():  # biases and norms too, so that each can be noticed
            if parameter.is_floating_point():
                base = parameter if parameter.ndim == 1 else torch.zeros_like(parameter)
                scale = 0.1 if parameter.ndim == 1 else 0.2
                parameter.copy_(base + scale * torch.randn_like(parameter))
    return model.to(torch.float64).eval()


def _bounded() -> AbstractContextManager:
    """Stop a model that has more modules than any real one, before it fills the memory."""
    before = count()

    def counted(*_: Any) -> None:
        if next(before) >= MOST_MODULES:
            raise Refused(f"it has more than {MOST_MODULES:,} modules")

    return registration.register_module_module_registration_hook(counted)


@torch.no_grad()
def outputs(instance: Instance) -> Tensor:
    """Return all floating-point outputs of a model as one vector."""
    with evaluating(instance.model):
        given = instance.model(**instance.inputs)
    values = given.values() if isinstance(given, Mapping) else given
    tensors = [values] if isinstance(values, Tensor) else [v for v in values if torch.is_tensor(v)]
    found = [value.double().flatten() for value in tensors if value.is_floating_point()]
    result = torch.cat(found) if found else torch.empty(0)
    if not len(result) or not result.isfinite().all():
        raise Refused("its outputs are no finite tensors")
    return result


def make_plain(config: Any) -> None:
    """Let a config and its parts ask for no cache, and for code that takes float64."""
    config._attn_implementation = config._experts_implementation = "eager"
    for part in config_parts(config):
        if getattr(part, "use_cache", None):
            part.use_cache = False


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return random inputs for the forward pass of a model of tokens or images."""
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(1)
    if name == "pixel_values":
        return {name: draw_inputs(model, BATCH, TOKENS, generator)[name].to(torch.float64)}
    if name != "input_ids":
        raise Refused(f"its forward pass takes {name}, and only tokens and images are known here")
    rows = model.get_input_embeddings().weight.shape[0]
    fields = {**config.to_dict(), **config.get_text_config().to_dict()}
    special = [value for key, value in fields.items() if TOKEN.fullmatch(key)]
    ordinary = torch.tensor([token for token in range(rows) if token not in special][:1000])
    reads, given = inspect.signature(model.forward).parameters, {}
    parts = {"": TOKENS, "decoder_": DECODER_TOKENS}
    for part in parts if getattr(config, "is_encoder_decoder", False) else [""]:
        draw = torch.randint(len(ordinary), (BATCH, parts[part]), generator=generator)
        given[part + name] = ordinary[draw]
        if f"{part}attention_mask" in reads:
            given[f"{part}attention_mask"] = torch.ones_like(draw)
    return given


def shrink(config: Any, sizes: Sizes | None, free: bool = False, layers: bool = False) -> Any:
    """Return a config of the same class with small sizes; with None, with few layers alone.

    With ``layers`` it keeps all layers.
    """

    def small(fields: Fields, names: Names) -> dict[str, Any]:
        less = dict(fields) if layers else _few_layers(fields, names)
        if sizes is not None:
            less = _narrow(_few_tokens(less), names, sizes, free)
        parts = {k: v for k, v in less.items() if k.endswith("config") and isinstance(v, Mapping)}
        return less | {key: small(part, {}) for key, part in parts.items()}

    names = getattr(config, "attribute_map", None) or {}
    fields = small(config.to_dict(), {own: name for name, own in names.items()})
    return type(config).from_dict({k: v for k, v in fields.items() if k not in LABELS})


def _integers(fields: Fields, pattern: re.Pattern, names: Names) -> list[str]:
    """Return the fields that hold an integer and have such a name."""
    integers = [key for key, value in fields.items() if type(value) is int]
    return [k for k in integers if pattern.fullmatch(k) or pattern.fullmatch(names.get(k, ""))]


def _few_layers(fields: Fields, names: Names) -> dict[str, Any]:
    """Shorten the number of layers, and every list with an entry a layer.

    Layers are taken so that each kind that the lists tell of is there.
    """
    counts = {key: fields[key] for key in _integers(fields, LAYERS, names)}
    small = {**fields, **{key: min(count, LAYERS_KEPT) for key, count in counts.items()}}
    most = max(counts.values(), default=0)
    lists = {
        key: value
        for key, value in fields.items()
        if isinstance(value, list) and len(value) == most > LAYERS_KEPT
    }
    if lists:
        kinds = [str(entry) for entry in zip(*lists.values(), strict=True)]
        first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:MOST_LAYERS]
        chosen = sorted({*first, *range(LAYERS_KEPT - len(first))})
        small |= {key: [value[index] for index in chosen] for key, value in lists.items()}
        small |= {key: len(chosen) for key, count in counts.items() if count == most}
    return small


def _few_tokens(fields: Fields) -> dict[str, Any]:
    """Shorten vocabularies, positions and images; special tokens follow."""
    small = dict(fields)
    for key, value in fields.items():
        if TOKEN.fullmatch(key) and isinstance(value, list):
            small[key] = [min(e, VOCAB - 1) if type(e) is int else e for e in value]
        elif key in ROPE and isinstance(value, Mapping):
            small[key] = _plain_rope(value)
        elif type(value) is int and key == "vocab_size":
            small[key] = VOCAB
        elif type(value) is int and (TOKEN.fullmatch(key) or POSITIONS.fullmatch(key)):
            small[key] = min(value, VOCAB - 1 if TOKEN.fullmatch(key) else MOST_POSITIONS)
    if type(fields.get("image_size")) is type(fields.get("patch_size")) is int:
        small |= {"image_size": 8, "patch_size": 4}
    return small


def _plain_rope(value: Fields) -> Any:
    """Return rotary settings without those that hold for one size of head or context."""
    if any(isinstance(each, Mapping) for each in value.values()):
        return {key: _plain_rope(each) for key, each in value.items()}
    kept = {key: value[key] for key in ("rope_theta", "partial_rotary_factor") if key in value}
    return {**kept, "rope_type": "default"}


def _narrow(fields: Fields, names: Names, sizes: Sizes, free: bool) -> dict[str, Any]:
    """Set heads, the size of a head, the hidden size and other widths; equal ones stay equal."""
    named = [key for key in fields if names.get(key) == "hidden_size"]
    hidden = next((fields[key] for key in [*named, *_integers(fields, HIDDEN, {})]), None)
    if type(hidden) is not int:
        return dict(fields)
    kv_heads, dims = _integers(fields, KV_HEADS, {}), _integers(fields, HEAD_DIM, {})
    heads = [key for key in _integers(fields, HEADS, names) if not KV_HEADS.fullmatch(key)]
    single = bool(kv_heads) and fields[kv_heads[0]] == 1
    count = sizes.grouped if kv_heads and not single else sizes.heads
    kv_count = 1 if single else count // 2 if count == FIRST.grouped else count
    least = max(min((fields[key] for key in dims), default=1), 1)
    own = count * (sizes.head_dim + 2 * (free and bool(dims)))
    small = dict(fields)
    for key, value in fields.items():
        if type(value) is not int or value <= 0 or NO_WIDTH.fullmatch(key):
            continue
        if value == hidden and (WIDTH.fullmatch(key) or HIDDEN.fullmatch(key) or key in names):
            small[key] = own
        elif CHANNELS.fullmatch(key) or (WIDTH.fullmatch(key) and value > hidden):
            small[key] = sizes.channels
        elif WIDTH.fullmatch(key):
            small[key] = max(4, own * value // hidden // 4 * 4)
    small |= {key: sizes.head_dim * fields[key] // least for key in dims}
    return small | dict.fromkeys(heads, count) | dict.fromkeys(kv_heads, kv_count)
