"""Keep a part of the vocabulary: choose tokens by text, and slice tokenizer and model to them.

Which parameters have a dimension of tokens is found, not listed: the stock class is built twice
without memory, the second time for more tokens, and whatever grew belongs to tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from liar_ext.calibration.texts import evaluation_sequences
from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.stock_config import dense_config, stock_of
from liar_ext.models import recipe_checks as check
from liar_ext.models.layers import narrow, owner_of
from liar_ext.models.registry import config_parts, skeleton
from liar_ext.models.running import device_of, evaluating, positions_of, predicts_next_token
from liar_ext.system.errors import InputError, one_line
from liar_ext.system.progress import Bar
from liar_ext.vocabulary.pieces import (
    check_alike,
    choose,
    counts_of,
    edited,
    encode,
    order_of,
    plain,
    read_pieces,
    size_in_bytes,
    size_of,
    spec_of,
    tokens_per_byte,
)

# Read by old and new tokenizers, and stored to be read again: words, code, scripts, white space.
SAMPLES = (
    "The weather was fine, so 12 of them walked 3.5 km to the sea.",
    "def double(x):\n    return 2 * x  # twice",
    "Ein schöner Tag, n'est-ce pas? Доброе утро. 你好，世界。",
    "  two  spaces\tand a tab\n\nE=mc² ≈ 9·10¹⁶ J/kg 🙂",
)
LINES = 20_000  # that are read by both tokenizers, to prove that they agree
STARTS, START = 64, 128  # beginnings of documents that a model goes on from, and their tokens
MORE = 64  # tokens of the second model
TOKEN = re.compile(r"(^|_)token_(ids?|index)$")
# Lists that forbid tokens: those that are gone need no ban.
BANS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
LISTS = (*BANS, "forced_decoder_ids", "force_words_ids", "lang_to_id", "task_to_id")


@dataclass(frozen=True)
class Choice:
    """The tokens that stay, by new id; their ``tokenizer.json``; and what the text says of them."""

    order: list[int]
    tokenizer_json: str
    facts: dict[str, Any]


class Counted:
    """A tokenizer, read once, with the counts of its tokens in some texts (`choose_tokens`)."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[str],
        scripts: Sequence[str] = (),
    ) -> None:
        token_parameters(model)  # refuses what can't be sliced, before any text is read
        self.model, self.tokenizer = model, tokenizer
        self.texts, self.spec = texts, spec_of(tokenizer)
        self.pieces = read_pieces(self.spec, rows_of(model))
        self.size = len(self.pieces.names)
        known = needed_tokens(model)
        lost = sorted(known - self.pieces.names.keys())
        if lost:
            raise InputError(
                f"vocabulary: the config names token {lost[0]}, which the tokenizer lacks; correct "
                "the config, or leave --keep-vocab out"
            )
        self.needed = known | self.pieces.of_scripts(scripts)
        self.old = plain(json.dumps(self.spec))
        self.counts = counts_of(self.old, texts, max(self.pieces.names) + 1)

    @cached_property
    def lines(self) -> list[tuple[str, list[int]]]:
        """The first lines of the texts and their tokens, which each size is compared with."""
        lines = [line for text in self.texts for line in text.splitlines() if line.strip()]
        return list(zip(lines[:LINES], encode(self.old, lines[:LINES]), strict=True))

    @cached_property
    def expected(self) -> np.ndarray:
        """``mean_t p(token | text before t)`` by token, over beginnings of documents.

        Zeros if the model predicts no next token, or the texts have none.
        """
        model, found = self.model, np.zeros(len(self.counts))
        if not predicts_next_token(model) or not self.counts.any():
            return found
        length = min(START, positions_of(model) or START)
        how = {"seq_len": length, "samples": STARTS, "packed": False}
        texts = [each for each in self.texts if each.strip()]
        drawn, total, positions = evaluation_sequences(texts, self.tokenizer, **how), 0.0, 0
        bar = Bar(total=len(drawn), desc="tokens")
        with torch.no_grad(), evaluating(model), bar:
            for batch in drawn.batches(1):  # the logits of one sequence are many
                logits = model(input_ids=batch["input_ids"].to(device_of(model))).logits[0]
                logits = logits[:, : len(found)]
                total = total + logits.float().softmax(-1).sum(0, dtype=torch.float64)
                positions += len(logits)
                bar.update()
        if not torch.isfinite(total).all():
            raise InputError(
                "vocabulary: the model's predictions on the text are not finite; load it with "
                "--dtype float32, or keep fewer tokens than the text has"
            )
        found[: len(total)] = (total / positions).cpu()
        return found

    def choose(self, keep: float | int) -> Choice | None:
        """Return the most frequent tokens with all that they need; None if that is all of them.

        If more tokens stay than the texts have, a language model says which.
        """
        size = size_of(keep, self.size)
        if size >= self.size:
            return None
        unseen = size > (self.counts > 0).sum()
        scores = self.counts + self.expected if unseen else self.counts
        order = order_of(self.pieces, choose(self.pieces, scores, size, self.needed))
        spec = json.dumps(edited(self.spec, self.pieces, order))
        new, total = plain(spec), int(self.counts.sum())
        rates = [total / size_in_bytes(self.texts), tokens_per_byte(new, self.texts)]
        facts = {
            "before": self.size,
            "after": len(order),
            "kind": self.pieces.kind_in_words,
            "kept_of_text": float(self.counts[order].sum() / max(total, 1)),
            "alike_lines": check_alike(new, order, self.lines, self.pieces),
            "tokens_per_byte": rates,
        }
        return Choice(order, spec, facts)


def choose_tokens(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    keep: float | int,
    scripts: Sequence[str] = (),
) -> Choice | None:
    """Choose the tokens of a smaller vocabulary by their counts in some texts.

    A language model adds each token's mean probability as the next one, ``mean_t p(token | text
    before t)``, where tokens that the texts lack are to stay.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model; it stays as it is.
    tokenizer : transformers tokenizer or processor
        Its tokenizer; it stays as it is.
    texts : sequence of str
        Text of the kind that the model will read.
    keep : float or int
        A fraction of the tokens, at most 1, or their number. It is rounded to a multiple of 64.
    scripts : sequence of str
        Unicode scripts, such as ``latin``, all of whose tokens stay.

    Returns
    -------
    Choice or None
        None if all tokens stay.

    Raises
    ------
    InputError
        If an argument is wrong, tokenizer or model can't be cut, or too few tokens would stay.
    """
    keep, scripts = check.vocabulary("keep", keep), check.scripts("scripts", scripts)
    if keep == "auto":
        raise check.wrong("keep", "be a fraction or a number of tokens", keep)
    if isinstance(texts, str):
        raise check.wrong("texts", "be a list of texts", texts)
    return Counted(model, tokenizer, texts, scripts).choose(keep)


def keep_tokens(model: nn.Module, tokenizer: Any, chosen: Choice | Sequence[int]) -> Any:
    """Slice a model in place to the tokens of a choice, and return the tokenizer that has them.

    ``chosen`` may be the old ids of all tokens that stay, in their new order, in which those that
    were only added to the tokenizer's own vocabulary are last.

    Raises
    ------
    InputError
        If the model or the tokenizer can't be cut, or not to these tokens in this order.
    """
    if not isinstance(chosen, Choice):
        spec, order = spec_of(tokenizer), list(chosen)
        pieces = read_pieces(spec)
        own = set(pieces.ids.values())
        added = [at not in own for at in order]
        if not order or len(pieces.names.keys() & order) < len(order) or added != sorted(added):
            raise InputError(
                "vocabulary: keep_tokens must be given tokens of the tokenizer, each once, and "
                "those that were only added to it last; choose_tokens gives such an order"
            )
        chosen = Choice(order, json.dumps(edited(spec, pieces, order)), {})
    before = count_params(model)
    slice_tokens(model, chosen.order)
    gone = before - count_params(model)
    smaller = copy.deepcopy(tokenizer)
    inner = getattr(smaller, "tokenizer", smaller)
    inner._tokenizer = Tokenizer.from_str(chosen.tokenizer_json)
    if smaller is not inner:  # a processor, which keeps tokens of images
        moved = {old: at for at, old in enumerate(chosen.order)}
        for name, value in list(vars(smaller).items()):
            if name.endswith("_token_id") and type(value) is int:
                setattr(smaller, name, moved.get(value, value))
    for name in ("_vocab", "_merges"):  # copies from which some classes were built
        vars(inner).pop(name, None)
    checks = [{"text": text, "ids": inner.encode(text)} for text in SAMPLES]
    facts = {"version": 1, "params_gone": gone, "kept": chosen.order, "checks": checks}
    model.liar_vocabulary = facts
    return smaller


def token_parameters(model: nn.Module) -> dict[str, int]:
    """Return the parameters and buffers with rows of tokens, and the dimension of the rows."""
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
    have = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    rows = {have[name].shape[dim] if name in have else None for name, dim in found.items()}
    tables = {id(have.get(name)) for name in found}
    if len(rows) != 1 or any(id(layer.weight) not in tables for layer in _ends(model)):
        raise _refused(model, "has a table of tokens of another size than vocab_size")
    return found


def slice_tokens(model: nn.Module, order: Sequence[int]) -> None:
    """Keep the tokens of ``order``, old ids by new id, of a model, in place.

    Embeddings, heads, biases and buffers are sliced, tied ones stay tied. The ids in the config and
    the generation config are renumbered, and bans of tokens that are gone are dropped. Where
    InputError is raised, the model is as it was.
    """
    rows, named = rows_of(model), token_parameters(model)
    if max(order) >= rows:
        raise _refused(model, f"has embeddings for {rows:,} tokens, its tokenizer has more")
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


def needed_tokens(model: nn.Module) -> set[int]:
    """Return the tokens that configs of a model name, but for those they only ban."""
    rows, found = rows_of(model), set()
    for config in _configs(model):
        for name, value in _named(config):
            if name not in BANS:
                _mapped(name, value, found.add)
    return {at for at in found if at < rows}


def _ends(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the embedding of tokens and the head, where a model has one of each."""
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # of two towers
            layer = get()
            if layer is not None:
                yield layer


def rows_of(model: nn.Module) -> int:
    """Return the tokens that a model has rows for."""
    weight = getattr(next(_ends(model), None), "weight", None)
    return len(weight) if isinstance(weight, nn.Parameter) else _tokens(model.config) or 0


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
