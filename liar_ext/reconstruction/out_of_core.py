"""What a solve in little memory is made of: sums read by blocks of rows, and tensors in files."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.calibration.moments import Moments, symmetric
from liar_ext.errors import one_line
from liar_ext.reconstruction.ladder import Rows, slices

# /tmp may itself be held in memory; this folder is for files that are large (hier(7)).
LARGE_FILES = "/var/tmp"


def in_file(*shape: int) -> Tensor:
    """Return a float64 tensor of zeros in a file without a name, which goes with it.

    The disk space is there for certain: without it a write to the map would end the process.

    Raises
    ------
    MemoryError
        If there can't be such a file.
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


@dataclass(frozen=True)
class About:
    """Sums over the tokens of some folds, of ``x̃ = x − mean`` and of a constant feature 1 after it.

    That is ``[[G̃, e], [eᵀ, n]]``, ``(d + 1, d + 1)``, ``G̃ = G − s meanᵀ − mean eᵀ`` and ``e = s −
    n mean`` of ``G = Σ x xᵀ``, ``s = Σ x``, n tokens; it is never there as a whole.
    """

    grams: tuple[Tensor, ...]  # of each fold; lower triangle
    total: Tensor
    tokens: Tensor
    mean: Tensor

    @classmethod
    def of(cls, moments: Moments, folds: list[int], mean: Tensor) -> About:
        """Return the sums over the tokens of some folds, about a mean."""
        total, tokens = moments.total[folds].double().sum(0), moments.tokens[folds].sum()
        return cls(tuple(moments.gram[fold] for fold in folds), total, tokens, mean)

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
