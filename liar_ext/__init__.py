"""Compress transformers without retraining: structured pruning with closed-form reconstruction."""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import liar_ext.environment  # noqa: F401  (before torch)

if TYPE_CHECKING:
    from liar_ext import ops
    from liar_ext.calibration.bank import MomentBank
    from liar_ext.calibration.collect import calibrate
    from liar_ext.calibration.documents import read_documents
    from liar_ext.calibration.moments import Moments
    from liar_ext.calibration.texts import calibration_sequences
    from liar_ext.checkpoint import load_model, load_pruned
    from liar_ext.checkpoint.saving import save_pruned
    from liar_ext.cli.prune import compress
    from liar_ext.cli.sweep import compare_methods
    from liar_ext.errors import InputError
    from liar_ext.export.verify import verify_pruned
    from liar_ext.healing.heal import heal
    from liar_ext.job import prune, sweep
    from liar_ext.measure.embeddings import encoder_similarity
    from liar_ext.measure.evaluation import kl_divergence, perplexity
    from liar_ext.measure.latency import measure_latency
    from liar_ext.models.registry import register_family
    from liar_ext.models.sites import sites
    from liar_ext.models.slicing import apply_plan
    from liar_ext.plan import Budget, Plan
    from liar_ext.recipe import Recipe
    from liar_ext.reconstruction.hidden_size import narrow
    from liar_ext.reconstruction.layerwise import reconstruct_layerwise
    from liar_ext.reconstruction.solve import reconstruct
    from liar_ext.report.report import Report
    from liar_ext.selection.allocation import allocate
    from liar_ext.selection.costs import Costs, LatencyTable
    from liar_ext.selection.criteria import criterion, score
    from liar_ext.selection.error_curves import error_curves
    from liar_ext.selection.sensitivity import site_divergences
    from liar_ext.suggest.suggest import suggest_family
    from liar_ext.vocabulary.keep import choose_tokens, keep_tokens

__version__: str

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
    "__version__",
    "allocate",
    "apply_plan",
    "calibrate",
    "calibration_sequences",
    "choose_tokens",
    "compare_methods",
    "compress",
    "criterion",
    "encoder_similarity",
    "error_curves",
    "heal",
    "keep_tokens",
    "kl_divergence",
    "load_model",
    "load_pruned",
    "measure_latency",
    "narrow",
    "ops",
    "perplexity",
    "prune",
    "read_documents",
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

_MODULES = {  # of the public names, imported when one is first asked for
    "Budget": "plan",
    "Costs": "selection.costs",
    "InputError": "errors",
    "LatencyTable": "selection.costs",
    "MomentBank": "calibration.bank",
    "Moments": "calibration.moments",
    "Plan": "plan",
    "Recipe": "recipe",
    "Report": "report.report",
    "allocate": "selection.allocation",
    "apply_plan": "models.slicing",
    "calibrate": "calibration.collect",
    "calibration_sequences": "calibration.texts",
    "choose_tokens": "vocabulary.keep",
    "compare_methods": "cli.sweep",
    "compress": "cli.prune",
    "criterion": "selection.criteria",
    "encoder_similarity": "measure.embeddings",
    "error_curves": "selection.error_curves",
    "heal": "healing.heal",
    "keep_tokens": "vocabulary.keep",
    "kl_divergence": "measure.evaluation",
    "load_model": "checkpoint",
    "load_pruned": "checkpoint",
    "measure_latency": "measure.latency",
    "narrow": "reconstruction.hidden_size",
    "perplexity": "measure.evaluation",
    "prune": "job",
    "read_documents": "calibration.documents",
    "reconstruct": "reconstruction.solve",
    "reconstruct_layerwise": "reconstruction.layerwise",
    "register_family": "models.registry",
    "save_pruned": "checkpoint.saving",
    "score": "selection.criteria",
    "site_divergences": "selection.sensitivity",
    "sites": "models.sites",
    "suggest_family": "suggest.suggest",
    "sweep": "job",
    "verify_pruned": "export.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name == "__version__":
        return version("liar_ext")
    if name == "ops":
        return import_module("liar_ext.ops")
    if name in _MODULES:
        return getattr(import_module(f"liar_ext.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not liar_ext.environment.is_command(sys.argv, sys.orig_argv):  # which answers without torch
    from liar_ext.checkpoint.loading import register

    register()  # stock loaders build layers of unequal sizes, where liar_ext is imported
