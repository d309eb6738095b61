"""Propose a row of the table of families for a model that it lacks, and prove it."""

from __future__ import annotations

import inspect
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, make_dataclass, replace
from itertools import islice, product
from pathlib import Path
from pprint import pformat
from textwrap import indent
from typing import Any

import torch
import transformers
from torch import nn

from liar_ext.checkpoint.inspection import read_config
from liar_ext.checkpoint.reading import reading
from liar_ext.checkpoint.stock_config import model_class
from liar_ext.models.family import TWO_STREAMS, WITHOUT, Family
from liar_ext.models.registry import FAMILIES
from liar_ext.models.running import DECODER_IDS, DECODER_MASK, base_path, blocks_of, has_path
from liar_ext.models.sites import CROSS
from liar_ext.suggest.instance import Call, Instance, Refused, Tried, find_stacks, prepare
from liar_ext.suggest.proof import KINDS, kinds_of, prove, prove_folders, rewired, tells_sizes
from liar_ext.suggest.sizes import (
    Meanings,
    with_bias_flags,
    with_config,
    with_head_dim,
    with_numbers,
    with_per_head,
)
from liar_ext.suggest.small_config import MOST_DEPTH, bound_layers, check_sizes, most_layers
from liar_ext.suggest.trace import Trace
from liar_ext.suggest.wiring import Found, find_sites
from liar_ext.system.errors import InputError, one_line
from liar_ext.system.progress import no_bars

# What a pruned or quantised folder says beside the sizes of its dense model.
EXTRA = ("liar", "per_layer_config", "quantization_config", "auto_map")
MOST_CHOICES, MOST_TRIALS = 4096, 64  # of what integers may mean
HIDDEN = "the residual stream isn't described"
FEW = "only a few blocks were looked at: not all of them can be built"


@dataclass(frozen=True)
class Suggestion:
    """A row of the table of families, and what stands behind it."""

    family: Family  # the row; its ``without`` says what it lacks, and why
    known: bool  # whether the table has it already; nothing was tried then
    proved: tuple[str, ...] = ()  # what was proved of it, each a sentence
    notes: tuple[str, ...] = ()  # what else is to be known, such as what was left alone

    @property
    def code(self) -> str:
        """Python code that registers the row."""
        words: set[str] = set()
        row = pformat(_without_defaults(self.family, words), width=96, sort_dicts=False)
        return (
            "from liar_ext import register_family\n"
            f"from liar_ext.models.family import {', '.join(sorted(words))}\n\n"
            f"register_family(\n{indent(row, ' ' * 4)}\n)\n"
        )


def _without_defaults(value: Any, words: set[str]) -> Any:
    """Return what prints a part of a row by the fields that it sets; add its classes to words."""
    if isinstance(value, Mapping):
        return {name: _without_defaults(each, words) for name, each in value.items()}
    if type(value) is tuple:
        return tuple(_without_defaults(each, words) for each in value)
    if not hasattr(type(value), "__annotations__"):
        return value
    shown = {
        name: _without_defaults(getattr(value, name), words)
        for name, field in inspect.signature(type(value)).parameters.items()
        if getattr(value, name) not in (field.default, {})
    }
    words.add(type(value).__name__)
    return make_dataclass(type(value).__name__, shown)(**shown)


@torch.no_grad()
def suggest_family(model: Any) -> Suggestion:
    """Propose a row of the table of families for a model or its config, and prove it.

    A tiny instance of the class shows the blocks, their linear layers and who reads whom. It is
    then pruned by the row in every combination: slicing must equal zeroing, and saved folders must
    load. What can't be proved isn't in the row. Residual streams and experts aren't looked for.

    Parameters
    ----------
    model : transformers.PreTrainedModel or PreTrainedConfig
        A model, whose weights aren't read; or a config, from which the class is built that it
        names in ``architectures``, or the base model.

    Returns
    -------
    Suggestion
        Its ``code`` registers the row. A family of the table comes back as it is.

    Raises
    ------
    InputError
        If neither attention nor MLP can be described, with the reason.

    Examples
    --------
    >>> import liar_ext
    >>> print(liar_ext.suggest_family(model).code)  # doctest: +SKIP
    """
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    name = getattr(config, "model_type", None)
    if not isinstance(name, str) or not name or not hasattr(config, "to_dict"):
        raise InputError(
            "suggest_family: takes a model of transformers or its config, with a model_type, got "
            f"{type(model).__name__}"
        )
    if name in FAMILIES:
        return Suggestion(FAMILIES[name], known=True)
    try:
        if wrong := check_sizes(config):
            raise Refused(wrong)
        with no_bars(), torch.device("cpu"):
            return _propose(prepare(_class_of(model), config), config)
    except Refused as error:
        raise InputError(
            f"suggest_family: no row for {name!r}: {one_line(error, 700)}; describe the family by "
            "hand, see docs/extend.md"
        ) from error


def suggest_for(name: str) -> Suggestion:
    """Propose a row for the model in a folder, or in a repository of the hub, by its config alone.

    No code of a folder or repository is run: build a model that needs its own, and call
    :func:`liar_ext.suggest_family` with it. InputError is raised if there is no config,
    transformers has no such architecture, or no row can be proposed.
    """
    path = Path(name)
    if path.is_dir():
        fields = read_config(path, "families")
    elif path.suffix == ".gguf" or path.is_absolute() or path.exists():
        raise InputError(f"families: {name} must be a model folder or a hub id")
    else:
        with reading(name, "families"):
            fields = transformers.PreTrainedConfig.get_config_dict(name)[0]
    kind = fields.get("model_type")
    if kind in FAMILIES:
        return Suggestion(FAMILIES[kind], known=True)
    if kind not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"families: transformers {transformers.__version__} has no architecture "
            f"{str(kind)[:60]!r}, and no code of {name} is run; load the model by what it needs, "
            "and call liar_ext.suggest_family(model)"
        )
    fields = {key: value for key, value in fields.items() if key not in EXTRA}
    if most_layers(fields) > MOST_DEPTH:
        fields = bound_layers(fields)
    with reading(f"the config of {name}", "families"):
        # Files write infinity as {"__float__": "Infinity"}.
        fields = transformers.PreTrainedConfig._decode_special_floats(fields)
        config = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    return suggest_family(config)


def _class_of(model: Any) -> type[nn.Module]:
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


def _propose(tried: Tried, config: Any) -> Suggestion:
    """Return a row for one stack of blocks, or for an encoder and a decoder; else raise Refused."""
    instance, name = tried.instances[0], config.model_type
    stacks = find_stacks(instance)
    if getattr(config, "is_encoder_decoder", False):
        found = _two_stacks(tried, name, stacks)
    elif len(stacks) > 1:
        prefix = base_path(instance.model)
        names = ", ".join(prefix + path for path in stacks)
        raise Refused(f"there are several lists of blocks: {names}")
    else:
        (stack,) = stacks.items()
        found = Stack(tried, name, *stack).own()
    proved = (*found.proved, *prove_folders(instance, found.family))
    lacking = {"hidden": HIDDEN, **found.family.without}
    without = {each: lacking[each] for each in WITHOUT if each in lacking}
    return replace(found, family=replace(found.family, without=without), proved=proved)


def _two_stacks(tried: Tried, name: str, stacks: dict[str, list[Call]]) -> Suggestion:
    """Return a row for an encoder that a decoder reads, each described first, then proved whole."""
    if len(stacks) != 2:
        found = ", ".join(stacks)
        raise Refused(f"an encoder and a decoder are two lists of blocks, found {found}")
    encoder, decoder = (Stack(tried, name, *stack) for stack in stacks.items())
    rows: dict[str, Suggestion] = {}
    for part, stack in (("encoder", encoder), ("decoder", decoder)):
        try:
            rows[part] = stack.own()
        except Refused as error:
            raise Refused(f"{stack.path}: {error}") from error
    if CROSS in encoder.found:
        raise Refused(f"blocks of {encoder.path} read something beside the encoder's text")
    notes = [f"{part}: {note}" for part, row in rows.items() for note in row.notes]
    cross = decoder.cross()
    if cross.attn is None:
        notes.append(f"decoder: attention to the encoder stays whole: {cross.without['attn']}")
    reads = inspect.signature(tried.instances[0].model.forward).parameters
    mask = DECODER_MASK if DECODER_MASK in reads else ""
    own = {part: row.family for part, row in rows.items()}
    reading = {"input": DECODER_IDS, "mask": mask, CROSS: cross.attn}
    parts = (
        own["encoder"].as_part("encoder", input="input_ids"),
        own["decoder"].as_part("decoder", **reading),
    )
    family = with_config(tried.instances, Family(name=name, parts=parts))
    family = replace(family, without={"hidden": TWO_STREAMS, **_lacking(family, own, cross)})
    return Suggestion(family, False, prove(tried.instances, family), tuple(notes))


def _lacking(family: Family, rows: Mapping[str, Family], cross: Family) -> dict[str, str]:
    """Return what the parts lack, and why, each reason once."""
    found: dict[str, list[str]] = {}
    for part, row in rows.items():
        for kind in KINDS.keys() & row.without.keys():
            found.setdefault(kind, []).append(f"{part}: {row.without[kind]}")
    for row in (*rows.values(), cross):
        for reason in filter(None, row.without.get("stock", "").split("; ")):
            # Of all parts together a field may tell what it doesn't of one.
            if not tells_sizes(family, "mlp" if "channels" in reason else "attn"):
                found.setdefault("stock", []).append(reason)
    return {kind: "; ".join(dict.fromkeys(reasons)) for kind, reasons in found.items()}


class Stack:
    """A list of blocks, with what was found in a block of it."""

    def __init__(self, tried: Tried, name: str, path: str, calls: list[Call]) -> None:
        self.tried, self.name, self.path, self.calls = tried, name, path, calls
        self.trace = Trace(calls[min(1, len(calls) - 1)])
        self.found, self.missing = find_sites(self.trace)

    def own(self) -> Suggestion:
        """Return the proved row of its attention and MLP, with config fields."""
        own = {kind: site for kind, site in self.found.items() if kind != CROSS}
        return self._describe(own, self.missing, self.found.get(CROSS))

    def cross(self) -> Family:
        """Return the row of the attention to another stack alone, or one that says why not."""
        if CROSS not in self.found:
            why = f": {self.missing['attn']}" if "attn" in self.missing else ""
            raise Refused(f"no attention of {self.path} that a row can name reads the encoder{why}")
        try:
            return self._describe({"attn": self.found[CROSS]}, {}, self.found.get("attn")).family
        except Refused as error:
            return Family(self.name, without={"attn": str(error)})

    def _describe(
        self, found: Mapping[str, Found], without: Mapping[str, str], apart: Found | None
    ) -> Suggestion:
        """Return the row of some sites; ``apart`` is another attention, with numbers of its own."""
        tried, ran = self.tried, self.trace.ran
        if apart is not None:
            home = _home(apart)
            ran = {path for path in ran if not f"{path}.".startswith(f"{home}.")}
        wirings = {kind: site.wiring for kind, site in found.items()}
        family = Family(name=self.name, blocks=self.path, without=without, **wirings)
        family = _fitting_every_block(tried, family)
        notes = [] if tried.whole is not None else [FEW]
        if family.attn is not None:
            site, first = found["attn"], self.calls[0].module
            try:
                family = with_head_dim(family, tried.models, site.head_dim, ran)
                head_input = self.trace.input_by_head(site.wiring.consumer, site.heads, first)
                family = rewired(family, "attn", head_input=head_input)
            except Refused as error:
                family = _less(family, "attn", str(error))
        if not kinds_of(family):
            without = family.without
            raise Refused(
                "; ".join(f"{kind}: {without[kind]}" for kind in KINDS if kind in without)
            )
        family = with_per_head(family, tried.models)
        family, unclear, at_hand = with_numbers(family, tried.models, ran)
        family, proved = _settle(tried.instances, family, unclear, at_hand)
        if family.attn is not None and family.attn.stacked and found["attn"].kv_heads == 1:
            notes.append(
                "one key for all heads: whether a weight is stacked by group can't be seen"
            )
        known = {path for kind in kinds_of(family) for path in getattr(family, kind).numbers}
        if left := [path for path in unclear if path not in known]:
            notes.append(f"may be the hidden size, and are left alone: {', '.join(left)}")
        family = with_bias_flags(tried.instances[0], with_config(tried.instances, family))
        return Suggestion(family, False, proved, tuple(notes))


def _home(site: Found) -> str:
    """Return the module that all layers of a site are in; a dot if that is the block itself."""
    owners = [layer.rpartition(".")[0].replace(".", "/") for layer in site.wiring.layers]
    return posixpath.commonpath(owners).replace("/", ".") or "."


def _less(family: Family, kind: str, why: str) -> Family:
    return replace(family, **{kind: None}, without={**family.without, kind: why})


def _fitting_every_block(tried: Tried, family: Family) -> Family:
    """Return a row without what some block lacks, also of the whole model."""
    for kind, model in product(KINDS, (tried.models[0], tried.whole)):
        wiring = getattr(family, kind)
        for path, block in blocks_of(model, family) if wiring and model is not None else ():
            if lacking := [each for each in wiring.layers if not has_path(block, each, nn.Module)]:
                family = _less(family, kind, f"blocks differ: {path} has no {lacking[0]}")
                break
    return family


def _settle(
    instances: list[Instance], family: Family, unclear: Meanings, at_hand: Meanings
) -> tuple[Family, tuple[str, ...]]:
    """Return the row that the proof holds for, with as few unclear integers as it takes.

    Where it holds for none, one kind of site may hold by itself.
    """
    reasons: list[str] = []
    for other in (None, *KINDS) if len(kinds_of(family)) == 2 else (None,):
        row = family if other is None else _less(family, other, reasons[0])
        for trial in _trials(row, unclear, at_hand):
            try:
                return trial, prove(instances, trial)
            except Refused as error:
                reasons.append(str(error))
    raise Refused("; ".join(dict.fromkeys(reasons)))


def _trials(family: Family, unclear: Meanings, at_hand: Meanings) -> Iterator[Family]:
    """Yield rows in which unclear integers mean nothing, then one thing or another.

    Numbers of the config come last: mostly no forward reads them.
    """
    kinds = kinds_of(family)
    options = [
        [None, *((path, kind, size) for kind, size in meanings if kind in kinds)]
        for path, meanings in {**unclear, **at_hand}.items()
    ]
    choices = [list(filter(None, each)) for each in islice(product(*options), MOST_CHOICES)]
    choices.sort(key=lambda meant: (sum(path in at_hand for path, _, _ in meant), len(meant)))
    for meant in choices[:MOST_TRIALS]:
        row = family
        for path, kind, size in meant:
            row = rewired(row, kind, numbers={**getattr(row, kind).numbers, path: size})
        yield row
