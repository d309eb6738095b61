"""Make a config small: few layers, few heads, and sizes that can be told apart.

Names say what a field is (``num_hidden_layers``, ``n_head``, ``ffn_dim``, ...), and equal widths
stay equal. Nothing is built here, so that a config of any size costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

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
SIZES = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("intermediate_size", "head_dim", "vocab_size"),
)
ROPE = ("rope_scaling", "rope_parameters")
VOCAB, MOST_POSITIONS, LAYERS_KEPT, MOST_LAYERS = 67, 64, 3, 6
MOST_DEPTH = 1000
Fields = Mapping[str, Any]


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


def check_sizes(config: Any) -> str:
    """Return what is wrong with the sizes that a config claims; nothing if they may be sizes."""
    names, whole = _names(config), config.to_dict()
    for fields in (whole, *_parts(whole).values()):
        patterns = (LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH)
        known = {key for pattern in patterns for key in _integers(fields, pattern, names)}
        for key, value in fields.items():
            least = 1 if names.get(key, key) in SIZES else 0
            if (least or key in known) and type(value) is int and value < least:
                return f"{key} must be a size of at least {least}, got {value}"
    return ""


def most_layers(fields: Fields, names: Mapping[str, str] = MappingProxyType({})) -> int:
    """Return the largest number of layers that a config, or a part of it, claims."""
    counts = [fields[key] for key in _integers(fields, LAYERS, names)]
    return max([*counts, *map(most_layers, _parts(fields).values())], default=0)


def bound_layers(fields: Fields) -> dict[str, Any]:
    """Return the fields of a ``config.json`` with few layers, from which a config may be made.

    Classes make lists with an entry a layer, so that a config that claims 10⁹ of them isn't.
    """
    small = {key: v for key, v in _few_layers(fields, {}).items() if key not in LABELS}
    return small | {key: bound_layers(part) for key, part in _parts(small).items()}


def shrink(config: Any, sizes: Sizes | None, free: bool = False, layers: bool = False) -> Any:
    """Return a config of the same class with small sizes; with None, with few layers alone.

    With ``layers`` it keeps all layers.
    """

    def small(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
        less = dict(fields) if layers else _few_layers(fields, names)
        if sizes is not None:
            less = _narrow(_few_tokens(less), names, sizes, free)
        return less | {key: small(part, {}) for key, part in _parts(less).items()}

    fields = small(config.to_dict(), _names(config))
    return type(config).from_dict({k: v for k, v in fields.items() if k not in LABELS})


def is_deep(config: Any) -> bool:
    """Tell whether a config claims more layers than are built."""
    return most_layers(config.to_dict(), _names(config)) > MOST_DEPTH


def _parts(fields: Fields) -> dict[str, Fields]:
    return {k: v for k, v in fields.items() if k.endswith("config") and isinstance(v, Mapping)}


def _names(config: Any) -> dict[str, str]:
    """Return what fields with names of their own are called in other configs."""
    mapping = getattr(config, "attribute_map", None) or {}
    return {own: name for name, own in mapping.items()}


def _integers(fields: Fields, pattern: re.Pattern, names: Mapping[str, str]) -> list[str]:
    """Return the fields that hold an integer and have such a name."""
    integers = [key for key, value in fields.items() if type(value) is int]
    return [k for k in integers if pattern.fullmatch(k) or pattern.fullmatch(names.get(k, ""))]


def _few_layers(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
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
        elif type(value) is int:
            most = VOCAB - 1 if TOKEN.fullmatch(key) else MOST_POSITIONS
            if key == "vocab_size":
                small[key] = VOCAB
            elif TOKEN.fullmatch(key) or POSITIONS.fullmatch(key):
                small[key] = min(value, most)
    if type(fields.get("image_size")) is type(fields.get("patch_size")) is int:
        small |= {"image_size": 8, "patch_size": 4}
    return small


def _plain_rope(value: Fields) -> Any:
    """Return rotary settings without those that hold for one size of head or context."""
    if any(isinstance(each, Mapping) for each in value.values()):
        return {key: _plain_rope(each) for key, each in value.items()}
    kept = {key: value[key] for key in ("rope_theta", "partial_rotary_factor") if key in value}
    return {**kept, "rope_type": "default"}


def _narrow(fields: Fields, names: Mapping[str, str], sizes: Sizes, free: bool) -> dict[str, Any]:
    """Set heads, the size of a head, the hidden size and other widths; equal ones stay equal."""
    named = [key for key in fields if names.get(key) == "hidden_size"]
    hidden = next((fields[key] for key in [*named, *_integers(fields, HIDDEN, {})]), None)
    if type(hidden) is not int or hidden <= 0:
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
