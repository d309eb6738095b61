"""How a pruned model is trained: settings, weights, memory, and the loss towards the dense one."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from liar_ext.calibration.batches import Batch, completed, count_tokens
from liar_ext.calibration.collect import check_not_padding
from liar_ext.healing import OF_SIZE, RATE, TRAIN
from liar_ext.models.plan import is_number
from liar_ext.models.running import LOGITS, device_of, output_of, predicts_next_token, token_weights
from liar_ext.system.distributed import all_reduce, local_world_size, rank, world_size
from liar_ext.system.environment import available_memory
from liar_ext.system.errors import InputError, refusing

BUDGETS = ("tokens", "minutes", "steps")
LORA_RANK = 16
OF_TRAINED = 3  # times their bytes: gradients and two moments
OF_FREE = 0.8  # of the free memory may be used
OF_OUTPUTS = 0.1  # of the free memory that outputs of the dense model may take
AT_ONCE = 1 << 19  # logits whose softmax is taken at once: ten rows of 50,000 stay in caches
GIB = 2**30
State = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How a model is trained; InputError is raised if a field is out of range.

    Parameters
    ----------
    budget : mapping
        One of ``{"tokens": n}``, ``{"minutes": n}`` and ``{"steps": n}``.
    lr : float, optional
        Highest learning rate. By default each parameter has its own, see :func:`rates`.
    train : {"no-embeddings", "all", "norms", "lora"}
        ``no-embeddings``: all weights but embeddings and output head. ``lora``: adapters for all
        linear layers, merged into them at the end; needs peft. Weights with ``requires_grad=False``
        stay as they are, unless all have it.
    accumulate : int
        Batches per step, of each rank.
    seed : int
        Of the order of batches, and of adapters.
    bfloat16 : bool, optional
        Compute in bfloat16 by autocast. By default if the hardware has instructions for it.
    gradient_checkpointing : bool, optional
        Compute the activations of blocks a second time instead of storing them. By default if they
        would not fit the free memory.
    """

    budget: Mapping[str, float]
    lr: float | None = None
    train: str = TRAIN[0]
    accumulate: int = 1
    seed: int = 0
    bfloat16: bool | None = None
    gradient_checkpointing: bool | None = None

    def __post_init__(self) -> None:
        one = isinstance(self.budget, Mapping) and len(self.budget) == 1 and self.unit in BUDGETS
        if not (one and is_number(self.amount) and 0 < self.amount < math.inf):
            raise InputError(
                f"heal: budget must be one of {', '.join(BUDGETS)} with a number above 0, got "
                f"{self.budget!r}"
            )
        if self.train not in TRAIN:
            raise InputError(f"heal: train must be one of {', '.join(TRAIN)}, got {self.train!r}")
        if self.lr is not None and not (is_number(self.lr) and 0 < self.lr < math.inf):
            raise InputError(f"heal: lr must be above 0, got {self.lr!r}")
        for name, value, least in (("accumulate", self.accumulate, 1), ("seed", self.seed, 0)):
            if not (is_number(value, Integral) and value >= least):
                raise InputError(f"heal: {name} must be at least {least}, got {value!r}")

    unit = property(lambda self: next(iter(self.budget)))
    amount = property(lambda self: next(iter(self.budget.values())))

    def facts(self) -> dict[str, Any]:
        """Return the settings for a report and a checkpoint."""
        return {
            "budget": dict(self.budget),
            "lr": self.lr,
            "train": self.train,
            "batches_per_step": self.accumulate,
            "seed": self.seed,
            "precision": "bfloat16" if self.bfloat16 else "float32",
        }


def check_usable(models: Sequence[nn.Module], *texts: Sequence[Batch]) -> None:
    """Raise InputError if weights are offloaded, or a batch holds only padding."""
    if any(each.is_meta for model in models for each in model.parameters()):
        raise InputError(
            "heal: all weights must be in memory, and some are offloaded; use a larger device, or "
            "the CPU"
        )
    for index, batch in (pair for text in texts for pair in enumerate(text)):
        check_not_padding(index, batch, "heal")


def choose(model: nn.Module, train: str, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model to train, with adapters for ``lora``, and its trained parameters by name."""
    if train == "lora":
        hint = 'pip install peft, or choose train="no-embeddings"'
        with refusing('heal: train="lora" needs peft', hint, Exception):
            from peft import LoraConfig, get_peft_model
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(seed)
            model = get_peft_model(model, config)
    left, norms = set(), set()
    frozen = not any(each.requires_grad for each in model.parameters())  # all, as for inference
    for module in model.modules():
        own = {id(each) for each in module.parameters(recurse=False)}
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            left |= own
        if "norm" in type(module).__name__.lower():
            norms |= own
    trained = {
        name: each
        for name, each in model.named_parameters()
        if (each.requires_grad or (frozen and each.is_floating_point()))
        and can_split(each)
        and (train != "no-embeddings" or id(each) not in left)
        and (train != "norms" or id(each) in norms)
    }
    if not trained:
        raise InputError(f"heal: train={train!r} leaves no weights to train; choose another")
    kept = {id(each) for each in trained.values()}
    for each in model.parameters():
        each.requires_grad_(id(each) in kept)
    return model, trained


def rates(model: nn.Module, trained: Mapping[str, Tensor], training: Training) -> dict[str, float]:
    """Return the highest learning rate of each trained parameter: ``lr``, if that is given.

    Else AdamW, whose steps are as long as the rate, changes the matrices of a causal language model
    in proportion to their size::

        rate(W) = OF_SIZE · √(mean W²)        of a matrix, or a stack of some
        rate(b) = RATE                        of a vector, an adapter, zeros, or another model
    """
    sized = predicts_next_token(model) and training.train != "lora"

    def rate(value: Tensor) -> float:
        if training.lr is not None:
            return training.lr
        root = float(value.detach().float().square().mean().sqrt())
        return OF_SIZE * root if sized and value.dim() > 1 and root else RATE

    return {name: rate(value) for name, value in trained.items()}


@contextmanager
def sharded(
    student: nn.Module, blocks: Sequence[nn.Module]
) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield a copy of a model and its blocks with weights split over several ranks (FSDP)."""
    if world_size() == 1:
        yield student, list(blocks)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second to import

    names, device = {module: name for name, module in student.named_modules()}, device_of(student)
    try:
        copied = copy.deepcopy(student.to("cpu"))
        copies = [copied.get_submodule(names[block]) for block in blocks]
        ignored = {each for each in copied.parameters() if not can_split(each)}
        for each in ignored:
            each.data = each.data.to(device)
        owners = Counter(each for block in copies for each in block.parameters())
        mesh = init_device_mesh(device.type, (world_size(),))  # FSDP moves the parts there
        # Held-out text has no backward pass, after which the root would be split again.
        how = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": ignored}
        for module in (*(copies if max(owners.values(), default=1) == 1 else ()), copied):
            fully_shard(module, **how)
        copied.set_reduce_scatter_unused_params(True)  # of experts without a token
        yield copied, copies
    finally:
        student.to(device)


def can_split(parameter: Tensor) -> bool:
    """Tell whether FSDP can split a parameter: not a lone number, and none without values."""
    return parameter.dim() > 0 and parameter.numel() > 0


def part_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without its gradient."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which each rank holds a part; all ranks call this."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def as_part(value: Tensor, of: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is split as another is."""
    if not hasattr(of, "to_local"):
        return value
    from torch.distributed.tensor import DTensor

    shape = {"shape": of.shape, "stride": of.stride()}
    return DTensor.from_local(value, of.device_mesh, of.placements, run_check=False, **shape)


def put(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy values into parameters, or into what this rank holds of them."""
    for name, value in state.items():
        part_of(parameters[name]).copy_(value)


def set_dtypes(model: nn.Module, like: State | None = None) -> None:
    """Give parameters in half precision float32, or all those of others; buffers keep theirs."""
    for name, each in model.named_parameters():
        dtype = each.dtype if like is None else like[name].dtype
        half = like is None and dtype.is_floating_point and dtype.itemsize < 4
        each.data = each.data.to(torch.float32 if half else dtype)


def _free(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def check_memory(device: torch.device, trained: Iterable[Tensor]) -> None:
    """Raise InputError if gradients and moments of the trained weights do not fit the memory."""
    here = 1 if device.type == "cuda" else local_world_size()  # ranks that share a memory
    need = OF_TRAINED * sum(each.nbytes for each in trained) * here / world_size()
    free = _free(device)
    if free is not None and need > free:
        raise InputError(
            f"heal: training takes {need / GIB:.1f} GiB for gradients and moments, and "
            f"{free / GIB:.1f} GiB are free; train fewer weights (norms or lora), or use a larger "
            "device, or several"
        )


def needs_checkpointing(
    model: nn.Module, batches: Sequence[Batch], trained: Iterable[Tensor]
) -> bool:
    """Tell whether the activations of the largest batch would not fit the free memory."""
    device, largest = device_of(model), max(batches, key=count_tokens)
    if (free := _free(device)) is None:
        return False
    stored = len(largest) * activation_bytes(model, largest.select([0]).to(device))
    return stored + OF_TRAINED * sum(each.nbytes for each in trained) > OF_FREE * free


def activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward pass stores for the backward pass, weights excluded."""
    held: list[Tensor] = []  # so that no address is used twice

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model(**completed(model, batch).inputs)
    storages = {each.data_ptr(): each.nbytes() for each in map(Tensor.untyped_storage, held)}
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    return sum(size for place, size in storages.items() if place not in weights)


@dataclass(frozen=True)
class Target:
    """The output of the dense model for a batch, which has all inputs of the models."""

    batch: Batch
    name: str
    value: Tensor
    mask: Tensor | None  # which outputs count; None: all


class Teacher:
    """A dense model, whose outputs are computed once for each batch, while memory has room."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.known = model, {}
        self.room = int(OF_OUTPUTS * (available_memory() or 0) / max(local_world_size(), 1))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Target:
        """Return the output for a batch."""
        if id(batch) in self.known:
            return self.known[id(batch)][1]
        read = completed(self.model, batch)
        name, value = _run(self.model, read)
        mask = read.output_mask
        alike = mask is not None and value.dim() == 3 and mask.shape == value.shape[:2]
        if name == "spans" or not alike:
            mask = None  # outputs are of each sequence
        found = Target(read, name, value, mask)
        if value.nbytes <= self.room:
            self.room -= value.nbytes
            found = replace(found, value=value.cpu())
            self.known[id(batch)] = batch, found  # it lives on, and nothing else has its id
        return found


def losses(student: nn.Module, target: Target) -> Tensor:
    """Return the loss of each row, ``(rows,)`` float32, with gradients for the student.

    - logits: ``KL(p ‖ q) = Σ p (log p − log q)`` of each token or sequence, p the dense model;
      of spans one for the start and one for the end; of labels one for each, right or not
    - scores: ``mean (z − z')²`` of a sequence
    - hidden states: ``1 − cos(m, m') + mean (h − h')²`` of a sequence, m the mean over its tokens

    Padding does not count. Raises InputError if the outputs have different shapes.
    """
    _, value = _run(student, target.batch)
    dense, mask = target.value.to(value.device), target.mask
    if value.shape != dense.shape:
        raise InputError(
            f"heal: the outputs of the two models must have one shape, got {tuple(value.shape)} "
            f"and {tuple(dense.shape)}; name the model that was pruned as teacher"
        )
    mask = None if mask is None else mask.to(value.device)
    if target.name not in LOGITS:
        return _of_states(value.float(), dense.float(), mask)
    if mask is not None:
        value, dense = value[mask], dense[mask]
    if target.name == "labels":  # softmax([z, 0]) has the sigmoid of z
        value, dense = (torch.stack([z, torch.zeros_like(z)], -1) for z in (value, dense))
    value, dense = value.flatten(0, -2), dense.flatten(0, -2)
    if target.name == "scores":
        return (value.float() - dense.float()).square().mean(-1)
    return KLDivergence.apply(value, dense)


@torch.no_grad()
def mean_loss(student: nn.Module, teacher: Teacher, batches: Sequence[Batch]) -> float:
    """Return the mean of :func:`losses` over all rows of batches, which ranks share."""
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(batches), world_size()):
        index = start + rank()  # beyond the end, a rank goes along with the others
        found = losses(student, teacher(batches[index % len(batches)]))
        if index < len(batches):
            sums[0] += float(found.sum(dtype=torch.float64))
            sums[1] += len(found)
    all_reduce(sums)
    return float(sums[0] / sums[1])


def _run(model: nn.Module, batch: Batch) -> tuple[str, Tensor]:
    outputs = model(**batch.to(device_of(model)).inputs)
    return output_of(model, outputs, batch.output_mask)


class KLDivergence(torch.autograd.Function):
    """``KL(p ‖ q)`` of each row of logits, with its gradient ``q − p`` by those of q.

    One softmax of some rows at a time serves both: all rows take several times their memory.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, target: Tensor) -> Tensor:
        """Return the divergences, ``(rows,)``, of logits ``(rows, classes)``."""
        found, slope = [], torch.empty_like(value) if ctx.needs_input_grad[0] else None
        step = max(1, AT_ONCE // value.shape[-1])
        for at in range(0, len(value), step):
            rows = slice(at, at + step)
            log_q, log_p = (each[rows].float().log_softmax(-1) for each in (value, target))
            p = log_p.exp()
            found.append((p * log_p.sub_(log_q)).sum(-1))
            if slope is not None:
                slope[rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(slope)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by the logits of q."""
        (slope,) = ctx.saved_tensors
        return slope * gradient[:, None].to(slope.dtype), None


def _of_states(value: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    distance = (value - target).square().mean(-1)
    if value.dim() == 2:  # embeddings
        return 1 - functional.cosine_similarity(value, target, dim=-1) + distance
    weight = token_weights(value, mask)
    pooled = [(weight[..., None] * each).sum(1) for each in (value, target)]
    return 1 - functional.cosine_similarity(*pooled, dim=-1) + (weight * distance).sum(1)
