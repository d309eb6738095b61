"""What tells one model, and one calibration text, from another."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from torch import Tensor

from liar_ext.calibration.kept_text import Text, sequence_digests, text_of
from liar_ext.data.batches import Batch, Batches, read_batches

SAMPLED = 64  # values of each weight that tell one model from another


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


class Seen:
    """What is kept of the batches that were run: digests, and the text if it is asked for.

    Parameters
    ----------
    keep_text : bool
        It is.
    """

    def __init__(self, keep_text: bool = False) -> None:
        self.digest = blake2b(digest_size=16)
        self.sequences: list[int] = []
        self.text: Text | None = [] if keep_text else None
        self.batches = self.longest = 0  # longest: in tokens

    def add(self, batch: Batch) -> None:
        """Count a batch in."""
        for name, value in sorted({**batch.inputs, "fold": batch.fold}.items()):
            self.digest.update(f"{name} {tuple(value.shape)}".encode())
            self.digest.update(value.detach().double().cpu().numpy().tobytes())
        self.batches += 1
        self.sequences += sequence_digests(batch)
        ids = batch.inputs.get("input_ids")
        self.longest = max(self.longest, 0 if ids is None else ids.shape[-1])
        if self.text is not None:
            kept = text_of(batch)
            if kept is None:
                self.text = None
            else:
                self.text.append(kept)

    def facts(self, tokens: int, routed: dict[str, list[int]]) -> dict[str, object]:
        """Return what a bank says of its text; ``routed`` if there are experts."""
        said = {
            "sequences": len(self.sequences),
            "tokens": tokens,
            "seq_len": self.longest,
            "data": [self.digest.hexdigest()],
        }
        return said | ({"routed": routed} if routed else {})
