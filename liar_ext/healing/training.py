"""How a pruned model is trained: its settings, its weights, and what memory they take."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liar_ext.calibration.batches import Batch, completed, count_tokens
from liar_ext.calibration.taps import replaced
from liar_ext.healing import OF_SIZE, RATE, TRAIN
from liar_ext.models.running import computes_bfloat16, device_of, predicts_next_token
from liar_ext.recipe.checks import is_number
from liar_ext.system.distributed import local_world_size, world_size
from liar_ext.system.environment import available_memory
from liar_ext.system.errors import InputError, refusing

BUDGETS = ("tokens", "minutes", "steps")
LORA_RANK = 16
OF_TRAINED = 3  # times their bytes: gradients and two moments
OF_FREE = 0.8  # of the free memory may be used
WARM_UP = 0.3  # of the budget: AdamW's first steps are equally long for all weights, and do harm
GIB = 2**30
State = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How a model is trained.

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

    Raises
    ------
    InputError
        If a field is out of range.
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


def choose(model: nn.Module, train: str, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model to train, with adapters for ``lora``, and its trained parameters by name."""
    if train == "lora":
        model = _with_adapters(model, seed)
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


def schedule(done: float) -> float:
    """Return the factor of the learning rate when a fraction of the budget is spent."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1)))


def _with_adapters(model: nn.Module, seed: int) -> nn.Module:
    hint = 'pip install peft, or choose train="no-embeddings"'
    with refusing('heal: train="lora" needs peft', hint, Exception):
        from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    with torch.random.fork_rng(), warnings.catch_warnings(category=FutureWarning, action="ignore"):
        torch.manual_seed(seed)  # peft reads a name that transformers will drop
        return get_peft_model(model, config)


@contextmanager
def sharded(
    student: nn.Module, blocks: Sequence[nn.Module]
) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Give a copy of a model, and of its blocks, of whose weights each rank holds a part (FSDP).

    A block has its whole weights while it runs. The model itself is on the CPU meanwhile; without
    several ranks it is given as it is.
    """
    if world_size() == 1:
        yield student, list(blocks)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard  # a second to import

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # of experts without a token
        raise InputError(
            f"heal: several processes need a newer torch than {torch.__version__}; update it, or "
            "start one process"
        )
    names, device = {module: name for name, module in student.named_modules()}, device_of(student)
    try:
        copied = copy.deepcopy(student.to("cpu"))
        copies = [copied.get_submodule(names[block]) for block in blocks]
        ignored = {each for each in copied.parameters() if not can_split(each)}
        for each in ignored:
            each.data = each.data.to(device)
        owners = Counter(each for block in copies for each in block.parameters())
        mesh = init_device_mesh(device.type, (world_size(),))  # FSDP moves the parts there
        # The root is split after each forward pass: held-out text has no backward pass, and its
        # weights would stay whole, and old.
        how = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": ignored}
        for module in (*(copies if max(owners.values(), default=1) == 1 else ()), copied):
            fully_shard(module, **how)
        copied.set_reduce_scatter_unused_params(True)
        yield copied, copies
    finally:
        student.to(device)


def can_split(parameter: Tensor) -> bool:
    """Tell whether FSDP can split a parameter: it takes no lone number, and none without values."""
    return parameter.dim() > 0 and parameter.numel() > 0


def is_part(tensor: Tensor) -> bool:
    """Tell whether this rank holds a part of a tensor, and others the rest."""
    return hasattr(tensor, "full_tensor")


def part_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without its gradient."""
    return tensor.detach().to_local() if is_part(tensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which each rank holds a part; all ranks call this."""
    return tensor.detach().full_tensor() if is_part(tensor) else tensor.detach()


def as_part(value: Tensor, of: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that is split as another is."""
    if not is_part(of):
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


def _free(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def needs_checkpointing(
    model: nn.Module, batches: Sequence[Batch], trained: Iterable[Tensor]
) -> bool:
    """Tell whether the activations of the largest batch would not fit the free memory."""
    device = device_of(model)
    free = _free(device)
    if free is None:
        return False
    largest = max(batches, key=count_tokens)
    stored = len(largest) * activation_bytes(model, largest.select([0]).to(device))
    return stored + OF_TRAINED * sum(each.nbytes for each in trained) > OF_FREE * free


def activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward pass stores for the backward pass, without weights."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    held: dict[int, Tensor] = {}  # the tensors, too, so that no address is used twice

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = model(**completed(model, batch).inputs)
    del output
    stored = (each.untyped_storage() for at, each in held.items() if at not in weights)
    return sum(each.nbytes() for each in stored)


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks compute their activations a second time in the backward pass."""
    with ExitStack() as stack:
        for block in blocks:
            twice = partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(replaced(block, twice))
        yield
