"""``liar eval``, ``bench`` and ``verify``: a model's quality, its speed, and its proof."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.calibration.documents import read_documents
from liar_ext.calibration.media import evaluation_inputs, spread
from liar_ext.calibration.texts import check_seq_len, evaluation_sequences
from liar_ext.checkpoint.inspection import read_config
from liar_ext.checkpoint.loading import kind_of, load_reader
from liar_ext.checkpoint.placing import check_place
from liar_ext.checkpoint.reading import stock_class
from liar_ext.cli.inputs import load_with_tokenizer, read_source
from liar_ext.cli.output import show
from liar_ext.export.verify import table, verify_everywhere
from liar_ext.job.vocabulary import VocabularyQuality
from liar_ext.measure.embeddings import Pairs, embed, encoder_similarity, pair_quality, read_pairs
from liar_ext.measure.evaluation import evaluate_tasks, load_tasks, perplexity, word_errors
from liar_ext.measure.speed import BENCH_MARK, Settings, benchmark
from liar_ext.models.running import inputs_read, positions_of, predicts_next_token
from liar_ext.report.reading import bench_file, report_digest
from liar_ext.report.report import Report, is_same_place, versions
from liar_ext.report.sections import speed
from liar_ext.report.tables import MEASURES, measured, measured_on, quality, to_text
from liar_ext.system.atomic_write import begins_with, write_whole
from liar_ext.system.errors import InputError

PAIR_MEASURES = {"spearman": "Spearman correlation", "recall_at_1": "recall@1"}
NEEDS_CAUSAL = {  # an option of a command, and what others do
    "eval": ("--tasks", "judge an encoder by --text"),
    "verify": ("--text", "leave it out, and all runtimes read the same stored tokens"),
}
SEQ_LEN, SAMPLES = 256, 16  # of the text of verify, which every runtime reads


def run(options: argparse.Namespace) -> None:
    """Print the perplexity, what an encoder keeps, or lm-eval's table."""
    _check_together(options)
    if options.tasks:
        _check_causal("eval", options.model)
    output = Path(options.out) if options.out else None
    if output is not None:
        check_place(output, "eval", "--out", begins_with('{\n "model": '))
    if options.tasks:
        result, lines = _tasks(options)
    else:
        kind = kind_of(options.model, [options.text])
        result, lines = _text(options) if kind is None else _files(options, kind)
    show(options, result, lines)
    if output is not None:
        facts = json.dumps({"model": options.model, **result, "versions": versions()}, indent=1)
        write_whole(output, facts + "\n", "eval", "--out")


def _check_together(options: argparse.Namespace) -> None:
    """Refuse options of the other kind, which would change nothing."""
    of_text, of_tasks = ("samples", "against", "pairs"), ("include_path", "limit", "num_fewshot")
    for name in of_text if options.tasks else of_tasks:
        if getattr(options, name) is not None:
            option, kind = "--" + name.replace("_", "-"), "--text" if options.tasks else "--tasks"
            raise InputError(f"eval: {option} goes with {kind}; leave one of them out")
    if not (options.text or options.tasks or options.pairs):
        raise InputError("eval: needs --text TEXT, --tasks TASK, or of an encoder --pairs FILE")


Result = tuple[dict[str, Any], list[str]]  # what was measured, and the lines that say it


def _text(options: argparse.Namespace) -> Result:
    """Return the perplexity on a text, or what an encoder keeps on text and on pairs of texts."""
    documents = read_documents(options.text) if options.text else None
    pairs = read_pairs(options.pairs) if options.pairs else None
    model, tokenizer = _load(options, options.model)
    check_seq_len(model, tokenizer, options.seq_len)
    name, causal = type(model).__name__, _is_causal(options, model)
    if not causal and "input_ids" not in inputs_read(model):
        raise InputError(
            f"eval: {name} reads {' and '.join(inputs_read(model))}, and no text; call "
            "liar_ext.encoder_similarity with batches of your own"
        )
    how = {"seq_len": options.seq_len, "samples": options.samples}
    if causal:
        windows = evaluation_sequences(documents, tokenizer, **how).batches(options.batch_size)
        return _perplexity(options, model, windows, "windows of")
    dense, reads, result = _dense(options, needed=documents is not None)
    lines: list[str] = []
    if documents is not None:
        found = _on_text(options, (model, tokenizer), (dense, reads), documents, how)
        result, lines = result | found, _said(found)
    if pairs is not None:
        result |= _of_pairs(model, tokenizer, pairs, options)
        own = {} if dense is None else _of_pairs(dense, reads, pairs, options)
        for name in PAIR_MEASURES.keys() & result.keys():
            result |= {f"dense_{name}": own[name]} if own else {}
            beside = f" (dense {own[name]:.4f})" if own else ""
            said = f"{PAIR_MEASURES[name]} {result[name]:.4f}{beside}"
            lines.append(f"{said} over {result['pairs']:,} pairs")
    return result, lines


def _is_causal(options: argparse.Namespace, model: nn.Module) -> bool:
    """Tell whether a model has a perplexity; refuse what is for others then."""
    causal, option = predicts_next_token(model), "--against" if options.against else "--pairs"
    if causal and (options.against or options.pairs):
        raise InputError(
            f"eval: {option} is for encoders, got {type(model).__name__}, which has a perplexity; "
            "leave it out"
        )
    return causal


def _perplexity(
    options: argparse.Namespace, model: nn.Module, batches: Any, windows: str
) -> Result:
    result = perplexity(model, batches)
    return result, [
        f"perplexity {result['perplexity']:.3f} over {result['tokens']:,} tokens in "
        f"{result['sequences']} {windows} {result['seq_len']}"
    ]


def _files(options: argparse.Namespace, kind: str) -> Result:
    """Return what was measured of a model on recordings, pictures, or pictures with text."""
    if options.pairs:
        raise InputError(f"eval: --pairs is for text, and the model reads {kind}; give --text DIR")
    files = read_source(options.text, kind)
    items = spread(files.items, options.samples)
    model, _ = _load(options, options.model)
    reader = load_reader(kind, options.model, model)
    if _is_causal(options, model):
        batches = evaluation_inputs(files, reader, options.samples).batches(options.batch_size)
        return _perplexity(options, model, batches, "sequences of at most")
    spoken = reader.writes and all(item.text for item in items)
    dense, _, result = _dense(options, needed=not spoken)
    lines = []
    if spoken:
        size = options.batch_size
        found = word_errors(model, reader, items, batch_size=size)
        own = {} if dense is None else word_errors(dense, reader, items, batch_size=size)
        names = ("word_error_rate", "seconds_per_minute") if own else ()
        result |= found | {f"dense_{name}": own[name] for name in names}
        beside = f" (dense {own['word_error_rate']:.2%})" if own else ""
        slower = f" (dense {own['seconds_per_minute']:.2f})" if own else ""
        lines += [
            f"word error rate {found['word_error_rate']:.2%}{beside} over {found['words']:,} words "
            f"in {found['recordings']:,} recordings",
            f"seconds for a minute of audio: {found['seconds_per_minute']:.2f}{slower}",
        ]
    if dense is not None:
        batches = evaluation_inputs(files, reader, options.samples).batches(options.batch_size)
        found = encoder_similarity(model, dense, batches)
        result, lines = result | found, lines + _said(found)
    return result, lines


def _load(options: argparse.Namespace, name: str) -> tuple[nn.Module, Any]:
    return load_with_tokenizer(name, options.dtype, options.device)


def _dense(
    options: argparse.Namespace, *, needed: bool
) -> tuple[nn.Module | None, Any, dict[str, Any]]:
    """Return the dense model and its tokenizer, if it is known, and what a result says of it.

    It is named by an option or by the folder's report. InputError if it is needed and is not there.
    """
    name, replaced = options.against or "", False
    if not name:
        with suppress(InputError):
            report = Report.load(options.model)
            name = str(report.choices.get("model") or report.model)
            replaced = is_same_place(name, options.model)
    if options.against or (name and Path(name).is_dir() and not replaced):
        return *_load(options, name), {"against": name}
    if needed:
        gone = f"the folder of its report, {name}, is not there" if name else "it has no report"
        gone = "it was written in the place of that" if replaced else gone
        raise InputError(
            f"eval: {options.model} is an encoder, which is compared with the dense model, and "
            f"{gone}; give it by --against DENSE"
        )
    return None, None, {}


def _on_text(
    options: argparse.Namespace,
    pruned: tuple[nn.Module, Any],
    dense: tuple[nn.Module, Any],
    documents: Sequence[str],
    how: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a model keeps of the dense one's outputs; each reads a text as its own tokens."""
    own, other = (
        evaluation_sequences(documents, tokenizer, packed=False, **how)
        for _, tokenizer in (pruned, dense)
    )
    if len(pruned[1]) == len(dense[1]) and torch.equal(own.input_ids, other.input_ids):
        batches = own.batches(options.batch_size)
        return encoder_similarity(pruned[0], dense[0], batches)
    judge = VocabularyQuality(*dense, documents, batch_size=options.batch_size, **how)
    if judge.judged_by is None:
        raise InputError(
            f"eval: outputs of {type(dense[0]).__name__} don't compare between vocabularies; judge "
            "it by its own task"
        )
    found = measured(judge.compare(*pruned))
    longest, tokens = own.input_ids.shape[1], int(own.attention_mask.sum())
    return {**found, "sequences": len(own), "tokens": tokens, "seq_len": longest}


def _said(found: Mapping[str, float]) -> list[str]:
    """Return what an encoder keeps, in a line each."""
    over = measured_on(found)
    return [f"{MEASURES[n]} {quality(value)} over {over}" for n, value in measured(found).items()]


def _tasks(options: argparse.Namespace) -> Result:
    tasks = load_tasks(options.tasks, options.include_path)
    model, tokenizer = _load(options, options.model)
    if not predicts_next_token(model):
        raise _not_causal("eval", type(model).__name__)
    names = ("limit", "num_fewshot", "batch_size")
    settings = {name: getattr(options, name) for name in names}
    result = evaluate_tasks(model, tokenizer, tasks, **settings)
    return result, [result.pop("table").rstrip()]


def _check_causal(command: str, name: str) -> None:
    """Raise InputError if a folder's config tells that its model predicts no next token."""
    if Path(name).is_dir():
        fields = read_config(Path(name), "load_model")
        stock = stock_class(fields, "load_model")
        if not stock.can_generate() or fields.get("is_encoder_decoder"):
            raise _not_causal(command, stock.__name__)


def _not_causal(command: str, kind: str) -> InputError:
    option, hint = NEEDS_CAUSAL[command]
    return InputError(f"{command}: {option} needs a causal language model, got {kind}; {hint}")


def _of_pairs(
    model: nn.Module, tokenizer: Any, pairs: Pairs, options: argparse.Namespace
) -> Mapping[str, float]:
    def embeddings(of: Sequence[str]) -> Tensor:
        sequences = evaluation_sequences(of, tokenizer, seq_len=options.seq_len, packed=False)
        order = sequences.attention_mask.sum(1).argsort(stable=True)  # as batches are made
        found = embed(model, sequences.batches(options.batch_size))
        return found[order.argsort()]

    first, second = map(embeddings, (pairs.first, pairs.second))
    return pair_quality(first, second, pairs.second, pairs.scores)


def run_bench(options: argparse.Namespace) -> None:
    """Measure, print a table, and store the numbers: as told, or beside a folder."""
    target = Path(options.out) if options.out is not None else None
    if target is None and Path(options.folder).is_dir():  # and not a hub id
        target = bench_file(options.folder)
    if target is not None:
        check_place(target, "bench", "--out", begins_with(BENCH_MARK))
    names = ("rounds", "prompt_length", "new_tokens", "dtype", "device", "threads")
    settings = Settings(
        **{name: getattr(options, name) for name in names},
        batches=tuple(dict.fromkeys(options.batch)),
    )
    found = benchmark(options.folder, options.against, settings, memory=options.memory)
    timed = speed(found)
    print(found.to_json() if options.json else "\n".join([*to_text(timed), timed.note]))
    if target is not None:
        found = replace(found, report_digest=report_digest(options.folder))
        write_whole(target, found.to_json(), "bench", "--out")
        if not options.json:
            print(f"{target}: written")


def run_verify(options: argparse.Namespace) -> int:
    """Reload, compare, print; return 1 if outputs, tokens or weights differ."""
    ids = _ids(options.folder, options.text) if options.text else None
    facts = verify_everywhere(options.folder, options.device, ids)
    lines = [f"{facts['params']:,} parameters, {facts['layers']} layers, {facts['dtype']}"]
    lines += table(facts["rows"])
    if "tokenizer_agrees" in facts:
        verdict = "same tokens" if facts["tokenizer_agrees"] else "OTHER TOKENS"
        lines.append(f"tokenizer: {verdict} for the stored texts")
    lines += [f"{name}: CHANGED since it was saved" for name in facts["changed"]]
    show(options, {**facts, "rows": [asdict(row) for row in facts["rows"]]}, lines)
    return 0 if facts["agrees"] else 1


def _ids(folder: str, text: str) -> Any:
    """Return token ids of a text, as many sequences as a check in every runtime bears."""
    _check_causal("verify", folder)
    documents = read_documents(text)
    model, tokenizer = load_with_tokenizer(folder, "float32", "cpu")
    if not predicts_next_token(model):
        raise _not_causal("verify", type(model).__name__)
    length = min(SEQ_LEN, positions_of(model) or SEQ_LEN)
    sequences = evaluation_sequences(documents, tokenizer, seq_len=length, samples=SAMPLES)
    return np.concatenate([batch["input_ids"].numpy() for batch in sequences.batches(1)])
