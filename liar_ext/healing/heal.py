"""Heal a pruned model: train it for a short while towards the outputs of the dense model."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_twice

from liar_ext.calibration.batches import Batch, Batches, count_tokens, read_batches
from liar_ext.calibration.saved_sums import digest_of, fingerprint_of
from liar_ext.calibration.taps import replaced
from liar_ext.healing.training import (
    State,
    Teacher,
    Training,
    as_part,
    check_memory,
    check_usable,
    choose,
    losses,
    mean_loss,
    needs_checkpointing,
    part_of,
    put,
    rates,
    set_dtypes,
    sharded,
    whole,
)
from liar_ext.models.recipe_checks import check_keywords
from liar_ext.models.registry import config_digest
from liar_ext.models.running import computes_bfloat16, device_of, evaluating
from liar_ext.models.sites import sites
from liar_ext.system.checkpoint_store import Checkpoint, opened
from liar_ext.system.distributed import all_reduce, broadcast, exchanging, rank, world_size
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar, showing_bars

MEASURES = 4  # of the held-out loss, besides that before training
LOWER = 1 / 3  # of the learning rate, where the held-out loss has clearly risen
RISEN = 1.05  # times the least one; smaller rises pass as the rate falls
CLIP = 1.0
WARM_UP = 0.3  # of the budget: AdamW's first steps are equally long for all weights, and do harm
STATE = "state"  # its key in a checkpoint


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

    The loss compares outputs and uses no labels, see :func:`liar_ext.healing.training.losses`.
    AdamW without weight decay; learning rates, see :func:`liar_ext.healing.training.rates`, rise
    over the first three tenths of the budget and fall to 0 as a cosine; gradients are clipped to
    norm 1; dropout is off. The held-out loss is measured before training and four times during it.
    Where it is more than 5 % above the least, training goes on from the best state with a third of
    the rates. The model gets the best state that was measured. If none is better than the start, it
    stays bit-identical.

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
        fields of :class:`liar_ext.healing.training.Training`.

    Returns
    -------
    dict
        The section ``heal`` of a report: held-out loss ``before`` and ``after``, ``improved``,
        ``diverged`` (gradients were not finite: an early end), ``tokens``, ``steps``, ``seconds``,
        ``curve`` (pairs of tokens and held-out loss), settings.

    Raises
    ------
    InputError
        If an argument is out of range, the teacher is the model itself, peft is missing, outputs
        can't be compared or aren't finite, the memory is too small, or the checkpoint belongs to
        another run.

    Notes
    -----
    An interrupt (Ctrl-C) ends training, and the best state so far is kept. With a checkpoint
    KeyboardInterrupt is then raised, and the run can be resumed. Processes that have met by
    :func:`liar_ext.distributed.join` share each step: n of them do what one does with n times
    ``accumulate``, within rounding. Each holds the whole dense model, but, as in FSDP, only a part
    of what is trained, of its gradients and moments.
    """
    if model is teacher or not isinstance(teacher, nn.Module):
        raise InputError(
            "heal: the teacher must be the dense model, loaded on its own, got "
            f"{'the pruned model itself' if model is teacher else type(teacher).__name__}"
        )
    batches, held_out = list(read_batches(batches)), list(read_batches(held_out))
    if not batches or not held_out:
        raise InputError("heal: needs text to train on and held-out text; give more text")
    check_usable((model, teacher), batches, held_out)
    check_keywords("heal", training, Training.__annotations__, {})
    training = Training(budget, **training)
    if training.bfloat16 is None:
        training = replace(training, bfloat16=computes_bfloat16(device_of(model)))
    settings, recompute = training.facts(), training.gradient_checkpointing
    paths = dict.fromkeys(site.path for site in sites(model))
    original = {name: each.detach().cpu().clone() for name, each in model.named_parameters()}
    interrupted = False
    with ExitStack() as stack, showing_bars(progress):
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        stack.callback(set_dtypes, model, original)
        stack.enter_context(torch.inference_mode(False))  # with gradients
        saved = stack.enter_context(opened(checkpoint))
        for each in (model, teacher):
            stack.enter_context(evaluating(each))
        set_dtypes(model)
        run = Healing(model, teacher, batches, held_out, training, saved)
        try:
            check_memory(run.device, run.trained.values())
            if recompute is None:
                recompute = needs_checkpointing(run.student, batches, run.trained.values())
            if saved is not None:
                facts = {**settings, **run.identity(original)}
                recompute = saved.begin({"heal": facts}, recompute=recompute)["recompute"]
            with exchanging(), run.spread(map(model.get_submodule, paths)) as blocks:
                with checkpointed(blocks if recompute else ()):
                    run.train()
        except KeyboardInterrupt:
            if world_size() > 1:
                raise
            interrupted = True
        finally:
            improved = run.finish(original)
    if interrupted and (checkpoint is not None or not run.so_far.curve):
        raise KeyboardInterrupt
    return {
        "before": run.so_far.curve[0][1],
        "after": run.after,
        "improved": improved,
        "interrupted": interrupted,
        "diverged": run.diverged,
        **asdict(run.so_far),
        "last_lr": run.lr(),
        "held_out_sequences": sum(map(len, held_out)),
        "trained_params": sum(each.numel() for each in run.trained.values()),
        **settings,
        "budget": f"{training.amount:,} {training.unit}",
        "gradient_checkpointing": recompute,
    }


@dataclass
class SoFar:
    """How far a run is."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # held-out measurements included
    curve: list[list[float]] = field(default_factory=list)  # pairs of tokens and held-out loss


class Healing:
    """A run of :func:`heal`: the weights that it trains, their best state, and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        training: Training,
        saved: Checkpoint | None,
    ) -> None:
        self.model, self.batches, self.held_out = model, batches, held_out
        self.training, self.saved, self.device = training, saved, device_of(model)
        self.teacher = Teacher(teacher)
        kind, half = self.device.type, training.bfloat16
        self.cast = partial(torch.autocast, kind, torch.bfloat16, enabled=half)
        self.so_far, self.best, self.after, self.diverged = SoFar(), None, math.inf, False
        self.student, self.trained = choose(model, training.train, training.seed)
        self.optimizer: torch.optim.Optimizer | None = None
        self.rates: dict[str, float] = {}

    def identity(self, original: State) -> dict[str, Any]:
        """Return what a checkpoint is of, beside settings."""
        return {
            "ranks": world_size(),
            "model": fingerprint_of(original.items()),
            "configs": [config_digest(each) for each in (self.model, self.teacher.model)],
            "trained": fingerprint_of(self.trained.items()),
            "teacher": fingerprint_of(self.teacher.model.named_parameters()),
            "text": [digest_of(self.batches), digest_of(self.held_out)],
        }

    @contextmanager
    def spread(self, blocks: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
        """Train a copy that is spread over the ranks, if there are several; yield its blocks."""
        before = self.student, self.trained
        self.rates = rates(self.model, self.trained, self.training)
        with sharded(self.student, list(blocks)) as (self.student, copies):
            named = dict(self.student.named_parameters())
            self.trained = {name: named[name] for name in self.trained}
            groups = [{"params": [each], "name": name} for name, each in self.trained.items()]
            how = {"weight_decay": 0.0, "fused": self.device.type in ("cpu", "cuda")}
            self.optimizer = torch.optim.AdamW(groups, **how)
            parts = world_size() > 1
            try:
                yield copies
                if parts and self.best is not None:
                    put(self.trained, self.best)
                    self.best = {name: whole(each).cpu() for name, each in self.trained.items()}
                    parts = False
            finally:
                self.best = None if parts else self.best  # ranks may be at different places
                self.student, self.trained = before

    def train(self) -> None:
        """Train until the budget is spent or the weights are no longer finite."""
        known = None if self.saved is None else self.saved.get(STATE)
        start = time.monotonic()
        if known is None:
            self.measure()
        else:
            self.load(*known)
            start -= self.so_far.seconds
        if not math.isfinite(self.so_far.curve[0][1]):
            raise InputError(
                "heal: the outputs of the pruned or the dense model are not finite on the held-out "
                "text; look for damaged weights, or load both in float32"
            )
        with Bar(total=100, desc="heal") as bar:
            while self.done() < 1 and self.step():
                self.so_far.seconds = broadcast(time.monotonic() - start)
                if self.done() * MEASURES >= len(self.so_far.curve):
                    self.measure()
                    self.so_far.seconds = broadcast(time.monotonic() - start)
                if self.saved is not None and broadcast(self.saved.due(STATE)):
                    self.save()
                bar.update(int(100 * min(self.done(), 1)) - bar.n)

    def done(self, ahead: float = 0.0) -> float:
        """Return the fraction of the budget that is spent, and ``ahead`` of its unit more."""
        so_far = self.so_far
        spent = {"tokens": so_far.tokens, "steps": so_far.steps, "minutes": so_far.seconds / 60}
        return (spent[self.training.unit] + ahead) / self.training.amount

    def lr(self, name: str | None = None) -> float:
        """Return the highest learning rate, of a parameter or of all, after all too high ones."""
        rate = self.rates[name] if name else max(self.rates.values(), default=0.0)
        found = [loss for _, loss in self.so_far.curve]
        back = sum(not loss <= RISEN * min(found[:at]) for at, loss in enumerate(found) if at)
        return rate * LOWER**back

    def step(self) -> bool:
        """Do one step; return False, and leave the weights, if gradients are not finite."""
        so_far, each = self.so_far, self.training.accumulate * world_size()
        self.optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64)  # rows and tokens of all ranks
        for index in range(so_far.steps * each, (so_far.steps + 1) * each)[rank() :: world_size()]:
            turn, at = divmod(index, len(self.batches))  # each turn has an order of its own
            generator = torch.Generator().manual_seed(self.training.seed + turn)
            order = torch.randperm(len(self.batches), generator=generator)
            batch = self.batches[int(order[at])]
            with self.cast():
                found = losses(self.student, self.teacher(batch))
            found.sum().backward()
            sums[0] += len(found)
            sums[1] += count_tokens(batch)
        all_reduce(sums)
        rows, tokens = map(int, sums)
        gradients = [each.grad for each in self.trained.values() if each.grad is not None]
        torch._foreach_div_(gradients, rows / world_size())  # FSDP gives means over the ranks
        norm = whole(nn.utils.clip_grad_norm_(self.trained.values(), CLIP))
        if not torch.isfinite(norm):
            self.diverged = True
            return False
        minutes = so_far.seconds / 60 / max(so_far.steps, 1)
        step = {"tokens": tokens, "steps": 1, "minutes": minutes}[self.training.unit]
        middle = self.done(step / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(group["name"]) * schedule(middle)
        self.optimizer.step()
        so_far.steps, so_far.tokens = so_far.steps + 1, so_far.tokens + tokens
        return True

    def measure(self) -> None:
        """Measure the held-out loss; keep the best weights, or go back to them, with a lower lr."""
        so_far, loss = self.so_far, self.loss(self.student)
        least = min((y for _, y in so_far.curve), default=math.inf)
        if loss < least:
            self.best = {n: part_of(each).cpu().clone() for n, each in self.trained.items()}
        elif self.best is not None and not loss <= RISEN * least:
            put(self.trained, self.best)
            for state in self.optimizer.state.values():
                state["exp_avg"].zero_()  # its steps begin small again, of the scales seen so far
        so_far.curve.append([so_far.tokens, loss])

    def loss(self, student: nn.Module) -> float:
        """Return the held-out loss of a model."""
        with self.cast():
            return mean_loss(student, self.teacher, self.held_out)

    def save(self) -> None:
        """Save everything that the next step depends on."""
        tensors = {f"weight/{name}": part_of(value) for name, value in self.trained.items()}
        tensors |= {f"best/{name}": value for name, value in (self.best or {}).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{n}": part_of(value) for n, value in state.items()}
        said = f"healing after {self.so_far.tokens:,} tokens"
        own = {f"{rank()}/{name}": value for name, value in tensors.items()}
        self.saved.put_shared(STATE, own, {**asdict(self.so_far), "said": said})

    def load(self, stored: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`save` has written."""
        self.so_far = SoFar(**{name: facts[name] for name in asdict(self.so_far)})
        groups: dict[str, dict] = {"weight": {}, "best": {}, "optimizer": {}}
        for name in stored:
            owner, group, rest = name.split("/", 2)
            value = stored[name]  # which the first rank hands out to all
            if owner == str(rank()):
                groups[group][rest] = value
        put(self.trained, groups["weight"])
        self.best = groups["best"] or None
        state, parameters = defaultdict(dict), list(self.trained.values())
        for name, value in groups["optimizer"].items():
            index, rest = name.split("/")
            part = as_part(value, parameters[int(index)]) if value.dim() else value
            state[int(index)][rest] = part
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(state)})

    def finish(self, original: State) -> bool:
        """Give the model the best state, measured again if it is rounded; tell if it is better."""
        curve = [loss for _, loss in self.so_far.curve]
        self.after = min(curve, default=math.inf)
        improved = self.best is not None and self.after < curve[0]
        if improved:
            put(self.trained, self.best)
        if self.training.train == "lora":
            self.student.merge_and_unload() if improved else self.student.unload()
        named = dict(self.model.named_parameters())
        half = any(value.dtype != named[name].dtype for name, value in original.items())
        if improved and (half or self.training.train == "lora"):
            put(named, {name: named[name].to(value.dtype) for name, value in original.items()})
            self.after = self.loss(self.model)
            improved = self.after < curve[0]
        if not improved:
            put(named, original)
            self.after = curve[0] if curve else math.inf
        return improved


def schedule(done: float) -> float:
    """Return the factor of the learning rate after a fraction of the budget."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1)))


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks compute their activations a second time in the backward pass."""
    with ExitStack() as stack:
        for block in blocks:
            twice = partial(computed_twice, block.forward, use_reentrant=False)
            stack.enter_context(replaced(block, twice))
        yield
