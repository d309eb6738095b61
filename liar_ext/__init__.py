"""Compress transformers without retraining: structured pruning with closed-form reconstruction."""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import liar_ext.system.environment  # noqa: F401  (before torch)

if TYPE_CHECKING:
    from liar_ext import ops as ops
    from liar_ext.calibration.bank import MomentBank as MomentBank
    from liar_ext.calibration.batches import timestep_weights as timestep_weights
    from liar_ext.calibration.collect import calibrate as calibrate
    from liar_ext.calibration.documents import read_documents as read_documents
    from liar_ext.calibration.taps import Moments as Moments
    from liar_ext.calibration.texts import calibration_sequences as calibration_sequences
    from liar_ext.checkpoint import load_model as load_model
    from liar_ext.checkpoint import load_pruned as load_pruned
    from liar_ext.checkpoint.saving import save_pruned as save_pruned
    from liar_ext.cli.evaluate import compare_methods as compare_methods
    from liar_ext.cli.prune import compress as compress
    from liar_ext.export.verify import verify_pruned as verify_pruned
    from liar_ext.healing.heal import heal as heal
    from liar_ext.job.planning import sweep as sweep
    from liar_ext.job.pruning import prune as prune
    from liar_ext.measure.embeddings import encoder_similarity as encoder_similarity
    from liar_ext.measure.evaluation import kl_divergence as kl_divergence
    from liar_ext.measure.evaluation import perplexity as perplexity
    from liar_ext.measure.latency import measure_latency as measure_latency
    from liar_ext.measure.latency_table import LatencyTable as LatencyTable
    from liar_ext.models.plan import Budget as Budget
    from liar_ext.models.plan import Plan as Plan
    from liar_ext.models.plan import SitePlan as SitePlan
    from liar_ext.models.recipe import Recipe as Recipe
    from liar_ext.models.registry import register_family as register_family
    from liar_ext.models.sites import sites as sites
    from liar_ext.models.slicing import apply_plan as apply_plan
    from liar_ext.reconstruction.hidden_size import narrow as narrow
    from liar_ext.reconstruction.layerwise import reconstruct_layerwise as reconstruct_layerwise
    from liar_ext.reconstruction.solve import reconstruct as reconstruct
    from liar_ext.report.report import Report as Report
    from liar_ext.selection.allocation import allocate as allocate
    from liar_ext.selection.costs import Costs as Costs
    from liar_ext.selection.criteria import criterion as criterion
    from liar_ext.selection.criteria import score as score
    from liar_ext.selection.error_curves import error_curves as error_curves
    from liar_ext.selection.sensitivity import site_divergences as site_divergences
    from liar_ext.suggest.suggest import suggest_family as suggest_family
    from liar_ext.system import distributed as distributed
    from liar_ext.system.errors import InputError as InputError
    from liar_ext.vocabulary.keep import choose_tokens as choose_tokens
    from liar_ext.vocabulary.keep import keep_tokens as keep_tokens

__version__: str

_MODULES = {  # of the public names, imported when one is first asked for
    "Budget": "models.plan",
    "Costs": "selection.costs",
    "InputError": "system.errors",
    "LatencyTable": "measure.latency_table",
    "MomentBank": "calibration.bank",
    "Moments": "calibration.taps",
    "Plan": "models.plan",
    "Recipe": "models.recipe",
    "Report": "report.report",
    "SitePlan": "models.plan",
    "allocate": "selection.allocation",
    "apply_plan": "models.slicing",
    "calibrate": "calibration.collect",
    "calibration_sequences": "calibration.texts",
    "choose_tokens": "vocabulary.keep",
    "compare_methods": "cli.evaluate",
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
    "prune": "job.pruning",
    "read_documents": "calibration.documents",
    "reconstruct": "reconstruction.solve",
    "reconstruct_layerwise": "reconstruction.layerwise",
    "register_family": "models.registry",
    "save_pruned": "checkpoint.saving",
    "score": "selection.criteria",
    "site_divergences": "selection.sensitivity",
    "sites": "models.sites",
    "suggest_family": "suggest.suggest",
    "sweep": "job.planning",
    "timestep_weights": "calibration.batches",
    "verify_pruned": "export.verify",
}

_WHOLE = {"distributed": "system.distributed", "ops": "ops"}  # modules that are public themselves

__all__ = ["__version__", *_WHOLE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("liar_ext")
    if name in _WHOLE:
        return import_module(f"liar_ext.{_WHOLE[name]}")
    if name in _MODULES:
        return getattr(import_module(f"liar_ext.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The command answers some questions without torch.
if not liar_ext.system.environment.is_command(sys.argv, sys.orig_argv):
    from liar_ext.checkpoint import register

    register()  # stock loaders build layers of unequal sizes, where liar_ext is imported
