"""The cost of each stage of a job in seconds and bytes, counted before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch, probe_batches, read_batches
from liar_ext.calibration.saved_sums import bytes_of_sums, group_sites, split
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.job.solving import rescale_batches
from liar_ext.job.state import SENSITIVITY, Job, score_key, sensitivity_key
from liar_ext.models.plan import Budget
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.models.registry import is_diffusion
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import Site, get_consumer_bias, sites
from liar_ext.models.whole import count_blocks_kept, held_by_experts
from liar_ext.reconstruction.hidden_size import count_kept
from liar_ext.reconstruction.ridge import PAIRED_BYTES, WITH_BIAS, damp_ladder
from liar_ext.selection.costs import total_cost
from liar_ext.selection.whole_experts import bytes_of_products, layers_of
from liar_ext.system.environment import process_memory
from liar_ext.system.errors import InputError

GIB = 2**30
# Work is in operations of a product in float32, such as a forward pass is made of. The factors are
# those that `bench/stages.py` measures on SmolLM2-135M with one thread. On MiniLM only one pass was
# compared. It supports CURVE, and its solves took 1.3 times the count.
RATE = 1e11  # a second, unless measured: shares of the whole don't depend on it
DOUBLE = 2  # of an operation in float64
CURVE = 2  # of those of an error curve, whose products are narrow
TRIED = 3  # λ that a walk tries at a site before the held-out error rises
WHOLE = ("evaluate", "blocks", "gaps", "narrow", "solve")  # stages where keep is 1
AGAIN = 5  # blocks that are judged again, on average, for each one more that goes
WALKED = 2.6  # runs of all blocks in a walk: dense, attention alone, pruned, and looks at each
NORM = 2.4  # solves of the readers of a norm, which has new scales as well
BACKWARD = 3  # a backward pass with its forward, in forward passes
# Matrices of float64 that a step has at its peak beside the sums of a site, of d × d and of
# d × d_out: the peaks that `bench/solve_memory.py` measures, rounded up.
PEAKS = {
    "linear": (3.25, 2.5),
    "affine": (6.25, 2.0),
    "towards": (3.5, 9.0),
    "towards, affine": (5.5, 10.0),
    "curve": (2.75, 2.25),
    "obs": (4.0, 1.0),
}
WORKSPACE = 32 << 20  # what BLAS and the operators have besides
ACTIVATIONS = 6  # tensors of a block's widest layers that a forward pass of one batch has at a time
PATCHES = 1024  # of an image


@dataclass(frozen=True)
class Estimate:
    """The cost of a stage, or of one of its bars."""

    name: str
    seconds: float  # of all its steps
    bytes: int  # at its peak, beside the model: statistics, hidden states, and a solve
    steps: int  # of its progress bar


def bars_of(job: Job, rate: float = RATE) -> list[Estimate]:
    """Return the progress bars of a job in order, if its batches can be counted before it runs.

    Sites keep the budget's fraction. ``rate`` is in operations in float32 a second.
    """
    if not isinstance(job.batches, Sequence) or not job.batches or not job.sites(job.model):
        return []
    bars = [Estimate(name, work / rate, size, steps) for name, steps, work, size in _bars(job)]
    some = [each for each in bars if job.recipe.prunes_sites or each.name in WHOLE]
    return [each for each in some if each.steps]


def stages_of(bars: Sequence[Estimate]) -> dict[str, Estimate]:
    """Return the stages of a job by name, each with the sum of its bars."""
    found: dict[str, Estimate] = {}
    for each in bars:
        before = found.get(each.name, Estimate(each.name, 0.0, 0, 0))
        seconds, steps = before.seconds + each.seconds, before.steps + each.steps
        found[each.name] = Estimate(each.name, seconds, max(before.bytes, each.bytes), steps)
    return found


def _bars(job: Job) -> Iterator[tuple[str, int, float, int]]:
    """Yield name, steps, work and bytes of each bar, of no steps if it isn't asked for."""
    recipe, model, at = job.recipe, job.model, job.sites(job.model)
    batches, held_out = (list(read_batches(some or ())) for some in (job.batches, job.evaluate_on))
    tokens, count = sum(map(tokens_of, batches)), len(batches)
    whole = sum(work_of_token(model, at))
    yield (judged := ("evaluate", len(held_out), sum(map(tokens_of, held_out)) * whole, 0))
    if recipe.keep_blocks != 1.0:
        yield from _shortening(job, batches, tokens)
        at = [site for site in at if site.block < count_blocks_kept(model, recipe.keep_blocks)]
    body, head = work_of_token(model, at)
    forward, groups = body * tokens, group_sites(at, job.room)
    if job.narrows:
        yield from _narrowing(job, count, tokens, forward)
    layerwise, curve = recipe.schedule == "layerwise", recipe.allocation == "curve"
    drawn = curve and not job.known.has("curve", score_key(recipe), at)
    key = sensitivity_key(recipe, job.known, model, at)
    measured = curve and not job.known.has(SENSITIVITY, key, at)
    backward = CRITERIA[recipe.criterion] == "gradient"
    affine = recipe.reconstruct in WITH_BIAS or _has_biases(model, at)
    held = max(sum(bytes_of_sums(site.d_in) for site in group) for group in groups)

    def peak(*steps: str) -> int:
        return held + max(bytes_of_solve(site.d_in, site.d_out, steps) for site in at)

    def sums(group: Sequence[Site]) -> tuple[str, int, float, int]:
        steps = count if job.bank is None else 0
        work = forward + sum(tokens * site.active * site.d_in**2 for site in group)
        return "calibrate", steps, work, held

    def solves(group: Sequence[Site], each: int) -> tuple[str, int, float, int]:
        work = sum(_solve(site, recipe, each) for site in group)
        return "reconstruct", len(group), work, peak("affine" if affine else "linear")

    for group in groups:
        yield sums(group)
        yield "gradients", backward * count, BACKWARD * (forward + head * tokens), held
        if drawn:
            yield "curves", len(group), sum(map(_curve, group)), peak("curve")
        if measured:
            yield solves(group, FOLDS + 1)
            probes, part = probe_batches(batches), len(group) / len(at)
            work = part * _probed(probes, at, body, head)
            yield "sensitivity", len(probes) * len(group), work, held
    if job.judged is not None or not layerwise:
        for group in reversed(groups):
            if group is not groups[-1]:
                yield sums(group)
            yield solves(group, _solves(recipe))
    if layerwise:
        work = WALKED * forward + sum(_towards(site, recipe, tokens) for site in at)
        size = bytes_of_states(model, at, tokens, layerwise=True)
        size += peak("towards, affine" if affine else "towards")
        yield "layerwise", len({site.path for site in at}), work, size
    if recipe.rescale:
        probes = rescale_batches(batches)
        yield "rescale", len(probes), _probed(probes, at, body, head), 0
    yield judged


def _probed(
    probes: Sequence[Mapping[str, Tensor]], at: Sequence[Site], body: float, head: float
) -> float:
    """Count a dense run, and for each site one of its block, those after it, and the head."""
    share = (1 + 1 / len({site.path for site in at})) / 2
    return sum(map(tokens_of, probes)) * (body + head + len(at) * (share * body + head))


def _shortening(
    job: Job, batches: Sequence[Batch], tokens: int
) -> Iterator[tuple[str, int, float, int]]:
    """Yield the choice of whole blocks, and the walk that solves those around the gaps."""
    model, at = job.model, sites(job.model)
    (body, head), blocks = work_of_token(model, at), len({site.path for site in at})
    gone = blocks - count_blocks_kept(model, job.recipe.keep_blocks)
    probes = sum(map(tokens_of, probe_batches(batches)))
    yield "blocks", gone, (blocks + AGAIN * (gone - 1)) * probes * (body / 2 + head), 0
    whole = replace(job.recipe, keep=1.0)
    work = WALKED * body * tokens + sum(_towards(site, whole, tokens) for site in at)
    size = max(bytes_of_solve(site.d_in, site.d_out, ["towards, affine"]) for site in at)
    size += bytes_of_states(model, at, tokens, layerwise=True)
    yield "gaps", blocks * (whole.reconstruct not in ("none", "bias")), work, size


def _narrowing(
    job: Job, count: int, tokens: int, forward: float
) -> Iterator[tuple[str, int, float, int]]:
    """Yield the passes that choose hidden features, and those that sum what their readers read."""
    recipe, hidden = job.recipe, hidden_of(job.model)
    kept = count_kept(hidden, recipe.keep_hidden, recipe.tile)
    width, size = kept + hidden.size, bytes_of_sums(kept + hidden.size)
    runs = split(hidden.sources, [size] * len(hidden.sources), job.room)
    most = size * max(map(len, runs))
    yield "narrow", count, forward, most
    for run in runs:
        yield "narrow", count, forward + len(run) * tokens * width**2, most
        work = NORM * len(run) * _ridge(kept, hidden.size, _solves(recipe))
        yield "solve", len(run), work, most + bytes_of_solve(width, hidden.size, ["affine"])


def by_blocks(bars: Sequence[Estimate], blocks: int, kept: bool) -> list[Estimate]:
    """Return the bars of a job that reads one block at a time: its two walks over the blocks.

    A job in one pass solves on the second, from statistics that were ``kept`` or summed again.
    """
    stages = stages_of(bars)
    if "calibrate" not in stages:  # experts go, or nothing is counted
        return list(bars)
    seconds = Counter({name: each.seconds for name, each in stages.items()})
    steps = Counter({name: each.steps for name, each in stages.items()})
    first = seconds["calibrate"] + seconds["curves"] + seconds["sensitivity"]
    if "layerwise" in stages:
        first, second = first + seconds["reconstruct"], ("layerwise", seconds["layerwise"])
    elif kept:
        second = "from memory", seconds["reconstruct"]
    else:
        second = "calibrate", seconds["calibrate"] + seconds["reconstruct"]
    evaluated = "evaluate", 0.0, steps["evaluate"] // 2
    probed = "sensitivity", 0.0, steps["sensitivity"]
    found = [("calibrate", first, blocks), probed, evaluated, (*second, blocks), evaluated]
    size = max(each.bytes for each in bars)
    return [Estimate(name, work, size, count) for name, work, count in found if count]


def work_of_token(model: nn.Module, at: Sequence[Site]) -> tuple[float, int]:
    """Return the operations of a forward pass for one token: of the body, and of the head."""
    # A diffusion transformer ends with a linear layer like any other.
    table = None if is_diffusion(model) else model.get_output_embeddings()
    head = getattr(table, "weight", None)
    work = 0 if head is None else 2 * head.numel()
    return total_cost(model, at, Budget(1.0, "flops", seq_len=1)) - work, work


def tokens_of(inputs: Batch | Mapping[str, Tensor]) -> int:
    """Return the tokens of a batch, padding included; of images as many as is usual."""
    given = inputs.inputs if isinstance(inputs, Batch) else inputs
    ids = given.get("input_ids")
    return len(next(iter(given.values()))) * PATCHES if ids is None else ids.numel()


def bytes_of_states(model: nn.Module, at: Sequence[Site], tokens: int, *, layerwise: bool) -> int:
    """Return the bytes of the hidden states that a walk over the blocks holds."""
    size = model.dtype.itemsize
    # Layerwise: both streams, the next dense one, one amid the block, and two targets in float32.
    return tokens * at[0].d_out * (4 * size + 2 * 4 if layerwise else size)


def bytes_by_blocks(
    store: BlockStore, at: Sequence[Site], batches: Sequence[Batch], recipe: Recipe
) -> dict[str, int]:
    """Return the peak of a job with one block in memory and hidden states on disk, by its parts."""
    steps = steps_of(recipe, _has_biases(store.model, at))
    sums, solved = Counter(), Counter()  # solved: new weights, in float64 until a block is sliced
    cross = Counter()  # of all experts of a layer together
    pruned = at if recipe.prunes_sites else ()
    for site in pruned:
        sums[site.block] += bytes_of_sums(site.d_in)
        solved[site.block] += 8 * site.d_in * site.d_out
        if recipe.schedule == "layerwise":
            cross[site.team] += bytes_of_sums(site.d_in) + FOLDS * 8 * site.d_in * site.d_out
    solves = [
        bytes_of_solve(s.d_in, s.d_out, steps) + solved[s.block] - 8 * s.d_in * s.d_out
        for s in pruned
    ]
    fewer = 0
    if recipe.keep_experts != 1.0:
        layer, rows = layers_of(store.model)[0], sum(map(tokens_of, batches))
        cross["products"] = bytes_of_products(layer.experts, rows, at[0].d_out)
        held = held_by_experts(store.model, layer)  # of which one is taken without some, at a time
        fewer = max(getattr(each.owner, each.name).nbytes for each in held)
    widest = max(max(site.d_in, site.d_out) for site in at)
    tokens = max(map(tokens_of, batches), default=0)
    return {
        "outside of the blocks": process_memory(),
        # The one that is read ahead, too.
        "blocks": store.block_bytes * (1 + store.prefetch) + fewer,
        "sums of a block": max(*sums.values(), *cross.values(), 0),
        "their solve": max(solves, default=0),
        # Without attention scores: the default kernels make none.
        "a batch": max(widest * ACTIVATIONS * tokens * 4, store.head_bytes),
    }


def in_gib(parts: Mapping[str, int]) -> str:
    """Return sizes as text."""
    return ", ".join(f"{size / GIB:.3g} {name}" for name, size in parts.items())


def steps_of(recipe: Recipe, biases: bool) -> list[str]:
    """Return the steps of ``PEAKS`` in a job, for consumers with biases or without."""
    affine = recipe.reconstruct in WITH_BIAS or biases
    layerwise, curve = recipe.schedule == "layerwise", recipe.allocation == "curve"
    steps = {
        "towards, affine" if affine else "towards": layerwise,
        "affine" if affine else "linear": curve or not layerwise,  # probes are solved in one pass
        "curve": curve,
        "obs": recipe.criterion == "obs",
    }
    return [step for step, taken in steps.items() if taken]


def bytes_of_solve(d_in: int, d_out: int, steps: Sequence[str]) -> int:
    """Return the bytes of the largest of some steps at its peak, beside a site's sums."""
    sums = bytes_of_sums(d_in)
    copies = 2 * sums if sums <= PAIRED_BYTES else 0  # one pass: folds side by side take copies
    sizes = (
        8 * d_in * (squares * d_in + wide * d_out) + copies * (step in ("linear", "affine"))
        for step, (squares, wide) in ((step, PEAKS[step]) for step in steps)
    )
    return WORKSPACE + int(max(sizes))


def room_for_states(need: Mapping[str, int], limit: int) -> int:
    """Return the bytes of hidden states that fit; raise InputError if a job has no room."""
    left = limit - sum(need.values())
    if left < 0:
        raise InputError(
            f"prune: --max-memory must be at least {sum(need.values()) / GIB:.3g}GiB here, "
            f"got {limit / GIB:.3g}GiB (GiB: {in_gib(need)}); "
            "give more, or smaller --batch-size or --seq-len, or --sites attn"
        )
    return left


def _has_biases(model: nn.Module, at: Sequence[Site]) -> bool:
    return any(get_consumer_bias(model, site) is not None for site in at)


def _curve(site: Site) -> float:
    """Count :func:`liar_ext.selection.error_curves.error_curve` on both folds."""
    d, h = site.d_in, site.d_out
    return CURVE * FOLDS * DOUBLE * (2 * d**3 + 3 * h * d**2)


def _solves(recipe: Recipe) -> int:
    """Count the λ of a solve: the ladder on both folds, and the one that is chosen."""
    return FOLDS * len(damp_ladder(recipe.damp)) + 1


def _ridge(n: float, h: float, solves: int) -> float:
    return DOUBLE * solves * (n**3 / 3 + 3 * n**2 * h)


def _solve(site: Site, recipe: Recipe, solves: int) -> float:
    """Count :func:`liar_ext.reconstruction.solve.solve` for so many λ."""
    return _ridge(recipe.keep * site.d_in, min(site.d_out, (1 - recipe.keep) * site.d_in), solves)


def _towards(site: Site, recipe: Recipe, tokens: int) -> float:
    """Count a site's sums and :func:`liar_ext.reconstruction.solve.solve` in a walk."""
    d, h = site.d_in, site.d_out
    solves = FOLDS * min(TRIED, len(damp_ladder(recipe.damp))) + 1
    return tokens * (d**2 + 2 * d * h) + _ridge(recipe.keep * d, 3 * h, solves)
