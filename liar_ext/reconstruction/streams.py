"""Hidden states of the calibration text on its way through the blocks, in both models."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from liar_ext.calibration.batches import Batch
from liar_ext.calibration.taps import replaced
from liar_ext.models.registry import family_of
from liar_ext.models.running import body_of, device_of, evaluating
from liar_ext.models.sites import sites
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.system.checkpoint_store import Checkpoint, reading
from liar_ext.system.distributed import broadcast
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar, spare

# Methods of base models of transformers whose features depend on no weight that is pruned.
FEATURES = ("get_image_features", "get_audio_features")
UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # where there is a pooler_output
MOST_AT_ONCE = 1 << 30  # bytes of one call; Linux moves at most 2 GiB


class HiddenStates:
    """A place for hidden states: up to ``memory`` bytes, and an unlinked file in ``folder``."""

    def __init__(
        self, memory: int | None = None, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.memory, self.folder = memory, folder
        self.in_memory = self.most_on_disk = 0  # bytes
        self._file = None
        self._free: dict[int, list[int]] = {}  # offsets by size

    def hold(self, tensor: Tensor) -> Held:
        """Return what gives a tensor back, on the CPU."""
        return Held(self, tensor)

    def close(self) -> None:
        """Give the disk back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, size: int) -> int | None:
        """Return an offset in the file, or None if memory has room."""
        if self.memory is None or self.in_memory + size <= self.memory:
            self.in_memory += size
            return None
        if self._free.get(size):
            return self._free[size].pop()
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
        start = self.most_on_disk
        try:
            os.posix_fallocate(self._file.fileno(), start, size)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise InputError(
                f"hidden states: more than {(start + size) / 2**30:.3g} GiB are needed in {where} "
                f"({error.strerror}); free disk space, raise --max-memory, or give fewer --samples"
            ) from error
        self.most_on_disk += size
        return start

    def give_back(self, offset: int | None, size: int) -> None:
        """Let bytes be used for other tensors."""
        if offset is None:
            self.in_memory -= size
        else:
            self._free.setdefault(size, []).append(offset)

    def move(self, call: Callable[..., int], tensor: Tensor, offset: int) -> None:
        """Read or write a contiguous tensor; one call may move a part only."""
        bytes_ = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        while len(bytes_):
            done = call(self._file.fileno(), [bytes_[:MOST_AT_ONCE]], offset)
            bytes_, offset = bytes_[done:], offset + done


class Held:
    """One tensor of :class:`HiddenStates`, whose place is free once this is dropped."""

    def __init__(self, store: HiddenStates, tensor: Tensor) -> None:
        self._store = store
        self._tensor = self._offset = self._size = None  # while no place is taken
        self.set(tensor)

    def get(self) -> Tensor:
        """Return the tensor; not to be changed in place."""
        if self._offset is None:
            return self._tensor
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._store.move(os.preadv, tensor, self._offset)
        return tensor

    def set(self, tensor: Tensor) -> None:
        """Hold another tensor instead."""
        tensor = tensor.detach().cpu()
        if tensor.nbytes != self._size:
            self._drop()
            self._offset = self._store.take(tensor.nbytes)
            self._size = tensor.nbytes
        self.shape, self.dtype = tensor.shape, tensor.dtype
        if self._offset is None:
            self._tensor = tensor
        else:
            self._store.move(os.pwritev, tensor.contiguous(), self._offset)

    def _drop(self) -> None:
        if self._size is not None:
            self._store.give_back(self._offset, self._size)
        self._tensor = self._offset = self._size = None

    def __del__(self) -> None:
        self._drop()


class InMemory:
    """A source of blocks, all in memory: what a ``BlockStore`` is for a model in files."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, device_of(model)

    def block(self, index: int) -> AbstractContextManager:
        """Have one block in memory."""
        return nullcontext()

    def head(self) -> AbstractContextManager:
        """Have the output head in memory."""
        return nullcontext()


class Walk:
    """A walk over the blocks of a model; ``source`` has the weights, ``saved`` what is done."""

    def __init__(
        self, source: InMemory, attn_unit: str = "auto", saved: Checkpoint | None = None
    ) -> None:
        self.source, self.model, self.saved = source, source.model, saved
        self.attn_unit, self.states = attn_unit, HiddenStates()
        self.blocks = Blocks(self.model, sites(self.model, attn_unit=attn_unit))

    def refresh(self) -> None:
        """Look at the model anew, whose sites have changed."""
        returned = self.blocks.beside
        self.blocks = Blocks(self.model, sites(self.model, attn_unit=self.attn_unit))
        self.blocks.beside = returned

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Have the blocks run one by one, in evaluation mode."""
        with torch.no_grad(), evaluating(self.model), self.blocks.opened():
            yield

    def through(self, title: str, first: int = 0, count: int | None = None) -> Iterator[int]:
        """Yield the blocks from ``first`` up to ``count``, each in memory meanwhile."""
        count = len(self.blocks) if count is None else count
        spare(title, first)
        with self.begun():
            for index in Bar(range(first, count), desc=title, initial=first, total=count):
                with self.source.block(index):
                    yield index


@dataclass(eq=False)
class StreamedBatches:
    """Batches on their way past the blocks of a model; in the end its head answers for them."""

    name: str  # of their hidden states in a checkpoint
    walk: Walk
    batches: Iterable[Batch]
    numbers: Sequence[int] | None = None  # of those of this rank in the whole text; None: from 0 on
    hidden: list[Held] = field(default_factory=list)  # given if they have begun

    def __post_init__(self) -> None:
        self.batches = list(self.batches)
        self.numbers = range(len(self.batches)) if self.numbers is None else self.numbers

    def advance(self, index: int, note: Callable[[Batch], None] = lambda batch: None) -> None:
        """Take all batches past a block; tell ``note`` of each before."""
        for batch, held in self._placed():
            note(batch)
            held.set(self._past(index, batch, held))

    def branch(self, name: str, index: int) -> StreamedBatches:
        """Return the same batches past a block as it is now; these stay before it."""
        after = [self.walk.states.hold(self._past(index, *each)) for each in self._placed()]
        return StreamedBatches(name, self.walk, self.batches, self.numbers, after)

    def at(self, place: int) -> Tensor:
        """Return the hidden states of a batch where the model computes."""
        return self.hidden[place].get().to(self.walk.source.device)

    def answering_for(self, number: int) -> AbstractContextManager:
        """Let the model's forward go on from a batch behind the last block."""
        last, place = len(self.walk.blocks) - 1, self.numbers.index(number)
        return self.walk.blocks.answering({last: partial(self.at, place)})

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Let the model's forward answer for the batches, one call for each, in their order."""
        numbers, last = iter(range(len(self.batches))), len(self.walk.blocks) - 1
        with self.walk.begun(), self.walk.source.head():
            with self.walk.blocks.answering({last: lambda: self.at(next(numbers))}):
                yield

    def _placed(self) -> Iterator[tuple[Batch, Held]]:
        """Yield all batches where the model computes, with their hidden states."""
        walk, device = self.walk, self.walk.source.device
        if not self.hidden:
            entered = (walk.blocks.enter(0, each.to(device).inputs)[0][0] for each in self.batches)
            self.hidden += map(walk.states.hold, entered)
        for batch, held in zip(self.batches, self.hidden, strict=True):
            yield batch.to(device), held

    def _past(self, index: int, batch: Batch, held: Held) -> Tensor:
        hidden = held.get().to(self.walk.blocks.device(index))
        return self.walk.blocks.run(index, batch.inputs, hidden).output


@dataclass
class Part:
    """Sequences of one fold, or fresh ones, and how far they are."""

    batch: Batch  # as the model takes them
    fold: int | None  # None where they are fresh: no solve reads them, errors are measured on them
    number: int  # which of all parts it is, whatever ranks there are
    # Of the models "dense" and "pruned" before the next block. "dense behind 3" came out of the
    # stack that ends there, where a later one reads it.
    states: dict[str, Held]
    # By layer of the block in work: output of the dense consumer, or the stream after it.
    goals: dict[str, Held] = field(default_factory=dict)
    # The pruned stream between attention and MLP, and what the MLP's consumer reads: all that a new
    # one needs to finish the block.
    halfway: tuple[Held, Held] | None = None


Weights = dict[str, tuple[Tensor, Tensor | None]]
Streams = dict[str, list[Held]]


class SavedStreams:
    """All hidden states of a walk after a block, saved for a walk that goes on from there.

    ``name`` is that of what is done on the walk, which ``texts`` pass. ``others`` returns further
    streams, of each of which this rank has the hidden states with some ``numbers``.
    """

    def __init__(
        self,
        walk: Walk,
        name: str,
        texts: Sequence[StreamedBatches],
        others: Callable[[], Streams] = dict,
        numbers: Sequence[int] = (),
    ) -> None:
        self.saved, self.walk, self.name, self.key = walk.saved, walk, name, f"{name}-streams"
        self.texts, self.others, self._others_numbers = texts, others, numbers

    def _streams(self) -> Streams:
        return self.others() | {each.name: each.hidden for each in self.texts}

    def _numbers(self, name: str) -> Sequence[int]:
        own = {each.name: each.numbers for each in self.texts}
        return own.get(name, self._others_numbers)

    def restore(self) -> tuple[int, Streams]:
        """Put back what is saved of this rank; return how many blocks are done, and all streams."""
        streams = self._streams()
        known = None if self.saved is None else self.saved.get(self.key)
        if known is None:
            return 0, streams
        tensors, facts = known
        with reading(self.saved.path(self.key)):
            parts = (name.rpartition("/") for name in tensors)
            every = sorted((name, int(number)) for name, _, number in parts)
            done, self.walk.blocks.beside = facts["blocks"], facts["beside"]
        taken: Counter[str] = Counter()
        for name, number in every:
            tensor, into = tensors[f"{name}/{number}"], streams.setdefault(name, [])
            mine = number in self._numbers(name)  # of which this rank may have none
            if mine and taken[name] < len(into):
                into[taken[name]].set(tensor)
            elif mine:
                into.append(self.walk.states.hold(tensor))
            taken[name] += mine
        return done, streams

    def keep(self, done: int, *, now: bool = False) -> None:
        """Save the hidden states after ``done`` blocks if that is due, or ``now``."""
        if self.saved is None or not broadcast(now or self.saved.due(self.key)):
            return
        mine = {
            f"{name}/{number}": held
            for name, some in self._streams().items()
            for number, held in zip(self._numbers(name), some, strict=True)
        }
        facts = {"blocks": done, "beside": self.walk.blocks.beside}
        if not now:
            facts["said"] = f"{self.name}: {done} of {len(self.walk.blocks)} blocks"
        self.saved.put_shared(self.key, mine, facts)


def keep_block(
    saved: Checkpoint | None, index: int, weights: Weights, rows: Mapping[str, SiteRow]
) -> None:
    """Save new weights and rows of a block."""
    if saved is not None:
        tensors = {f"{name}.weight": weight for name, (weight, _) in weights.items()}
        tensors |= {f"{name}.bias": bias for name, (_, bias) in weights.items() if bias is not None}
        saved.put(f"block-{index}", tensors, {"rows": {n: asdict(rows[n]) for n in weights}})


def kept_block(saved: Checkpoint, index: int) -> tuple[Weights, dict[str, SiteRow]]:
    """Return saved weights and rows of a block."""
    stored, facts = saved.need(f"block-{index}")
    with reading(stored.path):
        tensors, rows = dict(stored), {n: SiteRow(**row) for n, row in facts["rows"].items()}
        return {n: (tensors[f"{n}.weight"], tensors.get(f"{n}.bias")) for n in rows}, rows


@contextmanager
def features_once(model: nn.Module, states: HiddenStates) -> Iterator[None]:
    """Let the encoder of images or sound run once for each input; ``states`` holds its output.

    Where the encoder itself is pruned, as in CLIP, nothing changes.
    """
    body, alone = body_of(model), not family_of(model).parts
    with ExitStack() as stack:
        for name in FEATURES:
            if alone and hasattr(body, name):
                once = _once(getattr(body, name), states, device_of(model))
                stack.enter_context(replaced(body, once, name))
        yield


def _once(compute: Callable, states: HiddenStates, device: torch.device) -> Callable:
    """Return a method that computes what it has not computed for the same arguments."""
    known: dict[bytes, Any] = {}

    @wraps(compute)
    @torch.no_grad()
    def features(*args: Any, **kwargs: Any) -> Any:
        key = _key((args, kwargs))
        if key not in known:
            output = compute(*args, **kwargs)
            if isinstance(output, ModelOutput) and output.get("pooler_output") is not None:
                output = type(output)(**{n: v for n, v in output.items() if n not in UNREAD})
            known[key] = pytree.tree_map_only(Tensor, states.hold, output)
        return pytree.tree_map_only(Held, lambda held: held.get().to(device), known[key])

    return features


def _key(arguments: Any) -> bytes:
    """Return a digest of arguments, and of all that their tensors hold."""
    leaves, names = pytree.tree_flatten(arguments)
    digest = blake2b(repr(names).encode(), digest_size=16)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()
