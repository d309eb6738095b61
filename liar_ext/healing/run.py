"""A run of healing: the weights that it trains, their best state, and how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from liar_ext.calibration.batches import Batch, completed, count_tokens
from liar_ext.checkpoint_store import Checkpoint
from liar_ext.distributed import all_reduce, broadcast, rank, world_size
from liar_ext.errors import InputError
from liar_ext.healing import RATE, TRAIN
from liar_ext.healing.weights import State, choose, put
from liar_ext.models.running import DECODER_IDS, DECODER_MASK, device_of, output_of
from liar_ext.progress import Bar

ROWS = 256  # logits whose softmax is in memory at once


def losses(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each row, ``(rows,)`` float32, with gradients for the student.

    ============== ================================================== ================
    output         loss                                               row
    ============== ================================================== ================
    logits         ``KL(p ‖ q) = Σ p (log p − log q)``                token, or
                                                                      sequence
    a single logit ``(z − z')²``                                      sequence
    hidden states  ``1 − cos(m, m') + mean (h − h')²``, where m is    sequence
                   the mean of h over the tokens
    ============== ================================================== ================

    Unprimed and p: the dense model. Padding does not count. No labels are used. Raises InputError
    if the outputs of the two models have different shapes.
    """
    batch = completed(teacher, batch)
    with torch.no_grad():
        name, target = _run(teacher, batch)
    _, value = _run(student, batch)
    target = target.to(value.device)
    if value.shape != target.shape:
        raise InputError(
            f"heal: the outputs of the two models must have one shape, got {tuple(value.shape)} "
            f"and {tuple(target.shape)} of the dense model; name the model that was pruned as "
            "teacher"
        )
    mask = batch.mask_of(DECODER_MASK if DECODER_IDS in batch.inputs else "attention_mask")
    if mask is not None and (value.dim() != 3 or mask.shape != value.shape[:2]):
        mask = None  # one output for each sequence
    mask = None if mask is None else mask.to(value.device)
    if name != "logits":
        return _of_states(value.float(), target.float(), mask)
    if mask is not None:
        value, target = value[mask], target[mask]
    rows = value.flatten(0, -2).split(ROWS), target.flatten(0, -2).split(ROWS)
    # The softmax of all rows would take several times the memory of the logits.
    return torch.cat(
        [checkpoint(_of_logits, *some, use_reentrant=False) for some in zip(*rows, strict=True)]
    )


@torch.no_grad()
def mean_loss(student: nn.Module, teacher: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean of :func:`losses` over all rows of some batches, which ranks share."""
    device, sums = device_of(student), torch.zeros(2, dtype=torch.float64)
    for batch in batches[rank() :: world_size()]:
        found = losses(student, teacher, batch.to(device))
        sums[0] += float(found.sum(dtype=torch.float64))
        sums[1] += len(found)
    all_reduce(sums)
    return float(sums[0] / sums[1])


def _run(model: nn.Module, batch: Batch) -> tuple[str, Tensor]:
    return output_of(model, model(**batch.to(device_of(model)).inputs))


def _of_logits(value: Tensor, target: Tensor) -> Tensor:
    value, target = value.float(), target.float()
    if value.shape[-1] == 1:
        return (value - target).square().flatten()
    dense = target.log_softmax(-1)
    return functional.kl_div(value.log_softmax(-1), dense, reduction="none", log_target=True).sum(
        -1
    )


def _of_states(value: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    distance = (value - target).square().mean(-1)
    if value.dim() == 2:  # embeddings
        return 1 - functional.cosine_similarity(value, target, dim=-1) + distance
    weight = torch.ones_like(distance) if mask is None else mask.to(distance)
    weight = weight / weight.sum(1, keepdim=True)
    pooled = [(weight[..., None] * each).sum(1) for each in (value, target)]
    return 1 - functional.cosine_similarity(*pooled, dim=-1) + (weight * distance).sum(1)


WARM_UP = 0.05  # of the budget
MEASURES = 4  # of the held-out loss, besides that before training
CLIP = 1.0
STATE = "state"  # its key in a checkpoint
BUDGETS = ("tokens", "minutes", "steps")


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Parameters
    ----------
    budget : mapping
        One of ``{"tokens": n}``, ``{"minutes": n}`` and ``{"steps": n}``.
    lr : float
        Highest learning rate.
    train : {"no-embeddings", "all", "norms", "lora"}
        ``no-embeddings``: all weights but embeddings and output head. ``lora``: adapters for all
        linear layers, merged into them at the end; needs peft.
    accumulate : int
        Batches per step, of each rank.
    seed : int
        Of the order of batches, and of adapters.
    bfloat16 : bool, optional
        Compute in bfloat16 by autocast. By default if the hardware has instructions for it.
    gradient_checkpointing : bool, optional
        Compute the activations of blocks a second time instead of storing them. By default if they
        would not fit the free memory.

    Raises
    ------
    InputError
        If a field is out of range.
    """

    budget: Mapping[str, float]
    lr: float = RATE
    train: str = TRAIN[0]
    accumulate: int = 1
    seed: int = 0
    bfloat16: bool | None = None
    gradient_checkpointing: bool | None = None

    def __post_init__(self) -> None:
        if len(self.budget) != 1 or self.unit not in BUDGETS or not 0 < self.amount < math.inf:
            raise InputError(
                f"heal: budget must be one of {', '.join(BUDGETS)} with a number above 0, got "
                f"{dict(self.budget)}"
            )
        if self.train not in TRAIN:
            raise InputError(f"heal: train must be one of {', '.join(TRAIN)}, got {self.train!r}")
        if not 0 < self.lr < math.inf or self.accumulate < 1:
            raise InputError(
                f"heal: lr must be above 0 and accumulate at least 1, got {self.lr} and "
                f"{self.accumulate}"
            )

    unit = property(lambda self: next(iter(self.budget)))
    amount = property(lambda self: next(iter(self.budget.values())))

    def on(self, device: torch.device) -> Training:
        """Return it with the precision that is best on a device, unless one was given."""
        given = self.bfloat16
        return replace(self, bfloat16=computes_bfloat16(device) if given is None else given)

    def facts(self) -> dict[str, Any]:
        """Return what a report and a checkpoint say of it."""
        return {
            "budget": dict(self.budget),
            "lr": self.lr,
            "train": self.train,
            "batches_per_step": self.accumulate,
            "seed": self.seed,
            "precision": "bfloat16" if self.bfloat16 else "float32",
        }


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


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
        self.model, self.teacher, self.batches, self.held_out = model, teacher, batches, held_out
        self.training, self.saved, self.device = training, saved, device_of(model)
        self.cast = partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=training.bfloat16
        )
        self.so_far, self.best, self.after = SoFar(), None, math.inf
        self.student, self.trained = choose(model, training.train, training.seed)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=training.lr, weight_decay=0.0)

    def train(self, progress: bool) -> None:
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
        with Bar(total=100, desc="heal", disable=not progress) as bar:
            while self.done() < 1 and self.step():
                self.so_far.seconds = broadcast(time.monotonic() - start)
                if self.done() * MEASURES >= len(self.so_far.curve):
                    self.measure()
                    self.so_far.seconds = broadcast(time.monotonic() - start)
                if self.saved is not None and self.saved.due(STATE):
                    self.save()
                bar.update(int(100 * min(self.done(), 1)) - bar.n)

    def done(self, ahead: float = 0.0) -> float:
        """Return the fraction of the budget that is spent, and ``ahead`` of its unit more."""
        so_far = self.so_far
        spent = {"tokens": so_far.tokens, "steps": so_far.steps, "minutes": so_far.seconds / 60}
        return (spent[self.training.unit] + ahead) / self.training.amount

    def step(self) -> bool:
        """Do one step; return False, and leave the weights, if gradients are not finite."""
        so_far, each = self.so_far, self.training.accumulate * world_size()
        self.optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64)  # rows and tokens of all ranks
        for index in range(so_far.steps * each, (so_far.steps + 1) * each)[rank() :: world_size()]:
            batch = self.batches[self.place(index)].to(self.device)
            with self.cast():
                found = losses(self.student, self.teacher, batch)
            found.sum().backward()
            sums[0] += len(found)
            sums[1] += count_tokens(batch)
        all_reduce(sums)
        rows, tokens = map(int, sums)
        torch._foreach_div_(self.gradients(), rows)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        if not torch.isfinite(norm):
            return False
        minutes = so_far.seconds / 60 / max(so_far.steps, 1)
        middle = self.done(
            {"tokens": tokens, "steps": 1, "minutes": minutes}[self.training.unit] / 2
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.lr * schedule(middle)
        self.optimizer.step()
        so_far.steps, so_far.tokens = so_far.steps + 1, so_far.tokens + tokens
        return True

    def gradients(self) -> list[Tensor]:
        """Return the gradients of what was used, added up over all ranks."""
        trained = list(self.trained.values())
        used = torch.tensor([each.grad is not None for each in trained], dtype=torch.int8)
        all_reduce(used)  # an expert may be used by the text of one rank alone
        for each, ranks in zip(trained, used.tolist(), strict=True):
            if ranks and each.grad is None:
                each.grad = torch.zeros_like(each)
        gradients = [each.grad for each in trained if each.grad is not None]
        all_reduce(*gradients)
        return gradients

    def place(self, index: int) -> int:
        """Return the batch to train on: each round has an order of its own."""
        turn, at = divmod(index, len(self.batches))
        generator = torch.Generator().manual_seed(self.training.seed + turn)
        return int(torch.randperm(len(self.batches), generator=generator)[at])

    def measure(self) -> None:
        """Measure the held-out loss, and keep the weights if none were better."""
        loss, best = self.loss(self.student), min((y for _, y in self.so_far.curve), default=None)
        if best is not None and loss < best:
            self.best = {name: value.detach().cpu().clone() for name, value in self.trained.items()}
        self.so_far.curve.append([self.so_far.tokens, loss])

    def loss(self, student: nn.Module) -> float:
        """Return the held-out loss of a model."""
        with self.cast():
            return mean_loss(student, self.teacher, self.held_out)

    def save(self) -> None:
        """Save everything that the next step depends on."""
        tensors = {f"weight/{name}": value for name, value in self.trained.items()}
        tensors |= {f"best/{name}": value for name, value in (self.best or {}).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
        said = f"healing after {self.so_far.tokens:,} tokens"
        self.saved.put(STATE, tensors, {**asdict(self.so_far), "said": said})

    def load(self, stored: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`save` has written."""
        self.so_far = SoFar(**{name: facts[name] for name in asdict(self.so_far)})
        groups: dict[str, dict] = {"weight": {}, "best": {}, "optimizer": {}}
        for name in stored:
            group, _, rest = name.partition("/")
            groups[group][rest] = stored[name]
        put(self.trained, groups["weight"])
        self.best = groups["best"] or None
        state: dict[int, State] = {}
        for name, value in groups["optimizer"].items():
            index, _, rest = name.partition("/")
            state.setdefault(int(index), {})[rest] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def finish(self, original: State) -> bool:
        """Give the model the best state, as it will be saved; tell whether it is better.

        Merged adapters and weights in half precision are measured again, as they are rounded.
        """
        curve = [loss for _, loss in self.so_far.curve]
        if self.best is not None:
            put(self.trained, self.best)
        if self.training.train == "lora":
            self.student.merge_and_unload() if self.best else self.student.unload()
        self.after = min(curve, default=math.inf)
        named = dict(self.model.named_parameters())
        half = any(value.dtype != named[name].dtype for name, value in original.items())
        if self.best is not None and (half or self.training.train == "lora"):
            put(named, {name: named[name].to(value.dtype) for name, value in original.items()})
            self.after = self.loss(self.model)
        improved = self.best is not None and self.after < curve[0]
        if not improved:
            put(named, original)
            self.after = curve[0] if curve else math.inf
        return improved


def schedule(done: float) -> float:
    """Return the factor of the learning rate when a fraction of the budget is spent."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1)))
