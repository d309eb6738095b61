"""Propose a row of the table of families for a model that it lacks, and prove it.

The proof is on tiny instances: sliced equals zeroed, in every combination, and folders load.
"""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass, replace
from itertools import product
from pathlib import Path
from pprint import pformat
from textwrap import indent
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from liar_ext.checkpoint.inspection import fields_of, read_config, reading
from liar_ext.checkpoint.loading import load_pruned
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import is_stock
from liar_ext.models.family import TWO_STREAMS, WITHOUT, Family
from liar_ext.models.registry import FAMILIES
from liar_ext.models.running import DECODER_IDS, DECODER_MASK
from liar_ext.models.sites import CROSS, get_consumer_weight, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.suggest.instance import (
    LAYERS,
    Instance,
    Refused,
    Tried,
    class_of,
    make_plain,
    outputs,
    prepare,
)
from liar_ext.suggest.sizes import (
    CONFIG,
    KINDS,
    Meanings,
    fitting_every_block,
    kinds_of,
    less,
    registered,
    rewired,
    some_plan,
    tells_sizes,
    trials_of,
    with_bias_flags,
    with_config,
    with_head_dim,
    with_numbers,
    with_per_head,
)
from liar_ext.suggest.trace import Call, Trace, find_stacks
from liar_ext.suggest.wiring import Found, find_sites
from liar_ext.system.errors import InputError, one_line
from liar_ext.system.progress import no_bars, quiet

# What a pruned or quantised folder says beside the sizes of its dense model.
EXTRA = ("liar", "per_layer_config", "quantization_config", "auto_map")
MOST_LAYERS = 1000  # of a config: classes make lists with an entry for each
CLOSE = 1e-6  # of the largest output: norms compute in float32 whatever the model's dtype
NOTICED = 1e-4  # by which zeroing must change the outputs, so that the comparison can fail
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
    if not name or not hasattr(config, "to_dict"):
        raise InputError(
            "suggest_family: takes a model of transformers or its config, with a model_type, got "
            f"{type(model).__name__}"
        )
    if name in FAMILIES:
        return Suggestion(FAMILIES[name], known=True)
    try:
        with no_bars(), torch.device("cpu"):
            return _propose(prepare(class_of(model), config), config)
    except Refused as error:
        raise InputError(
            f"suggest_family: no row for {name!r}: {one_line(error, 700)}; describe the family by "
            "hand, see docs/extend.md"
        ) from error


def suggest_for(name: str) -> Suggestion:
    """Propose a row for the model in a folder, or in a repository of the hub, by its config alone.

    No code of a folder or repository is run: build a model that needs its own, and call
    :func:`liar_ext.suggest_family` with it.
    """
    with reading(name, "families"):
        if Path(name).is_dir():
            fields = read_config(Path(name), "families")
        else:
            fields = transformers.PreTrainedConfig.get_config_dict(name)[0]
        fields = {key: value for key, value in fields.items() if key not in EXTRA}
        kind = fields.get("model_type")
        if kind in FAMILIES:
            return Suggestion(FAMILIES[kind], known=True)
        if kind not in transformers.CONFIG_MAPPING:
            raise InputError(
                f"families: transformers {transformers.__version__} has no architecture "
                f"{str(kind)[:60]!r}, and no code of {name} is run; load the model by what it "
                "needs, and call liar_ext.suggest_family(model)"
            )
        for field, value in fields_of(fields):
            if LAYERS.fullmatch(field) and type(value) is int and value > MOST_LAYERS:
                raise InputError(f"families: {name} claims {value} {field}; copy it again")
        # Files write infinity as {"__float__": "Infinity"}.
        fields = transformers.PreTrainedConfig._decode_special_floats(fields)
        config = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    return suggest_family(config)


def _propose(tried: Tried, config: Any) -> Suggestion:
    """Return a row for one stack of blocks, or for an encoder and a decoder; else raise Refused."""
    instance, name = tried.instances[0], config.model_type
    stacks = find_stacks(instance)
    expected = 2 if getattr(config, "is_encoder_decoder", False) else 1
    if len(stacks) != expected:
        raise Refused(f"it has lists of blocks {', '.join(stacks)}, and not {expected}")
    found = [Stack(tried, name, *stack) for stack in stacks.items()]
    made = found[0].own() if expected == 1 else _two_stacks(tried, name, *found)
    proved = (*made.proved, *prove_folders(instance, made.family))
    lacking = {"hidden": HIDDEN, **made.family.without}
    without = {each: lacking[each] for each in WITHOUT if each in lacking}
    return replace(made, family=replace(made.family, without=without), proved=proved)


def _two_stacks(tried: Tried, name: str, encoder: Stack, decoder: Stack) -> Suggestion:
    """Return a row for an encoder that a decoder reads, each described first, then proved whole."""
    rows = {"encoder": encoder.own(), "decoder": decoder.own()}
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
    without = {"hidden": TWO_STREAMS, **family.without}
    for kind in KINDS:
        why = [f"{part}: {row.without[kind]}" for part, row in own.items() if kind in row.without]
        without |= {kind: "; ".join(why)} if why else {}
    family = replace(family, without=without)
    return Suggestion(family, False, prove(tried.instances, family), tuple(notes))


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
            ran = {path for path in ran if not f"{path}.".startswith(f"{apart.home}.")}
        wirings = {kind: site.wiring for kind, site in found.items()}
        family = Family(name=self.name, blocks=self.path, without=without, **wirings)
        family = fitting_every_block(tried, family)
        notes = [] if tried.whole is not None else [FEW]
        if family.attn is not None:
            site, first = found["attn"], self.calls[0].module
            try:
                family = with_head_dim(family, tried.models, site.head_dim, ran)
                head_input = self.trace.input_by_head(site.wiring.consumer, site.heads, first)
                family = rewired(family, "attn", head_input=head_input)
            except Refused as error:
                family = less(family, "attn", str(error))
        if not kinds_of(family):
            raise Refused("; ".join(f"{kind}: {why}" for kind, why in family.without.items()))
        family = with_per_head(family, tried.models)
        family, unclear = with_numbers(family, tried.models, ran)
        family, proved = _settle(tried.instances, family, unclear)
        if family.attn is not None and family.attn.stacked and found["attn"].kv_heads == 1:
            notes.append(
                "one key for all heads: whether a weight is stacked by group can't be seen"
            )
        known = {path for kind in kinds_of(family) for path in getattr(family, kind).numbers}
        if left := [path for path in unclear if path not in known and CONFIG not in path]:
            notes.append(f"may be the hidden size, and are left alone: {', '.join(left)}")
        family = with_bias_flags(tried.instances[0], with_config(tried.instances, family))
        return Suggestion(family, False, proved, tuple(notes))


def _settle(
    instances: list[Instance], family: Family, unclear: Meanings
) -> tuple[Family, tuple[str, ...]]:
    """Return the row that the proof holds for, with as few unclear integers as it takes.

    Where it holds for none, one kind of site may hold by itself.
    """
    reasons: list[str] = []
    for other in (None, *KINDS) if len(kinds_of(family)) == 2 else (None,):
        row = family if other is None else less(family, other, reasons[0])
        for trial in trials_of(row, unclear):
            try:
                return trial, prove(instances, trial)
            except Refused as error:
                reasons.append(str(error))
    raise Refused("; ".join(dict.fromkeys(reasons)))


def prove(instances: Sequence[Instance], family: Family) -> tuple[str]:
    """Return in words what was proved of a row, on each of some instances."""
    done: dict[str, float] = {}
    stock = type(instances[0].model)
    has_sdpa = stock._supports_sdpa and stock._can_set_attn_implementation()
    ways = ("eager", "sdpa") if has_sdpa else ("eager",)
    with registered(family):
        for instance, attention in product(instances, ways):
            for kinds, unit in _combinations(instance.model, kinds_of(family)):
                name = " and ".join(kinds) + (f" by {unit}" if "attn" in kinds else "")
                error = _compare(instance, kinds, unit, attention, f"pruning {name},")
                done[name] = max(error, done.get(name, 0.0))
    worst = max(done.values())
    said = f"to {worst:.0e} of the largest output" if worst else "exactly"
    return (f"sliced equals zeroed {said}, in float64: {', '.join(done)}",)


def prove_folders(instance: Instance, family: Family) -> list[str]:
    """Return in words which saved folders give the same outputs when they are loaded."""
    stock, told = type(instance.model), [k for k in kinds_of(family) if tells_sizes(family, k)]
    ways = {}
    if told:
        name = f"{stock.__name__}.from_pretrained"
        ways[f"equal layers of {' and '.join(told)} load in {name}"] = (told, stock.from_pretrained)
    if is_stock(stock):
        ways["unequal layers load by liar_ext.load_pruned"] = (kinds_of(family), load_pruned)
    for kinds, load in ways.values():
        pruned = instance._replace(model=copy.deepcopy(instance.model))
        with registered(family), tempfile.TemporaryDirectory() as folder, quiet():
            plan = some_plan(pruned.model, kinds, equal=load is not load_pruned)
            apply_plan(pruned.model, plan)
            expected = outputs(pruned)
            try:
                save_pruned(pruned.model, Path(folder, "pruned"), plan)
                loaded = load(Path(folder, "pruned"), dtype=torch.float64)
                make_plain(loaded.config)
                # Buffers were made in float32, of this model as of the one that was saved.
                given = outputs(instance._replace(model=loaded.to(torch.float64).eval()))
            except Exception as error:  # a stranger's class and config have rules of their own
                raise Refused(f"a saved folder doesn't load: {one_line(error, 160)}") from error
        if not _distance(given, expected) <= CLOSE:
            raise Refused("a saved folder loads with other outputs")
    return list(ways)


def _combinations(model: nn.Module, kinds: list[str]) -> Iterator[tuple[list[str], str]]:
    """Yield which kinds of site are pruned together, and by which unit of attention."""
    for subset in [[kind] for kind in kinds] + [kinds] * (len(kinds) > 1):
        units = ["auto"]
        if "attn" in subset:
            site = sites(model, ("attn",))[0]
            units = ["kv_group", "head"] if site.unit == "kv_group" else ["head"]
            units = [unit for unit in units if sites(model, ("attn",), unit)[0].units > 1]
        yield from ((subset, unit) for unit in units)


def _compare(
    instance: Instance, kinds: Sequence[str], unit: str, attention: str, what: str
) -> float:
    """Return by how much a sliced model differs from the one with zeroed columns."""
    dense, sliced = (instance._replace(model=copy.deepcopy(instance.model)) for _ in range(2))
    for each in (dense, sliced) if attention != "eager" else ():
        each.model.set_attn_implementation(attention)
    plan = some_plan(dense.model, kinds, unit)
    before = outputs(dense)
    for site in sites(dense.model, kinds, unit):
        removed = site.features(plan.sites[site.name].removed)
        get_consumer_weight(dense.model, site)[:, removed] = 0
    expected = outputs(dense)
    try:
        apply_plan(sliced.model, plan)
        given = outputs(sliced)
    except Exception as error:  # whatever a stranger's forward raises
        said = f"{type(error).__name__}: {one_line(error, 120)}"
        raise Refused(f"{what} the model fails: {said}") from error
    if _distance(before, expected) < NOTICED:
        raise Refused(f"{what} zeroing changes no output, so that nothing can be compared")
    error = _distance(given, expected)
    if not error <= CLOSE:
        raise Refused(f"{what} the outputs are {error:.1e} from those with zeroed columns")
    return error


def _distance(given: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a fraction of the largest value."""
    if given.shape != expected.shape:
        return math.inf
    return float((given - expected).abs().max()) / float(expected.abs().max())
