"""The operators, seen from Python.

Importing this registers them as ``torch.ops.liar_ext.*``, with fake kernels so that
``torch.compile`` and meta tensors work. Without a compiled extension, and on a device that it has
no kernels for, plain torch does the work, slower; see :mod:`liar_ext.ops.dispatch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.ops import backends, dispatch

__all__ = ["build_info", "gram_update_", "obs_curve", "reconstruct"]


def gram_update_(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    r"""Add the moments of a batch of tokens to running sums, in place and in one pass.

    .. math::

        G \mathrel{+}= X^T \mathrm{diag}(w)\,(Y \text{ or } X), \qquad
        s \mathrel{+}= X^T w, \qquad
        c \mathrel{+}= [\textstyle\sum_t w_t,\ \text{rows dropped}]

    A row of weight 0 is skipped unread, so padding may hold anything. A row that holds a NaN, an
    infinity or a value beyond 2⁴⁸ (2.8e14), in itself or times its weight, and one whose weight is
    negative or beyond that, is left out of all sums and counted in ``count[1]``. Where ``x`` and
    ``gram`` are both float64 the limit is 2⁵⁰⁰. Products are summed in float32 over at most 2048
    tokens, of float64 rows in float64, and then in the dtype of ``gram``. The result is the same
    bit for bit from run to run.

    Parameters
    ----------
    gram : Tensor
        ``(d, d)`` float32 or float64, of which only the lower triangle with the diagonal is read or
        written; with ``y``, ``(d, dy)``, all of it. Columns contiguous. No two of the tensors that
        are written share memory, nor one of them with one that is read.
    total : Tensor
        ``(d,)``, dtype of ``gram``.
    count : Tensor
        ``(2,)`` float64.
    x : Tensor
        ``(tokens, d)`` float16, bfloat16, float32 or float64; any strides.
    y : Tensor, optional
        ``(tokens, dy)``, dtype of ``x``: sums the cross-Gram matrix instead of the Gram matrix.
    weight : Tensor, optional
        ``(tokens,)`` bool, float32 or float64; 1 for every token if not given.

    Raises
    ------
    RuntimeError
        If a shape, a dtype or a device is not as above, or memory is shared.

    Notes
    -----
    Source: the Gram matrix of LIAR (arXiv 2407.13331, section III), as sums instead of means.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        backends.gram_update_(gram, total, count, x, y, weight)
    else:
        torch.ops.liar_ext.gram_update_(gram, total, count, x, y, weight)


def reconstruct(
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    damps: Tensor,
    holdout: Tensor | None = None,
    cross: Tensor | None = None,
    holdout_cross: Tensor | None = None,
    errors_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Fold the removed input features of a linear layer into the weights that stay.

    .. math::

        W' = W_K + D, \qquad (G_{KK} + \Lambda)\,D^T = R, \qquad
        \Lambda = \lambda\,\mathrm{mean}(\mathrm{diag}\,G_{KK})\,I

    with :math:`R = G_{KP} W_P^T`, or with dense targets :math:`R = C_K - G_{KK} W_K^T`, for every λ
    of ``damps``. λ = ∞ gives :math:`W_K`: plain dropping. Computed in float64.

    Several sites of one shape go in one call: then every tensor but ``damps`` has a leading
    dimension of sites, and so has every result, with the bits of single calls.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(d_out, d)``, any float dtype; ``(sites, d_out, d)`` for several sites.
    gram : Tensor
        ``G``, ``(d, d)`` float32 or float64; only the lower triangle is read.
    kept : Tensor
        ``K``, ``(n,)`` int64, strictly ascending; ``P`` is the rest. Keeping everything is allowed.
    damps : Tensor
        ``(L,)`` float64, each λ ≥ 0, infinity included. A mean diagonal of 0 counts as 1.
    holdout : Tensor, optional
        ``(d, d)``: another fold's Gram matrix to evaluate the error on.
    cross : Tensor, optional
        ``C = Σ x (y* − b)ᵀ``, ``(d, d_out)``: solve for the dense targets ``y*`` instead.
    holdout_cross : Tensor, optional
        The same over the other fold; required with ``holdout`` and ``cross``.
    errors_only : bool
        Do not form the weights: what choosing λ by its held-out error needs, at less cost.

    Returns
    -------
    weight : Tensor
        ``W'``, ``(L, d_out, n)`` float64; ``(0, d_out, n)`` with ``errors_only``.
    error : Tensor
        ``(L,)`` float64: ``tr(ΔW G ΔWᵀ)``, where ``ΔW`` is ``W' − W_K`` on K and ``−W_P`` on P;
        not below 0, though a Gram matrix that was rounded to float32 may be slightly indefinite.
        With ``cross``: ``tr(V G Vᵀ) − 2 tr(V C)``, ``V`` being ``W'`` on K and 0 on P; add
        ``Σ |y* − b|²`` for the error itself.
    holdout_error : Tensor
        The same on ``holdout``, ``(L,)``; ``(0,)`` without.
    info : Tensor
        ``(L, 2)`` float64: code and condition. Code 0 is solved; else errors and condition are NaN.
        Code k > 0 says that the leading minor of order k of ``G_KK + Λ`` is not positive definite;
        −2 that an argument holds a NaN or an infinity, or that an error is beyond float64; −1, on
        CUDA only, that ``kept`` is not ascending within ``d``. Condition is ``(max L_ii / min
        L_ii)²`` of the Cholesky factor, a lower bound.

    Raises
    ------
    RuntimeError
        If a shape, a dtype or a device is not as above; on the CPU also if an index or a λ is not.
        On CUDA nothing waits for their values: see ``info``.

    Notes
    -----
    Source: LIAR (arXiv 2407.13331), eq. for the transfer matrix, in the damped-transfer form.
    """
    tensors = weight, gram, kept, damps, holdout, cross, holdout_cross
    return torch.ops.liar_ext.reconstruct(*tensors, errors_only)


def obs_curve(
    weight: Tensor, gram: Tensor, width: int, damp: float, at_least: int, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Remove units one by one, each time the one whose loss costs least after re-solving.

    .. math::

        \delta_u = \mathrm{tr}\,W_u S^{-1} W_u^T, \quad S = H_{uu}, \quad
        H = (G_{KK} + \Lambda)^{-1}, \quad
        \Lambda = \lambda\,\mathrm{mean}(\mathrm{diag}\,G)\,I

    and then :math:`W \leftarrow W - W_u S^{-1} H_{u:}`, :math:`H \leftarrow H - H_{:u} S^{-1}
    H_{u:}`, where W are the weights with everything removed so far folded in. The sum of δ is the
    objective itself, :math:`\min_D \mathrm{tr}(\Delta W (G + \Lambda) \Delta W^T)` over the
    weights D that fold P into K, with :math:`\Delta W` = D on K and −W_P on P. Computed in float64.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(d_out, d)``, any float dtype.
    gram : Tensor
        ``G``, ``(d, d)`` float32 or float64; only the lower triangle is read. A feature of zero
        diagonal is dead: its column of W counts as zero, so that it goes first and costs nothing.
    width : int
        Features per unit; unit u is the features ``[u · width, (u + 1) · width)``.
    damp : float
        λ > 0, or 0 where G has full rank. The same Λ all the way, unlike that of ``reconstruct``,
        which follows the features that stay.
    at_least : int
        Units that stay in the end; a multiple of ``groups``.
    groups : int
        The units fall into this many equal runs, and each run loses one unit per round.

    Returns
    -------
    order : Tensor
        ``(units − at_least,)`` int64: units as they go. Equal costs: the lower index goes.
    error : Tensor
        ``(units − at_least + 1,)`` float64: the objective after k removals, from 0, ascending.
    info : Tensor
        ``(2,)`` float64: code and condition. Code 0 is solved; k > 0 says that the leading minor of
        order k of ``G + Λ`` is not positive definite, or beyond d, that rounding has spoilt H; the
        errors are NaN then. Condition is ``(max L_ii / min L_ii)²`` of the Cholesky factor.

    Raises
    ------
    RuntimeError
        If a shape, a dtype or a number is not as above.

    Notes
    -----
    Source: Optimal Brain Surgeon (Hassibi and Stork 1993) for whole units, as in SlimGPT
    (arXiv 2412.18110).
    """
    return torch.ops.liar_ext.obs_curve(weight, gram, width, damp, at_least, groups)


def build_info() -> dict[str, str]:
    """Return how the extension was built and what it uses on this machine.

    ``compiler``, ``torch_target`` (oldest torch that the binary runs with), ``torch_built``,
    ``cpu_kernel`` (instruction set in use; the environment variable ``LIAR_CPU_KERNEL`` forces one
    of ``cpu_kernels``), ``cuda`` (whether CUDA kernels were compiled in) and, if they were,
    ``cuda_archs`` (compute capabilities), ``cuda_runtime`` (CUDA's version that they want),
    ``cuda_driver`` (the newest that the driver knows, or none) and ``cuda_devices`` (how many).
    Without an extension ``extension`` says why, and torch is the kernel. After calls on a GPU
    ``gram``, ``solve`` and ``curve`` name the backends that were chosen, see
    :mod:`liar_ext.ops.backends`.
    """
    choosers = {"gram": backends.grams, "solve": backends.solves, "curve": backends.curves}
    chosen = {name: "; ".join(said) for name, each in choosers.items() if (said := each.lines())}
    if dispatch.MISSING:
        return chosen | {
            "extension": f"not in use: {dispatch.MISSING}",
            "compiler": "none",
            "torch_target": torch.__version__,
            "torch_built": "none",
            "cpu_kernel": "torch",
            "cpu_kernels": "torch",
            "cuda": "not compiled",
        }
    lines = torch.ops.liar_ext.build_info().splitlines()
    return chosen | dict(line.split("=", 1) for line in lines)
