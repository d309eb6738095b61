"""The calibration text in a moment bank: token ids, folds and sources, packed and read back.

Tensors of a bank's file, S sequences in B batches::

    text/batches          (B, 3) int32     sequences, tokens, and whether there is a mask
    text/input_ids        (Σ,)   int32     all tokens, batch after batch
    text/attention_mask   (Σ,)   uint8     of the batches that have one
    text/fold             (S,)   uint8
    text/source           (S,)   int32     which text each is of; left out where none is said
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from liar_ext.calibration.batches import FOLDS, Batch, Batches, read_batches

NAMES = ("input_ids", "attention_mask")
PARTS = {
    "text/batches": "I32",
    "text/input_ids": "I32",
    "text/attention_mask": "U8",
    "text/fold": "U8",
    "text/source": "I32",
}
MOST_ID = 2**31 - 1
SAMPLED = 64  # values of each weight that tell one model from another
Text = list[dict[str, Tensor]]


def text_of(batch: Batch) -> dict[str, Tensor] | None:
    """Return a batch as a bank keeps it; None where it is not text alone."""
    ids = batch.inputs.get("input_ids")
    if batch.labels or not set(batch.inputs) <= set(NAMES) or ids is None or ids.dim() != 2:
        return None
    if any(each.is_floating_point() or each.shape != ids.shape for each in batch.inputs.values()):
        return None
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= MOST_ID:
        return None
    kept = {name: value.detach().long().cpu() for name, value in batch.inputs.items()}
    kept["fold"] = batch.fold.cpu()
    if batch.source is not None:
        kept["source"] = batch.source.long().cpu()
    return kept


def pack(text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a text, see the module."""
    shapes = [[*batch["input_ids"].shape, int("attention_mask" in batch)] for batch in text]

    def joined(name: str) -> Tensor:
        parts = [batch[name].flatten() for batch in text if name in batch]
        return torch.cat([torch.zeros(0, dtype=torch.long), *parts])

    packed = {
        "text/batches": torch.tensor(shapes, dtype=torch.int32).view(-1, 3),
        "text/input_ids": joined("input_ids").int(),
        "text/attention_mask": joined("attention_mask").byte(),
        "text/fold": joined("fold").byte(),
    }
    if all("source" in batch for batch in text):
        packed["text/source"] = joined("source").int()
    return packed


def unpack(tensors: Mapping[str, Tensor], sequences: int) -> Text:
    """Return the batches of packed tensors.

    ValueError is raised if they contradict one another, or hold what no text gives.
    """
    shapes = tensors["text/batches"]
    if shapes.dim() != 2 or shapes.shape[1] != 3 or (shapes[:, :2] < 1).any():
        raise ValueError("text/batches must be (batches, 3), of at least a sequence and a token")
    if ((shapes[:, 2] != 0) & (shapes[:, 2] != 1)).any():
        raise ValueError("text/batches must say by 0 or 1 whether there is a mask")
    rows, widths, masked = shapes.long().unbind(1)
    sizes = {"input_ids": rows * widths, "attention_mask": rows * widths * masked, "fold": rows}
    sizes |= {"source": rows} if "text/source" in tensors else {}
    parts = {}
    for name, size in sizes.items():
        value = tensors[f"text/{name}"].long()
        if value.shape != (int(size.sum()),) or int(rows.sum()) != sequences:
            raise ValueError(f"text/{name} must hold {int(size.sum())} of {sequences} sequences")
        parts[name] = value.split(size.tolist())
        most = {"attention_mask": 1, "fold": FOLDS - 1}.get(name, MOST_ID)
        if name != "source" and ((value < 0) | (value > most)).any():
            raise ValueError("token ids must be at least 0, masks and folds 0 or 1")
    text: Text = []
    for index, (count, width, has_mask) in enumerate(shapes.tolist()):
        batch = {name: values[index] for name, values in parts.items()}
        if not has_mask:
            del batch["attention_mask"]
        text.append(
            {n: each.view(count, width) if n in NAMES else each for n, each in batch.items()}
        )
    return text


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the names, shapes and some values of tensors, quick to take."""
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        step = max(tensor.numel() // SAMPLED, 1)
        # An index, not a flattened copy: tied and transposed weights are views.
        some = tensor.detach().reshape(-1)[::step] if tensor.is_contiguous() else tensor.sum()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def digest_of(batches: Batches) -> str:
    """Return a digest of all that batches hold, but for labels."""
    seen = Seen()
    for batch in read_batches(batches):
        seen.add(batch)
    return seen.digest.hexdigest()


def _update(digest: blake2b, name: str, value: Tensor) -> None:
    digest.update(f"{name} {tuple(value.shape)}".encode())
    digest.update(value.detach().double().cpu().contiguous().numpy().tobytes())


class Seen:
    """What is kept of the batches that were run: digests, and the text if it is asked for."""

    def __init__(self, keep_text: bool = False) -> None:
        self.digest = blake2b(digest_size=16)
        self.sequences: list[int] = []  # a digest of each
        self.text: Text | None = [] if keep_text else None
        self.batches = self.longest = 0  # longest: in tokens

    def add(self, batch: Batch) -> None:
        """Count a batch in."""
        for name, value in sorted({**batch.inputs, "fold": batch.fold}.items()):
            _update(self.digest, name, value)
        self.batches += 1
        self.sequences += [self._digest(batch, row) for row in range(len(batch))]
        ids = batch.inputs.get("input_ids")
        self.longest = max(self.longest, 0 if ids is None else ids.shape[-1])
        if self.text is not None:
            kept = text_of(batch)
            if kept is None:
                self.text = None
            else:
                self.text.append(kept)

    @staticmethod
    def _digest(batch: Batch, row: int) -> int:
        """Return a digest of 8 bytes of a sequence, without its padding and its fold."""
        digest = blake2b(digest_size=8)
        for name, value in sorted(batch.inputs.items()):
            own = value[row]
            if name == "attention_mask":
                continue
            if batch.mask is not None and own.shape[:1] == batch.mask.shape[1:]:
                own = own[batch.mask[row].to(own.device)]
            _update(digest, name, own)
        return int.from_bytes(digest.digest(), "little", signed=True)

    def facts(self, tokens: int, routed: dict[str, list[int]]) -> dict[str, object]:
        """Return what a bank says of its text; ``routed`` if there are experts."""
        said = {"sequences": len(self.sequences), "tokens": tokens, "seq_len": self.longest}
        said["data"] = [self.digest.hexdigest()]
        return said | ({"routed": routed} if routed else {})
