"""What a job needs in memory when one block is there at a time, and what is left for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liar_ext.calibration.memory import bytes_of_sums
from liar_ext.data.batches import FOLDS, Batch
from liar_ext.environment import process_memory
from liar_ext.errors import InputError
from liar_ext.models.sites import Site
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.ridge import PAIRED_BYTES
from liar_ext.reconstruction.settings import WITH_BIAS
from liar_ext.streaming.block_store import BlockStore

GIB = 2**30
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
# Tensors of a block's widest layers that a forward pass has at a time, for one batch.
ACTIVATIONS = 6
PATCHES = 1024
SHARD_PART = 8  # a shard may take this part of the budget


@dataclass(frozen=True)
class Need:
    """Bytes that a job needs at its peak, without hidden states, by what takes them.

    Parameters
    ----------
    outside : int
        What the process has already: Python, libraries, embeddings.
    blocks : int
        The block in use, and the one that is read ahead.
    sums : int
        Sums over the calibration text at the sites of one block.
    work : int
        What a solve, or a score, of one site makes of them.
    batch : int
        Activations of one batch in one block, or at the head.
    """

    outside: int
    blocks: int
    sums: int
    work: int
    batch: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.outside + self.blocks + self.sums + self.work + self.batch

    def __str__(self) -> str:
        parts = {
            "outside of the blocks": self.outside,
            "blocks": self.blocks,
            "sums of a block": self.sums,
            "their solve": self.work,
            "a batch": self.batch,
        }
        return ", ".join(f"{size / GIB:.3g} {name}" for name, size in parts.items())


def need_of(
    store: BlockStore, at: Sequence[Site], batches: Sequence[Batch], recipe: Recipe
) -> Need:
    """Return what a job needs while hidden states lie on disk."""
    layerwise, steps = recipe.schedule == "layerwise", steps_of(recipe, _has_biases(store, at))
    by_block: dict[int, int] = {}
    solved: dict[int, int] = {}  # new weights, in float64 until the block is sliced
    for site in at:
        by_block[site.block] = by_block.get(site.block, 0) + bytes_of_sums(site.d_in)
        solved[site.block] = solved.get(site.block, 0) + _new(site)
    together = max(by_block.values())
    if layerwise:
        together = max(together, *(bytes_of_sums(site.d_in) + _cross(site) for site in at))
    widest = max(site.d_in for site in at)
    hidden = at[0].d_out
    tokens = max((len(batch) * sequence_length(batch) for batch in batches), default=0)
    # Attention scores aren't among them: kernels that make none are the default.
    wide = max(widest, hidden) * ACTIVATIONS * tokens * 4
    return Need(
        outside=process_memory(),
        blocks=store.block_bytes * (2 if store.prefetch else 1),
        sums=together,
        work=max(bytes_of_solve(s.d_in, s.d_out, steps) + solved[s.block] - _new(s) for s in at),
        batch=max(wide, store.head_bytes),
    )


def steps_of(recipe: Recipe, biases: bool) -> list[str]:
    """Return the steps of ``PEAKS`` that a job takes, for consumers with biases or without."""
    affine = recipe.reconstruct in WITH_BIAS or biases
    curve, steps = recipe.allocation == "curve", []
    if recipe.schedule == "layerwise":
        steps.append("towards, affine" if affine else "towards")
    if recipe.schedule != "layerwise" or curve:  # whose probes are solved in one pass
        steps.append("affine" if affine else "linear")
    steps += ["curve"] if curve else []
    return steps + (["obs"] if recipe.criterion == "obs" else [])


def bytes_of_solve(d_in: int, d_out: int, steps: Sequence[str]) -> int:
    """Return the bytes that the greediest of some steps has at its peak beside a site's sums."""
    sums = bytes_of_sums(d_in)
    copies = 2 * sums if sums <= PAIRED_BYTES else 0  # one pass: folds side by side take copies
    sizes = (
        8 * d_in * (squares * d_in + wide * d_out) + copies * (step in ("linear", "affine"))
        for step, (squares, wide) in ((step, PEAKS[step]) for step in steps)
    )
    return WORKSPACE + int(max(sizes))


def room_for_states(need: Need, limit: int, reserved: int) -> int:
    """Return the bytes of hidden states that fit beside a job's need and ``reserved`` bytes.

    Raises
    ------
    InputError
        If not even the job without them does.
    """
    left = limit - need.total - reserved
    if left < 0:
        raise InputError(
            f"prune: --max-memory must be at least {(need.total + reserved) / GIB:.3g}GiB here, "
            f"got {limit / GIB:.3g}GiB (GiB: {need}, {reserved / GIB:.3g} a shard to be written); "
            "give more, or smaller --batch-size or --seq-len, or --sites attn"
        )
    return left


def _cross(site: Site) -> int:
    return FOLDS * 8 * site.d_in * site.d_out


def _new(site: Site) -> int:
    return 8 * site.d_in * site.d_out


def sequence_length(batch: Batch) -> int:
    """Return the tokens of a sequence of a batch; for an image what most models make of one."""
    first = next(iter(batch.inputs.values()))
    return first.shape[1] if first.dim() == 2 else PATCHES


def _has_biases(store: BlockStore, at: Sequence[Site]) -> bool:
    return any(store.model.get_submodule(site.consumer).bias is not None for site in at)
