"""Sensitivity: what the whole model's output loses when sites are pruned, by forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch, Batches, read_batches
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.calibration.taps import replaced, watched
from liar_ext.models.layers import layer_of
from liar_ext.models.plan import Plan
from liar_ext.models.residual_stream import Weights
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.models.whole import why_lent
from liar_ext.selection.criteria import check_given
from liar_ext.system.checkpoint_store import Checkpoint, reading
from liar_ext.system.distributed import gather, rank, world_size
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar, showing_bars, spare

POSITIONS = 64  # tokens of a sequence at which outputs are compared, see docs/performance.md
ROWS = "rows compared"  # beside the divergences of a batch, by probe
# What makes the model that of a probe, for a batch by its number, while a context is open.
Having = Callable[[int], AbstractContextManager]


class Measured:
    """Sums of divergences by batch and probe, kept in a checkpoint as the first rank finds them.

    ``name`` distinguishes the probes of sites whose sums don't fit at once.
    """

    def __init__(self, saved: Checkpoint | None = None, name: str = "") -> None:
        self.saved, self.key = saved, f"sensitivities-{name}"
        self.found: dict[int, dict[str, float]] = {}
        known = None if saved is None else saved.get(self.key)
        if known is not None:
            with reading(saved.path(self.key)):
                found = known[1]["found"].items()
                self.found = {int(batch): dict(values) for batch, values in found}

    def has(self, batch: int, *names: str) -> bool:
        """Tell whether all these divergences of a batch are known."""
        return self.found.get(batch, {}).keys() >= {*names}

    def put(self, batch: int, name: str, value: float, of: int) -> None:
        """Keep a divergence, one of so many."""
        self.found.setdefault(batch, {})[name] = value
        done = sum(len(values) - (ROWS in values) for values in self.found.values())
        if self.saved is not None and (done == of or self.saved.due(self.key)):
            said = f"{done} of {of} divergences"
            self.saved.put(self.key, facts={"found": self.found, "said": said})

    def means(self) -> dict[str, float]:
        """Return the mean over rows by probe, those of all ranks; refuse what isn't finite."""
        every: dict[int, dict[str, float]] = {}
        for found in gather(self.found):
            for batch, values in found.items():
                every.setdefault(batch, {}).update(values)
        totals: dict[str, float] = {}
        for batch in sorted(every):  # not sum(), which rounds otherwise from Python 3.12 on
            for name, value in every[batch].items():
                totals[name] = totals.get(name, 0.0) + value
        rows = int(totals.pop(ROWS, 0))
        wrong = [name for name, total in totals.items() if not math.isfinite(total)]
        if wrong or not rows:
            got = f"{totals[wrong[0]]} with {wrong[0]} pruned" if wrong else "none"
            raise InputError(
                f"sensitivity: divergences must be finite, got {got}; give text, or load the model "
                "in a wider dtype"
            )
        return {name: total / rows for name, total in totals.items()}


@torch.no_grad()
def mean_divergences(
    model: nn.Module,
    batches: Mapping[int, Batch],
    dense: Having,
    probes: Mapping[str, Having],
    *,
    saved: Measured | None = None,
) -> dict[str, float]:
    """Return the mean ``KL(dense ‖ pruned)`` per token of each probe of all ranks, in nats.

    ``batches``, by their numbers, and ``probes``, by name, are those of this rank. What ``saved``
    has isn't measured.
    """
    measured = saved or Measured()
    spare("sensitivity", sum(measured.has(number, name) for number in batches for name in probes))
    of = len(batches) * len(probes)
    with Bar(total=of, desc="sensitivity") as bar:
        for number, batch in batches.items():
            if measured.has(number, ROWS, *probes):
                bar.update(len(probes))
                continue
            with dense(number):
                outputs = DenseOutputs(model, batch, POSITIONS)
            measured.found.setdefault(number, {})[ROWS] = len(outputs)
            for name, pruned in probes.items():
                bar.update()
                if not measured.has(number, name):
                    with pruned(number):
                        value = outputs.divergence(model, finite_only=True)
                    measured.put(number, name, value, of)
    return measured.means()


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

    Nothing is sliced, and the blocks before the site are not run again.

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
        Where divergences are kept as they are found; those that are there aren't measured.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict of str to float
        Mean ``KL(dense ‖ pruned)`` per token in nats by site name; 0 for a site that keeps
        everything. The experts of a layer are pruned together, and each has the divergence of all.
    """
    every = sites(model, attn_unit=plan.attn_unit)
    at = {site.name: site for site in every}
    plan.check_sites({site.name: site.units for site in every}, "site_divergences")
    parts = [at[name] for name, site_plan in plan.sites.items() if site_plan.removed]
    check_given(parts, weights, "site_divergences: weights")
    probes = {", ".join(site.name for site in some): some for some in teams_of(parts).values()}
    blocks, places = blocks_before(model, every)
    given: list = []  # what the blocks of the dense model give

    def dense(_: int) -> AbstractContextManager:
        given.clear()
        return recorded(blocks, given)

    @contextmanager
    def pruned(some: Sequence[Site], _: int) -> Iterator[None]:
        first = min(places[site.name] for site in some)
        with ExitStack() as stack:
            stack.enter_context(replayed(blocks[:first], given))
            for site in some:
                stack.enter_context(pruned_site(model, site, plan, weights[site.name]))
            yield

    names = list(probes)[rank() :: world_size()]
    mine = {name: partial(pruned, probes[name]) for name in names}
    numbered = dict(enumerate(read_batches(batches)))
    with evaluating(model), showing_bars(progress):
        values = mean_divergences(model, numbered, dense, mine, saved=saved)
    found = dict.fromkeys(plan.sites, 0.0)
    return found | {s.name: values[name] for name, some in probes.items() for s in some}


def blocks_before(
    model: nn.Module, every: Sequence[Site]
) -> tuple[list[nn.Module], dict[str, int]]:
    """Return the blocks of sites, and how many of them give the same whatever a site gives."""
    paths = list(dict.fromkeys(site.path for site in every))
    # What repeats gives something else every time, and what a block lends it must have made.
    anew = bool(why_lent(model))
    places = {s.name: 0 if anew or s.part.repeats else paths.index(s.path) for s in every}
    return [model.get_submodule(path) for path in paths], places


@contextmanager
def recorded(blocks: Sequence[nn.Module], given: list) -> Iterator[None]:
    """Collect what each block returns while the context is open."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(watched(block, lambda _, output: given.append(output)))
        yield


@contextmanager
def replayed(blocks: Sequence[nn.Module], given: Sequence[object]) -> Iterator[None]:
    """Let blocks give what was recorded of them, in their order, without computing it."""
    with ExitStack() as stack:
        for block, output in zip(blocks, given, strict=False):
            stack.enter_context(replaced(block, lambda *_, output=output, **__: output))
        yield


@contextmanager
def pruned_site(
    model: nn.Module, site: Site, plan: Plan, weights: tuple[Tensor, Tensor | None]
) -> Iterator[None]:
    """Give a consumer its new weights, with zeros for the units that go: as good as sliced."""
    consumer = layer_of(model, site)
    weight, bias = consumer.weight, consumer.bias
    full = weight.new_zeros(site.d_out, site.d_in)
    kept = site.features(plan.sites[site.name].kept).to(full.device)
    full[:, kept] = weights[0].to(full)
    full = full.T if site.wiring.transposed else full
    with ExitStack() as stack:
        if site.expert is not None:
            for part, values in ((weight, full), (bias, weights[1])):
                if part is not None and values is not None:
                    stack.callback(part.copy_, part.clone())
                    part.copy_(values)
        else:
            for layer, new in consumer.filled(full) if site.shared else [(consumer, full)]:
                stack.callback(setattr, layer, "weight", layer.weight)
                layer.weight = nn.Parameter(new, requires_grad=False)
            if weights[1] is not None:
                stack.callback(setattr, consumer, "bias", bias)
                consumer.bias = nn.Parameter(weights[1].to(full), requires_grad=False)
        yield
