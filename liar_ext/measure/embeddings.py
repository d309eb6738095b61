"""Evaluation of encoders without labels: how much of the dense model's outputs pruned ones keep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch, Batches, count_tokens, read_batches
from liar_ext.calibration.divergence import MOST_ROWS, DenseOutputs
from liar_ext.calibration.documents import JSON_LINES, checked, read_lines
from liar_ext.calibration.taps import watched
from liar_ext.checkpoint.carrying import source_folder
from liar_ext.checkpoint.readers import Pooling, Sentence, read_sentence
from liar_ext.measure.evaluation import perplexity
from liar_ext.models.running import (
    LOGITS,
    complete_inputs,
    device_of,
    evaluating,
    output_of,
    predicts_next_token,
)
from liar_ext.system.errors import InputError
from liar_ext.system.files import number
from liar_ext.system.progress import Bar, showing_bars

NEIGHBOURS = 10
ROWS = 256  # texts whose cosines with all others are held at once


class Evaluator:
    """Measures a dense model first, then models pruned from it, on the same held-out batches."""

    def __init__(self) -> None:
        self._dense: DenseEncoder | None = None

    def __call__(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Return the numbers of a model by their names; the first one is the dense model."""
        if predicts_next_token(model):
            return perplexity(model, batches)
        if self._dense is not None:
            return self._dense.compare(model, batches)
        self._dense = DenseEncoder(model, batches)
        return self._dense.own


class DenseEncoder:
    """What a dense encoder gives for held-out inputs, to tell how much of it pruned ones keep.

    With x the dense model's embeddings of n inputs, and y the pruned one's:

    - ``cosine``: ``(1/n) Σ xᵢ·yᵢ / |xᵢ||yᵢ|``, left out if they have not equally many features
    - ``neighbours``: ``(1/n) Σ |N(xᵢ) ∩ N(yᵢ)| / 10``, N the ten other inputs with the greatest
      cosine; left out if there are fewer than twelve inputs

    Of a model with logits:

    - ``divergence``: ``(1/N) Σ KL(p ‖ q)`` in nats
    - ``agreement``: fraction of outputs where both models find the same class most likely, or, of
      labels that are right or not by themselves, all of them

    Of one with scores, such as that of two texts:

    - ``correlation``: that of both models' scores (Pearson), the mean if there are several

    The model is run when this is made. ``own`` is what it has itself: 1 for all but the divergence,
    which is 0; ``sequences``, and of text ``tokens`` and ``seq_len``, the longest.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, batches: Batches) -> None:
        batches = list(read_batches(batches))
        facts = self._facts = _facts(batches)
        self._outputs: list[DenseOutputs] = []
        raw: list = []  # what the model returns for the first batch: a walk runs each batch once
        with evaluating(dense):
            positions = max(1, MOST_ROWS // facts["sequences"])
            with watched(dense, lambda _, output: raw.append(output)):
                first = DenseOutputs(dense, batches[0], positions)
            if not first.has_logits:
                self._embeddings = embed(dense, batches, known=raw)
                names = ("cosine", "neighbours") if self._has_neighbours else ("cosine",)
                self.own = {**dict.fromkeys(names, 1.0), **facts}
                return
            rest = Bar(batches[1:], desc="evaluate")
            self._outputs = [first, *(DenseOutputs(dense, batch, positions) for batch in rest)]
        if not any(map(len, self._outputs)):
            raise InputError(
                f"evaluation: no output of {type(dense).__name__}, the dense model, is finite; "
                "load it in a wider dtype"
            )
        self.own = {"divergence": 0.0, "agreement": 1.0, **facts}
        if first.name == "scores":
            self._scores = torch.cat([each.dense for each in self._outputs])
            self.own = {"correlation": correlation(self._scores, self._scores), **facts}
            if not self.own["correlation"]:
                raise InputError(
                    "evaluation: scores correlate if they differ, and those of "
                    f"{len(self._scores)} inputs do not; give more text"
                )

    @torch.no_grad()
    def compare(self, pruned: nn.Module, batches: Batches) -> dict[str, float]:
        """Return the numbers of a pruned model, which is run on the same batches."""
        if self._outputs:
            return {**self._predictions(pruned), **self._facts}
        found, dense = embed(pruned, batches), self._embeddings
        numbers = {}
        if found.shape == dense.shape:
            numbers["cosine"] = float(nn.functional.cosine_similarity(found, dense).mean())
        if self._has_neighbours:
            numbers["neighbours"] = shared_neighbours(dense, found)
        if not numbers:
            raise InputError(
                f"evaluation: embeddings of {found.shape[1]} features have no cosine with those "
                f"of {dense.shape[1]}, and neighbours take {NEIGHBOURS + 2} inputs, got "
                f"{len(dense)}; give more text"
            )
        return {**numbers, **self._facts}

    @property
    def _has_neighbours(self) -> bool:
        return len(self._embeddings) > NEIGHBOURS + 1

    def _predictions(self, pruned: nn.Module) -> dict[str, float]:
        divergence, same, count, scores = 0.0, 0, 0, []
        with evaluating(pruned):
            for dense in Bar(self._outputs, desc="evaluate"):
                rows = dense.outputs(pruned)
                if dense.name == "scores":
                    scores.append(rows)
                    continue
                divergence, same = divergence + dense.divergence_of(rows), same + dense.same(rows)
                count += len(dense)
        if scores:
            return {"correlation": correlation(self._scores, torch.cat(scores))}
        return {"divergence": max(divergence / count, 0.0), "agreement": same / count}


def encoder_similarity(
    model: nn.Module, dense: nn.Module, batches: Batches, *, progress: bool = False
) -> dict[str, float]:
    """Return how much of a dense encoder's outputs a pruned one keeps, on held-out inputs.

    That is ``cosine`` and ``neighbours`` of their embeddings, ``divergence`` and ``agreement`` of
    their predictions, or the ``correlation`` of their scores; see
    :class:`liar_ext.measure.embeddings.DenseEncoder`.

    Parameters
    ----------
    model, dense : nn.Module
        Models with the same outputs.
    batches : iterable of mapping
        Inputs of the models that neither was calibrated on.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        If there is no batch, or the outputs can't be compared.
    """
    batches = list(batches)
    with showing_bars(progress):
        return DenseEncoder(dense, batches).compare(model, batches)


@torch.no_grad()
def embed(model: nn.Module, batches: Batches, *, known: Sequence[object] = ()) -> Tensor:
    """Return one embedding for each input, ``(sequences, features)`` float32 on the CPU.

    They are pooled as the folder of the model says, for sentence-transformers, or else the mean
    over all tokens that are not padding. Those of an encoder with a decoder are the encoder's. The
    model isn't run on the first batches whose outputs are ``known``.
    """
    folder = source_folder(getattr(model.config, "name_or_path", ""))
    chain = read_sentence(folder) if folder is not None else None
    chain = chain or Sentence(Pooling(("mean",)), nn.Sequential())
    rows = []
    with evaluating(model):
        read = read_batches(Bar(batches, desc="evaluate"))
        for batch, outputs in zip_longest(read, known):
            batch = batch.to(device_of(model))
            if outputs is None:
                outputs = model(**complete_inputs(model, batch.inputs, batch.labels))
            rows.append(_pooled(model, outputs, batch, chain).float().cpu())
    return torch.cat(rows)


def correlation(x: Tensor, y: Tensor) -> float:
    """Return the correlation (Pearson) of two models' scores, ``(inputs, scores)``: the mean.

    It is 0 of a score that one model gives all inputs alike, or that isn't finite.
    """
    if len(x) < 2:
        return 0.0
    both = torch.stack([x, y], 2).double().cpu().unbind(1)
    found = [torch.corrcoef(each.mT)[0, 1].nan_to_num(nan=0.0) for each in both]
    return float(torch.stack(found).mean())


def shared_neighbours(x: Tensor, y: Tensor, count: int = NEIGHBOURS) -> float:
    """Return ``(1/n) Σ |N(xᵢ) ∩ N(yᵢ)| / count``, N the other rows with the greatest cosine.

    ``x`` and ``y`` are ``(n, features)``, of as many features as each has, and n is above count.
    NaN if one of them isn't finite.
    """
    if not all(torch.isfinite(each).all() for each in (x, y)):
        return math.nan
    x, y = (nn.functional.normalize(each.double(), dim=1) for each in (x, y))
    shared = 0
    for rows in torch.arange(len(x)).split(ROWS):
        near, other = (_nearest(each, rows, count) for each in (x, y))
        shared += int((near[:, :, None] == other[:, None, :]).sum())
    return shared / (len(x) * count)


def _nearest(unit: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the rows nearest to some, themselves excluded, ``(rows, count)``."""
    cosines = unit[rows] @ unit.T
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    return cosines.topk(count).indices


def pair_quality(
    first: Tensor, second: Tensor, texts: Sequence[str], scores: Sequence[float] | None
) -> dict[str, float]:
    """Return how well the cosine of two texts, from their embeddings, says what is known of them.

    ``spearman``, the rank correlation of cosines and scores; without scores ``recall_at_1``, the
    fraction of first texts to which of all second texts their own is the nearest (of two ``texts``
    that are the same either is right); ``pairs``. InputError is raised if embeddings aren't finite.
    """
    if not all(torch.isfinite(each).all() for each in (first, second)):
        raise InputError(
            "evaluation: embeddings must be finite, got a NaN or an infinity; load the model in a "
            "wider dtype"
        )
    first, second = (nn.functional.normalize(each.double(), dim=1) for each in (first, second))
    if scores is not None:
        ranks = _ranks((first * second).sum(1)), _ranks(torch.tensor(scores, dtype=torch.double))
        # 0 where all cosines are alike.
        found = {"spearman": float(torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num(nan=0.0))}
    else:
        nearest = torch.cat([(rows @ second.T).argmax(1) for rows in first.split(ROWS)]).tolist()
        right = sum(texts[at] == own for at, own in zip(nearest, texts, strict=True))
        found = {"recall_at_1": right / len(texts)}
    return {**found, "pairs": len(texts)}


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value; equal ones share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def _pooled(
    model: nn.Module, outputs: Mapping[str, Tensor], batch: Batch, chain: Sentence
) -> Tensor:
    """Return the embeddings of a batch, ``(sequences, features)``."""
    name, states = "", outputs.get("encoder_last_hidden_state")
    if states is None:
        name, states = output_of(model, outputs)
    if name in LOGITS:
        raise InputError(
            f"evaluation: {type(model).__name__} gives predictions and no embeddings; give its "
            "base model"
        )
    if states.dim() != 3:  # embeddings already, or a map of features: (sequences, features, ...)
        return states.flatten(2).mean(2) if states.dim() > 3 else states
    mask = batch.mask
    if mask is not None and mask.shape != states.shape[:2]:  # of samples, where states are frames
        of_frames = getattr(model, "_get_feature_vector_attention_mask", None)
        mask = of_frames and of_frames(states.shape[1], mask.long())
    if mask is None:
        mask = torch.ones(states.shape[:2])
    vectors = chain.pooling(states.float(), mask.to(states.device))
    reads = [each.in_features for each in chain.rest if isinstance(each, nn.Linear)]
    fits = reads[:1] in ([], [vectors.shape[1]])  # not where the hidden size was pruned
    return chain.rest.to(states.device)(vectors) if fits else vectors


def _facts(batches: Sequence[Batch]) -> dict[str, int]:
    sequences = sum(map(len, batches))
    if not sequences:
        raise InputError("evaluation: needs at least one batch, got none; give more text")
    if any("input_ids" not in batch.inputs for batch in batches):
        return {"sequences": sequences}
    longest = max(batch.inputs["input_ids"].shape[1] for batch in batches)
    tokens = sum(map(count_tokens, batches))
    return {"sequences": sequences, "tokens": tokens, "seq_len": longest}


@dataclass(frozen=True)
class Pairs:
    """Texts that belong together, by their places."""

    first: list[str]
    second: list[str]
    scores: list[float] | None  # how alike those of each pair are, where the file says so


def read_pairs(path: str) -> Pairs:
    """Return the pairs of a file: a line for each, of two texts and, in all or none, a score.

    In a ``.jsonl`` file a line is an array of these, or an object whose values are these, by any
    names. In any other they are separated by tabs.
    """
    place = Path(path)
    if not place.is_file():
        raise InputError(f"pairs: {path} is no file; give one with two texts in each line")
    rows = []
    for where, line in read_lines(place):
        try:
            values = _values(line, place.suffix.lower() in JSON_LINES)
        except (AttributeError, ValueError, RecursionError):
            values = []
        texts = [each for each in values if isinstance(each, str) and each.strip()]
        scores = [each for each in values if number(each) is not None]
        if len(texts) != 2 or len(scores) > 1 or len(texts) + len(scores) < len(values):
            raise InputError(
                f"pairs: {where} must have two texts, and a number if they have a score; separate "
                'them by tabs, or write ["text", "text", 0.5] in a .jsonl file; of seven columns '
                """of STS-B take awk -F'\\t' '{print $6"\\t"$7"\\t"$5}'"""
            )
        rows.append((*(checked(text, where) for text in texts), *map(float, scores)))
    if not rows:
        raise InputError(f"pairs: {path} has no lines; give one with two texts in each line")
    if len({len(row) for row in rows}) > 1:
        raise InputError(f"pairs: {path} has lines with a score and without; give all one, or none")
    first, second, *scores = map(list, zip(*rows, strict=True))
    told = scores[0] if scores else second
    if len(set(told)) < 2:
        raise InputError(
            f"pairs: all lines of {path} end with {str(told[0])[:40]}; give more pairs"
        )
    return Pairs(first, second, scores[0] if scores else None)


def _values(line: str, is_json: bool) -> list[Any]:
    if not is_json:
        first, *rest = line.rstrip("\r").split("\t")
        return [first, *rest[:1], *map(float, rest[1:])]
    value = json.loads(line)
    return value if isinstance(value, list) else list(value.values())
