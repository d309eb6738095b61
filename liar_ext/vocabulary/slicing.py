"""Slice the rows of a model that belong to tokens, and renumber the tokens that its config names.

Which parameters have a dimension of tokens is found, not listed: the stock class is built twice
without memory, the second time for more tokens, and whatever grew belongs to tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from liar_ext.checkpoint.stock_config import dense_config, stock_of
from liar_ext.models.configs import config_parts, skeleton
from liar_ext.models.residual_stream import narrow
from liar_ext.models.running import owner_of
from liar_ext.system.errors import InputError, one_line

MORE = 64  # tokens of the second model
TOKEN = re.compile(r"(^|_)token_(ids?|index)$")
# Lists that forbid tokens: those that are gone need no ban.
BANS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
LISTS = (*BANS, "forced_decoder_ids", "force_words_ids", "lang_to_id", "task_to_id")


def token_parameters(model: nn.Module) -> dict[str, int]:
    """Return the parameters and buffers with rows of tokens, and the dimension of the rows.

    InputError is raised if the model has none that the config counts, or its embedding is none of
    them.
    """
    config, more = dense_config(model.config), dense_config(model.config)
    known = _tokens(config)
    if known is None:
        raise _refused(model, "counts its tokens in no single vocab_size")
    _set_tokens(more, known, known + MORE)
    try:
        ours, theirs = (_shapes(skeleton(stock_of(model), each)) for each in (config, more))
    except Exception as error:  # a class may refuse any config in its own way
        why = f"cannot be built for more tokens ({one_line(error, 120)})"
        raise _refused(model, why) from error
    found = {}
    for name, shape in ours.items():
        other = theirs.get(name, ())
        grown = [at for at, (one, two) in enumerate(zip(shape, other, strict=False)) if one != two]
        if len(shape) != len(other) or len(grown) > 1:
            raise _refused(model, f"has {name}, whose tokens are no rows")
        if grown:
            found[name] = grown[0]
    _check_embeddings(model, found)
    return found


def slice_tokens(model: nn.Module, order: Sequence[int]) -> None:
    """Keep the tokens of ``order``, old ids by new id, of a model, in place.

    Embeddings, heads, biases and buffers are sliced, tied ones stay tied. The ids in the config and
    the generation config are renumbered, and bans of tokens that are gone are dropped. Tokens,
    types and positions of a sequence are not touched. If the tokens can't be sliced, InputError is
    raised, and the model is as it was.
    """
    check_rows(model, max(order))
    rows, named = rows_of(model), token_parameters(model)
    new = {old: at for at, old in enumerate(order)}
    _check_positions(model, named, new)
    missing = sorted(needed_tokens(model) - new.keys())
    if missing:
        raise _refused(model, f"names token {missing[0]} in its config, which would go")
    index, sliced = torch.tensor(order), {}
    for name, dim in named.items():
        narrow(*owner_of(model, name), dim, index, sliced)
    for module in model.modules():  # what they keep of the config
        for name, value in list(vars(module).items()):
            if type(value) is int and name == "vocab_size" and value == rows:
                setattr(module, name, len(order))
            elif type(value) is int and (name == "padding_idx" or TOKEN.search(name)):
                setattr(module, name, new.get(value, value))
    own = getattr(model, "generation_config", None)
    as_read = own is not None and getattr(own, "_original_object_hash", None) == hash(own)
    for config in _configs(model):
        for name, value in _named(config):
            if name in BANS:  # those of tokens that are still there
                each = ((ban, ban if isinstance(ban, list | tuple) else [ban]) for ban in value)
                value = [ban for ban, tokens in each if new.keys() >= set(tokens)] or None
            setattr(config, name, _mapped(name, value, lambda at: new.get(at, at)))
    if as_read:  # transformers writes what it has read, and refuses some of it if it was changed
        own._original_object_hash = hash(own)
    _set_tokens(model.config, _tokens(model.config), len(order))


def check_rows(model: nn.Module, last: int) -> None:
    """Raise InputError unless a model has a row for the last token of its tokenizer."""
    rows = rows_of(model)
    if last >= rows:
        raise _refused(model, f"has embeddings for {rows:,} tokens, its tokenizer has more")


def needed_tokens(model: nn.Module) -> set[int]:
    """Return the tokens that configs of a model name, but for those they only ban."""
    rows, found = rows_of(model), set()
    for config in _configs(model):
        for name, value in _named(config):
            if name not in BANS:
                _mapped(name, value, found.add)
    return {at for at in found if at < rows}


def _check_embeddings(model: nn.Module, found: Mapping[str, int]) -> None:
    """Raise InputError unless embedding and head are among what grew, with equal rows."""
    have = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    lacking = sorted(found.keys() - have.keys())
    if lacking:
        raise _refused(model, f"lacks {lacking[0]} of its stock class")
    known = {id(have[name]) for name in found}
    for layer in _ends(model):
        if id(layer.weight) not in known:
            kind = type(layer).__name__
            raise _refused(model, f"has a {kind} of tokens that vocab_size does not count")
    sizes = {have[name].shape[dim] for name, dim in found.items()}
    if len(sizes) != 1:
        raise _refused(model, f"has rows for {sorted(sizes)} tokens")


def _ends(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the embedding of tokens and the head, where a model has one of each."""
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # of two towers
            layer = get()
            if layer is not None:
                yield layer


def rows_of(model: nn.Module) -> int:
    """Return the tokens that a model has rows for."""
    first = next(_ends(model), None)
    if first is not None and isinstance(getattr(first, "weight", None), nn.Parameter):
        return first.weight.shape[0]
    return _tokens(model.config) or 0


def _check_positions(model: nn.Module, named: Mapping[str, int], new: Mapping[int, int]) -> None:
    """Refuse another number for padding where positions are counted from it, as RoBERTa does."""
    tables = {owner_of(model, name)[0] for name in named}
    for module in model.modules():
        at = getattr(module, "padding_idx", None) if isinstance(module, nn.Embedding) else None
        if at is not None and module not in tables and new.get(at, at) != at:
            raise _refused(model, f"counts positions from its padding token {at}, whose id changes")


def _configs(model: nn.Module) -> list[Any]:
    both = *config_parts(model.config), getattr(model, "generation_config", None)
    return [each for each in both if each is not None]


def _named(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config that name tokens."""
    for name, value in list(vars(config).items()):
        if value is not None and not name.startswith("_") and (TOKEN.search(name) or name in LISTS):
            yield name, value
    if getattr(config, "sequence_bias", None):
        raise InputError(
            "vocabulary: generation_config.json has sequence_bias, whose tokens can't be "
            "renumbered; remove it first"
        )


def _mapped(name: str, value: Any, change: Callable[[int], Any]) -> Any:
    """Return a token, a list of tokens, or a mapping to tokens with each token changed."""
    if name == "forced_decoder_ids" and isinstance(value, list | tuple):
        return [[position, _mapped("", token, change)] for position, token in value]
    if isinstance(value, list | tuple):
        return type(value)(_mapped("", each, change) for each in value)
    if isinstance(value, dict):
        return {key: _mapped("", each, change) for key, each in value.items()}
    is_token = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return change(value) if is_token else value


def _tokens(config: Any) -> int | None:
    """Return how many tokens a config counts; None if it has no one text part, or no tokens."""
    try:
        return getattr(config.get_text_config(), "vocab_size", None)
    except ValueError:  # several text parts
        return None


def _set_tokens(config: Any, old: int | None, new: int) -> None:
    """Change each field of a config that counts the tokens: some models count them twice."""
    for part in config_parts(config):
        for name, value in list(vars(part).items()):
            if "vocab_size" in name and value == old:
                setattr(part, name, new)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tuple(value.shape) for name, value in both}


def _refused(model: nn.Module, what: str) -> InputError:
    return InputError(
        f"vocabulary: {type(model).__name__} {what}; leave --keep-vocab out for this model"
    )
