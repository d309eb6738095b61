"""A job before it runs: its model, text, sites and schedule, checked against one another."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from liar_ext.calibration.bank_source import digest_of, fingerprint_of
from liar_ext.calibration.batches import Batches, check_batches, read_batches
from liar_ext.calibration.collect import check_bank_is_of, check_finite_weights
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.calibration.gradients import check_loss, check_owned
from liar_ext.calibration.media import INPUTS
from liar_ext.calibration.saved_sums import room_for_sums
from liar_ext.calibration.taps import is_relative
from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.folder import count_params
from liar_ext.job.solving import hold_out
from liar_ext.job.state import SENSITIVITY, Job, Known, sensitivity_key, tokens_gone
from liar_ext.job.streamed import check_blocks, share_out
from liar_ext.models.configs import config_digest
from liar_ext.models.depth import check_block_count
from liar_ext.models.plan import KINDS
from liar_ext.models.registry import is_diffusion, type_of
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.running import evaluating, inputs_read
from liar_ext.models.sites import Site, why_whole
from liar_ext.recipe import Recipe
from liar_ext.recipe.checks import CRITERIA
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
    """Return a job with all that its recipe leaves open resolved, before the first batch is run.

    InputError is raised for whatever can't work.
    """
    if job.batches is not None:
        check_batches(job.batches)
    _check_kind(job.model)
    model, notes = job.model, [*job.notes, *getattr(job.model, "liar_notes", [])]
    job = replace(job, asked=job.recipe, recipe=job.recipe.settled(), notes=notes)
    job = replace(job, known=job.known or Known.of_bank(job.bank))
    at = job.sites(model)
    if job.walk is not None:
        check_blocks(model, job.recipe, len(job.walk.source), certifies=job.certify_on is not None)
    measures = _measures(job)
    if not measures:
        job = _without_gain(replace(job, judged=None), at)
    recipe = job.recipe
    if recipe.of == "latency" and world_size() > 1:
        raise InputError(
            "prune: of latency times the model, which all ranks would at once, and "
            f"{world_size()} ranks share the job; leave it out, or run the job in one process"
        )
    _check_plain(model, at)
    earlier = stock_config.history_of(model.config)
    _warn_of_what_stays(model, recipe.prunable_kinds, at)
    if is_diffusion(model):
        _check_diffusion(job)
    if job.bank is not None:
        job = replace(job, batches=check_bank(job, at))
    job = replace(job, speed=job.timed(model))
    check_budget(at, recipe.budget, recipe.allocation, job.costs(model))
    _check_sizes(job, at)
    backward = CRITERIA[recipe.criterion] == "gradient"
    if backward:
        check_owned(at)
    if job.saved is not None or job.walk or runs_over_text(recipe, job.known, model, at):
        job = replace(job, batches=list(job.batches or ()))  # to be gone through again
    if recipe.schedule == "layerwise" and job.walk is None:
        job = _walked(job)
        measures = measures and job.recipe.schedule == "layerwise"
    if measures and job.judged is None:
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


def _check_kind(model: nn.Module) -> None:
    """Refuse models whose inputs are of a kind that can't be drawn."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise InputError(
            f"prune: {type(model).__name__} reads several texts at once, which no calibration text "
            "gives; prune its base model"
        )


def _check_plain(model: nn.Module, at: Sequence[Site]) -> None:
    """Refuse layers with adapters or masks, or of several sites, and what no config says."""
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
        missing, otherwise = why_textless(model)
        raise InputError(
            f"prune: {needed[0]} runs the model over {missing}; {otherwise}use --preset fast "
            f"without {needed[0].split()[0]}"
        )
    if not needed:
        return bank.text
    rows = model.get_input_embeddings()
    if any(int(each["input_ids"].max()) >= rows.num_embeddings for each in bank.text):
        raise InputError(
            f"prune: the bank's text has tokens that the {rows.num_embeddings} embeddings of the "
            "model lack; calibrate this model anew"
        )
    return bank.text


def why_textless(model: nn.Module) -> tuple[str, str]:
    """Return what a bank without text lacks, and what to do about it other than to do without."""
    media = [INPUTS[name] for name in inputs_read(model) if name in INPUTS]
    if media:
        return f"the calibration set, and banks keep no {media[0]}", ""
    sees = not INPUTS.keys().isdisjoint(inspect.signature(model.forward).parameters)
    how = "calibrate on text alone, and" if sees else "calibrate"
    return "the calibration text, and the bank keeps none", f"{how} without --no-text, or "


def _check_diffusion(job: Job) -> None:
    """Refuse what counts tokens of one text, or scales layers that read one thing each."""
    if job.recipe.of not in ("prunable", "params"):
        raise InputError(
            f'prune: of="{job.recipe.of}" counts the tokens of one text, and a diffusion '
            'transformer reads others, too; give of="prunable" or of="params"'
        )
    if job.recipe.rescale:
        raise InputError(
            "prune: rescale does not work with a diffusion transformer; give rescale=False"
        )
    if job.evaluate_on is not None:
        raise InputError(
            "prune: evaluate_on does not work with a diffusion transformer; give certify_on, which "
            "compares what it predicts, and judge its images"
        )


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
    """Refuse what compares the dense model's outputs with narrower ones."""
    for batch in islice(batches or (), 1):
        with torch.no_grad(), evaluating(model):
            if DenseOutputs(model, batch, positions=1).has_logits:
                return
        raise InputError(
            f"prune: {option} compares hidden states, whose size keep_hidden changes: "
            f"{type(model).__name__} gives no logits; leave one of them out"
        )


def _warn_of_what_stays(model: nn.Module, kinds: Sequence[str], at: Sequence[Site]) -> None:
    for kind in (each for each in kinds if each in KINDS):
        some, reason = [site for site in at if site.kind == kind], why_whole(model, kind)
        if some and all(site.unit == "kv_group" and site.units == 1 for site in some):
            reason = "all its query heads share one key and value; give attn_unit='head'"
        if reason:
            message = f"prune: {kind} of {type_of(model)} stays whole: {reason}"
            warnings.warn(message, stacklevel=4)


def settled_for(asked: Recipe, at: Sequence[Site]) -> Recipe:
    """Return a recipe with what ``schedule="auto"`` stands for where no text is left to measure by.

    One pass where a norm reads what their consumers give: of Gemma-3 it is better in all pairs that
    were measured, in two thirds of the time (docs/quality.md). Else :meth:`Recipe.settled`.
    """
    if asked.schedule == "auto" and any(map(is_relative, at)):
        return replace(asked, schedule="one-pass")
    return asked.settled()


def _measures(job: Job) -> bool:
    auto = job.asked.schedule == "auto" and job.recipe.schedule == "layerwise"
    # Fewer hidden features are no states to compare with the dense model's, and of a model that is
    # written as it is solved there is nothing to compare.
    possible = auto and not job.narrows and job.walk is None and job.recipe.prunes_sites
    return possible and (job.bank is None or job.judged is not None)


def _without_gain(job: Job, at: Sequence[Site]) -> Job:
    """Solve in one pass by default where a walk gains nothing."""
    if job.walk is not None and job.certify_on is not None:
        return job  # in one pass fresh text can't be measured on block by block
    settled = settled_for(job.asked, at)
    if job.recipe.schedule == "layerwise" and settled.schedule == "one-pass":
        return _in_one_pass(job, NO_GAIN)
    return job


def _walked(job: Job) -> Job:
    """Refuse to walk blocks that can't be run one by one, or do without one by default."""
    check_finite_weights(job.model)  # before anything is run
    try:
        check_walk(job.model, job.batches)
    except InputError as error:
        if job.asked.schedule != "auto":
            raise
        return _in_one_pass(job, str(error).removeprefix("layerwise: ").partition("; use")[0])
    return job


def _in_one_pass(job: Job, reason: str) -> Job:
    note = f"Layers were solved in one pass, not one after the other: {reason}."
    recipe = replace(job.recipe, schedule="one-pass")
    return replace(job, judged=None, recipe=recipe, notes=[*job.notes, note])


def recorded(job: Job) -> Job:
    """Return a prepared job as its checkpoint has it; raise InputError if that is of another job.

    What depends on the memory that is free stays what it was: other groups have other sums.
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
