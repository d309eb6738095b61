"""Costs: what sites take of a budget by the units kept, and the least loss within a budget."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from liar_ext.errors import InputError
from liar_ext.models.residual_stream import is_transposed
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import Site, sites
from liar_ext.plan import PHASES, Budget, Plan
from liar_ext.system.untrusted import listing, mapping, named, read_object, text

VERSION = 1
MOST_ROWS, MOST_COUNTS = 4096, 256
MAX_GRAINS = 8192


@dataclass(frozen=True)
class SizeRow:
    """Sites of one shape, and the seconds that each of them takes by the units that it keeps."""

    kind: str
    unit: str
    units: int
    width: int
    groups: int
    d_out: int
    sites: int  # how many there are of this shape
    counts: tuple[int, ...]  # units kept, ascending; the last is all of them
    seconds: tuple[float, ...]  # medians, never falling
    spread: tuple[float, ...]  # half of the distance between the quartiles of single runs

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        if not self.counts or not ascending or self.counts[0] < 0 or self.counts[-1] != self.units:
            raise InputError("latency: counts must be ascending, up to all units")
        if len(self.seconds) != len(self.counts) or len(self.spread) != len(self.counts):
            raise InputError("latency: a row must have seconds and a spread for every count")
        never_falls = all(a <= b for a, b in zip(self.seconds, self.seconds[1:], strict=False))
        if not never_falls or not all(0.0 <= each < float("inf") for each in self.seconds):
            raise InputError("latency: seconds must be finite, at least 0, and never fall")

    @property
    def shape(self) -> tuple[str, str, int, int, int, int]:
        """What tells sites of one row from those of another."""
        return self.kind, self.unit, self.units, self.width, self.groups, self.d_out

    def by_count(self) -> list[float]:
        """Return seconds for every number of units, ``(units + 1,)``, by linear interpolation.

        Less than the smallest size that was measured costs as much as that; nothing costs nothing.
        """
        found = np.interp(range(self.units + 1), self.counts, self.seconds).tolist()
        return [0.0, *found[1:]]


@dataclass(frozen=True)
class LatencyTable:
    """What :func:`liar_ext.measure_latency` measured, to be kept and used again.

    The model is taken to need ``fixed + Σ_s seconds_s(units kept)``.

    Parameters
    ----------
    phase, batch, prompt, new_tokens
        What was timed, as ``latency_phase`` and so on of :class:`liar_ext.Budget`.
    fixed : float
        Seconds of all but the sites: embeddings, norms, output head, and what lies between.
    spread : float
        Half of the distance between the quartiles of the dense model's seconds.
    rows : tuple of SizeRow
        One per shape.
    scale : float
        What sites save, measured on a whole plan, by what the rows say; 1 where none was measured.
    where : dict
        Device, dtype, threads, versions.
    """

    phase: str
    batch: int
    prompt: int
    new_tokens: int
    fixed: float
    spread: float
    rows: tuple[SizeRow, ...]
    scale: float = 1.0
    where: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of the dense model."""
        return self.fixed + sum(row.sites * row.seconds[-1] for row in self.rows)

    def check(self, budget: Budget) -> None:
        """Raise InputError unless this is what the budget counts."""
        names = ("phase", "batch", "prompt", "new_tokens")
        asked = [getattr(budget, f"latency_{name}") for name in names]
        found = [getattr(self, name) for name in names]
        if asked != found:
            told = ", ".join(f"{n} {a}" for n, a in zip(names, found, strict=True))
            raise InputError(
                f"latency: the table was measured with {told}, the budget asks for "
                f"{', '.join(map(str, asked))}; ask for what it has, or measure again"
            )

    def check_sites(self, *several: Sequence[Site]) -> None:
        """Raise InputError unless the table counts sites as one of several sets has them."""
        for row in self.rows:
            counts = [sum(site.shape == row.shape for site in some) for some in several]
            if any(counts) and row.sites not in counts:
                raise InputError(
                    f"latency: the table is of {row.sites} layers with {row.units} "
                    f"{row.unit}s, and the model has {max(counts)}; measure this model"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON has it."""
        return json.loads(json.dumps({"version": VERSION, **asdict(self)}, allow_nan=False))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> LatencyTable:
        """Read what :meth:`to_dict` gave; raise InputError if it is no table."""
        if facts.get("version") != VERSION:
            raise InputError(f"latency: a table must be of version {VERSION}")
        rows = [mapping(row) for row in listing(facts.get("rows"))]
        if not rows or len(rows) > MOST_ROWS:
            raise InputError("latency: a table must have rows")
        try:
            made = cls(
                phase=text(facts["phase"]),
                **{name: int(facts[name]) for name in ("batch", "prompt", "new_tokens")},
                **{name: float(facts[name]) for name in ("fixed", "spread", "scale")},
                rows=tuple(_row(row) for row in rows),
                where=named(facts.get("where")),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"latency: not a table: {error!r}") from error
        numbers = (made.fixed, made.spread, made.scale)
        if made.phase not in PHASES or not all(0.0 <= each < float("inf") for each in numbers):
            raise InputError("latency: a table must have a phase, and numbers of at least 0")
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table that :meth:`save` wrote, or that of a report: a folder or its JSON.

        InputError is raised if the file can't be read, or holds no table.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "liar" / "report.json"
        facts, _ = read_object(path, "latency")
        inside = mapping(mapping(facts.get("latency")).get("table"))
        try:
            return cls.from_dict(inside or facts)
        except InputError as error:
            raise InputError(f"{error} (in {path}); measure_latency writes one") from None


def _row(facts: Mapping[str, Any]) -> SizeRow:
    found: dict[str, Any] = {name: text(facts[name], 40) for name in ("kind", "unit")}
    found |= {name: int(facts[name]) for name in ("units", "width", "groups", "d_out", "sites")}
    for name, read in (("counts", int), ("seconds", float), ("spread", float)):
        found[name] = tuple(map(read, listing(facts.get(name))[:MOST_COUNTS]))
    return SizeRow(**found)


@dataclass(frozen=True)
class Costs:
    """What every site costs by the number of units that it keeps, and what the model costs.

    Parameters
    ----------
    by_count : mapping of str to sequence of float
        ``(units + 1,)`` by site name: the cost when k units stay. Any shape will do; a count that
        costs no less than a larger one is never taken.
    total : float
        Dense cost of the whole model. What it has beyond its dense sites can't be pruned.
    gone : float
        Cost that the model had before and that no longer is in ``total``, such as that of tokens.
    """

    by_count: Mapping[str, Sequence[float]]
    total: float
    gone: float = 0.0

    @classmethod
    def of(
        cls, at: Sequence[Site], budget: Budget, total: float | None = None, gone: float = 0.0
    ) -> Costs:
        """Return costs that are proportional to units, as all but those of latency are.

        ``total`` comes from :func:`total_cost`; only ``prunable`` needs none.
        """
        if budget.of == "latency":
            raise InputError(
                "allocate: a budget of latency needs costs=, seconds by units; measure_latency "
                "measures them"
            )
        if total is None and budget.of != "prunable":
            raise InputError(f"allocate: a budget of {budget.of} needs total=total_cost(...)")
        of_unit = {site.name: _unit_cost(site, budget) for site in at}
        if total is None:
            total = sum(of_unit[site.name] * site.units for site in at)
        by_count = {s.name: [of_unit[s.name] * k for k in range(s.units + 1)] for s in at}
        return cls(by_count, total, gone)

    @classmethod
    def measured(cls, table: LatencyTable, at: Sequence[Site]) -> Costs:
        """Return the seconds of sites, as a table of latency has them for their shapes.

        InputError is raised if the table lacks the shape of a site.
        """
        rows = {row.shape: row for row in table.rows}
        by_count = {}
        for site in at:
            row = rows.get(site.shape)
            if row is None:
                raise InputError(
                    f"latency: the table has no sizes of {site.name}, with {site.units} "
                    f"{site.unit}s of {site.width} features; measure this model"
                )
            found = row.by_count()
            # What a whole plan saves, measured, by the sum of what its sites save.
            by_count[site.name] = [
                max(0.0, found[-1] - table.scale * (found[-1] - each)) for each in found
            ]
        return cls(by_count, table.total)

    def check(self, at: Sequence[Site]) -> None:
        """Raise InputError unless every site has a cost of at least 0 for every count."""
        for site in at:
            costs = self.by_count.get(site.name)
            if costs is None or len(costs) != site.units + 1:
                came = "none" if costs is None else f"{len(costs)}"
                raise InputError(
                    f"allocate: costs must have {site.units + 1} values for {site.name}, from 0 "
                    f"units kept to all, got {came}; measure this model's own sites"
                )
            if not all(0.0 <= cost < float("inf") for cost in costs):
                raise InputError(f"allocate: costs of {site.name} must be finite and at least 0")

    def kept_fraction(self, plan: Plan) -> float:
        """Return the fraction of the model's dense cost that a plan keeps."""
        costs = ((self.by_count[name], site) for name, site in plan.sites.items())
        removed = sum(each[s.units] - each[len(s.kept)] for each, s in costs)
        return (self.total - removed) / (self.total + self.gone)


def total_cost(model: nn.Module, at: Sequence[Site], budget: Budget) -> float:
    """Return the dense cost of the whole model in the unit of ``budget``; not of latency.

    ``prunable``: parameters of the sites. ``params``: all parameters, tied ones once. ``flops``:
    one forward pass over ``seq_len`` tokens: 2 per weight of every linear layer (an output head
    included) and token, and the two attention products; of experts, those that a token is sent to.
    ``kv_cache``: keys and values of a token.
    """
    if budget.of == "prunable":
        return sum(site.params for site in at)
    if budget.of == "params":
        return sum(parameter.numel() for parameter in model.parameters())
    if budget.of == "kv_cache":
        if not predicts_next_token(model):
            raise InputError(
                f"allocate: a budget of kv_cache needs a model that generates, got "
                f"{type(model).__name__}; use of='params' or of='latency'"
            )
        if any(site.keys_stay for site in at):
            raise InputError(
                "allocate: query heads that leave a KV group leave its keys and values behind; "
                "prune whole groups with attn_unit='kv_group' for a budget of kv_cache"
            )
        total = sum(cached_values(site) for site in sites(model, ["attn"]))
        if not total:
            raise InputError(
                f"allocate: the cache of {model.config.model_type!r} holds what all heads make "
                "their keys and values from, however many they are; use of='params' or of='flops'"
            )
        return total
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) or is_transposed(module)
    )
    # Experts are no linear layers: they are counted whether they may be pruned or not.
    names = {site.name for site in at}
    experts = [s for s in sites(model) if s.expert is not None and s.name not in names]
    in_sites = sum(site.units * site.unit_flops(budget.seq_len) for site in (*at, *experts))
    # Biases are some thousandths of it.
    weights_in_sites = sum(site.params for site in at if site.expert is None)
    return in_sites + 2.0 * budget.seq_len * max(0, linear - weights_in_sites)


def cached_values(site: Site) -> int:
    """Return the numbers that generation keeps of a token for a site: a key and a value each.

    None where keys and values of a token are made anew from what all heads share, or where heads
    keep a state, as large for any number of tokens.
    """
    stacks = site.wiring.stacked.values()
    own = bool(site.wiring.key_value) or any(stack.shared for stack in stacks)
    return 2 * site.kv_heads * site.head_dim if own and not site.key_dim else 0


def _unit_cost(site: Site, budget: Budget) -> float:
    if budget.of == "flops":
        return float(site.unit_flops(budget.seq_len))
    if budget.of == "kv_cache":
        # Query heads share what is cached, where a group of them has one key and value.
        return cached_values(site) / site.units if not site.keys_stay else 0.0
    return float(site.unit_params)


def choose(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], limit: float
) -> list[int]:
    """Minimise ``Σ losses[i][choice_i]`` subject to ``Σ costs[i][choice_i] ≤ limit``.

    Dynamic programming over the cost: ``best[c]`` is the least loss of the lists so far at a cost
    of at most c grains. What the first options cost is set aside; the rest is counted in grains,
    rounded up. If all costs are whole numbers, the grain is their greatest common divisor, and the
    result exact, as long as what is left of the limit holds at most ``MAX_GRAINS`` of them. Else it
    is that rest divided by ``MAX_GRAINS``, and rounding wastes less than one grain per list: the
    loss is at most the least one of a limit that is lower by a grain per list.

    ``costs`` ascend strictly in each list, ``losses`` has one per option, and ``limit`` is at least
    the cost of all the first options. Returns the index of the option taken, by list.
    """
    extra = [[cost - options[0] for cost in options] for options in costs]
    room = min(limit - sum(options[0] for options in costs), sum(each[-1] for each in extra))
    if room <= 0:
        return [0] * len(costs)
    costs_of_all = [cost for each in extra for cost in each]
    whole = all(float(cost).is_integer() for cost in costs_of_all)
    grain = float(math.gcd(*map(int, costs_of_all))) if whole else 0.0
    if room > MAX_GRAINS * grain:
        grain = room / MAX_GRAINS
    grains = int(room / grain + 1e-6)
    steps = [[math.ceil(cost / grain - 1e-6) for cost in each] for each in extra]

    best, choices = np.zeros(grains + 1), []
    for spent, lost in zip(steps, losses, strict=True):
        better = np.full(grains + 1, np.inf)
        choice = np.zeros(grains + 1, dtype=np.int32)
        for option, (step, loss) in enumerate(zip(spent, lost, strict=True)):
            if step > grains:
                break
            total = best[: grains + 1 - step] + loss
            wins = total < better[step:]
            better[step:][wins] = total[wins]
            choice[step:][wins] = option
        best = better
        choices.append(choice)

    taken = []
    for spent, choice in zip(reversed(steps), reversed(choices), strict=True):
        taken.append(int(choice[grains]))
        grains -= spent[taken[-1]]
    return taken[::-1]
