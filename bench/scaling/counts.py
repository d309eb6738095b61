"""Operations and bytes of each phase of a job, counted by formula.

A multiply-add counts as two. Attention counts as the full square although it is causal, which is
what kernels without a mask skip in part. Left out: norms, activations, softmax, rotary positions,
scores, gathers and the plan, which are linear in what they read; the logarithms of the probes'
distributions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.scaling.shapes import TRIED, WIDTH, Settings, Shape, groups_of
from liar_ext.calibration.batches import FOLDS, PROBE_LENGTH, PROBE_ROWS, count_probes
from liar_ext.reconstruction.ladder import ROW_BLOCK
from liar_ext.selection.error_curves import PANEL
from liar_ext.selection.sensitivity import POSITIONS

SEQUENCES, SITES, ALONE = "sequences", "sites", "alone"


@dataclass
class Work:
    """What a phase takes: operations by kind, and bytes.

    Operations: ``forward``, the model's products; ``gram`` and ``gram32``, sums over rows of the
    model's dtype and of float32; and in float64 ``product``, ``cholesky`` with the triangular
    solves.
    """

    name: str
    shared: str  # what several devices share it by: sequences, sites, or nothing
    operations: Counter = field(default_factory=Counter)
    memory: float = 0.0  # bytes that come from the device's memory at least
    link: float = 0.0  # that go between host and device
    disk: float = 0.0  # that are read from or written to files
    # Of which N ranks hand (N − 1) / N from one to another, one message after the other; an
    # all-reduce counts twice.
    sent: float = 0.0


def attention(shape: Shape, tokens: int, length: int, kept: int | None = None) -> int:
    """Return the operations of q, k, v, of QKᵀ and PV, and of o, which may read fewer features."""
    d = shape.features["attn"]
    square = 4 * tokens * length * d
    return 2 * tokens * (shape.projections + shape.hidden * (d if kept is None else kept)) + square


def producers(shape: Shape, tokens: int) -> int:
    """Return the operations of gate and up."""
    return 4 * tokens * shape.hidden * shape.channels


def down(shape: Shape, tokens: int, kept: int | None = None) -> int:
    """Return the operations of down, which may read fewer features."""
    return 2 * tokens * shape.hidden * (shape.channels if kept is None else kept)


def block(shape: Shape, tokens: int, length: int) -> int:
    """Return the operations of a block."""
    return attention(shape, tokens, length) + producers(shape, tokens) + down(shape, tokens)


def head(shape: Shape, rows: int) -> int:
    """Return the operations of the output head."""
    return 2 * rows * shape.hidden * shape.vocabulary


def calibration(shape: Shape, settings: Settings) -> Iterator[Work]:
    """Count :class:`liar_ext.calibration.collect.Passes`; by blocks a walk for each reading.

    Of G groups of sites a pass each, and in one pass G − 1 again on the way back. A pass ends at
    its last site; there is no head. ``gram_update_`` makes one triangle, and reads and writes it
    in float64 for each batch. Ranks run batches of their own, and all-reduce the sums of each pass.
    """
    groups = groups_of(shape, settings)
    passes = groups if settings.layerwise else [*groups, *groups[-2::-1]]
    if settings.by_blocks:
        passes = groups * (1 if settings.layerwise else 2)
    forward = Work("calibration: the blocks", SEQUENCES)
    sums = Work("calibration: sums", SEQUENCES)
    for group in passes:
        last, kind = group[-1]
        whole = last + (kind == "mlp")
        run = whole * block(shape, settings.tokens, settings.length)
        if kind == "attn":
            run += attention(shape, settings.tokens, settings.length)
        forward.operations["forward"] += run
        forward.memory += settings.batches * (last + 1) * WIDTH * shape.block
        if settings.by_blocks:
            forward.link += 2 * shape.layers * settings.tokens * shape.hidden * WIDTH
        for _, each in group:
            d = shape.features[each]
            sums.operations["gram"] += settings.tokens * d * (d + 1)
            sums.memory += settings.batches * 8 * d**2
            sums.sent += 2 * 16 * d**2
    yield from (forward, sums)


def curves(shape: Shape, settings: Settings) -> Work:
    """Count :func:`liar_ext.selection.error_curves.error_curve`, on both folds of every site.

    ``d³/3`` to factor, as many to invert the factor L, ``d² h`` for W L with h outputs; then by
    blocks Z G Zᵀ and YᵀY up to their diagonal, some ``d³ + d² h``.
    """
    work = Work("error curves", SITES)
    for d in shape.features.values():
        blocks = list(blocks_of(d))
        counted = factored(d) + inverted(d)
        counted["product"] += sum(2 * shape.hidden * (d - start) * b for start, b in blocks)
        counted["product"] += sum(2 * b * (start + b) ** 2 for start, b in blocks)
        for index, (_, b) in enumerate(blocks):
            terms = sum(2 * b * c * (at + c + shape.hidden) for at, c in blocks[: index + 1])
            counted["product"] += terms
        for kind, count in counted.items():
            work.operations[kind] += FOLDS * shape.layers * count
    return work


def blocks_of(n: int, size: int = ROW_BLOCK) -> Iterator[tuple[int, int]]:
    """Yield where blocks of n rows start, and how many rows they have."""
    return ((start, min(size, n - start)) for start in range(0, n, size))


def factored(n: int) -> Counter:
    """Count :func:`liar_ext.reconstruction.ladder.factor_in_place`, ``n³/3``.

    What isn't products is the blocks on the diagonal and the triangular solves below them.
    """
    total: Counter = Counter()
    for start, b in blocks_of(n):
        total += Counter(product=2 * (n - start) * b * start)
        total += Counter(cholesky=b**3 / 3 + (n - start - b) * b**2)
    return total


def inverted(d: int) -> Counter:
    """Count :func:`liar_ext.selection.error_curves.invert_in_place`, by rows and their panels."""
    total: Counter = Counter()
    for start, b in blocks_of(d):
        panels = blocks_of(start, PANEL)
        total += Counter(product=sum(2 * b * (start - at + b) * width for at, width in panels))
        total += Counter(cholesky=b**3)
    return total


def solved(d: int, n: int, h: int, ladder: int, held_out: bool, dense: bool = False) -> Counter:
    """Count ``ops.reconstruct`` as the CUDA kernels do it, of d features n kept and h outputs.

    Gathering takes ``2 n p h + 2 p² h`` for each Gram matrix, p = d − n, or towards dense targets
    ``2 n² h`` once; each λ ``n³/3`` and ``2 n² h``, and ``2 n² h`` for an error on each matrix.
    """
    p, grams = d - n, 1 + held_out
    products = 2 * n**2 * h if dense else grams * (2 * n * p * h + 2 * p**2 * h)
    products += ladder * (1 + grams) * 2 * n**2 * h
    return Counter(cholesky=ladder * n**3 / 3, product=products)


def ridge(d: int, n: int, h: int, ladder: int) -> Counter:
    """Count :func:`liar_ext.reconstruction.solve.solve`: both folds, the whole, and tr(W G Wᵀ)."""
    total = solved(d, 0, h, 1, False)
    for _ in range(FOLDS):
        total += solved(d, n, h, ladder, True)
    return total + solved(d, n, h, 1, False)


def probe_solves(shape: Shape, settings: Settings) -> Work:
    """Count :func:`liar_ext.selection.error_curves.probe_sites`: one λ for every site."""
    work = Work("solves for the probes", SITES)
    for kind, d in shape.features.items():
        n = settings.stays(shape, kind, settings.probed)
        for name, count in ridge(d, n, shape.hidden, 1).items():
            work.operations[name] += shape.layers * count
    return work


def probes(shape: Shape, settings: Settings) -> Iterator[Work]:
    """Count :func:`liar_ext.selection.sensitivity.divergences`.

    The beginnings of a few sequences: the dense model once for every group of sites, and for every
    site the blocks from its own on; the head at some positions of each. Two sites a block:
    L (L + 1) runs of a block.
    """
    length = min(settings.length, PROBE_LENGTH)
    given = settings.sequences
    sequences = min(given, count_probes(given, given * length, given * settings.length))
    tokens, rows = sequences * length, sequences * min(length, POSITIONS)
    batches = -(-sequences // PROBE_ROWS)
    dense, sites = len(groups_of(shape, settings)), 2 * shape.layers
    for name, shared, runs, heads in (
        ("probes: the dense model", ALONE, dense * shape.layers, dense),
        ("probes: one site pruned", SITES, shape.layers * (shape.layers + 1), sites),
    ):
        work = Work(name, shared)
        work.operations["forward"] = runs * block(shape, tokens, length) + heads * head(shape, rows)
        vocabulary = shape.vocabulary * shape.hidden
        work.memory = batches * WIDTH * (runs * shape.block + heads * vocabulary)
        if settings.by_blocks:
            work.link = 2 * runs * tokens * shape.hidden * WIDTH
        yield work


def walk(shape: Shape, settings: Settings) -> Iterator[Work]:
    """Count :class:`liar_ext.reconstruction.walk.LayerwiseSolver`, target ``auto``.

    Of a block: the dense stream once; the pruned one to attention's consumer, then whole with the
    new consumer there, then the new consumer of the MLP alone, on what was kept of that run. And
    one sequence: twice past the model (``check_walk``), and three times past a block, twice with
    its MLP silent, to see that it adds plainly. Streams are held on the host, differences are
    float32. A site waits for the one before it: one rank sums and solves it, the others wait.
    """
    tokens, length, h = settings.tokens, settings.length, shape.hidden
    kept = {kind: settings.stays(shape, kind) for kind in shape.features}
    runs = block(shape, tokens, length)
    runs += attention(shape, tokens, length) + attention(shape, tokens, length, kept["attn"])
    runs += producers(shape, tokens) + down(shape, tokens) + down(shape, tokens, kept["mlp"])
    once = block(shape, length, length)
    look = 3 * once + 2 * (attention(shape, length, length) + producers(shape, length))
    forward = Work("walk: the blocks", SEQUENCES)
    forward.operations["forward"] = shape.layers * (runs + look)
    forward.memory = shape.layers * settings.batches * 3 * WIDTH * shape.block
    forward.link = shape.layers * tokens * (6 * h * WIDTH + 6 * h * 4 + 2 * shape.channels * WIDTH)
    sums = Work("walk: sums", SEQUENCES)
    solves = Work("walk: solves", ALONE)
    for kind, d in shape.features.items():
        sums.operations["gram32"] += shape.layers * tokens * (d * (d + 1) + 2 * d * h)
        sums.operations["product"] += shape.layers * 2 * tokens * h  # the mean of the differences
        sums.memory += shape.layers * settings.batches * (8 * d**2 + 16 * d * h)
        sums.sent += shape.layers * 2 * (16 * d**2 + 16 * d * h)
        for name, count in towards(d, kept[kind], h, settings.tried.get(kind, TRIED)).items():
            solves.operations[name] += shape.layers * count
        solves.sent += shape.layers * kept[kind] * h * 8
    yield from (forward, sums, solves)


def towards(d: int, n: int, h: int, tried: float) -> Counter:
    """Count :func:`liar_ext.reconstruction.solve.solve` towards a target, linear.

    For each fold the removed features' share, ``2 (d + 1) p h``, and for each finite λ that is
    tried :meth:`liar_ext.reconstruction.ladder.Fit.parabola`; of λ = ∞ one row. Then the Gram
    matrix times the weight, and one solve.
    """
    total = Counter(product=FOLDS * (2 * (d + 1) * (d - n) * h + half(1, 2 * h)) + 2 * d**2 * h)
    for name, count in parabola(n, h).items():
        total[name] += FOLDS * tried * count
    return total + solved(d, n, h, 1, False, dense=True)


def parabola(n: int, h: int) -> Counter:
    """Count the held-out errors of one λ: a factor, 2 h columns solved twice, their products."""
    products = Counter(product=half(n + 1, 2 * h))
    return products + factored(n) + substituted(n, 2 * h) + substituted(n, 2 * h)


def substituted(n: int, columns: int) -> Counter:
    """Count :func:`liar_ext.reconstruction.ladder.substitute`: a product at every halving."""
    if n <= ROW_BLOCK:
        return Counter(cholesky=n**2 * columns)
    a, c = n // 2, n - n // 2
    products = Counter(product=2 * a * c * columns)
    return substituted(a, columns) + substituted(c, columns) + products


def half(n: int, columns: int) -> int:
    """Count :func:`liar_ext.reconstruction.ladder.half_product`: the blocks up to the diagonal."""
    return sum(2 * b * (b + start) * columns for start, b in blocks_of(n))


def one_pass(shape: Shape, settings: Settings) -> Work:
    """Count :func:`liar_ext.reconstruction.solve.reconstruct`: the ladder for every site."""
    work = Work("solves", SITES)
    for kind, d in shape.features.items():
        n = settings.stays(shape, kind)
        for name, count in ridge(d, n, shape.hidden, settings.ladder).items():
            work.operations[name] += shape.layers * count
        work.sent += shape.layers * n * shape.hidden * 8
    return work


def phases(shape: Shape, settings: Settings) -> list[Work]:
    """Return what each phase of a job takes, in their order."""
    weights = WIDTH * shape.params
    read = Work("reading the weights", ALONE, disk=weights, link=weights)
    if settings.by_blocks:
        read = Work("reading the weights, twice", ALONE, disk=2 * weights, link=2 * weights)
    found = [read, *calibration(shape, settings)]
    if settings.curve:
        found += [curves(shape, settings), probe_solves(shape, settings)]
        found += probes(shape, settings)
    found += walk(shape, settings) if settings.layerwise else [one_pass(shape, settings)]
    gone = (1 - settings.keep) * shape.layers * shape.block
    return [*found, Work("writing", ALONE, disk=WIDTH * (shape.params - gone))]
