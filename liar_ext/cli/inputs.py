"""What a command reads: a model, a tokenizer, and text, recordings or pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration import documents as docs
from liar_ext.calibration import generated, media, texts
from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import read_batches
from liar_ext.calibration.collect import check_finite_weights
from liar_ext.calibration.generated import (
    SELF,
    count_beside,
    fraction_of,
    of_no_text,
    seed_of,
    write_sequences,
)
from liar_ext.calibration.image_text import read_examples
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.readers import kind_of, load_reader
from liar_ext.job.solving import LEAST
from liar_ext.job.vocabulary import SmallerVocabulary, shares_budget
from liar_ext.measure.latency_table import LatencyTable
from liar_ext.models.recipe import Recipe
from liar_ext.models.running import known_tokens, predicts_next_token
from liar_ext.report.report import Report
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.distributed import broadcast, is_first, local_world_size, world_size
from liar_ext.system.errors import InputError

SKETCHED = 32  # tokens of a sequence that is written for an estimate alone
WRITTEN = "written"  # key of generated text in a checkpoint
ONE_KIND = (
    "The calibration set is of one kind of text, and text unlike it loses more than it shows: name "
    "another kind as well"
)
ONE_SCORE = (
    "The model gives one score for each input, as cross-encoders do. If it reads two texts at "
    'once, calibrate it on lines {"text": "...", "text_pair": "..."} of a .jsonl file.'
)
OWN_SHARE = ", or let the model write a share of its own with --self-text 0.25"
UNMEASURED = (
    "The text is too short to measure --schedule auto on: layers are solved layer by layer, or in "
    "one pass if a norm reads the output of each layer."
)

Batches = Sequence[Mapping[str, Tensor]]


@dataclass
class Given:
    """What a recipe names, loaded."""

    recipe: Recipe  # with what the bank says, or without what can't be done block by block
    model: nn.Module
    tokenizer: Any
    bank: MomentBank | None = None
    store: BlockStore | None = None  # of a model that stays in its files
    calibration: Batches | None = None  # None: that of the bank
    evaluation: Batches | None = None
    certification: Batches | None = None
    judging: Batches | None = None
    facts: dict[str, object] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()  # of the draw
    documents: Tensor | None = None  # their digests
    text_digests: Mapping[str, str] = field(default_factory=dict)  # of whole texts, by their names
    vocabulary: SmallerVocabulary | None = None  # what became of the tokens

    def add_to(self, report: Report, pruned: nn.Module) -> None:
        """Let the report of a pruned model say what became of the texts."""
        report.settings |= self.facts
        report.warnings += self.warnings
        report.recipe = replace(report.recipe, text_digests=self.text_digests)
        if self.vocabulary is not None:
            self.vocabulary.add_to(report, pruned)


def load_with_tokenizer(name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """Return a model and its tokenizer; None of one that reads recordings or pictures."""
    model, tokenizer = load_model(name, dtype, device)
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
    loader: Callable[[str, str, str], tuple[nn.Module, Any]] = load_with_tokenizer,
    sketch: bool = False,
    judge: int = 0,
    must_judge: bool = False,
) -> Given:
    """Return the model, by a loader of it and its tokenizer, and the batches of a recipe.

    Of several ranks each loads the model; the first one reads, writes and draws text, and hands the
    others the sequences. A ``sketch`` has as many sequences, but of what the model writes itself
    only beginnings, again and again, and what all of it would take, in seconds, as
    ``facts["writing"]``. With ``judge`` so many sequences more are drawn to judge whole models by,
    if the text has them; InputError is raised if it has none and ``must_judge``.
    """
    check_unloaded(recipe)
    kind = kind_of(recipe.model, [*recipe.calibration, recipe.eval])
    read, held_out = _documents(recipe, kind) if is_first() else ({}, None)
    model, tokenizer = loader(recipe.model, recipe.dtype, recipe.device)
    if kind is None:
        texts.check_seq_len(model, tokenizer, recipe.seq_len)
    if sketch and shares_budget(recipe):
        raise InputError(
            "prune: --dry-run can't tell how --keep-vocab auto shares a budget of params, which it "
            "measures on pruned models; give a number of tokens, or leave --dry-run out"
        )
    write = partial(_written, recipe, model, sketch=sketch)
    asked = {"write": write, "judge": judge, "must_judge": must_judge}
    draw = partial(_draw, recipe, model, read=read, held_out=held_out, **asked)
    vocabulary = SmallerVocabulary(
        *(recipe, model, tokenizer, read, held_out),
        draw=lambda: draw(tokenizer)["calibration"],
    )
    tokenizer, drawn = vocabulary.tokenizer, None
    if is_first():
        drawn = draw(tokenizer if kind is None else load_reader(kind, recipe.model, model))
    return Given(recipe, model, tokenizer, **broadcast(drawn), vocabulary=vocabulary)


def check_unloaded(recipe: Recipe) -> None:
    """Refuse what can be told before the model is loaded, which may take minutes."""
    if recipe.device == "auto" and world_size() > 1:
        raise InputError(
            "load_model: --device auto spreads one model over all GPUs, and each of "
            f"{world_size()} ranks has one of its own; give --device cuda: each then takes one GPU"
        )
    gpus, ranks = torch.cuda.device_count(), local_world_size()
    if recipe.device.startswith("cuda") and world_size() > 1 and gpus < ranks:
        raise InputError(
            f"load_model: {ranks} ranks of this machine need a GPU each, and it has {gpus}; give "
            "as many to --nproc-per-node, or --device cpu"
        )
    if Path(recipe.model).is_file() and not recipe.model.endswith(".gguf"):
        raise InputError(
            f"load_model: {recipe.model} is a file, and no .gguf; give a model folder or a name on "
            "the hub first, then --calibration TEXT"
        )
    if recipe.latency_table is not None:
        LatencyTable.load(recipe.latency_table)


def read_source(source: str, kind: str | None) -> docs.Documents:
    """Return the documents, recordings or pictures of a source, as the model reads them."""
    if kind == media.IMAGES_WITH_TEXT:
        return read_examples(source)
    return docs.read_documents(source) if kind is None else media.read_files(source, kind)


def _documents(
    recipe: Recipe, kind: str | None
) -> tuple[dict[str, Sequence[str]], Sequence[str] | None]:
    """Return the documents of a recipe by source, and those to evaluate on."""
    words = SELF in recipe.calibration or recipe.random_tokens not in ("auto", 0)
    if kind is not None and (words or recipe.keep_vocab != 1.0):
        raise InputError(
            f"prune: {recipe.model} reads {kind}, and --calibration self, --random-tokens and "
            "--keep-vocab are for text; leave them out"
        )
    sources = dict.fromkeys([*recipe.calibration, *recipe.vocab_text])
    read = {source: read_source(source, kind) for source in sources if source != SELF}
    held_out = read_source(recipe.eval, kind) if recipe.eval else None
    docs.check_unchanged(recipe.text_digests, {**read, recipe.eval: held_out})
    if held_out is not None:
        known = docs.document_digests(text for some in read.values() for text in some)
        docs.check_apart(known, held_out)
    return read, held_out


def _draw(
    recipe: Recipe,
    model: nn.Module,
    reads: Any,
    *,
    read: dict[str, Sequence[str]],
    held_out: Sequence[str] | None,
    write: Callable[[Any, int], tuple[Sequence[str], dict[str, float]]],
    judge: int,
    must_judge: bool,
) -> dict[str, Any]:
    """Return what :class:`Given` has of text, as a tokenizer or a :class:`Reader` reads it."""
    facts: dict[str, object] = {"calibration": list(recipe.calibration), "seq_len": recipe.seq_len}
    named, causal = SELF in recipe.calibration, predicts_next_token(model)
    if named:
        size = recipe.samples + recipe.certify + judge
        read[SELF], seconds = write(reads, size)
        facts |= seconds
    asked = {"samples": recipe.samples, "seed": recipe.seed, "certify": recipe.certify}
    if isinstance(reads, media.Reader):
        draw, asked["must_judge"] = media.calibration_inputs, must_judge
    else:
        draw = texts.calibration_sequences
        if not causal:
            facts["seq_len"] = texts.longest_read(reads, recipe.seq_len)
        asked |= {"seq_len": recipe.seq_len, "packed": causal}
        asked["vocab_size"] = known_tokens(model, model.config)
        written = named or writes(recipe, model)
        asked["random_tokens"] = fraction_of(recipe.random_tokens, causal, written)
    draw = partial(draw, [read[source] for source in recipe.calibration], reads, **asked)
    short = []
    try:
        drawn = draw(judge=judge)
    except InputError as error:  # the text may be too short for one part more
        drawn = draw()
        if must_judge:
            why = str(error).removeprefix("calibration: ").replace(" seq_len", " --seq-len")
            raise InputError(f"calibration: an eighth can't be held out: {why}") from error
        short = [UNMEASURED] if judge and len(drawn) < LEAST else []
    facts |= {"bos": drawn.bos, **({"eval": recipe.eval} if recipe.eval else {})}
    every = [text for documents in read.values() for text in documents]
    kinds = warnings_of(recipe.calibration, causal, recipe.self_text > 0)
    pairs = isinstance(reads, media.Reader) or any(isinstance(text, docs.Pair) for text in every)
    if not pairs and getattr(model.config, "num_labels", 0) == 1:
        kinds.append(ONE_SCORE)
    whole = {**read, recipe.eval: held_out}
    parts = {"calibration": drawn, "certification": drawn.certification, "judging": drawn.judging}
    return {
        "evaluation": evaluation_batches(recipe, held_out, model, reads),
        "facts": facts,
        "warnings": [*drawn.notes, *short, *kinds],
        "notes": drawn.notes,
        "documents": torch.tensor(sorted(docs.document_digests(every))),
        "text_digests": {n: docs.text_digest(e) for n, e in whole.items() if e and n != SELF},
        **{n: None if e is None else e.batches(recipe.batch_size) for n, e in parts.items()},
    }


def warnings_of(names: Sequence[str], causal: bool, own: bool) -> list[str]:
    """Return what a user has to know of the kinds of calibration text."""
    alone = len(set(names)) == 1 and SELF not in names and not own
    return [f"{ONE_KIND}{OWN_SHARE}."] if alone and causal else []


def evaluation_batches(
    recipe: Recipe, held_out: Sequence[str] | None, model: nn.Module, reads: Any
) -> list[dict[str, Tensor]] | None:
    """Return the batches of the held-out text or files, if there are some."""
    if held_out is None:
        return None
    if isinstance(reads, media.Reader):
        sequences = media.evaluation_inputs(held_out, reads, recipe.eval_samples)
    else:
        how = {"samples": recipe.eval_samples, "packed": predicts_next_token(model)}
        sequences = texts.evaluation_sequences(held_out, reads, seq_len=recipe.seq_len, **how)
    return sequences.batches(recipe.batch_size)


def _written(
    recipe: Recipe, model: nn.Module, tokenizer: Any, size: int, *, sketch: bool
) -> tuple[Sequence[str], dict[str, float]]:
    """Return the model's own share of ``size`` sequences, and of a sketch what all would take."""
    start = time.perf_counter()
    share = generated.enough_documents(-(-size // len(recipe.calibration)))
    tokens = min(recipe.seq_len, SKETCHED) if sketch else recipe.seq_len
    how = {"documents": share, "tokens": tokens, "seed": recipe.seed}
    written = generated.write_documents(model, tokenizer, **how)
    if not sketch:
        return written, {}
    times = -(-recipe.seq_len // tokens)
    # Once more, as what is read again may be fewer tokens.
    again = [(times + 1) * text for text in written]
    return again, {"writing": times * (time.perf_counter() - start)}


def writes(recipe: Recipe, model: nn.Module) -> bool:
    """Tell whether a model writes text beside that which a recipe names."""
    named = SELF in recipe.calibration
    return recipe.self_text > 0 and not named and predicts_next_token(model)


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


def let_write(given: Given, saved: Checkpoint | None = None, *, sketch: bool = False) -> None:
    """Add the sequences that the model writes, if any, once the calibration set is gone through.

    The first rank writes, or takes what a checkpoint has, and hands it to the others. A ``sketch``
    has beginnings, again and again.
    """
    recipe, model, length = given.recipe, given.model, given.recipe.seq_len
    if given.bank is not None or not writes(recipe, model):
        return
    rows = [
        row
        for batch in read_batches(given.calibration)
        for row in batch.inputs["input_ids"][batch.source >= 0]
    ]
    how = {"count": count_beside(len(rows), recipe.self_text), "seed": seed_of(rows, recipe.seed)}
    how["written"] = min(length, SKETCHED) if sketch else length
    if how["count"] == 0:
        return

    def write() -> Batches:
        check_finite_weights(model)
        kept = None if saved is None else saved.get(WRITTEN)
        if kept is not None:
            ids = kept[0]["input_ids"]
        else:
            ids = None
            if is_first():
                ids = write_sequences(model, given.tokenizer, seq_len=length, **how).input_ids
            ids = broadcast(ids)
            if saved is not None:
                saved.put(WRITTEN, {"input_ids": ids})
        own = of_no_text(ids)
        given.facts["written_sequences"] = len(own)
        return own.batches(recipe.batch_size)

    given.calibration = TextAndOwn(given.calibration, write)
