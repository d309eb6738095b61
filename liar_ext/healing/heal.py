"""Heal a pruned model: train it for a short while towards the outputs of the dense model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from torch import nn

from liar_ext.calibration.bank_source import digest_of, fingerprint_of
from liar_ext.calibration.batches import Batches, read_batches
from liar_ext.checkpoint_store import Checkpoint, opened
from liar_ext.distributed import world_size
from liar_ext.errors import InputError
from liar_ext.healing.run import Healing, Training
from liar_ext.healing.weights import (
    block_paths,
    check_memory,
    checkpointed,
    needs_checkpointing,
    set_dtypes,
)
from liar_ext.models.running import device_of, evaluating


def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    held_out: Batches,
    budget: Mapping[str, float],
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool = False,
    **training: Any,
) -> dict[str, Any]:
    """Train a pruned model in place towards the outputs of the dense model.

    The loss compares outputs and uses no labels, see :func:`liar_ext.healing.run.losses`.
    AdamW without weight decay; the learning rate rises over the first twentieth of the budget and
    then falls to 0 as a cosine; gradients are clipped to norm 1; dropout is off. The held-out loss
    is measured before training and four times during it. The model gets the best state that was
    measured. If none is better than the start, it stays bit-identical.

    Parameters
    ----------
    model : nn.Module
        The pruned model. Weights in half precision are trained in float32 and rounded at the end.
    teacher : nn.Module
        The dense model.
    batches : iterable of mapping or Tensor
        Text to train on, see :func:`liar_ext.calibration.batches.read_batches`. It is repeated, in
        another order, until the budget is spent.
    held_out : iterable of mapping or Tensor
        Text that is never trained on.
    budget : mapping
        One of ``{"tokens": n}``, ``{"minutes": n}`` and ``{"steps": n}``. Padding does not count.
    checkpoint : path or Checkpoint, optional
        Folder to save the state in, and to resume from. The result is bit-identical to that of a
        run without interruption, unless the budget is in minutes.
    progress : bool
        Show a progress bar.
    **training
        ``lr``, ``train``, ``accumulate``, ``seed``, ``bfloat16`` and ``gradient_checkpointing``, as
        fields of :class:`liar_ext.healing.run.Training`.

    Returns
    -------
    dict
        The section ``heal`` of a report: held-out loss ``before`` and ``after``, ``improved``,
        ``tokens``, ``steps``, ``seconds``, ``curve`` (pairs of tokens and held-out loss), settings.

    Raises
    ------
    InputError
        If an argument is out of range, peft is missing, outputs can't be compared or aren't finite,
        the memory is too small, or the checkpoint belongs to another run.

    Notes
    -----
    An interrupt (Ctrl-C) ends training, and the best state so far is kept. With a checkpoint
    KeyboardInterrupt is then raised, and the run can be resumed. Processes that have met by
    :func:`liar_ext.distributed.join` share each step: n of them do what one does with n times
    ``accumulate``, within rounding.
    """
    batches, held_out = list(read_batches(batches)), list(read_batches(held_out))
    training = Training(budget, **training).on(device_of(model))
    if not batches or not held_out:
        raise InputError("heal: needs text to train on and held-out text; give more text")
    if any(each.is_meta for one in (model, teacher) for each in one.parameters()):
        raise InputError(
            "heal: all weights must be in memory, and some are offloaded; use a larger device, or "
            "the CPU"
        )
    settings, recompute = training.facts(), training.gradient_checkpointing
    paths = block_paths(model)
    original = {name: each.detach().cpu().clone() for name, each in model.named_parameters()}
    wanted = {name: each.requires_grad for name, each in model.named_parameters()}
    interrupted = False
    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            stack.callback(parameter.requires_grad_, wanted[name])
        stack.callback(set_dtypes, model, original)
        saved = stack.enter_context(opened(checkpoint))
        for each in (model, teacher):
            stack.enter_context(evaluating(each))
        set_dtypes(model)
        run = Healing(model, teacher, batches, held_out, training, saved)
        check_memory(run.device, run.trained.values())
        try:
            if recompute is None:
                recompute = needs_checkpointing(run.student, batches, run.trained.values())
            if saved is not None:
                facts = settings | {
                    "ranks": world_size(),
                    "model": fingerprint_of(original.items()),
                    "teacher": fingerprint_of(teacher.named_parameters()),
                    "text": [digest_of(batches), digest_of(held_out)],
                }
                recompute = saved.begin({"heal": facts}, recompute=recompute)["recompute"]
            with checkpointed(model, paths if recompute else ()):
                run.train(progress)
        except KeyboardInterrupt:
            if world_size() > 1:  # the ranks may have stopped at different places
                run.best = None
                raise
            interrupted = True
        finally:
            improved = run.finish(original)
    so_far = run.so_far
    if interrupted and (checkpoint is not None or not so_far.curve):
        raise KeyboardInterrupt
    return {
        "before": so_far.curve[0][1],
        "after": run.after,
        "improved": improved,
        "interrupted": interrupted,
        **asdict(so_far),
        "held_out_sequences": sum(map(len, held_out)),
        "trained_params": sum(each.numel() for each in run.trained.values()),
        **settings,
        "budget": f"{training.amount:,} {training.unit}",
        "gradient_checkpointing": recompute,
    }
