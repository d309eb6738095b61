"""What the stages of a job will take beside one another, counted before: for the time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from liar_ext.bars import Stage
from liar_ext.calibration.passes import group_sites
from liar_ext.data.batches import FOLDS, Batches, probe_batches, read_batches
from liar_ext.models.sites import Site
from liar_ext.pipeline.rescaling import rescale_batches
from liar_ext.plan import Budget
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.ridge import damp_ladder
from liar_ext.selection.costs import total_cost
from liar_ext.selection.criteria import get_criterion

# Operations are those of a product in float32. One in float64 takes twice as long on a CPU.
DOUBLE = 2
TRIED = 3  # λ that a walk tries at a site before the held-out error rises
WALKED = 2.2  # runs of all blocks in a walk: the dense stream, attention alone, the pruned one
BACKWARD = 3  # a backward pass with its forward, in forward passes


def stages_of(
    model: nn.Module,
    at: Sequence[Site],
    batches: Batches,
    recipe: Recipe,
    room: int,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    both: bool = False,
) -> dict[str, Stage]:
    """Return the stages of :func:`liar_ext.prune` by the names of their bars.

    Empty where the batches can't be counted before they are run. Work is operations, roughly:
    passes are those of the whole model, and sites keep the budget's fraction.

    Parameters
    ----------
    model, at, batches, recipe
        The job's.
    room : int
        Bytes that sums may take at a time.
    evaluate_on : sequence of mapping, optional
        Held-out text.
    both : bool
        Layers are solved in one pass, too, to compare.
    """
    if not isinstance(batches, Sequence) or not batches or not at:
        return {}
    count = len(batches)
    tokens = sum(_size(batch.inputs) for batch in read_batches(batches))
    per_token = total_cost(model, at, Budget(1.0, "flops", seq_len=1))
    groups, layerwise = len(group_sites(at, room)), recipe.schedule == "layerwise"
    passes = groups if layerwise and not both else 2 * groups - 1
    forward, squares = per_token * tokens, sum(tokens * site.active * site.d_in**2 for site in at)
    stages = {"calibrate": Stage(passes * count, passes * forward + squares * passes / groups)}
    if get_criterion(recipe.criterion).needs == "gradient":
        stages["gradients"] = Stage(groups * count, groups * BACKWARD * forward)
    solved = 0.0
    if recipe.allocation == "curve":
        stages["curves"] = Stage(len(at), sum(map(_curve, at)))
        probes = probe_batches(batches)
        share = sum(map(_size, probes)) / tokens
        stages["sensitivity"] = Stage(len(probes) * len(at), len(at) / 2 * share * forward)
        solved += sum(_solve(site, recipe, 1) for site in at)
    if layerwise:
        blocks = len({site.path for site in at})
        work = WALKED * forward + sum(_towards(site, recipe, tokens) for site in at)
        stages["layerwise"] = Stage(blocks, work)
    one_pass = both or not layerwise
    if one_pass:
        solved += sum(_solve(site, recipe, len(damp_ladder(recipe.damp))) for site in at)
    solves = (recipe.allocation == "curve") + one_pass
    if solves:
        stages["reconstruct"] = Stage(solves * len(at), solved)
    if recipe.rescale:
        probes = rescale_batches(batches)
        share = sum(map(_size, probes)) / tokens
        stages["rescale"] = Stage(len(probes), len(at) / 2 * share * forward)
    if evaluate_on:
        work = sum(map(_size, evaluate_on)) * per_token
        stages["evaluate"] = Stage(2 * len(evaluate_on), 2 * work)
    return stages


def before_plan(at: Sequence[Site], recipe: Recipe) -> dict[str, int | None]:
    """Return the steps, by stage, that come before the plan; None for all of a stage."""
    probed = len(at) if recipe.allocation == "curve" else 0
    stages = dict.fromkeys(("calibrate", "gradients", "curves", "sensitivity"))
    return {**stages, "reconstruct": probed}


def by_blocks(stages: Mapping[str, Stage], blocks: int, kept: bool) -> dict[str, Stage]:
    """Return the stages of a job that reads one block at a time: its two walks over the blocks.

    What needs the sums of a block is done on the first walk; a job in one pass solves on the second
    one, for which the sums are ``kept``, or summed again.
    """
    if not stages:
        return {}
    work = {name: each.work for name, each in stages.items()}
    solves = work.get("reconstruct", 0.0)
    first = sum(work.get(name, 0.0) for name in ("calibrate", "curves", "sensitivity"))
    if "layerwise" in work:
        second = {"layerwise": Stage(blocks, work["layerwise"])}
        return {"calibrate": Stage(blocks, first + solves), **second}
    if kept:
        return {"calibrate": Stage(blocks, first), "from memory": Stage(blocks, solves)}
    return {"calibrate": Stage(2 * blocks, first + work["calibrate"] + solves)}


def _size(inputs: Mapping[str, Tensor]) -> int:
    """Return the tokens of a batch, or the sequences of one that has none."""
    ids = inputs.get("input_ids")
    return len(next(iter(inputs.values()))) if ids is None else ids.numel()


def _curve(site: Site) -> float:
    """Count :func:`liar_ext.selection.error_curves.error_curve` on both folds."""
    d, h = site.d_in, site.d_out
    return FOLDS * DOUBLE * (2 * d**3 + 3 * h * d**2)


def _solve(site: Site, recipe: Recipe, ladder: int) -> float:
    """Count :func:`liar_ext.reconstruction.solve.solve`: the ladder on both folds, and one λ."""
    n, h = recipe.keep * site.d_in, min(site.d_out, (1 - recipe.keep) * site.d_in)
    return DOUBLE * (FOLDS * ladder + 1) * (n**3 / 3 + 3 * n**2 * h)


def _towards(site: Site, recipe: Recipe, tokens: int) -> float:
    """Count a site's sums and :func:`liar_ext.reconstruction.solve.solve` in a walk."""
    d, h, n = site.d_in, site.d_out, recipe.keep * site.d_in
    solves = FOLDS * min(TRIED, len(damp_ladder(recipe.damp))) + 1
    return tokens * (d**2 + 2 * d * h) + solves * DOUBLE * (n**3 / 3 + 6 * n**2 * h)
