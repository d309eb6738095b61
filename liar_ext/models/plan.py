"""What to keep: the budget that is asked for and the plan that meets it."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from liar_ext.system.errors import InputError, refusing

PLAN_VERSION = 2
# Of a plan that removes whole experts, or blocks, which a reader of an earlier one would keep.
EXPERTS_VERSION, BLOCKS_VERSION = 3, 4
READABLE = (1, 2, 3, 4)  # version 1 has no hidden features
KINDS = ("attn", "mlp")
PARTS = ("encoder", "decoder")  # of a model that has both
ATTN_UNITS = ("auto", "kv_group", "head")
MODES = ("auto", "none", "bias", "linear", "affine")  # of reconstruction
BUDGET_UNITS = ("prunable", "params", "flops", "kv_cache", "latency")
PHASES = ("prefill", "decode", "both")
MOST_BESIDE = 0.9  # of all sequences: nine for each of text
# The default tile, the smallest group of common weight quantisers. It is halved for a size that
# has fewer steps of it than these, where one step would be more than an eighth of a layer.
AUTO_TILE, LEAST_STEPS = 32, 8


def is_number(value: Any, kind: type = numbers.Real) -> bool:
    """Tell whether a value is a number, and not true or false."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_tile(operation: str, value: Any) -> int | str:
    """Return a tile, or raise InputError unless it is an integer of at least 1 or ``"auto"``."""
    if is_number(value, numbers.Integral) and 1 <= value < 2**63:
        return int(value)
    if isinstance(value, str) and value == "auto":
        return value
    raise InputError(
        f'{operation}: tile must be an integer of at least 1 or "auto", got {value!r}; 32 is one'
    )


def check_fraction(operation: str, name: str, fraction: float) -> None:
    """Raise InputError unless a fraction of all sequences can come beside those of text."""
    if not 0.0 <= fraction <= MOST_BESIDE:
        raise InputError(
            f"{operation}: {name} must be in [0, {MOST_BESIDE}], got {fraction}; 0.25 is a third "
            "as many as there are of text, and 0 none"
        )


def check_mode(mode: str) -> None:
    """Raise InputError unless a layerwise walk can solve in this ``mode``."""
    if mode not in ("auto", "linear", "affine"):
        raise InputError(
            f"layerwise: reconstruct must be auto, linear or affine, got {mode!r}, which solves "
            'for no target; use schedule="one-pass"'
        )


@dataclass(frozen=True)
class Budget:
    """How much of the model may stay, and which unit counts are allowed.

    A plan meets the budget when the cost that it keeps is at most ``keep`` times the dense cost.

    Parameters
    ----------
    keep : float
        Fraction of the dense cost that may stay, in (0, 1].
    of : {"prunable", "params", "flops", "kv_cache", "latency"}
        What the cost counts: parameters of the sites that may be pruned; all parameters;
        floating-point operations of a forward pass over ``seq_len`` tokens; bytes of every token in
        the key-value cache (MLPs stay whole); seconds of the whole model.
    tile : int or "auto"
        Channels that an MLP keeps are a multiple of this, unless it keeps all. ``"auto"`` is 32,
        halved for a layer until that has eight steps.
    uniform_layers : bool
        Every site of a kind ("attn", "mlp") keeps the same number of units, for stock loaders.
    seq_len : int
        Sequence length in tokens at which FLOPs are counted.
    latency_phase : {"prefill", "decode", "both"}
        Seconds of a prompt; of the tokens after it, one at a time with a key-value cache; of both.
        A model that does not generate has one forward pass over ``latency_prompt`` tokens (or one
        batch of images), and no ``decode``.
    latency_batch, latency_prompt, latency_new_tokens : int
        Sequences at a time, tokens of a prompt, and tokens generated after it.

    Raises
    ------
    InputError
        If a field is out of range.
    """

    keep: float
    of: str = "prunable"
    tile: int | str = "auto"
    uniform_layers: bool = False
    seq_len: int = 512
    latency_phase: str = "both"
    latency_batch: int = 1
    latency_prompt: int = 128
    latency_new_tokens: int = 32

    def __post_init__(self) -> None:
        if not (is_number(self.keep) and 0.0 < self.keep <= 1.0):
            raise InputError(f"Budget: keep must be in (0, 1], got {self.keep!r}; 0.8 keeps 80 %")
        for name, known in (("of", BUDGET_UNITS), ("latency_phase", PHASES)):
            if (value := getattr(self, name)) not in known:
                one = ", ".join(known)
                raise InputError(f"Budget: {name} must be one of {one}, got {value!r}")
        object.__setattr__(self, "tile", check_tile("Budget", self.tile))
        for name in ("seq_len", "latency_batch", "latency_prompt", "latency_new_tokens"):
            value = getattr(self, name)
            if not (is_number(value, numbers.Integral) and value >= 1):
                raise InputError(f"Budget: {name} must be an integer of at least 1, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that count for this unit, as a plan or a report keeps them."""
        facts = asdict(self)
        if self.of != "latency":
            facts = {name: each for name, each in facts.items() if not name.startswith("latency_")}
        if self.of not in ("latency", "flops"):
            del facts["seq_len"]
        return facts

    def step(self, size: int, base: int = 1) -> int:
        """Return the grid of a size, which must be a multiple of ``base`` anyhow: lcm(base, tile).

        An automatic tile is halved until the size has ``LEAST_STEPS`` steps, if it can have them.
        """
        tile = AUTO_TILE if self.tile == "auto" else self.tile
        while self.tile == "auto" and tile > 1 and LEAST_STEPS * math.lcm(base, tile) > size:
            tile //= 2
        return math.lcm(base, tile)


@dataclass(frozen=True)
class SitePlan:
    """The part of a plan that concerns one site."""

    units: int  # of the dense site
    kept: tuple[int, ...]  # indices of the units that stay, strictly ascending
    bias: bool = False  # whether the consumer gains one that the dense model lacks

    def __post_init__(self) -> None:
        fits = all(is_number(unit, numbers.Integral) for unit in (self.units, *self.kept))
        fits &= all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if not self.kept or not fits or self.kept[0] < 0 or self.kept[-1] >= self.units:
            raise InputError(
                f"SitePlan: kept must be ascending indices in [0, {self.units}) and not empty, "
                f"got {self.kept[:8]}"
            )

    @classmethod
    def first(cls, units: int, count: int, groups: int = 1) -> SitePlan:
        """Return the plan that keeps ``count`` units, the first ones of each group."""
        run, each = units // groups, count // groups
        return cls(units, tuple(g * run + unit for g in range(groups) for unit in range(each)))

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the units that go, ascending."""
        kept = set(self.kept)
        return tuple(unit for unit in range(self.units) if unit not in kept)


@dataclass(frozen=True)
class Plan:
    """The kept units of every site of a model; it holds no tensor of the model.

    Parameters
    ----------
    model_type : str
        ``config.model_type`` of the model that the plan is for.
    attn_unit : str
        What an attention unit is: ``"kv_group"`` or ``"head"``; ``"auto"`` only in a plan without
        sites, that narrows the hidden size alone.
    sites : mapping of str to SitePlan
        One entry per site, by name such as ``"3.mlp"``.
    budget : mapping
        The budget as it was asked for; for the record only.
    hidden : SitePlan or None
        The features of the residual stream that stay, the same in every block; None: all.
    experts : mapping of str to SitePlan
        The experts that stay, by layer such as ``"3.mlp"``. Those of ``sites`` are numbered as they
        are then: ``"3.mlp.0"`` is the first one that stays.
    blocks : SitePlan or None
        The blocks that stay; None: all. Sites and experts are numbered as they are then.
    """

    model_type: str
    attn_unit: str
    sites: Mapping[str, SitePlan]
    budget: Mapping[str, object] = field(default_factory=dict)
    hidden: SitePlan | None = None
    experts: Mapping[str, SitePlan] = field(default_factory=dict)
    blocks: SitePlan | None = None

    def check_sites(self, held: Mapping[str, int], operation: str) -> None:
        """Raise InputError unless every site of the plan is ``held``, with as many units."""
        missing = [name for name in self.sites if name not in held]
        if missing:
            raise InputError(
                f"{operation}: model and moments must hold every site of the plan, missing "
                f"{', '.join(missing[:5])}; give those that the plan was made from"
            )
        for name, site in self.sites.items():
            if site.units != held[name]:
                raise InputError(
                    f"{operation}: {name} has {held[name]} units, the plan counts {site.units}; "
                    "give the model that the plan was made from"
                )

    def after(self, first: Plan) -> Plan:
        """Return the plan that does what ``first`` does to a model, and then what this one does.

        Unit i here is the i-th unit that ``first`` keeps: ``kept[i] = first.kept[self.kept[i]]``.
        InputError is raised if this plan can't be for what ``first`` leaves.
        """
        # A plan without sites of attention names a unit that nothing is counted in.
        has_attention = [p for p in (first, self) if "attn" in map(kind_of, p.sites)]
        units = {plan.attn_unit for plan in has_attention}
        if first.model_type != self.model_type or len(units) > 1:
            raise InputError(
                f"Plan.after: both plans must be for one model type and one attention unit, got "
                f"{first.model_type}/{first.attn_unit} and {self.model_type}/{self.attn_unit}; "
                "keep both plans"
            )
        before = _renumbered(sites_left(first.sites, self.blocks), self.experts)
        experts = sites_left(first.experts, self.blocks)
        return Plan(
            self.model_type,
            min(units or {first.attn_unit, self.attn_unit} - {"auto"}, default="auto"),
            _composed(before, self.sites),
            self.budget,
            _then("hidden features", first.hidden, self.hidden),
            _composed(experts, self.experts),
            _then("blocks", first.blocks, self.blocks),
        )

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        facts, version = asdict(self), PLAN_VERSION
        for name, own in (("experts", EXPERTS_VERSION), ("blocks", BLOCKS_VERSION)):
            if facts[name]:
                version = own
            else:
                del facts[name]
        return json.dumps({"version": version, **facts})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text; raise InputError if it is none of a known version."""
        wrong = (KeyError, TypeError, AttributeError, ValueError, RecursionError)
        with refusing("Plan: not a plan", "copy its folder again", *wrong, named=True):
            data = json.loads(text)
            version = data.pop("version")
            if version not in READABLE:
                raise InputError(
                    f"Plan: version {version} is none of {', '.join(map(str, READABLE))}; "
                    "read it with the liar_ext that wrote it"
                )
            for part, some in (("sites", data["sites"]), ("experts", data.get("experts", {}))):
                data[part] = {name: _read_site(site) for name, site in some.items()}
            for part in ("hidden", "blocks"):
                data[part] = _read_site(data[part]) if data.get(part) else None
            return cls(**data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _read_site(fields: Mapping[str, Any]) -> SitePlan:
    return SitePlan(fields["units"], tuple(fields["kept"]), fields["bias"])


def kind_of(site: str) -> str:
    """Return the kind of a site by its name: ``attn`` of ``decoder.3.cross_attn``, for one."""
    words = [word for word in site.split(".") if not word.isdigit()]
    return (words or [""])[-1].rpartition("_")[2]


Value = TypeVar("Value")


def sites_left(sites: Mapping[str, Value], blocks: SitePlan | None) -> dict[str, Value]:
    """Return what there is of sites, by the names that they have once other blocks are gone.

    A name, of a layer of experts for one, begins with the number of the block.
    """
    if blocks is None:
        return dict(sites)
    found, places = {}, {str(block): place for place, block in enumerate(blocks.kept)}
    for name, value in sites.items():
        number, _, rest = name.partition(".")
        if number in places:
            found[f"{places[number]}.{rest}"] = value
    return found


def _renumbered(
    sites: Mapping[str, SitePlan], experts: Mapping[str, SitePlan]
) -> dict[str, SitePlan]:
    """Return the plans of sites under the numbers that experts have once others are gone."""
    found = {}
    for name, site in sites.items():
        layer, _, number = name.rpartition(".")
        if layer not in experts:
            found[name] = site
        elif int(number) in experts[layer].kept:
            found[f"{layer}.{experts[layer].kept.index(int(number))}"] = site
    return found


def _composed(one: Mapping[str, SitePlan], two: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    return {name: _then(name, one.get(name), two.get(name)) for name in {**one, **two}}


def _then(name: str, first: SitePlan | None, then: SitePlan | None) -> SitePlan | None:
    """Return what the second plan of a site comes to for what was there before the first one."""
    if first is None or then is None:
        return first or then
    if then.units != len(first.kept):
        raise InputError(
            f"Plan.after: {name} has {len(first.kept)} units after the first plan, and the second "
            f"counts {then.units}; give the plans of one model, in their order"
        )
    kept = tuple(first.kept[unit] for unit in then.kept)
    return SitePlan(first.units, kept, first.bias or then.bias)
