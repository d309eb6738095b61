"""Scores and losses of a job, from its moments and its text; what is known is not computed again.

Finders take the sites of a group, whose moments are at hand in ``passes``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version

from torch import Tensor, nn

from liar_ext.calibration.batches import Batches
from liar_ext.calibration.collect import Passes, check_bank_is_of
from liar_ext.distributed import share
from liar_ext.errors import InputError
from liar_ext.job.state import SENSITIVITY, Job, Known
from liar_ext.models.sites import Site, get_consumer_bias
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields
from liar_ext.reconstruction.ridge import form_at
from liar_ext.selection.criteria import score
from liar_ext.selection.curve_allocation import measure_sensitivities, probe_sites, probes_of
from liar_ext.selection.error_curves import error_curves
from liar_ext.selection.sensitivity import Measured


def find_scores(job: Job, passes: Passes, at: Sequence[Site]) -> dict[str, Tensor]:
    """Return the scores of sites."""
    recipe = job.recipe

    def compute(missing: Sequence[Site]) -> dict[str, Tensor]:
        how = {"seed": recipe.seed, "batches": passes.batches, "per": _per(recipe)}
        given = passes.model, passes.bank, missing, recipe.criterion
        return score(*given, **how, progress=job.bars)

    return job.known.get("score", score_key(recipe), at, partial(share, compute=compute))


def find_curves(
    job: Job,
    passes: Passes,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    elsewhere: dict[str, str],
) -> dict[str, Tensor]:
    """Return the error curves of sites; ``elsewhere`` is told of those that found no memory."""

    def compute(missing: Sequence[Site]) -> dict[str, Tensor]:
        given = passes.model, passes.bank, missing, scores
        return error_curves(*given, progress=job.bars, elsewhere=elsewhere)

    return job.known.get("curve", score_key(job.recipe), at, partial(share, compute=compute))


def find_sensitivities(
    job: Job,
    passes: Passes,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the sensitivities of sites of a model in memory."""
    recipe, known, model = job.recipe, job.known, passes.model

    def measure(missing: Sequence[Site]) -> dict[str, float]:
        teams = {site.team for site in missing}  # experts of a layer are measured together
        some = [site for site in at if site.team in teams]
        budget = replace(recipe.budget, keep=known.probe_keep or recipe.keep)
        how = {"mode": recipe.reconstruct, "progress": job.bars}
        probes = probe_sites(model, passes.bank, some, scores, curves, budget, **how)
        saved = None if job.saved is None else Measured(job.saved, at[0].name)
        text = probes_of(model, passes.batches)
        return measure_sensitivities(model, probes, text, saved=saved, progress=job.bars)

    return known.get(SENSITIVITY, sensitivity_key(recipe, known, model, at), at, measure)


def _per(recipe: Recipe) -> str:
    return "feature" if recipe.allocation == "global" else "unit"


def score_key(recipe: Recipe, **more: object) -> str:
    """Return what scores and error curves depend on, beside the site."""
    chosen = {each.name: getattr(recipe, each.name) for each in recipe_fields(affects="scores")}
    facts = {**chosen, "per": _per(recipe), "liar_ext": version("liar_ext"), **more}
    return json.dumps(facts, sort_keys=True)


def sensitivity_key(recipe: Recipe, known: Known, model: nn.Module, at: Sequence[Site]) -> str:
    """Return what sensitivities depend on, beside the site: also the form of the new weights."""
    forms = {get_consumer_bias(model, site) is not None for site in at}
    mode = recipe.reconstruct
    form = form_at(mode, *forms) if len(forms) == 1 else mode
    return score_key(recipe, keep=known.probe_keep or recipe.keep, form=form)


def runs_over_text(recipe: Recipe, known: Known, model: nn.Module, at: Sequence[Site]) -> list[str]:
    """Return which choices run the model over the calibration text, beside its moments."""
    measured = known.has(SENSITIVITY, sensitivity_key(recipe, known, model, at), at)
    chosen = recipe.without("from_sums")
    return [recipe.spelled(each) for each in chosen if not (measured and each.name == "allocation")]


def changes_all(recipe: Recipe) -> list[str]:
    """Return which choices change the activations of all layers, so that no bank holds them."""
    chosen = recipe.without("with_bank")
    return [recipe.spelled(each) for each in chosen if each.metadata["affects"] == "scores"]


def check_bank(job: Job, at: Sequence[Site]) -> Batches | None:
    """Return the batches of a job that is given a bank: its own, or else the text of the bank.

    Raise InputError if the bank doesn't serve the job, or keeps no text where the job needs it.
    """
    recipe, bank, model = job.recipe, job.bank, job.model
    if whole := changes_all(recipe):
        raise InputError(
            f"prune: {whole[0]} does not work with a bank, which is of the whole model; leave the "
            "bank out and give the calibration text"
        )
    check_bank_is_of(bank, model, at)
    if job.batches is not None:
        return job.batches
    needed = runs_over_text(recipe, job.known, model, at)
    if bank.text is None and needed:
        raise InputError(
            f"prune: {needed[0]} runs the model over the calibration text, and the bank keeps "
            "none; calibrate with the text kept, or use the preset fast"
        )
    rows = model.get_input_embeddings()
    if needed and any(int(each["input_ids"].max()) >= rows.num_embeddings for each in bank.text):
        raise InputError(
            f"prune: the bank's text has tokens that the {rows.num_embeddings} embeddings of the "
            "model lack; calibrate this model anew"
        )
    return bank.text
