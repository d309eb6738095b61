"""The same solve in little memory: one square in a file, and all else by blocks.

Blocks of rows are gathered from the sums, and centred, whenever they are read. What is factored,
``G_KK + Λ``, and the right-hand sides lie in unlinked temporary files, mapped into memory. Results
are those of :class:`liar_ext.reconstruction.ridge.System` but for rounding.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from liar_ext.calibration.moments import Moments
from liar_ext.ops.reference import NOT_FINITE, symmetric
from liar_ext.reconstruction import ridge
from liar_ext.reconstruction.ladder import Choice, Equations, Fit, Rows, half_product, slices
from liar_ext.reconstruction.ridge import BOTH
from liar_ext.system.errors import is_out_of_memory, one_line

OUTPUTS = 256  # solved at a time
Done = TypeVar("Done")
# /tmp may itself be held in memory; this folder is for files that are large (hier(7)).
LARGE_FILES = "/var/tmp"


def in_file(*shape: int) -> Tensor:
    """Return a float64 zero tensor in an unlinked temporary file, removed with the tensor.

    The disk space is allocated: without it a write to the map would end the process. MemoryError
    if there can't be such a file.
    """
    folder = os.environ.get("TMPDIR") or LARGE_FILES
    folder = folder if os.access(folder, os.W_OK) else tempfile.gettempdir()
    numbers = math.prod(shape)
    size = 8 * max(numbers, 1)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            pages = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise MemoryError(
            f"not enough memory, and no file of {size / 2**20:.3g} MiB in {folder} to do without "
            f"({one_line(error)}); free some, or set TMPDIR to a folder on a disk with room"
        ) from error
    return torch.frombuffer(pages, dtype=torch.float64)[:numbers].view(shape)


def oom_fallback(
    device: torch.device,
    here: Callable[[], Done],
    in_file: Callable[[], Done],
    on_host: Callable[[], Done],
) -> Done:
    """Return ``here()``; if an allocation fails ``in_file()``, or on a GPU ``on_host()``."""
    try:
        return here()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler: the traceback holds what was allocated.
    if device.type == "cpu":
        return in_file()
    torch.cuda.empty_cache()
    return on_host()


class About:
    """Sums over the tokens of some folds, of ``x̃ = x − mean`` and of a constant feature 1 after it.

    That is ``[[G̃, e], [eᵀ, n]]``, ``(d + 1, d + 1)``, ``G̃ = G − s meanᵀ − mean eᵀ`` and ``e = s −
    n mean`` of ``G = Σ x xᵀ``, ``s = Σ x``, n tokens; it is never there as a whole.
    """

    def __init__(self, moments: Moments, folds: list[int], mean: Tensor) -> None:
        self.grams = [moments.gram[fold] for fold in folds]  # lower triangles
        self.total, self.mean = moments.total[folds].double().sum(0), mean
        self.tokens = moments.tokens[folds].sum()

    def rows(self, index: Tensor) -> Rows:
        """Return the block rows for features of an ascending ``index`` and the constant."""
        n, edge = len(index), self.total - self.tokens * self.mean

        def gathered(start: int, stop: int) -> Tensor:
            at, to = index[start:stop], index[:stop]
            found = self.total.new_empty(stop - start, stop)
            block = found[: len(at), : len(to)]
            block.zero_()
            for gram in self.grams:
                block += gram[at].index_select(1, to)
            block.addr_(self.total[at], self.mean[to], alpha=-1)
            block.addr_(self.mean[at], edge[to], alpha=-1)
            corner = block[:, start:]
            corner.copy_(symmetric(corner))
            if stop > n:
                found[-1, :-1], found[-1, -1] = edge[to], self.tokens
                found[:-1, -1] = edge[at]
            return found

        return gathered

    def product(self, right: Tensor) -> Tensor:
        """Return the product of all of it with ``right``, ``(d + 1, columns)``."""
        rows, product = self.rows(torch.arange(len(self.mean))), torch.zeros_like(right)
        for here in slices(len(right)):
            start = here.start
            block = rows(here.start, here.stop)
            torch.addmm(product[here], block, right[: here.stop], out=product[here])
            if start:
                above, left = product[:start], block[:, :start]
                torch.addmm(above, left.mT, right[here], out=above)
        return product


class System(ridge.System):
    """The ridge system of one consumer, by blocks."""

    by_blocks = True

    def new_square(self) -> Tensor:
        """Return room for a factor, ``(n, n)``."""
        return in_file(len(self.kept), len(self.kept))

    def solve(self, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Solve on both folds with the λ and the step size that were chosen."""
        mean, offset = self.means(BOTH)
        equations = self.equations(BOTH, mean, False)
        fit = Fit(equations, equations, offset, self.new_square())
        factor, solved = fit.factor(choice.damp)
        new = torch.empty(len(self.weight), len(self.kept), dtype=torch.float64)
        error = energy = torch.zeros((), dtype=torch.float64)
        size = choice.step_size
        powers = torch.tensor([1.0, size, size**2], dtype=torch.float64)
        sums = About(self.moments, BOTH, torch.zeros_like(mean))
        rows = sums.rows(torch.arange(len(mean)))
        for here, change, parabola in fit.changes(factor) if solved else ():
            new[here] = self.weight[here][:, self.kept]
            count, turned = here.stop - here.start, self._turned(here)
            if factor is not None:
                new[here] += change[:-1, :count].mT
                if change.shape[1] > count:
                    new[here] += size * change[:-1, count:].mT
            error = error + parabola @ powers
            energy = energy + 2 * (turned * half_product(rows, turned)).sum()
        finite = bool(torch.isfinite(error + energy))
        code = torch.tensor(1.0 if not solved else 0.0 if finite else NOT_FINITE)
        diagonal = torch.ones(1).double() if factor is None else factor.diagonal()
        return new, error, energy, code, (diagonal.max() / diagonal.min()) ** 2

    def equations(self, folds: list[int], mean: Tensor, judging: bool) -> Equations:
        """Return what the kept features have to restore over the tokens of folds."""
        about, d, n = About(self.moments, folds, mean), len(mean), len(self.kept)
        stays = torch.cat([self.kept, self.kept.new_tensor([d])])
        right, energy = [], torch.zeros((), dtype=torch.float64)
        for here in slices(len(self.weight), OUTPUTS):
            leaving = self._turned(here).index_fill_(0, stays, 0.0)
            removed = about.product(leaving)
            energy += (leaving * removed).sum()
            parts = [removed[stays]]
            if self.target is not None:
                missing = self.target.total[folds][:, here].sum(0)
                cross = torch.cat([self.target.cross[folds, :, here].sum(0), missing[None]])
                cross[:d].addr_(mean, missing, alpha=-1)
                energy += 2 * (leaving * cross).sum()
                parts.append(cross[stays])
            parts = [sum(parts)] if judging else parts
            room = in_file(n + 1, sum(part.shape[1] for part in parts))
            right.append((here, torch.cat(parts, 1, out=room)))
        if self.target is not None:
            energy += self.target.energy[folds].sum()
        return Equations(about.rows(self.kept), right, energy)

    def _turned(self, here: slice) -> Tensor:
        """Return the weights of some outputs, ``(d + 1, outputs)``: none are of the constant."""
        turned = torch.zeros(self.weight.shape[1] + 1, here.stop - here.start).double()
        turned[:-1] = self.weight[here].mT
        return turned
