"""Scores and losses for a job: from its moments and, where the recipe says so, its text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from torch import Tensor, nn

from liar_ext.calibration.batches import Batches
from liar_ext.calibration.collect import check_bank_is_of
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.passes import Passes
from liar_ext.checkpoint_store import Checkpoint
from liar_ext.distributed import share
from liar_ext.errors import InputError
from liar_ext.models.sites import Site, get_consumer_bias
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields
from liar_ext.reconstruction.ridge import form_at
from liar_ext.selection.criteria import score
from liar_ext.selection.curve_allocation import measure_sensitivities, probe_sites, probes_of
from liar_ext.selection.error_curves import error_curves
from liar_ext.selection.sensitivity import Measured


def find_scores(
    recipe: Recipe, known: Known, passes: Passes, at: Sequence[Site], *, progress: bool = False
) -> dict[str, Tensor]:
    """Return the scores of sites, by :class:`Passes` or those of one block at a time.

    What is known is not computed again.
    """

    def compute(missing: Sequence[Site]) -> dict[str, Tensor]:
        return score(
            passes.model,
            passes.bank,
            missing,
            recipe.criterion,
            seed=recipe.seed,
            batches=passes.batches,
            per="feature" if recipe.allocation == "global" else "unit",
            progress=progress,
        )

    return known.get("score", score_key(recipe), at, partial(share, compute=compute))


def find_curves(
    recipe: Recipe,
    known: Known,
    passes: Passes,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    elsewhere: dict[str, str],
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return the error curves of sites; what is known is not computed again.

    ``elsewhere`` is told of those that found no memory.
    """

    def compute(missing: Sequence[Site]) -> dict[str, Tensor]:
        given = passes.model, passes.bank, missing, scores
        return error_curves(*given, progress=progress, elsewhere=elsewhere)

    return known.get("curve", score_key(recipe), at, partial(share, compute=compute))


def find_sensitivities(
    recipe: Recipe,
    known: Known,
    passes: Passes,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
    *,
    saved: Checkpoint | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Return the sensitivities of sites; what is known is not measured again."""
    kept = None if saved is None else Measured(saved, at[0].name)

    def measure(missing: Sequence[Site]) -> dict[str, float]:
        teams = {site.team for site in missing}  # experts of a layer are measured together
        probes = probe_sites(
            passes.model,
            passes.bank,
            [site for site in at if site.team in teams],
            scores,
            curves,
            replace(recipe.budget, keep=known.probe_keep or recipe.keep),
            mode=recipe.reconstruct,
            progress=progress,
        )
        text = probes_of(passes.model, passes.batches)
        return measure_sensitivities(passes.model, probes, text, saved=kept, progress=progress)

    key = key_of_sensitivities(recipe, known, passes.model, at)
    return known.get(SENSITIVITY, key, at, measure)


def key_of_sensitivities(recipe: Recipe, known: Known, model: nn.Module, at: Sequence[Site]) -> str:
    """Return what the sensitivities of a job's sites depend on, beside the site."""
    forms = {get_consumer_bias(model, site) is not None for site in at}
    mode, keep = recipe.reconstruct, known.probe_keep or recipe.keep
    return sensitivity_key(recipe, keep, form_at(mode, *forms) if len(forms) == 1 else mode)


def runs_over_text(recipe: Recipe, known: Known, model: nn.Module, at: Sequence[Site]) -> list[str]:
    """Return which choices run the model over the calibration text, beside its moments."""
    measured = known.has(SENSITIVITY, key_of_sensitivities(recipe, known, model, at), at)
    return [
        recipe.spelled(each)
        for each in recipe.without("from_sums")
        if not (measured and each.name == "allocation")
    ]


def changes_all(recipe: Recipe) -> list[str]:
    """Return which choices change the activations of all layers, so that no bank holds them."""
    chosen = recipe.without("with_bank")
    return [recipe.spelled(each) for each in chosen if each.metadata["affects"] == "scores"]


def check_bank(
    recipe: Recipe,
    known: Known,
    bank: MomentBank,
    batches: Batches | None,
    model: nn.Module,
    at: Sequence[Site],
) -> Batches | None:
    """Return the batches of a job that is given a bank: its own, or else the text of the bank.

    Raises
    ------
    InputError
        If the bank doesn't serve the job, or keeps no text where the job runs the model over it.
    """
    if whole := changes_all(recipe):
        raise InputError(
            f"prune: {whole[0]} does not work with a bank, which is of the whole model; leave the "
            "bank out and give the calibration text"
        )
    check_bank_is_of(bank, model, at)
    if batches is not None:
        return batches
    needed = runs_over_text(recipe, known, model, at)
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


SENSITIVITY = "sensitivity"
Value = TypeVar("Value")


@dataclass
class Known:
    """What has been found for one dense model, its moments and their text.

    Parameters
    ----------
    found : dict
        Values by what they are, key and site.
    spared : float
        CPU seconds that were not spent anew.
    probe_keep : float or None
        Fraction of a site that stays while its sensitivity is measured; None: the budget's.
    """

    found: dict[tuple, tuple[Any, float]] = field(default_factory=dict)
    spared: float = 0.0
    probe_keep: float | None = None

    @classmethod
    def of_bank(cls, bank: MomentBank | None, probe_keep: float | None = None) -> Known:
        """Return the sensitivities that a bank has."""
        known = cls(probe_keep=probe_keep)
        for each in [] if bank is None else bank.source.get("sensitivities", ()):
            for name, value in each["sites"].items():
                known.found[SENSITIVITY, each["key"], name] = value, 0.0
        return known

    def get(
        self,
        what: str,
        key: str,
        at: Sequence[Site],
        compute: Callable[[Sequence[Site]], Mapping[str, Value]],
    ) -> dict[str, Value]:
        """Return the values of sites by name; ``compute`` gives those that aren't there."""
        missing = [site for site in at if not self.has(what, key, [site])]
        self.spared += sum(self.found.get((what, key, place(site)), (0, 0.0))[1] for site in at)
        if missing:
            start = time.process_time()
            values = compute(missing)
            each = (time.process_time() - start) / len(missing)
            for site in missing:
                self.found[what, key, place(site)] = values[site.name], each
        return {site.name: self.found[what, key, place(site)][0] for site in at}

    def has(self, what: str, key: str, at: Sequence[Site]) -> bool:
        """Tell whether the values of all sites are there."""
        return all((what, key, place(site)) in self.found for site in at)

    def store_sensitivities(self, bank: MomentBank) -> None:
        """Put the sensitivities that were measured into a bank, for jobs to come."""
        by_key: dict[str, dict[str, float]] = {}
        for (what, key, name), (value, _) in self.found.items():
            if what == SENSITIVITY:
                by_key.setdefault(key, {})[name] = value
        bank.source["sensitivities"] = [
            {"key": key, "sites": sites} for key, sites in by_key.items()
        ]


def place(site: Site) -> str:
    """Return what a value is of: a site with its units."""
    return f"{site.name} {site.unit} {site.units} {site.groups}"


def score_key(recipe: Recipe) -> str:
    """Return what scores and error curves depend on, beside the site."""
    per = "feature" if recipe.allocation == "global" else "unit"
    chosen = {each.name: getattr(recipe, each.name) for each in recipe_fields(affects="scores")}
    return json.dumps({**chosen, "per": per, "liar_ext": version("liar_ext")}, sort_keys=True)


def sensitivity_key(recipe: Recipe, keep: float, form: str) -> str:
    """Return what sensitivities depend on, beside the site; ``form`` is that of the new weights."""
    more = {"keep": keep, "form": form}
    return json.dumps({**json.loads(score_key(recipe)), **more}, sort_keys=True)
