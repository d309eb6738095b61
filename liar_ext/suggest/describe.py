"""Describe one stack of blocks from what a trace shows, and settle what only the proof can tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice, product

from torch import nn

from liar_ext.models.family import Family
from liar_ext.models.running import blocks_of
from liar_ext.models.sites import CROSS
from liar_ext.suggest.instance import Blocks, Instance, Refused, Tried
from liar_ext.suggest.proof import KINDS, kinds_of, prove, rewired
from liar_ext.suggest.sizes import (
    Meanings,
    with_bias_flags,
    with_config,
    with_head_dim,
    with_numbers,
    with_per_head,
)
from liar_ext.suggest.trace import Trace
from liar_ext.suggest.wiring import Found, find_sites

MOST_CHOICES, MOST_TRIALS = 4096, 64  # of what integers may mean


@dataclass
class Described:
    """A row of one stack of blocks that was proved, and what it lacks."""

    family: Family
    proved: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Stack:
    """A list of blocks, with what was found in a block of it."""

    def __init__(self, tried: Tried, name: str, blocks: Blocks) -> None:
        self.tried, self.name, self.blocks = tried, name, blocks
        self.trace = Trace(blocks.calls[min(1, len(blocks.calls) - 1)])
        self.found, self.missing = find_sites(self.trace)

    def own(self) -> Described:
        """Return the proved row of its attention and MLP, with config fields."""
        own = {kind: site for kind, site in self.found.items() if kind != CROSS}
        return self._describe(own, dict(self.missing), self.found.get(CROSS))

    def cross(self) -> Described:
        """Return the row of the attention to another stack alone, or one that says why not."""
        if CROSS not in self.found:
            why = f": {self.missing['attn']}" if "attn" in self.missing else ""
            raise Refused(
                f"no attention of {self.blocks.path} that a row can name reads the encoder{why}"
            )
        try:
            return self._describe({"attn": self.found[CROSS]}, {}, self.found.get("attn"))
        except Refused as error:
            return Described(Family(self.name), missing={"attn": str(error)})

    def _describe(
        self, found: Mapping[str, Found], missing: dict[str, str], apart: Found | None
    ) -> Described:
        """Return the row of some sites; ``apart`` is another attention, with numbers of its own."""
        tried, ran = self.tried, self.trace.ran
        if apart is not None:
            home = _home(apart)
            ran = {path for path in ran if not f"{path}.".startswith(f"{home}.")}
        wirings = {kind: site.wiring for kind, site in found.items()}
        family = Family(name=self.name, blocks=self.blocks.path, **wirings)
        family, notes = _fitting_every_block(tried, family, missing)
        if family.attn is not None:
            site, first = found["attn"], self.blocks.calls[0].module
            try:
                family = with_head_dim(family, tried.models, site.head_dim, ran)
                head_input = self.trace.input_by_head(site.wiring.consumer, site.heads, first)
                family = rewired(family, "attn", head_input=head_input)
            except Refused as error:
                missing["attn"] = str(error)
                family = replace(family, attn=None)
        if not kinds_of(family):
            reasons = [f"{kind}: {missing[kind]}" for kind in KINDS if kind in missing]
            raise Refused("; ".join(reasons))
        family = with_per_head(family, tried.models)
        family, unclear, at_hand = with_numbers(family, tried.models, ran)
        family, proved = _settle(tried.instances, family, unclear, at_hand, missing)
        if family.attn is not None and family.attn.stacked and found["attn"].kv_heads == 1:
            notes.append(
                "one key for all heads: whether a weight is stacked by group can't be seen"
            )
        known = {path for kind in kinds_of(family) for path in getattr(family, kind).numbers}
        if left := [path for path in unclear if path not in known]:
            notes.append(f"may be the hidden size, and are left alone: {', '.join(left)}")
        family, no_config = with_config(tried.instances, family)
        family = with_bias_flags(tried.instances[0], family)
        if no_config:
            missing["stock"] = "; ".join(no_config.values())
        return Described(family, proved, missing, notes)


def _home(site: Found) -> str:
    """Return the module that all layers of a site are in; a dot if that is the block itself."""
    first, *others = [layer.split(".")[:-1] for layer in site.wiring.layers]
    while first and any(names[: len(first)] != first for names in others):
        first = first[:-1]
    return ".".join(first) or "."


def _fitting_every_block(
    tried: Tried, family: Family, missing: dict[str, str]
) -> tuple[Family, list[str]]:
    """Return a row without what some block lacks, also of the whole model; and what to know."""
    for kind, model in product(KINDS, (tried.models[0], tried.whole)):
        if model is not None and getattr(family, kind) is not None:
            if lacking := _lacking(model, family, kind):
                missing[kind] = f"blocks differ: {lacking}"
                family = replace(family, **{kind: None})
    few = "only a few blocks were looked at: not all of them can be built"
    return family, [few] * (tried.whole is None)


def _lacking(model: nn.Module, family: Family, kind: str) -> str:
    """Return which block of a model lacks which layer of a site; nothing if none does."""
    for path, block in blocks_of(model, family):
        there = {name for name, _ in block.named_modules()}
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
    for other in (None, *KINDS) if len(kinds_of(family)) == 2 else (None,):
        row = family if other is None else replace(family, **{other: None})
        for trial in _trials(row, unclear, at_hand):
            try:
                proved = prove(instances, trial)
            except Refused as error:
                reasons.append(str(error))
            else:
                missing |= {} if other is None else {other: reasons[0]}
                return trial, proved
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
