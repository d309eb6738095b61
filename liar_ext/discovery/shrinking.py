"""Make a config small: few layers, few heads, and sizes that can be told apart.

Names say what a field is (``num_hidden_layers``, ``n_head``, ``ffn_dim``, ...), and equal widths
stay equal. Nothing is built here, so that a config of any size costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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
EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
TOP_K = re.compile(r"num_experts_per_tok(en)?|moe_(top_?)?k|num_experts_per_token|top_k_experts")
EXPERT_GROUPS = ("n_group", "topk_group", "num_expert_group")
DENSE_FIRST = ("first_k_dense_replace", "moe_layer_start_index")
LABELS = ("id2label", "label2id", "num_labels")
SIZES = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("intermediate_size", "head_dim", "vocab_size"),
)
ROPE = ("rope_scaling", "rope_parameters")
VOCAB, MOST_POSITIONS, LAYERS_KEPT, MOST_LAYERS = 67, 64, 3, 6
MOST_DEPTH = 1000


@dataclass(frozen=True)
class Sizes:
    """The sizes that a small model is to have; no two of them are equal, so that each is known.

    Parameters
    ----------
    heads, grouped, head_dim : int
        Heads without and with groups of two, features of a head.
    channels : int
        Of the MLP.
    experts : int
        Of a mixture, where it has more.
    """

    heads: int
    grouped: int
    head_dim: int
    channels: int
    experts: int


# A number that a module keeps is compared in both instances with what it may mean.
FIRST, SECOND = Sizes(4, 6, 8, 20, 7), Sizes(5, 5, 16, 28, 9)
# For classes whose heads share no keys, and for heads of which a part alone is rotated.
ALONE, WIDE = Sizes(4, 4, 8, 20, 7), Sizes(4, 6, 32, 20, 7)


def candidates(config: Any) -> list[Callable[[], Any]]:
    """Return what makes small versions of a config, the best one first, and at last itself.

    A version has heads of its own size where a field names it, so that the features that heads
    have together aren't the hidden size; some classes refuse that.
    """
    small = [
        partial(shrink, config, sizes, free=free)
        for sizes, free in (
            *((FIRST, True), (FIRST, False), (ALONE, False), (WIDE, False)),
            (None, False),
        )
    ]
    return [*small, partial(rebuilt, config, config.to_dict())]


def seconds(config: Any) -> list[Callable[[], Any]]:
    """Return what makes versions of a config with other sizes than :func:`candidates` has."""
    return [partial(shrink, config, SECOND, free=free) for free in (True, False)]


def tall(config: Any) -> list[Callable[[], Any]]:
    """Return what makes small versions of a config that keep all its layers.

    There are none where a config claims more layers than any model has.
    """
    if most_layers(config.to_dict(), _names(config)) > MOST_DEPTH:
        return []
    return [
        partial(shrink, config, sizes, free=free, layers=True)
        for sizes, free in ((FIRST, True), (FIRST, False), (ALONE, False), (WIDE, False))
    ]


def check_sizes(config: Any) -> str:
    """Return what is wrong with the sizes that a config claims; nothing if they may be sizes."""
    names = _names(config)
    whole = config.to_dict()
    for fields in (whole, *_parts(whole)):
        for key, value in fields.items():
            least = 1 if names.get(key, key) in SIZES else 0
            patterns = (LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH)
            known = least or any(_is(pattern, key, names) for pattern in patterns)
            if known and _is_int(value) and value < least:
                return f"{key} must be a size of at least {least}, got {value}"
    return ""


def shrink(config: Any, sizes: Sizes | None, *, free: bool = False, layers: bool = False) -> Any:
    """Return a config of the same class with small sizes; with None, with few layers alone.

    With ``layers`` it keeps all layers.
    """
    return rebuilt(config, _part(config.to_dict(), _names(config), sizes, free, layers))


def rebuilt(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a config of the same class from fields."""
    fields = {key: value for key, value in fields.items() if key not in LABELS}
    return type(config).from_dict(fields)


def most_layers(fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> int:
    """Return the largest number of layers that a config, or a part of it, claims."""
    counts = [
        value for key, value in fields.items() if _is(LAYERS, key, names or {}) and _is_int(value)
    ]
    return max([*counts, *map(most_layers, _parts(fields))], default=0)


def _parts(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the fields of the parts of a config."""
    return [v for key, v in fields.items() if key.endswith("config") and isinstance(v, Mapping)]


def bound_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``config.json`` with few layers, from which a config may be made.

    Classes make lists with an entry a layer, so that a config that claims 10⁹ of them isn't.
    """
    small = {key: v for key, v in _few_layers(fields, {}).items() if key not in LABELS}
    for key, value in small.items():
        if key.endswith("config") and isinstance(value, Mapping):
            small[key] = bound_layers(value)
    return small


def _names(config: Any) -> dict[str, str]:
    """Return what fields with names of their own are called in other configs."""
    mapping = getattr(config, "attribute_map", None) or {}
    return {own: name for name, own in mapping.items()}


def _part(
    fields: Mapping[str, Any],
    names: Mapping[str, str],
    sizes: Sizes | None,
    free: bool,
    layers: bool,
) -> dict[str, Any]:
    """Return the fields of a config, or of a part of one, with small sizes."""
    small = dict(fields) if layers else _few_layers(fields, names)
    if sizes is not None:
        small = _few_experts(_narrow(_few_tokens(small), names, sizes, free), names, sizes)
    for key, value in small.items():
        if isinstance(value, Mapping) and key.endswith("config"):
            small[key] = _part(value, {}, sizes, free, layers)
    return small


def _few_layers(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Shorten the number of layers, and every list with an entry a layer.

    Layers are taken so that each kind that the lists tell of is there.
    """
    small = dict(fields)
    counts = {
        key: value for key, value in fields.items() if _is(LAYERS, key, names) and _is_int(value)
    }
    for key, count in counts.items():
        small[key] = min(count, LAYERS_KEPT)
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
        for key, value in lists.items():
            small[key] = [value[index] for index in chosen]
        for key, count in counts.items():
            small[key] = len(chosen) if count == most else small[key]
    return small


def _few_experts(
    fields: Mapping[str, Any], names: Mapping[str, str], sizes: Sizes
) -> dict[str, Any]:
    """Set how many experts there are, and how many of them a token gets, without groups of them."""
    small = dict(fields)
    counts = [key for key, value in fields.items() if _is(EXPERTS, key, names) and _is_int(value)]
    if not any(fields[key] > 1 for key in counts):
        return small
    small |= {key: sizes.experts for key in counts if fields[key] > 1}
    for key, value in fields.items():
        if _is(TOP_K, key, names) and _is_int(value):
            small[key] = min(value, 2)
        elif key in EXPERT_GROUPS and _is_int(value):
            small[key] = 1
        elif key in DENSE_FIRST and _is_int(value):
            small[key] = min(value, 1)
    return small


def _few_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten vocabularies, positions and images; special tokens follow."""
    small = dict(fields)
    for key, value in fields.items():
        if key == "vocab_size" and _is_int(value):
            small[key] = VOCAB
        elif TOKEN.fullmatch(key) and _is_int(value) and value >= VOCAB:
            small[key] = VOCAB - 1
        elif TOKEN.fullmatch(key) and isinstance(value, list):
            small[key] = [min(each, VOCAB - 1) if _is_int(each) else each for each in value]
        elif POSITIONS.fullmatch(key) and _is_int(value):
            small[key] = min(value, MOST_POSITIONS)
        elif key in ROPE and isinstance(value, Mapping):
            small[key] = _plain_rope(value)
    if "image_size" in fields and "patch_size" in fields:
        plain = _is_int(fields["image_size"]) and _is_int(fields["patch_size"])
        small |= {"image_size": 8, "patch_size": 4} if plain else {}
    return small


def _plain_rope(value: Mapping[str, Any]) -> Any:
    """Return rotary settings without those that hold for one size of head or context."""
    if any(isinstance(each, Mapping) for each in value.values()):
        return {key: _plain_rope(each) for key, each in value.items()}
    kept = {key: value[key] for key in ("rope_theta", "partial_rotary_factor") if key in value}
    return {**kept, "rope_type": "default"}


def _narrow(
    fields: Mapping[str, Any], names: Mapping[str, str], sizes: Sizes, free: bool
) -> dict[str, Any]:
    """Set heads, the size of a head, the hidden size and other widths; equal ones stay equal."""
    small = dict(fields)
    hidden = next((fields[key] for key in fields if names.get(key) == "hidden_size"), None)
    if hidden is None:
        found = [fields[key] for key in fields if HIDDEN.fullmatch(key) and _is_int(fields[key])]
        hidden = found[0] if found else None
    heads = [key for key in fields if _is(HEADS, key, names) and not KV_HEADS.fullmatch(key)]
    heads = [key for key in heads if _is_int(fields[key])]
    if not _is_int(hidden) or hidden <= 0:
        return small
    kv_heads = [key for key in fields if KV_HEADS.fullmatch(key)]
    shared = [fields[key] for key in kv_heads if _is_int(fields[key])]
    single = bool(shared) and shared[0] == 1
    count = sizes.grouped if shared and not single else sizes.heads
    kv_count = 1 if single else count // 2 if count == FIRST.grouped else count
    small |= dict.fromkeys(heads, count)
    small |= {key: kv_count for key in kv_heads if _is_int(fields[key])}
    dims = [key for key in fields if HEAD_DIM.fullmatch(key) and _is_int(fields[key])]
    least = min((fields[key] for key in dims), default=1)
    small |= {key: sizes.head_dim * fields[key] // max(least, 1) for key in dims}
    own = count * (sizes.head_dim + 2) if free and dims else count * sizes.head_dim
    done = {*heads, *kv_heads, *dims}
    for key, value in fields.items():
        if key in done or not _is_int(value) or value <= 0 or NO_WIDTH.fullmatch(key):
            continue
        if value == hidden and (WIDTH.fullmatch(key) or HIDDEN.fullmatch(key) or key in names):
            small[key] = own
        elif CHANNELS.fullmatch(key) or (WIDTH.fullmatch(key) and value > hidden):
            small[key] = sizes.channels
        elif WIDTH.fullmatch(key):
            small[key] = max(4, own * value // hidden // 4 * 4)
    return small


def _is(pattern: re.Pattern, key: str, names: Mapping[str, str]) -> bool:
    return bool(pattern.fullmatch(key) or pattern.fullmatch(names.get(key, "")))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
