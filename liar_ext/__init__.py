"""Compress transformers without retraining: structured pruning with closed-form reconstruction."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import liar_ext.environment  # noqa: F401  (before torch)
from liar_ext import ops
from liar_ext.benchmarking.latency import measure_latency
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.moments import MomentBank, Moments
from liar_ext.checkpoint import load_pruned
from liar_ext.checkpoint.registration import register
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.errors import InputError
from liar_ext.evaluation import kl_divergence, perplexity
from liar_ext.healing.heal import heal
from liar_ext.latency_table import LatencyTable
from liar_ext.models.sites import register_family, sites
from liar_ext.narrowing.narrowing import narrow
from liar_ext.pipeline import prune, sweep
from liar_ext.plan import Budget, Plan
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.layerwise import reconstruct_layerwise
from liar_ext.reconstruction.one_pass import reconstruct
from liar_ext.report.report import Report
from liar_ext.selection.allocation import allocate
from liar_ext.selection.costs import Costs
from liar_ext.selection.criteria import criterion, score
from liar_ext.selection.error_curves import error_curves
from liar_ext.selection.sensitivity import site_divergences
from liar_ext.surgery.units import apply_plan

if TYPE_CHECKING:
    from liar_ext.export.verify import verify_pruned
    from liar_ext.suggest.suggest import suggest_family

register()  # stock loaders build layers of unequal sizes, where liar_ext is imported

__all__ = [
    "Budget",
    "Costs",
    "InputError",
    "LatencyTable",
    "MomentBank",
    "Moments",
    "Plan",
    "Recipe",
    "Report",
    "allocate",
    "apply_plan",
    "calibrate",
    "criterion",
    "error_curves",
    "heal",
    "kl_divergence",
    "load_pruned",
    "measure_latency",
    "narrow",
    "ops",
    "perplexity",
    "prune",
    "reconstruct",
    "reconstruct_layerwise",
    "register_family",
    "save_pruned",
    "score",
    "site_divergences",
    "sites",
    "suggest_family",
    "sweep",
    "verify_pruned",
]

_LATER = {  # by their modules, which most programs don't use
    "suggest_family": "liar_ext.suggest.suggest",
    "verify_pruned": "liar_ext.export.verify",
}


def __getattr__(name: str) -> Any:
    """Import one of those when it is first asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
