"""Criteria: how much each unit of a site matters. Higher scores stay."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext import ops
from liar_ext.calibration.batches import Batches
from liar_ext.calibration.divergence import SiteGradients, collect_gradients
from liar_ext.calibration.taps import Moments
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.models.recipe_checks import criterion as check_criterion
from liar_ext.models.sites import Site, get_consumer_weight
from liar_ext.system.errors import InputError
from liar_ext.system.progress import showing_bars

# The choice of units hardly depends on λ: from 1e-4 to 1e-2 the held-out errors agree to a percent.
OBS_DAMP = 1e-2
NEEDS = ("moments", "gradient")
PER = ("unit", "feature")


@dataclass(frozen=True)
class SiteStatistics:
    """What a criterion may look at: never the model.

    What the moments don't hold, such as the mean of |x|, can be collected by hooks on the consumer
    before, and found by the ``site``.
    """

    weight: Tensor  # the consumer's W, (d_out, d_in) float64, on the device of the moments
    moments: Moments  # of its input x, (tokens, d_in)
    width: int  # features per unit; unit u is the features [u·width, (u+1)·width)
    generator: torch.Generator  # seeded per site
    groups: int = 1  # equal runs of units that must lose equally many
    gradients: SiteGradients | None = None  # for a criterion that needs them
    site: str = ""  # its name, such as "3.mlp"


# By name; CRITERIA has what each needs.
_CRITERIA: dict[str, Callable[[SiteStatistics], Tensor]] = {}


def criterion(name: str, *, needs: str = "moments") -> Callable:
    """Register a function ``SiteStatistics -> scores`` as the criterion ``name``.

    It returns scores of features, ``(d_in,)``, which :func:`score` sums to units, or of units,
    ``(units,)``. Only scores of features can be allocated as FLAP does.

    Parameters
    ----------
    name : str
        What users call it.
    needs : {"moments", "gradient"}
        With ``"gradient"`` it gets :attr:`SiteStatistics.gradients`, too, for which the model is
        run backward over the calibration text.
    """
    if needs not in NEEDS:
        raise InputError(f"criterion: needs must be one of {', '.join(NEEDS)}, got {needs!r}")

    def register(function: Callable[[SiteStatistics], Tensor]) -> Callable:
        CRITERIA[name] = needs
        _CRITERIA[name] = function
        return function

    return register


def score(
    model: nn.Module,
    bank: Mapping[str, Moments],
    at: Sequence[Site],
    criterion: str = "wifv",
    *,
    seed: int = 0,
    batches: Batches | None = None,
    per: str = "unit",
    progress: bool = False,
) -> dict[str, Tensor]:
    """Score the units of every site in ``at``.

    Parameters
    ----------
    model : nn.Module
        The dense model; it stays as it is.
    bank : mapping of str to Moments
        From :func:`liar_ext.calibrate`, or loaded.
    at : sequence of Site
        Sites to score.
    criterion, seed : str, int
        A registered criterion, and the seed of one that draws.
    batches : iterable of mapping or Tensor, optional
        Text for the criteria that need gradients, which no moments hold; see
        :func:`liar_ext.calibration.divergence.collect_gradients`.
    per : {"unit", "feature"}
        ``unit``: the sum over a unit's features. ``feature``: scores of features where the
        criterion has them (``magnitude``, ``wanda``, ``wifv``), for allocation ``global``.
    progress : bool
        Show a progress bar for the gradients.

    Returns
    -------
    dict of str to Tensor
        ``(units,)`` float64, or ``(d_in,)`` by feature, by site name, on the device of the site's
        moments; higher means keep.

    Raises
    ------
    InputError
        If the criterion is unknown, lacks the batches that it needs, or its scores are not finite,
        or the bank lacks a site.
    """
    if per not in PER:
        raise InputError(f"score: per must be one of {', '.join(PER)}, got {per!r}")
    chosen = _CRITERIA[check_criterion("criterion", criterion)]
    gradients: Mapping[str, SiteGradients] = {}
    if CRITERIA[criterion] == "gradient":
        if batches is None:
            raise InputError(
                f"score: criterion {criterion} needs gradients, which moments do not hold; give "
                "the calibration text as batches=, or take a criterion such as wifv"
            )
        with showing_bars(progress):
            gradients = collect_gradients(model, batches, at)
    check_given(at, bank, "score: moments")
    scores = {}
    for site in at:
        moments, own = bank[site.name], gradients.get(site.name)
        # Moments that were loaded lie on the CPU, wherever the model is.
        device = moments.gram.device
        stats = SiteStatistics(
            weight=get_consumer_weight(model, site).to(device, torch.float64),
            moments=moments,
            width=site.width,
            generator=torch.Generator().manual_seed(seed + zlib.crc32(site.name.encode())),
            groups=site.groups,
            gradients=None if own is None else own.to(device),
            site=site.name,
        )
        # Of an expert that no token reached only the weights are known.
        function = chosen if moments.tokens.sum() > 0 else magnitude
        values = torch.as_tensor(function(stats), device=device)
        if values.shape not in ((site.units,), (site.d_in,)) or not torch.isfinite(values).all():
            raise InputError(
                f"score: criterion {criterion} must give {site.units} finite scores at "
                f"{site.name}, or {site.d_in} by feature, got shape {tuple(values.shape)}"
            )
        scores[site.name] = values if per == "feature" else site.per_unit(values)
    return scores


def check_given(at: Iterable[Site], given: Mapping[str, object], what: str) -> None:
    """Raise InputError unless there is something for every site."""
    if missing := [site.name for site in at if site.name not in given]:
        raise InputError(
            f"{what} are missing for {', '.join(missing[:5])}; give those of the same sites of "
            "the same model"
        )


@criterion("random")
def random(stats: SiteStatistics) -> Tensor:
    """Uniform noise: what any other criterion has to beat."""
    units = stats.weight.shape[1] // stats.width
    return torch.rand(units, generator=stats.generator, dtype=torch.float64)


@criterion("magnitude")
def magnitude(stats: SiteStatistics) -> Tensor:
    """``‖W_:j‖²`` by feature, the consumer's columns (Han et al. 2015); blind to activations."""
    return stats.weight.square().sum(0)


@criterion("wanda")
def wanda(stats: SiteStatistics) -> Tensor:
    """``Σ_i |W_ij| · ‖x_j‖`` by feature: Wanda (arXiv:2306.11695), summed to Wanda-sp."""
    norm = stats.moments.second_moment().sqrt()
    return stats.weight.abs().sum(0) * norm


@criterion("wifv")
def wifv(stats: SiteStatistics) -> Tensor:
    """``Var(x_j) · ‖W_:j‖²`` by feature: what a bias can't restore (FLAP, arXiv:2312.11983)."""
    return stats.weight.square().sum(0) * stats.moments.variance()


@criterion("obs")
def obs(stats: SiteStatistics) -> Tensor:
    """Error per token once ``u`` is gone, units going by least error after reconstruction.

    The next to go is the unit of least ``tr W_u [(G_KK + Λ)⁻¹]_uu⁻¹ W_uᵀ``, as in Optimal Brain
    Surgeon; see :func:`liar_ext.ops.obs_curve`.
    """
    gram, _, tokens = stats.moments.pooled()
    order, error, _ = ops.obs_curve(stats.weight, gram, stats.width, OBS_DAMP, 0, stats.groups)
    scores = torch.empty_like(error[1:])
    scores[order] = error[1:] / tokens
    return scores


@criterion("snip", needs="gradient")
def snip(stats: SiteStatistics) -> Tensor:
    """``Σ_w |w · ∂L/∂w|`` over all weights of the unit: SNIP (arXiv:1810.02340), summed.

    It is also the element form of LLM-Pruner's first-order importance.
    """
    return stats.gradients.absolute.sum(0)


@criterion("taylor", needs="gradient")
def taylor(stats: SiteStatistics) -> Tensor:
    """``Σ_i |W_i · ∂L/∂W_i|``: LLM-Pruner's importance, first order, vector form, summed.

    LLM-Pruner is arXiv:2305.11627. ``W_i`` is all that the unit owns in layer i: within a layer
    products may cancel, across layers they may not.
    """
    return stats.gradients.signed.abs().sum(0)


@criterion("fisher", needs="gradient")
def fisher(stats: SiteStatistics) -> Tensor:
    """``(1/S) Σ_s (∂L_s/∂m_u)²``: the diagonal of the empirical Fisher information of the masks.

    A sample s is a sequence. Kwon et al. (arXiv:2204.09656) search masks by it.
    """
    return stats.gradients.fisher
