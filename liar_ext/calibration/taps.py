"""Sums over calibration tokens, and the taps that take tokens in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from liar_ext import ops
from liar_ext.calibration.batches import FOLDS, Batch
from liar_ext.models.sites import Site
from liar_ext.models.whole import Routed, called_at, routed_input
from liar_ext.system.errors import InputError

NORM_EPS = 1e-6  # what norms of today's families add to a mean square
# Tokens of one fold, and what each counts; 1 if None.
Piece = tuple[int, Tensor, Tensor | None]


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
        if other is self or other.d_in != self.d_in:
            raise InputError(
                "Moments.merge: must be given other sums over the same features; merge those of "
                "one site of one model over other text"
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


class Ended(Exception):
    """Raised by a callback, or a forward put in place, to leave a forward pass early.

    Whoever started the pass catches it; its arguments carry what was on its way.
    """


def watched(module: nn.Module, callback: Callable[[tuple, object], None]) -> RemovableHandle:
    """Call ``callback`` with the positional arguments and the output of each run of a module.

    The handle is a context, at whose end this ends.
    """

    def hook(_: nn.Module, args: tuple, output: object) -> None:
        callback(args, output)

    return module.register_forward_hook(hook)


@contextmanager
def replaced(module: nn.Module, method: Callable, name: str = "forward") -> Iterator[None]:
    """Let a module compute something else; a method that others put there is given back."""
    before = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


@dataclass(frozen=True)
class Tap:
    """A tensor to take the moments of."""

    name: str  # what the bank calls it
    module: str  # path of the module that is watched
    d_in: int  # number of features
    # Gives the tensor, (batch, tokens, d_in), or the tokens that reach an expert, from the module's
    # arguments and output.
    take: Callable[[tuple, Tensor], Tensor | Routed]
    first: bool = False  # only the first token counts
    sums: type[Moments] | type[Squares] = Moments
    mask: str = "attention_mask"  # the input that says which tokens are padding; empty if none are
    repeats: bool = False  # the module runs several times in a forward pass, and every run counts
    relative: bool = False  # tokens count as relative_weights of what the module gives says
    # More modules whose tokens are added to the same sums, each with its own ``take``.
    also: tuple[tuple[str, Callable], ...] = ()

    @property
    def all(self) -> tuple[Tap, ...]:
        """A tap for each of its modules."""
        return (self, *(replace(self, module=m, take=take, also=()) for m, take in self.also))


def tap_at(model: nn.Module, site: Site) -> Tap:
    """Return where what the consumer of a site reads is to be had."""

    def take(arguments: tuple, _: Tensor) -> Tensor | Routed:
        # The module of all experts computes what each reads.
        return arguments[0] if site.expert is None else routed_input(model, site, arguments)

    how = {"mask": site.part.mask, "repeats": site.part.repeats, "relative": is_relative(site)}
    if site.shared:
        (module, take), *also = ((path, _placing(site, *where)) for path, *where in site.reads)
        return Tap(site.name, module, site.d_in, take, also=tuple(also), **how)
    return Tap(site.name, called_at(site), site.d_in, take, **how)


def _placing(site: Site, features: Tensor, columns: slice) -> Callable:
    """Return what puts columns of a layer's input in their places among the features of a site."""

    def take(arguments: tuple, _: Tensor) -> Tensor:
        x = arguments[0]
        found = x.new_zeros(*x.shape[:-1], site.d_in)
        found[..., features.to(x.device)] = x[..., columns]
        return found

    return take


def is_relative(site: Site) -> bool:
    """Tell whether errors of a site count relative to what its consumer gives for the token.

    A norm that reads it, and that alone, passes on no more: ``y / rms(y)``.
    """
    return bool(site.wiring.output_norm) and site.expert is None


def relative_weights(output: Tensor, *, centred: bool = False) -> Tensor:
    """Return what each token counts where errors are relative to the output, ``(tokens,)`` float64.

    ``w_t = 1 / (|y_t|² / d_out + ε)``, as a norm divides by ``rms(y_t)``, with its usual ε = 1e-6,
    of y ``(tokens, d_out)``; 1 where y isn't finite, so that whoever sums drops the token and
    counts it.
    """
    wide = output.detach().double()
    size = wide.var(-1, correction=0) if centred else wide.square().mean(-1)
    return torch.where(torch.isfinite(size), 1 / (size + NORM_EPS), 1.0)


@dataclass
class InFlight:
    """What the taps need to know of the batch that is run, and what they have counted."""

    batch: Batch | None = None
    rows: dict[int, Tensor | slice] = field(default_factory=dict)  # sequences by fold
    seen: set[tuple[str, str]] = field(default_factory=set)  # taps and modules that were run
    # Tokens of the batch that aren't padding, where they don't count as one; the most of any tap.
    counted: int = 0
    tokens: int = 0  # sum of that over all batches
    routed: dict[str, list[int]] = field(default_factory=dict)  # tokens by expert and fold
    weighted: bool = False  # whether sequences have weights

    def set(self, batch: Batch) -> None:
        """Note the folds and the mask of the batch that is run next."""
        self.batch, fold = batch, batch.fold
        self.weighted |= batch.weight is not None
        self.seen.clear()
        self.counted = 0
        if bool((fold == fold[0]).all()):
            self.rows = {int(fold[0]): slice(None)}
        else:
            self.rows = {each: (fold == each).nonzero().flatten() for each in range(FOLDS)}


def adding(tap: Tap, moments: Moments | Squares, current: InFlight, ends: float) -> Callable:
    """Return what adds a tapped tensor to its moments, and ends the run after ``ends`` taps."""

    def add(arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x = tap.take(arguments, output)
        pieces = _routed if isinstance(x, Routed) else _pieces
        for fold, tokens, weight in pieces(tap, x, current, output):
            moments.update(tokens, fold, weight)
        current.seen.add((tap.name, tap.module))
        if len(current.seen) == ends:
            raise Ended

    return add


def _pieces(tap: Tap, x: Tensor, current: InFlight, output: Tensor) -> Iterator[Piece]:
    weight = current.batch.mask_of(tap.mask)
    # OPT flattens sequences and tokens before its MLP; a head may see one token of each.
    if x.dim() == 2:
        x = x.unflatten(0, (len(current.batch), -1))
    weight = None if weight is None else weight.to(x.device)
    if tap.relative or current.batch.weight is not None:
        used = torch.ones(x.shape[:2], device=x.device) if weight is None else weight
        current.counted = max(current.counted, int(used.sum()))
        weight = current.batch.weighing(used)
    if tap.relative:
        weight = weight * relative_weights(output.reshape(*x.shape[:2], -1))
    if tap.first or x.shape[1] == 1:
        x, weight = x[:, :1], None if weight is None else weight[:, :1]
    for fold, rows in current.rows.items():
        rows = rows if isinstance(rows, slice) else rows.to(x.device)
        counts = None if weight is None else weight[rows].flatten()
        yield fold, x[rows].flatten(0, -2), counts


def _routed(tap: Tap, routed: Routed, current: InFlight, _: Tensor) -> Iterator[Piece]:
    """Yield the tokens that reach an expert, for ``Σ r² x xᵀ`` over those that aren't padding."""
    device, batch = routed.x.device, current.batch
    each = routed.tokens // len(batch)
    folds = batch.fold.to(device).repeat_interleave(each)[routed.token]
    used = batch.counting(routed.tokens, device)[routed.token]
    current.counted = routed.tokens if batch.mask is None else int(batch.mask.sum())
    found = current.routed.setdefault(tap.name, [0] * FOLDS)
    for fold in range(FOLDS):
        here = used & (folds == fold)
        x = routed.x[here]
        found[fold] += len(x)
        weight = routed.weight[here].double().square()
        if batch.weight is not None:
            weight *= batch.weight.to(device, torch.float64)[routed.token[here] // each]
        yield fold, x, weight
