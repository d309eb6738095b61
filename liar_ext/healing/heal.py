"""Heal a pruned model: train it for a short while towards the outputs of the dense model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from liar_ext.calibration.batches import Batch, Batches, read_batches
from liar_ext.calibration.kept_text import digest_of, fingerprint_of
from liar_ext.checkpoint_store import Checkpoint, opened
from liar_ext.distributed import world_size
from liar_ext.errors import InputError
from liar_ext.healing import TRAIN
from liar_ext.healing.run import Healing
from liar_ext.healing.weights import block_paths, checkpointed, needs_checkpointing, set_dtypes
from liar_ext.models.running import device_of, evaluating

BUDGETS = ("tokens", "minutes", "steps")


def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    held_out: Batches,
    budget: Mapping[str, float],
    lr: float = 1e-4,
    train: str = "no-embeddings",
    accumulate: int = 1,
    seed: int = 0,
    bfloat16: bool | None = None,
    gradient_checkpointing: bool | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool = False,
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
    lr : float
        Highest learning rate.
    train : {"no-embeddings", "all", "norms", "lora"}
        ``no-embeddings``: all weights but embeddings and output head. ``lora``: adapters for all
        linear layers, merged into them at the end; needs peft.
    accumulate : int
        Batches per step.
    seed : int
        Of the order of batches, and of adapters.
    bfloat16 : bool, optional
        Compute in bfloat16 by autocast. By default if the hardware has instructions for it.
    gradient_checkpointing : bool, optional
        Compute the activations of blocks a second time instead of storing them. By default if they
        would not fit the free memory.
    checkpoint : path or Checkpoint, optional
        Folder to save the state in, and to resume from. The result is bit-identical to that of a
        run without interruption, unless the budget is in minutes.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict
        The section ``heal`` of a report: held-out loss ``before`` and ``after``, ``improved``,
        ``tokens``, ``steps``, ``seconds``, ``curve`` (pairs of tokens and held-out loss), settings.

    Raises
    ------
    InputError
        If an argument is out of range, peft is missing, outputs can't be compared or aren't finite,
        or the checkpoint belongs to another run.

    Notes
    -----
    An interrupt (Ctrl-C) ends training, and the best state so far is kept. With a checkpoint
    KeyboardInterrupt is then raised, and the run can be resumed. One process only.
    """
    batches, held_out = list(read_batches(batches)), list(read_batches(held_out))
    unit, amount = _check(batches, held_out, budget, lr, train, accumulate)
    if any(each.is_meta for one in (model, teacher) for each in one.parameters()):
        raise InputError(
            "heal: all weights must be in memory, and some are offloaded; use a larger device, or "
            "the CPU"
        )
    device = device_of(model)
    bfloat16 = computes_bfloat16(device) if bfloat16 is None else bfloat16
    settings = {"budget": {unit: amount}, "lr": lr, "train": train, "batches_per_step": accumulate}
    settings |= {"seed": seed, "precision": "bfloat16" if bfloat16 else "float32"}
    paths = block_paths(model)
    original = {name: each.detach().cpu().clone() for name, each in model.named_parameters()}
    wanted = {name: each.requires_grad for name, each in model.named_parameters()}
    interrupted = False
    with opened(checkpoint) as saved, evaluating(model), evaluating(teacher):
        try:
            set_dtypes(model)
            run = Healing(model, teacher, batches, held_out, settings, saved)
            try:
                recompute = gradient_checkpointing
                if recompute is None:
                    recompute = needs_checkpointing(run.student, batches, run.trained.values())
                if saved is not None:
                    facts = settings | {
                        "model": fingerprint_of(original.items()),
                        "teacher": fingerprint_of(teacher.named_parameters()),
                        "text": [digest_of(batches), digest_of(held_out)],
                    }
                    recompute = saved.begin({"heal": facts}, recompute=recompute)["recompute"]
                with checkpointed(model, paths if recompute else ()):
                    run.train(progress)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                improved = run.finish(original)
        finally:
            set_dtypes(model, original)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted[name])
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
        "budget": f"{amount:,} {unit}",
        "gradient_checkpointing": recompute,
    }


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, name, bool)() for name in known)
    return False


def _check(
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    budget: Mapping[str, float],
    lr: float,
    train: str,
    accumulate: int,
) -> tuple[str, float]:
    """Return unit and amount of the budget; raise InputError unless all arguments can be."""
    (unit, amount), *more = budget.items() if budget else [("", 0)]
    if more or unit not in BUDGETS or not 0 < amount < math.inf:
        raise InputError(
            f"heal: budget must be one of {', '.join(BUDGETS)} with a number above 0, got "
            f"{dict(budget)}"
        )
    if train not in TRAIN:
        raise InputError(f"heal: train must be one of {', '.join(TRAIN)}, got {train!r}")
    if not 0 < lr < math.inf or accumulate < 1:
        raise InputError(
            f"heal: lr must be above 0 and accumulate at least 1, got {lr} and {accumulate}"
        )
    if not batches or not held_out:
        raise InputError("heal: needs text to train on and held-out text; give more text")
    if world_size() > 1:
        raise InputError("heal: runs in one process; start it without torchrun")
    return unit, amount
