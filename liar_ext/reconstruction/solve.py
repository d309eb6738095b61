"""Solve one consumer from its sums, in memory or, if an allocation fails, in a file."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from liar_ext.calibration.moments import Moments, symmetric
from liar_ext.models.sites import Site
from liar_ext.reconstruction import low_memory
from liar_ext.reconstruction.low_memory import oom_fallback
from liar_ext.reconstruction.ridge import Residual, Solution, System
from liar_ext.rows import BY_BLOCKS, ON_HOST, SiteRow


def solve(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    kept: Tensor,
    *,
    target: Residual | None = None,
    step: tuple[float, float] = (0.0, 0.0),
    mode: str = "auto",
    damp: float | str = "auto",
) -> Solution:
    """Reconstruct one consumer ``y = W x + b`` from the features that are kept.

    ``linear``: ``W' = W_K + W_P G_PK (G_KK + Λ)⁻¹`` with ``Λ = λ · mean(diag G_KK) · I``.
    ``affine``: the same with the centred Gram ``C``, and ``b' = b + W_P (μ_P − T μ_K)``.
    ``bias``: the affine form with ``T = 0`` (FLAP). ``none``: plain dropping.

    A target ``y*`` may ask for more than the dense output. With the residual ``r = y* − (W x + b)``
    a step α towards it is taken::

        W' = W_K + (W_P G_PK + α Σ r x_Kᵀ) (G_KK + Λ)⁻¹

    In the affine form all sums are centred, and ``b' = b + W μ + α ρ − W' μ_K`` with μ, ρ the means
    of x and r.

    λ and α have the least error ``Σ |W' x_K + b' − y*|²`` on held-out tokens: solved on fold A and
    judged on fold B, and the other way round, see :func:`liar_ext.reconstruction.ladder.choose`
    and :func:`liar_ext.reconstruction.ladder.least_held_out`. The returned weight is solved with
    them on both folds together. If ``step`` begins at 0, the result is never worse on held-out
    tokens than the one without a target.

    The solve is done on the device of the sums. If a GPU has no memory for it, it is done on the
    CPU, on copies of the sums, and the path of the solution, and so the row of the report, ends in
    :data:`ON_HOST`. If an allocation fails on the CPU, it is done once more by
    :mod:`liar_ext.reconstruction.low_memory`, and :data:`BY_BLOCKS` is in its path.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(d_out, d_in)``.
    bias : Tensor or None
        ``b``, ``(d_out,)``.
    moments : Moments
        Of the consumer's input x.
    kept : Tensor
        ``(n_kept,)`` int64, ascending: features that are kept.
    target : Residual, optional
        Of the target, over the same tokens; if not given, the target is the dense output.
    step : (float, float)
        Least and greatest α.
    mode : {"auto", "none", "bias", "linear", "affine"}
        Form of the new weight; ``auto`` is ``affine`` if there is a bias, else ``linear``.
    damp : float or "auto"
        λ, or the choice among ``DAMP_LADDER``.

    Returns
    -------
    Solution
        Its errors are those to the full target, whatever α, relative to ``tr(W G Wᵀ)``.

    Raises
    ------
    InputError
        If a fold has no tokens and ``mode`` isn't ``none``, or a given damp leaves ``G_KK + Λ``
        singular.
    MemoryError, RuntimeError
        If an allocation fails by blocks as well, or the file can't be made.

    Notes
    -----
    Source: LIAR, arXiv:2407.13331; docs/method.md, sections "Reconstruction", "Choice of λ" and
    "Layerwise reconstruction".
    """
    device, weight, kept = moments.gram.device, weight.detach(), kept.to(moments.gram.device)

    def in_memory() -> Solution:
        system = System(weight.to(device), bias, moments, kept, target, mode)
        return system.solution(step, damp)

    def in_file() -> Solution:
        system = low_memory.System(weight, bias, moments, kept, target, mode)
        found = system.solution(step, damp)
        return replace(found, path=f"{found.path}, {BY_BLOCKS}")

    def on_host() -> Solution:
        found = solve(
            weight.cpu(),
            None if bias is None else bias.detach().cpu(),
            _on_host(moments),
            kept.cpu(),
            target=None if target is None else _on_host(target),
            step=step,
            mode=mode,
            damp=damp,
        )
        return replace(
            found,
            weight=found.weight.to(device),
            bias=None if found.bias is None else found.bias.to(device),
            path=f"{found.path}, {ON_HOST}",
        )

    return oom_fallback(device, in_memory, in_file, on_host)


def _on_host(sums: Moments | Residual) -> Moments | Residual:
    """Return sums with their tensors on the CPU."""
    return type(sums)(*(part.cpu() for part in vars(sums).values()))


def error_on(
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    new: tuple[Tensor, Tensor | None],
    moments: Moments,
    target: Residual | None = None,
) -> float:
    """Return the error of a consumer on sums over any text, such as text that no decision saw.

    ``Σ_t |ΔW x_t + Δb + r_t|² / Σ_t |W x_t|²`` with ``ΔW = W − W' S``, S selecting the features
    that are kept, and r the residual of the target, if any. NaN if the dense output is zero.

    Parameters
    ----------
    weight, bias, kept, moments, target
        See :func:`solve`.
    new : (Tensor, Tensor or None)
        New weight and bias; None if the consumer keeps its bias.
    """
    gram, total, tokens = moments.pooled()
    gram, old = symmetric(gram), weight.detach().to(gram)
    lost, shift = old.clone(), old.new_zeros(len(old))
    lost[:, kept.to(lost.device)] -= new[0].to(gram)
    if new[1] is not None:
        shift = (0.0 if bias is None else bias.detach().to(gram)) - new[1].to(gram)
    error = ((lost @ gram) * lost).sum() + 2 * shift @ (lost @ total)
    error += tokens * shift.square().sum()
    if target is not None:
        error += 2 * ((lost.mT * target.cross.sum(0)).sum() + shift @ target.total.sum(0))
        error += target.energy.sum()
    return float(error.clamp(min=0) / ((old @ gram) * old).sum())


def report_row(
    site: Site,
    units: int,
    dropped_rows: int,
    solution: Solution,
    seconds: float,
    target: str = "dense-input",
) -> SiteRow:
    """Return the row of the report on a site that keeps ``units`` units."""
    return SiteRow(
        name=site.name,
        units_before=site.units,
        units_after=units,
        params_before=site.params,
        params_after=units * site.unit_params,
        damp=solution.damp,
        error=solution.error,
        holdout_error=solution.holdout_error,
        condition=solution.condition,
        dropped_rows=dropped_rows,
        path=solution.path,
        seconds=seconds,
        target=target,
        share=solution.step_size,
    )
