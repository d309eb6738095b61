"""What a command reads: a model, a tokenizer, and text, recordings or pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext import checkpoint
from liar_ext.calibration import generated, texts
from liar_ext.calibration.batches import read_batches
from liar_ext.calibration.collect import check_finite_weights
from liar_ext.calibration.documents import (
    Documents,
    check_apart,
    check_unchanged,
    document_digests,
    read_documents,
    text_digest,
)
from liar_ext.calibration.folds import count_beside, fraction_of, of_no_text, seed_of
from liar_ext.calibration.generated import SELF, write_sequences
from liar_ext.calibration.media import Reader, calibration_inputs, evaluation_inputs, read_files
from liar_ext.checkpoint.processors import kind_of, load_reader
from liar_ext.checkpoint_store import Checkpoint, Stored
from liar_ext.cli.output import check_device
from liar_ext.cli.vocabulary import SmallerVocabulary
from liar_ext.distributed import broadcast, is_first
from liar_ext.errors import InputError
from liar_ext.job.choosing import LEAST
from liar_ext.models.running import known_tokens, predicts_next_token
from liar_ext.recipe import Recipe
from liar_ext.report.report import Report
from liar_ext.selection.costs import LatencyTable

SKETCHED = 32  # tokens of a sequence that is written for an estimate alone

ONE_KIND = (
    "The calibration set is of one kind of text, and text unlike it loses more than it shows: name "
    "another kind as well, or let the model write a share of its own with --self-text 0.25."
)

UNMEASURED = (
    "The text is too short to measure --schedule auto on: layers are solved layer by layer, or in "
    "one pass if a norm reads the output of each layer."
)


@dataclass
class Given:
    """What a recipe names, loaded."""

    model: nn.Module
    tokenizer: Any
    calibration: Sequence[Mapping[str, Tensor]] | None  # None: that of the bank
    evaluation: Sequence[Mapping[str, Tensor]] | None
    certification: Sequence[Mapping[str, Tensor]] | None
    judging: Sequence[Mapping[str, Tensor]] | None
    facts: dict[str, object]
    warnings: list[str]
    notes: tuple[str, ...] = ()  # of the draw
    documents: Tensor | None = None  # their digests
    text_digests: Mapping[str, str] = field(default_factory=dict)  # of whole texts, by their names
    vocabulary: SmallerVocabulary | None = None  # what became of the tokens


def load_with_tokenizer(name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """Return a model and its tokenizer; None of one that reads recordings or pictures."""
    model, tokenizer = checkpoint.load_model(name, dtype, device)
    check_tokenizer(name, tokenizer)
    return model, tokenizer


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise InputError if a model that is given text has no tokenizer."""
    if tokenizer is None and kind_of(name) is None:
        raise InputError(
            f"load_model: {name} has no tokenizer to read text with; put one into the folder, or "
            "call liar_ext.prune with batches of your own"
        )


def load(
    recipe: Recipe,
    *,
    progress: bool = False,
    loader: Callable[[str, str, str], tuple[nn.Module, Any]] = load_with_tokenizer,
    sketch: bool = False,
    judge: int = 0,
) -> Given:
    """Return the model, by a loader of it and its tokenizer, and the batches of a recipe.

    Of several ranks each loads the model; the first one reads, writes and draws text, and hands the
    others the sequences. A ``sketch`` has as many sequences, but of what the model writes itself
    only beginnings, again and again, and what all of it would take, in seconds, as
    ``facts["writing"]``. With ``judge`` so many sequences more are drawn to judge whole models by,
    if the text has them.
    """
    check_unloaded(recipe)
    kind = kind_of(recipe.model)
    read, held_out = _documents(recipe, kind) if is_first() else ({}, None)
    model, tokenizer = loader(recipe.model, recipe.dtype, recipe.device)
    if kind is None:
        texts.check_seq_len(model, recipe.seq_len)
    vocabulary = SmallerVocabulary(recipe, model, tokenizer, read, held_out)
    tokenizer = vocabulary.tokenizer
    drawn = None
    if is_first():
        reads = tokenizer if kind is None else load_reader(kind, recipe.model, model)
        asked = {"progress": progress, "sketch": sketch, "judge": judge}
        drawn = _draw(recipe, model, reads, read, held_out, **asked)
    return Given(model, tokenizer, *broadcast(drawn), vocabulary=vocabulary)


def read_source(source: str, kind: str | None) -> Documents:
    """Return the documents, recordings or pictures of a source, as the model reads them."""
    return read_documents(source) if kind is None else read_files(source, kind)


def _documents(
    recipe: Recipe, kind: str | None
) -> tuple[dict[str, Sequence[str]], Sequence[str] | None]:
    """Return the documents of a recipe by source, and those to evaluate on."""
    written = SELF in recipe.calibration or recipe.random_tokens not in ("auto", 0)
    if kind is not None and written:
        raise InputError(
            f"prune: {recipe.model} reads {kind}, which no model writes (--calibration self) and "
            "random tokens (--random-tokens) are not; leave them out"
        )
    if kind is not None and recipe.keep_vocab != 1.0:
        raise InputError(
            f"prune: {recipe.model} reads {kind}, by which no tokens are counted; leave out "
            "--keep-vocab"
        )
    sources = dict.fromkeys([*recipe.calibration, *recipe.vocab_text])
    read = {source: read_source(source, kind) for source in sources if source != SELF}
    held_out = read_source(recipe.eval, kind) if recipe.eval else None
    check_unchanged(recipe.text_digests, {**read, recipe.eval: held_out})
    if held_out is not None:
        check_apart([text for documents in read.values() for text in documents], held_out)
    return read, held_out


def _draw(
    recipe: Recipe,
    model: nn.Module,
    reads: Any,
    read: dict[str, Sequence[str]],
    held_out: Sequence[str] | None,
    *,
    progress: bool,
    sketch: bool,
    judge: int,
) -> tuple:
    """Return what :class:`Given` has beside the model and its tokenizer, in its order.

    A tokenizer or a :class:`Reader` reads.
    """
    facts: dict[str, object] = {"calibration": list(recipe.calibration), "seq_len": recipe.seq_len}
    if SELF in recipe.calibration:
        asked = {"judge": judge, "progress": progress, "sketch": sketch}
        read[SELF], seconds = _written(model, reads, recipe, **asked)
        facts |= {"writing": seconds} if sketch else {}
    draw = _drawing(recipe, model, reads, [read[source] for source in recipe.calibration])
    short = []
    try:
        calibration = draw(judge=judge)
    except InputError:  # the text may be too short for one part more
        calibration = draw()
        short = [UNMEASURED] if judge and len(calibration) < LEAST else []
    evaluation = evaluation_batches(recipe, held_out, model, reads)
    facts |= {"bos": calibration.bos, **({"eval": recipe.eval} if recipe.eval else {})}
    kinds = warnings_of(recipe.calibration, predicts_next_token(model), recipe.self_text)
    warnings = [*calibration.notes, *short, *kinds]
    every = (text for documents in read.values() for text in documents)
    known = torch.tensor(sorted(document_digests(every)))
    batches, *apart = (
        None if some is None else some.batches(recipe.batch_size)
        for some in (calibration, calibration.certification, calibration.judging)
    )
    named = {**read, recipe.eval: held_out}
    whole = {n: text_digest(each) for n, each in named.items() if each and n != SELF}
    return batches, evaluation, *apart, facts, warnings, calibration.notes, known, whole


def _drawing(
    recipe: Recipe, model: nn.Module, reads: Any, sources: Sequence[Sequence[str]]
) -> Callable[..., Any]:
    """Return the function that draws the calibration set from its sources."""
    asked = {"samples": recipe.samples, "seed": recipe.seed, "certify": recipe.certify}
    if isinstance(reads, Reader):
        return partial(calibration_inputs, sources, reads, **asked)
    written = SELF in recipe.calibration or writes(recipe, model)
    return partial(
        texts.calibration_sequences,
        sources,
        reads,
        **asked,
        seq_len=recipe.seq_len,
        random_tokens=fraction_of(recipe.random_tokens, predicts_next_token(model), written),
        vocab_size=known_tokens(model, model.config),
        packed=predicts_next_token(model),
    )


def warnings_of(names: Sequence[str], causal: bool, self_text: float) -> list[str]:
    """Return what a user has to know of the kinds of calibration text."""
    alone = len(set(names)) == 1 and SELF not in names and self_text == 0
    return [ONE_KIND] if alone and causal else []


def check_unloaded(recipe: Recipe) -> None:
    """Refuse what can be told before the model is loaded, which may take minutes."""
    check_device(recipe.device)
    if recipe.latency_table is not None:
        LatencyTable.load(recipe.latency_table)


def evaluation_batches(
    recipe: Recipe, held_out: Sequence[str] | None, model: nn.Module, reads: Any
) -> list[dict[str, Tensor]] | None:
    """Return the batches of the held-out text or files, if there are some."""
    if held_out is None:
        return None
    if isinstance(reads, Reader):
        return evaluation_inputs(held_out, reads, recipe.eval_samples).batches(recipe.batch_size)
    how = {"samples": recipe.eval_samples, "packed": predicts_next_token(model)}
    sequences = texts.evaluation_sequences(held_out, reads, seq_len=recipe.seq_len, **how)
    return sequences.batches(recipe.batch_size)


def _written(
    model: nn.Module, tokenizer: Any, recipe: Recipe, *, judge: int, progress: bool, sketch: bool
) -> tuple[Sequence[str], float]:
    """Return the model's own share of the calibration text, and the seconds to write it."""
    start = time.perf_counter()
    share = -(-(recipe.samples + recipe.certify + judge) // len(recipe.calibration))
    tokens = min(recipe.seq_len, SKETCHED) if sketch else recipe.seq_len
    size = {"documents": generated.enough_documents(share), "tokens": tokens}
    how = {"seed": recipe.seed, "progress": progress}
    written = generated.write_documents(model, tokenizer, **size, **how)
    times = -(-recipe.seq_len // tokens)
    if sketch:  # once more, as what is read again may be fewer tokens
        written = [(times + 1) * text for text in written]
    return written, times * (time.perf_counter() - start)


def writes(recipe: Recipe, model: nn.Module) -> bool:
    """Tell whether a model writes text beside that which a recipe names."""
    named = SELF in recipe.calibration
    return recipe.self_text > 0 and not named and predicts_next_token(model)


def add_facts(report: Report, given: Given) -> None:
    """Let a report say what became of the texts."""
    report.settings |= given.facts
    report.warnings += given.warnings
    report.recipe = replace(report.recipe, text_digests=given.text_digests)
    if given.vocabulary is not None:
        given.vocabulary.add_to(report)


Batches = Sequence[Mapping[str, Tensor]]
WRITTEN = "written"  # its name in a checkpoint


class TextAndOwn(Sequence):
    """Batches of text, then those that are written when the first of all is asked for.

    What a job refuses it refuses before that, and so in no time. ``seconds`` are what it took.
    """

    seconds = 0.0

    def __init__(self, text: Batches, write: Callable[[], Batches]) -> None:
        self._text, self._write = text, write

    @cached_property
    def _all(self) -> list[Mapping[str, Tensor]]:
        start = time.perf_counter()
        found = [*self._text, *self._write()]
        self.seconds = time.perf_counter() - start
        return found

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index):
        return self._all[index]


def let_write(
    given: Given,
    recipe: Recipe,
    saved: Checkpoint | None = None,
    *,
    progress: bool = False,
    sketch: bool = False,
) -> None:
    """Give what was loaded the sequences that its model writes, if any, once it is gone through.

    The first rank writes, or takes what a checkpoint has, and hands it to the others. A ``sketch``
    has beginnings, again and again.
    """
    if not writes(recipe, given.model):
        return
    rows = [
        row
        for batch in read_batches(given.calibration)
        for row in batch.inputs["input_ids"][batch.source >= 0]
    ]
    count = count_beside(len(rows), recipe.self_text)
    if count == 0:
        return
    size = {"count": count, "seq_len": recipe.seq_len}
    size["written"] = min(recipe.seq_len, SKETCHED) if sketch else recipe.seq_len
    seed = seed_of(rows, recipe.seed)

    def write() -> Batches:
        check_finite_weights(given.model)
        kept = None if saved is None else saved.get(WRITTEN)
        if kept is not None:
            ids = _read(kept[0], recipe.seq_len, given.model)
        else:
            ids, how = None, {"seed": seed, "progress": progress}
            if is_first():
                ids = write_sequences(given.model, given.tokenizer, **size, **how).input_ids
            ids = broadcast(ids)
            if saved is not None:
                saved.put(WRITTEN, {"input_ids": ids})
        own = of_no_text(ids)
        given.facts["written_sequences"] = len(own)
        return own.batches(recipe.batch_size)

    given.calibration = TextAndOwn(given.calibration, write)


def _read(kept: Stored, seq_len: int, model: nn.Module) -> Tensor:
    """Return what a checkpoint has of it."""
    ids = kept["input_ids"] if "input_ids" in kept else torch.empty(0)
    known = known_tokens(model, model.config)
    if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[1] != seq_len or not len(ids):
        raise InputError(f"checkpoint: {kept.path} holds no text of this job; remove the folder")
    if not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise InputError(f"checkpoint: {kept.path} has tokens beyond {known}; remove the folder")
    return ids
