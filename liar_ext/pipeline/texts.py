"""Text that passes the blocks with the calibration set: the model is judged on it in the end.

Of several ranks the first one has it.
"""

from __future__ import annotations

from liar_ext.data.batches import Batch, Batches, read_batch, read_batches
from liar_ext.distributed import alone, is_first
from liar_ext.evaluation import perplexity
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.selection.divergence import Divergence


def judged_texts(
    walk: Walk, held_out: Batches | None, fresh: Batches | None
) -> tuple[StreamedBatches, StreamedBatches]:
    """Return held-out text and fresh text before the first block."""
    here = is_first()
    judged = map(_as_judged, read_batches(held_out or ())) if here else ()
    certified = read_batches(fresh or ()) if here else ()
    return StreamedBatches("held out", walk, judged), StreamedBatches("fresh", walk, certified)


def perplexity_of(text: StreamedBatches) -> dict[str, float] | None:
    """Return the perplexity of the model on text past its last block; None without text."""
    if not text.batches:
        return None
    with text.answering():
        return perplexity(text.walk.model, text.batches, progress=text.walk.progress)


def outputs_of(text: StreamedBatches) -> Divergence | None:
    """Return the dense model's outputs for text past its last block, to compare others with."""
    if not text.batches:
        return None
    with text.answering(), alone():
        return Divergence(text.walk.model, [batch.inputs for batch in text.batches])


def _as_judged(batch: Batch) -> Batch:
    """Return a batch as the model gets it where its perplexity is measured."""
    ids = batch.inputs["input_ids"]
    mask = ids.new_ones(ids.shape) if batch.mask is None else batch.mask.to(ids.dtype)
    return read_batch({"input_ids": ids, "attention_mask": mask})
