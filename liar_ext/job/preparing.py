"""A job before it runs: its model, text, sites and schedule, checked against one another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from liar_ext.calibration.batches import FOLDS, Batches, check_batches, read_batches
from liar_ext.calibration.collect import check_bank_is_of, check_finite_weights
from liar_ext.calibration.divergence import DenseOutputs, check_loss, check_owned
from liar_ext.calibration.saved_sums import digest_of, fingerprint_of, room_for_sums
from liar_ext.calibration.taps import is_relative
from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.folder import count_params
from liar_ext.job.solving import hold_out
from liar_ext.job.state import SENSITIVITY, Job, Known, sensitivity_key, tokens_gone
from liar_ext.job.streamed import check_blocks, share_out
from liar_ext.models.plan import KINDS
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.models.registry import config_digest, is_diffusion, type_of
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site, why_whole
from liar_ext.models.whole import check_block_count
from liar_ext.reconstruction.hidden_size import count_kept
from liar_ext.reconstruction.layerwise import check_walk
from liar_ext.selection.allocation import check_budget
from liar_ext.selection.whole_experts import count_experts_kept
from liar_ext.system.distributed import world_size
from liar_ext.system.errors import InputError
from liar_ext.system.progress import quiet

NO_GAIN = (
    "a norm reads what each gives, and there a walk gains nothing; "
    "--schedule layerwise walks anyway"
)


def prepare(job: Job) -> Job:
    """Return a job with its recipe resolved; raise InputError for whatever can't work."""
    if job.batches is not None:
        check_batches(job.batches)
    fresh = None if job.certify_on is None else sum(map(len, read_batches(job.certify_on)))
    if fresh is not None and fresh < FOLDS:
        raise InputError(f"prune: certify_on needs at least {FOLDS} sequences, got {fresh}")
    model, auto = job.model, job.recipe.schedule == "auto"
    notes = [*job.notes, *getattr(model, "liar_notes", [])]
    known = job.known or Known.of_bank(job.bank)
    job = replace(job, recipe=job.recipe.settled(), notes=notes, known=known)
    at = job.sites(model)
    if job.walk is not None:
        check_blocks(model, job.recipe, len(job.walk.source), certifies=job.certify_on is not None)
    # Whether both schedules are tried, and the better one kept. Fewer hidden features can't be
    # compared with the dense model's, nor can a model that is written as it is solved.
    measures = auto and job.recipe.schedule == "layerwise" and job.recipe.prunes_sites
    measures &= not job.narrows and job.walk is None
    measures &= job.bank is None or job.judged is not None
    if not measures:
        job = replace(job, judged=None)
        job = _without_gain(job, at) if auto else job
    recipe = job.recipe
    _check_model(job, at)
    earlier = stock_config.history_of(model.config)
    _warn_of_whole(model, recipe.prunable_kinds, at)
    if job.bank is not None:
        job = replace(job, batches=_check_bank(job, at))
    job = replace(job, speed=job.timed(model))
    check_budget(at, recipe.budget, recipe.allocation, job.costs(model))
    _check_sizes(job, at)
    backward = CRITERIA[recipe.criterion] == "gradient"
    if backward:
        check_owned(at)
    if job.saved is not None or job.walk or _runs_over_text(job, at):
        job = replace(job, batches=list(job.batches or ()))  # to be gone through again
    if recipe.schedule == "layerwise" and job.walk is None:
        job = _walked(job, auto)
    if measures and job.recipe.schedule == "layerwise" and job.judged is None:
        batches, judged = hold_out(read_batches(job.batches))
        job = replace(job, batches=batches, judged=judged or None)
        job = job if judged else _without_gain(job, at)
    if backward and job.batches:
        check_loss(model, job.batches[0])
    if job.narrows and recipe.rescale:
        _check_compared(model, job.batches, "rescale")
    before, prunable = count_params(model) + tokens_gone(model), sum(s.params for s in at)
    params = {"before": before, "prunable_before": prunable}
    room = room_for_sums(model, recipe.memory)
    job = replace(job, earlier=earlier, params=params, room=room)
    return job if job.walk is None else share_out(job)


def _check_model(job: Job, at: Sequence[Site]) -> None:
    """Refuse layers with adapters or masks, configs that can't be told, and wrong choices."""
    model, recipe = job.model, job.recipe
    if recipe.of == "latency" and world_size() > 1:
        raise InputError(
            "prune: of latency times the model, which all ranks would at once, and "
            f"{world_size()} ranks share the job; leave it out, or run the job in one process"
        )
    owner: dict[nn.Module, str] = {}
    for site in (each for each in at if each.expert is None and not each.shared):
        for path in (*site.producers, site.consumer):
            layer = model.get_submodule(path)
            if layer._parameters.get("weight") is None:
                raise InputError(
                    f"prune: the weight of {path} is made of other parameters, as of an adapter, a "
                    "parametrization or a mask; merge or remove that first"
                )
            if (other := owner.setdefault(layer, path)) != path:
                raise InputError(
                    f"prune: {path} and {other} are one module, which can't lose different units; "
                    "give each layer its own"
                )
    with quiet():
        stock_config.described(model)  # what is not said now isn't said once layers are sliced
    if is_diffusion(model) and (
        recipe.of not in ("prunable", "params") or recipe.rescale or job.evaluate_on is not None
    ):
        raise InputError(
            "prune: of a diffusion transformer only prunable parameters, or params, are counted, "
            "without rescale and evaluate_on; leave these out, and give certify_on to compare"
        )


def _runs_over_text(job: Job, at: Sequence[Site]) -> list[str]:
    """Return which choices run the model over the calibration text, beside its moments."""
    recipe, key = job.recipe, sensitivity_key(job.recipe, job.known, job.model, at)
    measured = job.known.has(SENSITIVITY, key, at)
    chosen = recipe.without("from_sums")
    return [recipe.spelled(each) for each in chosen if not (measured and each.name == "allocation")]


def changes_all(recipe: Recipe) -> list[str]:
    """Return which choices change the activations of all layers, so that no bank holds them."""
    chosen = recipe.without("with_bank")
    return [recipe.spelled(each) for each in chosen if each.metadata["affects"] == "scores"]


def _check_bank(job: Job, at: Sequence[Site]) -> Batches | None:
    """Return the batches of a job with a bank, its own or those of the bank, if it can do."""
    bank, model = job.bank, job.model
    if whole := changes_all(job.recipe):
        raise InputError(
            f"prune: {whole[0]} does not work with a bank, which is of the whole model; leave the "
            "bank out and give the calibration text"
        )
    check_bank_is_of(bank, model, at)
    batches = bank.text if job.batches is None else job.batches
    if batches is None and (needed := _runs_over_text(job, at)):
        raise InputError(
            f"prune: {needed[0]} runs the model over the calibration text, and the bank keeps "
            f"none; leave the bank out, or use --preset fast without {needed[0].split()[0]}"
        )
    return batches


def _check_sizes(job: Job, at: Sequence[Site]) -> None:
    model, recipe = job.model, job.recipe
    if recipe.keep_blocks != 1.0:
        check_block_count(model, recipe.keep_blocks)
        if any(map(is_relative, at)):
            warnings.warn(
                f"keep_blocks: a norm reads what each layer of {type_of(model)} gives, so the "
                "others make up for less of a block: of Gemma-3-270m narrower layers lost far less",
                stacklevel=4,
            )
    if recipe.keep_experts != 1.0:
        count_experts_kept(model, recipe.keep_experts)
    if recipe.keep_vocab != 1.0 and not hasattr(model, "liar_vocabulary"):
        raise InputError(
            "prune: keep_vocab is for text that is drawn afterwards; call liar_ext.keep_tokens and "
            "draw the batches with its tokenizer, or let liar_ext.compress do it all"
        )
    if job.narrows:
        count_kept(hidden_of(model), recipe.keep_hidden, recipe.tile)
        _check_compared(model, job.certify_on, "certify")


def _check_compared(model: nn.Module, batches: Batches | None, option: str) -> None:
    """Refuse a comparison of the dense model's hidden states with narrower ones."""
    for batch in islice(batches or (), 1):
        with torch.no_grad(), evaluating(model):
            if DenseOutputs(model, batch, positions=1).has_logits:
                return
        raise InputError(
            f"prune: {option} compares hidden states, whose size keep_hidden changes: "
            f"{type(model).__name__} gives no logits; leave one of them out"
        )


def _warn_of_whole(model: nn.Module, kinds: Sequence[str], at: Sequence[Site]) -> None:
    """Warn of kinds of sites that can't lose anything."""
    for kind in (each for each in kinds if each in KINDS):
        some, reason = [site for site in at if site.kind == kind], why_whole(model, kind)
        if some and all(site.unit == "kv_group" and site.units == 1 for site in some):
            reason = "all its query heads share one key and value; give attn_unit='head'"
        if reason:
            message = f"prune: {kind} of {type_of(model)} stays whole: {reason}"
            warnings.warn(message, stacklevel=4)


def settled_for(asked: Recipe, at: Sequence[Site]) -> Recipe:
    """Return a recipe with a schedule for ``auto`` where no text is left to measure by.

    If a norm reads the outputs of consumers, one pass was better and faster (docs/quality.md).
    """
    if asked.schedule == "auto" and any(map(is_relative, at)):
        return replace(asked, schedule="one-pass")
    return asked.settled()


def _without_gain(job: Job, at: Sequence[Site]) -> Job:
    """Solve in one pass where the default is a walk that gains nothing."""
    if job.walk is not None and job.certify_on is not None:
        return job  # in one pass fresh text can't be measured on block by block
    settled = settled_for(replace(job.recipe, schedule="auto"), at)
    if job.recipe.schedule == "layerwise" and settled.schedule == "one-pass":
        return _in_one_pass(job, NO_GAIN)
    return job


def _walked(job: Job, auto: bool) -> Job:
    """Refuse to walk blocks that can't be run one by one, or do without one by default."""
    check_finite_weights(job.model)  # before anything is run
    try:
        check_walk(job.model, job.batches)
    except InputError as error:
        if not auto:
            raise
        return _in_one_pass(job, str(error).removeprefix("layerwise: ").partition("; use")[0])
    return job


def _in_one_pass(job: Job, reason: str) -> Job:
    note = f"Layers were solved in one pass, not one after the other: {reason}."
    recipe = replace(job.recipe, schedule="one-pass")
    return replace(job, judged=None, recipe=recipe, notes=[*job.notes, note])


def recorded(job: Job) -> Job:
    """Return a prepared job as its checkpoint has it; raise InputError if that is of another job.

    The room for sums is that of the checkpoint: other groups have other sums.
    """
    if job.saved is None:
        return job
    texts = {"calibration": job.batches, "fresh": job.certify_on, "judged": job.judged}
    if job.walk is None:
        weights, kept = fingerprint_of(job.model.state_dict().items()), {"room": job.room}
    else:
        weights, kept = job.walk.source.fingerprint(), {"keep_sums": job.shares.keep_sums}
        texts["held-out"] = job.evaluate_on  # whose hidden states are saved
    facts = {
        "weights": weights,
        "config": config_digest(job.model),
        "dtype": str(job.model.dtype),
        **{f"{n} text": None if each is None else digest_of(each) for n, each in texts.items()},
        "bank": None if job.bank is None else job.bank.source.get("data"),
        "settings": job.recipe.to_dict(),
    }
    known = job.saved.begin(facts, **kept)
    if job.walk is None:
        return replace(job, room=known["room"])
    return share_out(job, known["keep_sums"])
