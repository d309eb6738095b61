"""Sums over calibration tokens, in two folds: all that the decisions and the solve ever read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext import ops
from liar_ext.calibration.batches import FOLDS
from liar_ext.system.errors import InputError


@dataclass
class Moments:
    """First and second moments of one consumer's input, kept in two folds.

    ``gram[f] = Σ_t w_t x_t x_tᵀ``, ``total[f] = Σ_t w_t x_t`` and ``count[f] = [Σ_t w_t, rows
    dropped]`` over the tokens ``t`` of fold ``f``: sums, so that shards, ranks and runs add up.

    Parameters
    ----------
    gram : Tensor
        ``(2, d_in, d_in)``, float64 (or float32); only the lower triangles are valid.
    total : Tensor
        ``(2, d_in)``, dtype of ``gram``.
    count : Tensor
        ``(2, 2)`` float64: the sum of the weights, and the rows dropped as non-finite.
    """

    gram: Tensor
    total: Tensor
    count: Tensor

    def __post_init__(self) -> None:
        d = self.total.shape[-1]
        got = [tuple(part.shape) for part in (self.gram, self.total, self.count)]
        wanted = [(FOLDS, d, d), (FOLDS, d), (FOLDS, 2)]
        if got != wanted:
            raise InputError(
                f"Moments: gram, total and count must be {wanted}, got {got}; give sums of "
                f"{FOLDS} folds over the same features"
            )

    @classmethod
    def zeros(
        cls, d_in: int, *, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"
    ) -> Moments:
        """Return moments of no tokens for ``d_in`` features."""
        sums = (torch.zeros(FOLDS, *s, dtype=dtype, device=device) for s in ((d_in, d_in), (d_in,)))
        return cls(*sums, torch.zeros(FOLDS, 2, dtype=torch.float64, device=device))

    def __eq__(self, other: object) -> bool:
        """Tell whether all sums that are valid are the same numbers, on whatever devices."""
        if not isinstance(other, Moments):
            return NotImplemented
        pairs = zip(*((m.gram.tril(), m.total, m.count) for m in (self, other)), strict=True)
        return all(torch.equal(own.cpu(), their.cpu()) for own, their in pairs)

    @property
    def d_in(self) -> int:
        """Number of features."""
        return self.gram.shape[-1]

    @property
    def tokens(self) -> Tensor:
        """Sum of the token weights per fold, ``(2,)`` float64."""
        return self.count[:, 0]

    @property
    def dropped_rows(self) -> int:
        """Token rows left out because a value was not finite."""
        return int(self.count[:, 1].sum())

    def update(self, x: Tensor, fold: int, weight: Tensor | None = None) -> None:
        """Add tokens ``x`` of shape ``(tokens, d_in)`` to a fold, ``weight`` per token or 1."""
        ops.gram_update_(self.gram[fold], self.total[fold], self.count[fold], x, weight=weight)

    def merge(self, other: Moments) -> None:
        """Add the sums of ``other``, which must be others over the same features, fold by fold."""
        if other is self:
            raise InputError(
                "Moments.merge: sums cannot be merged with themselves, which would count every "
                "token twice; merge those of other text"
            )
        if other.d_in != self.d_in:
            raise InputError(
                f"Moments.merge: d_in must agree, got {self.d_in} and {other.d_in}; "
                "merge moments of the same site of the same model"
            )
        self.gram += other.gram.to(self.gram)
        self.total += other.total.to(self.total)
        self.count += other.count.to(self.count)

    def pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gram (lower triangle), total and Σw over both folds together."""
        return self.gram.sum(0), self.total.sum(0), self.tokens.sum()

    def second_moment(self) -> Tensor:
        """Return ``Σ w x² / Σ w`` per feature over both folds, ``(d_in,)`` float64."""
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1).sum(0).double()
        return diagonal / self.tokens.sum()

    def variance(self) -> Tensor:
        """Return the (biased) variance per feature over both folds, ``(d_in,)`` float64."""
        mean = self.total.sum(0).double() / self.tokens.sum()
        return (self.second_moment() - mean.square()).clamp_min(0.0)


@dataclass
class Squares:
    """Sums of the squares of each feature alone: Moments without the products, ``d_in`` numbers.

    ``total[f] = Σ_t w_t x_t²``, ``(2, d_in)`` float64, over the tokens of fold ``f``; ``count`` is
    as in :class:`Moments`.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, d_in: int, *, device: str | torch.device = "cpu") -> Squares:
        """Return the sums over no tokens."""
        return cls(*(torch.zeros(FOLDS, n, dtype=torch.float64, device=device) for n in (d_in, 2)))

    tokens = Moments.tokens

    @property
    def d_in(self) -> int:
        """Number of features."""
        return self.total.shape[-1]

    def update(self, x: Tensor, fold: int, weight: Tensor | None = None) -> None:
        """Add tokens ``x`` of shape ``(tokens, d_in)`` to a fold, ``weight`` per token or 1."""
        square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        # The operator knows which rows count; of its products only one column is made.
        product = torch.zeros_like(self.total[fold]).unsqueeze(1)
        ops.gram_update_(product, self.total[fold], self.count[fold], square, square[:, :1], weight)

    def second_moment(self) -> Tensor:
        """Return ``Σ w x² / Σ w`` per feature over both folds, ``(d_in,)`` float64."""
        return self.total.sum(0) / self.tokens.sum()


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither a NaN nor an infinity.

    By its least and greatest value, of which a NaN is both, in a fortieth of the time of
    :func:`torch.isfinite`, and without a copy.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()  # torch has no extremes of float8
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def check_finite(*sums: Tensor, at: str = "a site") -> None:
    """Raise InputError if sums over the calibration text, taken ``at`` a site, are not finite."""
    if not all(all_finite(part) for part in sums):
        raise InputError(
            f"calibrate: moments must be finite, got a NaN or an infinity in the sums at {at}; "
            "leave the text with the largest activations out, or load the model in float64"
        )


def check_folds(moments: Moments) -> None:
    """Raise InputError unless both folds hold tokens, and finite sums over them."""
    check_finite(moments.gram, moments.total)
    if (moments.tokens <= 0).any():
        raise InputError(
            "reconstruct: both folds need tokens for the held-out error, got "
            f"{moments.tokens.tolist()}; calibrate with at least two sequences"
        )


def centre(gram: Tensor, total: Tensor, tokens: Tensor, mean: Tensor) -> Tensor:
    """Return ``Σ w (x − mean)(x − mean)ᵀ`` from plain sums; lower triangle in and out.

    With ``mean = total / tokens`` this is the centred Gram ``G − s sᵀ / n`` of the affine
    form; with the mean of another fold it is what that fold's affine fit is judged by.
    """
    half = total - mean * (tokens / 2)
    return torch.addr(gram, half, mean, alpha=-1).addr_(mean, half, alpha=-1)
