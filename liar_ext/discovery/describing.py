"""Describe one stack of blocks from what a trace shows, and settle what only the proof can tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice, product
from typing import Any

from torch import nn

from liar_ext.discovery.blocks import Blocks
from liar_ext.discovery.configs import with_bias_flags, with_config
from liar_ext.discovery.experts import find_experts
from liar_ext.discovery.instance import (
    Instance,
    Refused,
    build,
    make_instance,
    make_second,
    variants,
)
from liar_ext.discovery.numbers import Meanings, with_head_dim, with_numbers, with_per_head
from liar_ext.discovery.proof import prove
from liar_ext.discovery.rows import registered
from liar_ext.discovery.shrinking import tall
from liar_ext.discovery.tracing import Trace
from liar_ext.discovery.watching import input_by_head
from liar_ext.discovery.wiring import Found, find_sites
from liar_ext.models.family import Family
from liar_ext.models.reading import blocks_of

MOST_CHOICES, MOST_TRIALS = 4096, 64  # of what integers may mean
KINDS = ("attn", "mlp")


@dataclass(frozen=True)
class Tried:
    """What everything is tried on.

    Parameters
    ----------
    instances : list of Instance
        One, or two of sizes that differ.
    models : list of nn.Module
        Those of the instances, or the one and variants of it without weights.
    whole : nn.Module or None
        A model with all blocks, and without weights; None if none can be built.
    """

    instances: list[Instance]
    models: list[nn.Module]
    whole: nn.Module | None


@dataclass
class Described:
    """A row of one stack of blocks that was proved, and what it lacks."""

    family: Family
    proved: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def prepare(model_class: type[nn.Module], config: Any, given: nn.Module | None) -> Tried:
    """Build the tiny models of a class.

    Raises
    ------
    Refused
        If none can be built and run.
    """
    instance = make_instance(model_class, config, given)
    second = make_second(model_class, config, instance)
    instances = [instance] if second is None else [instance, second]
    models = [each.model for each in instances]
    if second is None:
        models += variants(instance)
    return Tried(instances, models, _whole(instance.model, config))


def trace_of(blocks: Blocks) -> tuple[Trace, dict[str, Found], dict[str, str]]:
    """Return the trace of a block, its sites by kind, and why a kind can't be described."""
    trace = Trace(blocks.calls[min(1, len(blocks.calls) - 1)])
    found, missing = find_sites(trace)
    try:
        if (mixture := find_experts(trace)) is not None:
            if "mlp" in found:
                found["shared_mlp"] = found["mlp"]
            found["mlp"] = mixture
            missing.pop("mlp", None)
    except Refused as error:
        found.pop("mlp", None)
        missing["mlp"] = str(error)
    return trace, found, missing


def describe(
    tried: Tried,
    name: str,
    blocks: Blocks,
    trace: Trace,
    found: Mapping[str, Found],
    missing: Mapping[str, str],
    apart: Found | None = None,
) -> Described:
    """Return the proved row of a stack of blocks, with config fields, by what was found.

    ``apart`` is another attention of the block, whose numbers are its own.

    Raises
    ------
    Refused
        If neither attention nor MLP can be described.
    """
    missing, ran = dict(missing), trace.ran
    if apart is not None:
        home = _home(apart)
        ran = {path for path in ran if not f"{path}.".startswith(f"{home}.")}
    wirings = {kind: found[kind].wiring if kind in found else None for kind in KINDS}
    family = Family(name=name, blocks=blocks.path, **wirings)
    model, models = tried.instances[0].model, tried.models
    family, notes = _fitting_every_block(model, tried.whole, family, missing)
    if family.attn is not None:
        attention, first = found["attn"], blocks.calls[0].module
        try:
            family = with_head_dim(family, models, attention.head_dim, ran)
            head_input = input_by_head(trace, attention.wiring.consumer, attention.heads, first)
            family = replace(family, attn=replace(family.attn, head_input=head_input))
        except Refused as error:
            missing["attn"] = str(error)
            family = replace(family, attn=None)
    _check_left(family, missing)
    family = with_per_head(family, models)
    family, unclear, at_hand = with_numbers(family, models, ran)
    family, proved = _settle(tried.instances, family, unclear, at_hand, missing)
    if family.attn is not None and family.attn.stacked and found["attn"].kv_heads == 1:
        notes.append("one key for all heads: whether a weight is stacked by group can't be seen")
    left = [path for path in unclear if not any(path in w.numbers for w in _wirings(family))]
    if left:
        notes.append(f"may be the hidden size, and are left alone: {', '.join(left)}")
    family, no_config = with_config(tried.instances, family)
    family = with_bias_flags(tried.instances[0], family)
    if no_config:
        missing["stock"] = "; ".join(no_config.values())
    return Described(family, proved, missing, notes)


def with_shared(
    tried: Tried, blocks: Blocks, trace: Trace, found: Mapping[str, Found], described: Described
) -> Described:
    """Return a row of a mixture with the MLP that every token passes beside the experts, if any.

    Where that can't be described a note says why.
    """
    family = described.family
    if "shared_mlp" not in found or not has_experts(family):
        return described
    beside = found["shared_mlp"]
    wiring = replace(beside.wiring, optional=family.mlp.optional)
    try:
        alone = {"mlp": replace(beside, wiring=wiring)}
        shared = describe(tried, family.name, blocks, trace, alone, {}, found["mlp"])
        row = replace(family, shared_mlp=replace(shared.family.mlp, optional=True))
        proved = prove(tried.instances, row)
    except Refused as error:
        said = f"the MLP beside the experts stays whole: {error}"
        return replace(described, notes=[*described.notes, said])
    missing = described.missing
    if "stock" in shared.missing:
        reasons = [missing[key] for key in missing if key == "stock"] + [shared.missing["stock"]]
        missing = {**missing, "stock": "; ".join(dict.fromkeys(reasons))}
    return Described(row, proved, missing, described.notes)


def _home(site: Found) -> str:
    """Return the module that all layers of a site are in; a dot if that is the block itself."""
    first, *others = [layer.split(".")[:-1] for layer in site.wiring.layers]
    while first and any(names[: len(first)] != first for names in others):
        first = first[:-1]
    return ".".join(first) or "."


def has_experts(family: Family) -> bool:
    """Tell whether the MLP of a row is a mixture of experts."""
    return family.mlp is not None and family.mlp.experts is not None


def _check_left(family: Family, missing: dict[str, str]) -> None:
    if family.attn is None and family.mlp is None:
        raise Refused("; ".join(f"{kind}: {missing[kind]}" for kind in KINDS if kind in missing))


def _wirings(family: Family) -> list[Any]:
    return [getattr(family, kind) for kind in KINDS if getattr(family, kind) is not None]


def _whole(model: nn.Module, config: Any) -> nn.Module | None:
    """Return a model with all its blocks and no weights, or None if none can be built."""
    for make in tall(config):
        with suppress(Exception):  # a stranger's class and config have rules of their own
            return build(type(model), make(), "meta")
    return None


def _fitting_every_block(
    model: nn.Module, whole: nn.Module | None, family: Family, missing: dict[str, str]
) -> tuple[Family, list[str]]:
    """Return a row without what some block lacks, also of the whole model: a dense MLP, for one."""
    notes: list[str] = []
    for kind in KINDS:
        for each in (model, whole):
            if each is None or getattr(family, kind) is None:
                continue
            lacking = "" if getattr(family, kind).optional else _lacking(each, family, kind)
            if lacking and kind == "mlp" and has_experts(family):
                family = replace(family, mlp=replace(family.mlp, optional=True))
                notes = [f"blocks without experts keep what they have: {lacking}"]
            elif lacking:
                missing[kind] = f"blocks differ: {lacking}"
                family = replace(family, **{kind: None})
    few = "only a few blocks were looked at: not all of them can be built"
    return family, [few] * (whole is None) + notes


def _lacking(model: nn.Module, family: Family, kind: str) -> str:
    """Return which block of a model lacks which layer of a site; nothing if none does."""
    with registered(family):
        for path, block in blocks_of(model, family):
            there = {name for name, _ in (*block.named_modules(), *block.named_parameters())}
            for layer in getattr(family, kind).layers:
                if layer not in there:
                    return f"{path} has no {layer}"
    return ""


def _settle(
    instances: list[Instance],
    family: Family,
    unclear: Meanings,
    at_hand: Meanings,
    missing: dict[str, str],
) -> tuple[Family, list[str]]:
    """Return the row that the proof holds for, with as few unclear integers as it takes.

    Where it holds for none, one kind of site may hold by itself; the reason why the other doesn't
    is added to ``missing``.
    """
    reasons: list[str] = []
    held = _first_proved(instances, _trials(family, unclear, at_hand), reasons)
    if held is None and len(_wirings(family)) == 2:
        for other in ("attn", "mlp"):
            alone = replace(family, **{other: None})
            held = _first_proved(instances, _trials(alone, unclear, at_hand), reasons)
            if held is not None:
                missing[other] = reasons[0]
                break
    if held is None:
        raise Refused("; ".join(dict.fromkeys(reasons)))
    return held


def _first_proved(
    instances: list[Instance], trials: Iterator[Family], reasons: list[str]
) -> tuple[Family, list[str]] | None:
    """Return the first row that the proof holds for, or None; add the reasons of the others."""
    for trial in trials:
        try:
            return trial, prove(instances, trial)
        except Refused as error:
            reasons.append(str(error))
    return None


def _trials(family: Family, unclear: Meanings, at_hand: Meanings) -> Iterator[Family]:
    """Yield rows in which unclear integers mean nothing, then one thing or another.

    Numbers of the config come last: mostly no forward reads them.
    """
    kinds = [kind for kind in KINDS if getattr(family, kind) is not None]
    options = {
        path: [None, *(each for each in meanings if each[0] in kinds)]
        for path, meanings in {**unclear, **at_hand}.items()
    }
    choices = product(*options.values())

    def cost(choice: tuple[tuple[str, str] | None, ...]) -> tuple[int, int]:
        taken = [path for path, meaning in zip(options, choice, strict=True) if meaning]
        return sum(path in at_hand for path in taken), len(taken)

    for choice in sorted(islice(choices, MOST_CHOICES), key=cost)[:MOST_TRIALS]:
        row = family
        for path, meaning in zip(options, choice, strict=True):
            if meaning:
                kind, size = meaning
                wiring = getattr(row, kind)
                row = replace(
                    row, **{kind: replace(wiring, numbers={**wiring.numbers, path: size})}
                )
        yield row
