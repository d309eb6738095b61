"""Sums on disk: their facts, triangles and checkpoint; and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch, Batches, read_batches
from liar_ext.calibration.taps import Moments
from liar_ext.models.sites import Site, teams_of
from liar_ext.system import files
from liar_ext.system.checkpoint_store import Checkpoint, reading
from liar_ext.system.distributed import broadcast, gather, is_first, local_world_size
from liar_ext.system.environment import available_memory
from liar_ext.system.errors import InputError

SUMS = "calibration"
PARTS = ("gram", "total", "count")
# Of the sums of one pass: OPT-1.3B takes 26 GiB, in two folds of float64.
MEMORY = 32 << 30
SAMPLED = 64  # values of each weight that a fingerprint has one by one
UNSAID = ("config", "dtype", "tokenizer")  # in banks of older versions, where they may be anything
Text = list[dict[str, Tensor]]
Item = TypeVar("Item")


def _is_count(value: Any) -> bool:
    return files.count(value) is not None


def _is_distance(value: Any) -> bool:
    return files.number(value) is not None and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # on terminals


# What a bank says of its sums, as far as it is known: [kind] are several, {...: kind} are by name.
FACTS: dict[str, Any] = {
    "model_type": _is_text,
    "model": _is_text,  # a fingerprint of the weights
    "config": _is_text,  # a digest of what the config computes with, such as activations
    "dtype": _is_text,  # of the weights, as the model was run
    "sites": {...: {"unit": _is_text, "units": _is_count, "width": _is_count, "groups": _is_count}},
    "sequences": _is_count,
    "tokens": _is_count,
    "seq_len": _is_count,  # tokens of the longest sequence
    "relative": [_is_text],  # the sites whose tokens count relative to the output
    "routed": {...: [_is_count]},  # tokens of each fold that reached an expert
    "data": [_is_text],  # a fingerprint of each text run over, with its folds
    "texts": [_is_text],  # names of the texts that source of the kept text counts
    "tokenizer": _is_text,  # a fingerprint
    # How the sequences of each run that was added were drawn: fields of a recipe, checked there.
    "calibrations": [
        {
            "texts": [_is_text],
            "notes": [_is_text],
            "bos": lambda value: isinstance(value, str),
            "packed": lambda value: isinstance(value, bool),
        }
    ],
    "sensitivities": [{"key": _is_text, "sites": {...: _is_distance}}],  # measured ones
}


def check_source(source: Any) -> None:
    """Raise ValueError unless the facts are such as a bank has, as far as it has them."""
    if not isinstance(source, dict):
        raise ValueError("facts must be a JSON object")
    for name, value in source.items():
        if name in FACTS and not _fits(value, FACTS[name]):
            raise ValueError(f"facts: {name} can't be {str(value)[:60]!r}")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        named = isinstance(value, dict)
        kinds = dict.fromkeys(value, kind[...]) if named and ... in kind else kind
        return named and all(n in value and _fits(value[n], each) for n, each in kinds.items())
    return kind(value)


def added(shares: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Return the sums of the counts of each fold by name, such as tokens by expert."""
    totals: dict[str, list[int]] = {}
    for name, counts in (pair for share in shares for pair in share.items()):
        totals[name] = [a + b for a, b in zip(totals.get(name, (0,) * FOLDS), counts, strict=True)]
    return totals


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of names, shapes, some values, and the sum of all bits as integers."""
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        flat = flat.clone() if flat.storage_offset() % 8 else flat  # as a view of eight bytes asks
        whole = flat.nbytes // 8 * 8 // flat.itemsize
        bits = flat[:whole].view(torch.int64).sum() if whole else 0
        some = torch.cat([flat[:: max(flat.numel() // SAMPLED, 1)], flat[whole:]])
        digest.update(f"{name} {tuple(tensor.shape)} {int(bits)}".encode())
        digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()


class Seen:
    """What is kept of the batches that were run: digests, and the text if it is asked for."""

    def __init__(self, keep_text: bool = False) -> None:
        self.digest = blake2b(digest_size=16)
        self.sequences: list[int] = []  # a digest of each
        self.text: Text | None = [] if keep_text else None
        self.batches = self.longest = 0  # longest: in tokens

    def add(self, batch: Batch) -> None:
        """Count a batch in."""
        known = {**batch.inputs, "fold": batch.fold}
        known |= {} if batch.weight is None else {"weight": batch.weight}
        for name, value in sorted(known.items()):
            _update(self.digest, name, value)
        self.batches += 1
        self.sequences += [_sequence_digest(batch, row) for row in range(len(batch))]
        ids = batch.inputs.get("input_ids")
        self.longest = max(self.longest, 0 if ids is None else ids.shape[-1])
        if self.text is not None:
            kept = _text_of(batch)
            if kept is None:
                self.text = None
            else:
                self.text.append(kept)

    def facts(self, tokens: int, routed: dict[str, list[int]]) -> dict[str, object]:
        """Return what a bank says of its text; ``routed`` if there are experts."""
        said = {"sequences": len(self.sequences), "tokens": tokens, "seq_len": self.longest}
        said["data"] = [self.digest.hexdigest()]
        return said | ({"routed": routed} if routed else {})


def digest_of(batches: Batches) -> str:
    """Return a digest of all that batches hold, but for labels."""
    seen = Seen()
    for batch in read_batches(batches):
        seen.add(batch)
    return seen.digest.hexdigest()


def _sequence_digest(batch: Batch, row: int) -> int:
    """Return a digest of 8 bytes of a sequence, without its padding and its fold."""
    digest = blake2b(digest_size=8)
    for name, value in sorted(batch.inputs.items()):
        own = value[row] if len(value) == len(batch) else value  # patches of a lone image
        if name == "attention_mask":
            continue
        if batch.mask is not None and own.shape[:1] == batch.mask.shape[1:]:
            own = own[batch.mask[row].to(own.device)]
        _update(digest, name, own)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _update(digest: blake2b, name: str, value: Tensor | list) -> None:
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value}".encode())
        return
    digest.update(f"{name} {tuple(value.shape)}".encode())
    digest.update(value.detach().double().cpu().contiguous().numpy().tobytes())


def _text_of(batch: Batch) -> dict[str, Tensor] | None:
    """Return a batch as a bank keeps it; None where it is not text alone."""
    ids, more = batch.inputs.get("input_ids"), batch.labels or batch.weight is not None
    if more or not batch.inputs.keys() <= {"input_ids", "attention_mask"} or ids is None:
        return None
    if any(each.is_floating_point() or each.shape != ids.shape for each in batch.inputs.values()):
        return None
    kept = {name: value.detach().long().cpu() for name, value in batch.inputs.items()}
    kept["fold"] = batch.fold.cpu()
    if batch.source is not None:
        kept["source"] = batch.source.long().cpu()
    return kept


def bytes_of_sums(features: int) -> int:
    """Return the bytes of the sums at one site: ``d²`` of float64 for each fold."""
    return FOLDS * 8 * features**2


def check_memory(operation: str, needed: int) -> None:
    """Raise InputError if sums of so many bytes can't be held at once on the CPU."""
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{operation}: the sums of all sites take {needed / 2**30:.3g} GiB of memory at once, "
            f"and {free / 2**30:.3g} are free; free some, or let liar prune --memory sum them in "
            "groups, without a bank"
        )


def room_for_sums(model: nn.Module, memory: int | None = None) -> int:
    """Return the bytes that the sums of each rank may take: ``memory``, if that is given.

    Else ``MEMORY``, or half of what is free on any device in use, shared by the ranks there.
    """
    if memory is not None:
        return memory
    devices = {parameter.device for parameter in model.parameters()}
    free = [torch.cuda.mem_get_info(at)[0] for at in devices if at.type == "cuda"]
    if any(at.type == "cpu" for at in devices):
        free += [count // local_world_size() for count in [available_memory()] if count is not None]
    return min(gather(min([MEMORY, *(count // 2 for count in free)])))


def group_sites(at: Sequence[Site], memory: int) -> list[Sequence[Site]]:
    """Return groups of sites whose sums fit; the experts of a layer stay together."""
    teams = list(teams_of(at).values())
    sizes = [sum(bytes_of_sums(site.d_in) for site in team) for team in teams]
    return [[site for team in some for site in team] for some in split(teams, sizes, memory)]


def split(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[Sequence[Item]]:
    """Return runs of ``items`` whose sizes add up to at most ``limit``, or that are of one item."""
    starts, total = [0], 0
    for index, size in enumerate(sizes):
        if total + size > limit and index > starts[-1]:
            starts.append(index)
            total = 0
        total += size
    return [items[a:b] for a, b in zip(starts, [*starts[1:], len(items)], strict=True)]


class Triangles:
    """The lower triangles of a Gram matrix per fold, packed when they are asked for."""

    def __init__(self, gram: Tensor) -> None:
        d = gram.shape[-1]
        self.gram, self.dtype, self.shape = gram, gram.dtype, (FOLDS, d * (d + 1) // 2)

    def get(self) -> Tensor:
        """Return them, ``(2, d (d + 1) / 2)``."""
        below = torch.ones(self.gram.shape[1:], dtype=torch.bool).tril_()
        found = torch.empty(self.shape, dtype=self.dtype)
        for fold, gram in enumerate(self.gram):  # a triangle at a time
            found[fold] = gram.detach().cpu()[below]
        return found


def packed(moments: Mapping[str, Moments]) -> dict[str, Tensor | Triangles]:
    """Return moments by site name as tensors for a file: ``NAME.gram`` and the other parts."""
    found: dict[str, Tensor | Triangles] = {}
    for name, sums in moments.items():
        parts = Triangles(sums.gram), sums.total, sums.count
        found |= {f"{name}.{part}": value for part, value in zip(PARTS, parts, strict=True)}
    return found


def restored(get: Callable[[str], Tensor], name: str) -> Moments:
    """Return the moments of a site from :func:`packed` tensors, with zeros above the triangles."""
    triangles, total, count = (get(f"{name}.{part}") for part in PARTS)
    d = total.shape[-1]
    if triangles.shape != (FOLDS, d * (d + 1) // 2):
        raise ValueError(f"{name}.gram must be triangles of {d} features")
    gram = triangles.new_zeros(FOLDS, d, d)
    gram[:, torch.ones(d, d, dtype=torch.bool).tril_()] = triangles
    return Moments(gram, total, count)


class SavedSums:
    """The sums of one pass over ``of`` batches in a checkpoint, if any; of a group, by its number.

    All ranks must call each method.
    """

    def __init__(self, saved: Checkpoint | None, of: int | None = None, group: int = 0) -> None:
        self.saved, self.of, self.group = saved, of, f" of group {group}" if group else ""
        self.key = f"{SUMS}-{group}" if group else SUMS
        self.done = 0  # batches
        self.facts: dict[str, Any] = {}  # of the sums, as a bank has them
        self._at = 0  # batches in the checkpoint
        self._widths: dict[str, int] = {}

    def restore(self, moments: Mapping[str, Moments], facts: Mapping[str, Any]) -> None:
        """Copy saved sums into ``moments``, at the first rank; refuse those of another model."""
        known = None if self.saved is None else self.saved.get(self.key)
        self._widths = {name: sums.d_in for name, sums in moments.items()}
        if known is None:
            return
        path = self.saved.path(self.key)
        with reading(path):
            source, batches, theirs = (known[1][name] for name in ("source", "batches", "widths"))
            check_source(source)
            known_facts = {name: facts.get(name) for name in UNSAID} | source
            same = all(known_facts.get(name) == value for name, value in facts.items())
            if not same or theirs != self._widths:
                raise InputError(
                    f"checkpoint: {path} is of another model, or of other sites; name another "
                    "folder, or remove that file"
                )
            for name in self._widths:  # one at a time
                its = restored(known[0].__getitem__, name)
                for part in PARTS if is_first() else ():
                    getattr(moments[name], part).copy_(getattr(its, part))
            self.facts, self.done = source, int(batches)

    def check(self, batches: int, digest: str) -> None:
        """Raise InputError unless the first batches are those of the sums."""
        if batches != self.done or digest != (self.facts.get("data") or [""])[-1]:
            raise InputError(
                f"checkpoint: the sums in {self.saved.path(self.key)} are over {self.done} batches "
                "of other text than was given; give the same text, or remove that file"
            )

    def save(
        self,
        batches: int,
        so_far: Callable[[], tuple[Mapping[str, Moments], dict[str, Any]]],
        *,
        now: bool = False,
    ) -> None:
        """Save the sums of all ranks over so many batches, and their facts, if due or ``now``."""
        if self.saved is None:
            return
        due = batches != self._at and (now or self.saved.due(self.key))
        if not broadcast(due):
            return
        moments, source = so_far()
        of = "" if self.of is None else f" of {self.of}"
        said = f"sums over {batches}{of} batches{self.group}"
        known = {"source": source, "batches": batches, "widths": self._widths, "said": said}
        self.saved.put(self.key, packed(moments), known)
        self._at = batches
