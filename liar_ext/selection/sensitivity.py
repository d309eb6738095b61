"""Sensitivity: what the whole model's output loses when sites are pruned, by forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batches, read_batches
from liar_ext.calibration.taps import replaced, watched
from liar_ext.checkpoint_store import Checkpoint, reading
from liar_ext.distributed import gather, rank, world_size
from liar_ext.errors import InputError
from liar_ext.models.experts import layer_at
from liar_ext.models.registry import family_of
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.plan import Plan
from liar_ext.progress import Bar, spare
from liar_ext.selection.divergence import DenseOutputs

Weights = Mapping[str, tuple[Tensor, Tensor | None]]

# Tokens of a sequence at which outputs are compared. A large vocabulary makes the head at all of
# them as expensive as the blocks; docs/performance.md says what fewer cost in accuracy.
POSITIONS = 64


class Measured:
    """Sums of divergences by probe and batch, kept in a checkpoint as they are found.

    Several ranks each measure their own probes. The first one writes, and learns what others have
    found by :meth:`gather`.

    Parameters
    ----------
    saved : Checkpoint, optional
        Where they are kept.
    name : str
        Distinguishes probes, as sites whose sums don't fit at once come in groups.

    Attributes
    ----------
    found : dict of tuple of str to list of float
        By the names of the sites that a probe prunes, and by batch; NaN where it isn't known.
    rows : list of float
        The number of rows compared, by batch.
    """

    def __init__(self, saved: Checkpoint | None = None, name: str = "") -> None:
        self.saved, self.key = saved, f"sensitivities-{name}"
        self.found: dict[tuple[str, ...], list[float]] = {}
        self.rows: list[float] = []
        known = None if saved is None else saved.get(self.key)
        if known is not None:
            tensors, facts = known
            with reading(saved.path(self.key)):
                *columns, self.rows = tensors["values"].T.tolist()
                self.found = dict(zip(map(tuple, facts["probes"]), columns, strict=True))

    def begin(self, batches: int, probes: Sequence[Sequence[str]]) -> None:
        """Say what is measured; divergences on other batches are measured again."""
        if len(self.rows) != batches:
            self.rows, self.found = [math.nan] * batches, {}
        for names in probes:
            self.found.setdefault(tuple(names), [math.nan] * batches)

    def has(self, batch: int, names: Sequence[str]) -> bool:
        """Tell whether a divergence is known."""
        return not math.isnan(self.found[tuple(names)][batch])

    def has_all(self, batch: int, probes: Sequence[Sequence[str]]) -> bool:
        """Tell whether all divergences of a batch are known, and its number of rows."""
        return not math.isnan(self.rows[batch]) and all(self.has(batch, each) for each in probes)

    def put(self, batch: int, names: Sequence[str], value: float) -> None:
        """Keep a divergence."""
        self.found[tuple(names)][batch] = value
        self._keep()

    def gather(self, batch: int) -> None:
        """Let all ranks know what each has found on a batch."""
        for theirs in gather({names: values[batch] for names, values in self.found.items()}):
            for names, value in theirs.items():
                if not self.has(batch, names):
                    self.found[names][batch] = value
        if world_size() > 1:
            self._keep()

    def totals(self, probes: Sequence[Sequence[str]]) -> list[float]:
        """Return the sum over batches by probe, added in their order."""
        totals = [0.0] * len(probes)
        for batch in range(len(self.rows)):  # not sum(), which rounds otherwise from Python 3.12 on
            for index, names in enumerate(probes):
                totals[index] += self.found[tuple(names)][batch]
        return totals

    def _count(self) -> int:
        return sum(not math.isnan(value) for values in self.found.values() for value in values)

    def _keep(self) -> None:
        whole = self._count() == len(self.found) * len(self.rows)
        if self.saved is None or not (whole or self.saved.due(self.key)):
            return
        columns = list(self.found.values())
        of = f"{len(columns) * len(self.rows)} divergences of {len(columns)} sensitivities"
        facts = {"probes": list(self.found), "said": f"{self._count()} of {of}"}
        values = torch.tensor([*columns, self.rows], dtype=torch.float64).T
        self.saved.put(self.key, {"values": values}, facts)


def site_divergences(
    model: nn.Module,
    batches: Batches,
    plan: Plan,
    weights: Weights,
    *,
    saved: Measured | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Return the divergence from the dense model when one site alone is pruned, for every site.

    Parameters
    ----------
    model : nn.Module
        The dense model; it is as it was afterwards.
    batches : iterable of mapping or Tensor
        Inputs of the model, as for :func:`liar_ext.calibrate`.
    plan : Plan
        What stays at each site.
    weights : mapping of str to (Tensor, Tensor or None)
        Consumer weights and biases for the plan, from :func:`liar_ext.reconstruct`.
    saved : Measured, optional
        Where each divergence is kept as it is found; those that are there aren't measured.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict of str to float
        By site name, see :func:`divergences`; 0 for a site that keeps everything. The experts of a
        layer are pruned together, and each has the divergence of all.
    """
    at = {site.name: site for site in sites(model, attn_unit=plan.attn_unit)}
    pruned = [at[name] for name, site_plan in plan.sites.items() if site_plan.removed]
    probes = [[site.name for site in some] for some in teams_of(pruned).values()]
    given = model, batches, plan, weights, probes
    values = divergences(*given, saved=saved, progress=progress)
    found = dict.fromkeys(plan.sites, 0.0)
    for names, value in zip(probes, values, strict=True):
        found |= dict.fromkeys(names, value)
    return found


@torch.no_grad()
def divergences(
    model: nn.Module,
    batches: Batches,
    plan: Plan,
    weights: Weights,
    probes: Sequence[Sequence[str]],
    *,
    saved: Measured | None = None,
    progress: bool = False,
) -> list[float]:
    """Return the divergence from the dense model for each set of sites pruned together.

    ``probes`` are the names of these sites, all else is as for :func:`site_divergences`. Nothing is
    sliced. The blocks before the first site of a probe are not run again, and outputs are compared
    at ``POSITIONS`` tokens of a sequence: a value is the mean ``KL(dense ‖ pruned)`` per token in
    nats, see :class:`liar_ext.selection.divergence.DenseOutputs`.
    """
    every = sites(model, attn_unit=plan.attn_unit)
    found = {site.name: site for site in every}
    blocks, places = blocks_before(model, every)
    batches = list(read_batches(batches))
    measured = Measured() if saved is None else saved
    measured.begin(len(batches), probes)
    spare("sensitivity", sum(measured.has(n, each) for n in range(len(batches)) for each in probes))
    bar = Bar(total=len(batches) * len(probes), desc="sensitivity", disable=not progress)
    with evaluating(model), bar:
        for number, batch in enumerate(batches):
            if measured.has_all(number, probes):
                bar.update(len(probes))
                continue
            with recorded(blocks) as given:
                dense = DenseOutputs(model, batch, POSITIONS)
            measured.rows[number] = len(dense)
            for index, names in enumerate(probes):
                bar.update()
                if measured.has(number, names) or index % world_size() != rank():
                    continue
                first = min((places[name] for name in names), default=len(blocks))
                with ExitStack() as stack:
                    stack.enter_context(replayed(blocks[:first], given))
                    for name in names:
                        stack.enter_context(pruned_site(model, found[name], plan, weights[name]))
                    measured.put(number, names, dense.divergence(model, finite_only=True))
            measured.gather(number)
    return mean_divergences(measured.totals(probes), int(sum(measured.rows)), probes)


def mean_divergences(
    total: Sequence[float], rows: int, probes: Sequence[Sequence[str]]
) -> list[float]:
    """Return the mean over rows of sums of divergences by probe; refuse what isn't finite."""
    if not rows:
        raise InputError(
            "sensitivity: needs at least one batch to run, and outputs of the dense model that are "
            "finite, got none; give text, or load the model in a wider dtype"
        )
    for names, value in zip(probes, total, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"sensitivity: outputs must be finite, got a divergence of {value} with "
                f"{', '.join(names)} pruned; load the model in a wider dtype"
            )
    return [value / rows for value in total]


def blocks_before(
    model: nn.Module, every: Sequence[Site]
) -> tuple[list[nn.Module], dict[str, int]]:
    """Return the blocks of sites, and how many of them give the same whatever a site gives."""
    paths = list(dict.fromkeys(site.path for site in every))
    # What repeats gives something else every time, and what a block lends it must have made.
    anew = family_of(model).lends
    places = {s.name: 0 if anew or s.part.repeats else paths.index(s.path) for s in every}
    return [model.get_submodule(path) for path in paths], places


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list]:
    """Collect what each block returns while the context is open."""
    given: list = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(watched(block, lambda _, output: given.append(output)))
        yield given


@contextmanager
def replayed(blocks: Sequence[nn.Module], given: Sequence[object]) -> Iterator[None]:
    """Let blocks give what was recorded of them, in their order, without computing it."""
    with ExitStack() as stack:
        for block, output in zip(blocks, given, strict=False):
            stack.enter_context(replaced(block, _answering(output)))
        yield


def _answering(output: object) -> Callable:
    """Return a forward that gives ``output`` without computing it."""
    return lambda *args, **kwargs: output


@contextmanager
def pruned_site(
    model: nn.Module, site: Site, plan: Plan, weights: tuple[Tensor, Tensor | None]
) -> Iterator[None]:
    """Give a consumer its new weights, with zeros for the units that go: as good as sliced."""
    consumer = layer_at(model, site.consumer, site.expert)
    weight, bias = consumer.weight, consumer.bias
    full = weight.new_zeros(site.d_out, site.d_in)
    kept = site.features(plan.sites[site.name].kept).to(full.device)
    full[:, kept] = weights[0].to(full)
    if site.expert is not None:
        full = full.T if site.wiring.transposed else full
        with _overwritten(weight, full), _overwritten(bias, weights[1]):
            yield
        return
    consumer.weight = nn.Parameter(full.T if site.wiring.transposed else full, requires_grad=False)
    if weights[1] is not None:
        consumer.bias = nn.Parameter(weights[1].to(full), requires_grad=False)
    try:
        yield
    finally:
        consumer.weight, consumer.bias = weight, bias


@contextmanager
def _overwritten(part: Tensor | None, values: Tensor | None) -> Iterator[None]:
    """Let a part of a parameter hold other values while the context is open."""
    if part is None or values is None:
        yield
        return
    before = part.clone()
    part.copy_(values)
    try:
        yield
    finally:
        part.copy_(before)
