"""The quality of models: ``liar eval`` and ``liar compare-methods``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from liar_ext.calibration.documents import read_documents
from liar_ext.calibration.media import evaluation_inputs, spread
from liar_ext.calibration.texts import check_seq_len, evaluation_sequences
from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.placing import check_place
from liar_ext.checkpoint.readers import kind_of, load_reader
from liar_ext.cli.inputs import let_write, load, load_with_tokenizer, read_source
from liar_ext.cli.main import show
from liar_ext.cli.options import StrPath, check_complete, given_fields, paths_of
from liar_ext.job.planning import Sweep
from liar_ext.job.solving import sequences_to_judge
from liar_ext.job.vocabulary import VocabularyQuality
from liar_ext.measure.embeddings import (
    Evaluator,
    Pairs,
    embed,
    encoder_similarity,
    pair_quality,
    read_pairs,
)
from liar_ext.measure.evaluation import evaluate_tasks, load_tasks, perplexity, word_errors
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_checks import CompressOptions
from liar_ext.models.recipe_fields import recipe_fields
from liar_ext.models.running import predicts_next_token
from liar_ext.report.report import Report, is_same_place, versions
from liar_ext.report.tables import MEASURES, Table, figure, measured, measured_on, quality, to_text
from liar_ext.system.errors import InputError
from liar_ext.system.files import begins_with, write_whole
from liar_ext.system.progress import no_bars, showing_bars

PAIR_MEASURES = {"spearman": "Spearman correlation", "recall_at_1": "recall@1"}
Result = tuple[dict[str, Any], list[str]]  # what was measured, and the lines that say it


def run(options: argparse.Namespace) -> None:
    """Print the perplexity, what an encoder keeps, or lm-eval's table."""
    _check_together(options)
    output = Path(options.out) if options.out else None
    if output is not None:
        check_place(output, "eval", "--out", partial(begins_with, '{\n "model": '))
    kind = None if options.tasks else kind_of(options.model, [options.text])
    if options.tasks:
        result, lines = _tasks(options)
    elif kind is None:
        result, lines = _text(options)
    else:
        result, lines = _files(options, kind)
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


def _text(options: argparse.Namespace) -> Result:
    """Return the perplexity on a text, or what an encoder keeps on text and on pairs of texts."""
    documents = read_documents(options.text) if options.text else None
    pairs = read_pairs(options.pairs) if options.pairs else None
    model, tokenizer = _load(options, options.model)
    causal = _is_causal(options, model)
    check_seq_len(model, tokenizer, options.seq_len)
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
    name = options.against
    if not name:
        with suppress(InputError):
            report = Report.load(options.model)
            said = str(report.choices.get("model") or report.model)
            name = said if Path(said).is_dir() and not is_same_place(said, options.model) else None
    if name:
        return *_load(options, name), {"against": name}
    if needed:
        raise InputError(
            f"eval: {options.model} is an encoder, which is compared with the dense model, and its "
            "report names none that is there; give it by --against DENSE"
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
        kind = type(model).__name__
        raise InputError(f"eval: --tasks needs a causal language model, got {kind}")
    names = ("limit", "num_fewshot", "batch_size")
    settings = {name: getattr(options, name) for name in names}
    result = evaluate_tasks(model, tokenizer, tasks, **settings)
    return result, [result.pop("table").rstrip()]


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


METHODS = {"liar": "balanced"}  # presets that have another name here
Row = dict[str, Any]


def run_compare_methods(options: argparse.Namespace) -> None:
    """Prune a copy of the model by each method with each seed, print a table."""
    given = given_fields(options)
    needed = {"MODEL": "model", "--calibration TEXT": "calibration", "--eval TEXT": "eval"}
    example = "for one liar compare-methods MODEL --calibration text.txt --eval held_out.txt"
    needed = {name: given.get(field) for name, field in needed.items()}
    check_complete("compare-methods", needed, example)
    given |= {name: getattr(options, name) for name in ("methods", "seeds", "progress")}
    found = compare_methods(given.pop("model"), given.pop("calibration"), **given)
    show(options, found, to_text(methods_table(found["dense"], found["runs"])))


def compare_methods(
    model: StrPath,
    text: StrPath | Sequence[StrPath],
    *,
    methods: Sequence[str] = ("flap", "wanda-sp", "liar"),
    seeds: Sequence[int] = (0, 1),
    progress: bool = False,
    **options: Unpack[CompressOptions],
) -> dict[str, Any]:
    """Prune copies of a model by several methods, and measure each: ``liar compare-methods``.

    Options of the command are keywords, with their defaults there, and hold for all methods::

        found = compare_methods("gpt2", "text.txt", eval="held_out.txt", keep=0.8)
        for run in found["runs"]:
            print(run["method"], run["seed"], run["perplexity"])

    Parameters
    ----------
    model : str or path
        Model folder, hub id, or GGUF file.
    text : str or path, or a sequence of them
        Calibration text.
    methods : sequence of str
        Presets, or ``"liar"`` for ``"balanced"``.
    seeds : sequence of int
        Random seeds: each method is run with each of them.
    progress : bool
        Show progress bars.
    **options
        ``eval``, the held-out text, and other fields of the recipe.

    Returns
    -------
    dict
        What the command prints with ``--json``. ``dense`` has the numbers of the dense model,
        ``runs`` those of each method and seed: ``params``, ``seconds``, and ``perplexity`` or what
        :func:`liar_ext.encoder_similarity` measures.

    Raises
    ------
    InputError
        If a file, the model or an option cannot be used.
    """
    if options.get("eval") is None or options.keys() & {"certify", "preset", "seed"}:
        raise InputError(
            "compare_methods: needs held-out text, such as eval='held_out.txt', and methods and "
            "seeds, not preset and seed; it certifies nothing"
        )
    if options.get("keep_vocab", 1.0) != 1.0:
        raise InputError(
            "recipe: keep_vocab can't be compared, as every method would have the same tokens; "
            "prune with it and keep 1 first, and compare methods on that folder"
        )
    calibration = paths_of(text)
    shared = {**options, "model": os.fspath(model), "calibration": calibration}
    recipes = {
        (method, seed): Recipe.build(preset=METHODS.get(method, method), **shared, seed=seed)
        for seed in seeds
        for method in methods
    }
    groups: dict[tuple, list[tuple[str, int]]] = {}  # on the same text, which share its statistics
    for key, recipe in recipes.items():
        inputs = (getattr(recipe, each.name) for each in recipe_fields(affects="inputs"))
        groups.setdefault((recipe.seed, *inputs), []).append(key)
    dense, rows, loader, measure = None, [], cache(load_with_tokenizer), Evaluator()
    with showing_bars(progress), nullcontext() if progress else no_bars():
        for keys in groups.values():
            judge = max(sequences_to_judge(recipes[key]) for key in keys)
            given = load(recipes[keys[0]], loader=loader, judge=judge)
            let_write(given)
            if dense is None:
                dense = _numbers(measure, given.model, given.evaluation)
            work = Sweep(given.model, given.calibration, judge_on=given.judging)
            for method, seed in keys:
                pruned, point = work.prune(recipes[method, seed])
                found = _numbers(measure, pruned, given.evaluation)
                rows.append({"method": method, "seed": seed, **found, "seconds": point.seconds})
    return {"dense": dense, "runs": rows}


def methods_table(dense: Row, rows: Sequence[Row]) -> Table:
    """Return a row for the dense model, and one for each method over its seeds.

    They are judged by the perplexity, or the first measure of an encoder that all of them have.
    """
    by_method = {"dense": [dense]}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    # Of fewer hidden features there is no cosine.
    measure = next(name for name in measured(dense) if all(name in row for row in rows))
    cells = []
    for method, runs in by_method.items():
        found = [row[measure] for row in runs]
        spread = (min(found), max(found)) if len(found) > 1 else (None, None)
        spent = mean(row["seconds"] for row in runs) if "seconds" in runs[0] else None
        numbers = [quality(each) for each in (mean(found), *spread)]
        params = mean(row["params"] for row in runs)
        cells.append((method, f"{params:,.0f}", *numbers, figure(spent, ".1f")))
    heads = ("method", "parameters", measure, "lowest seed", "highest seed", "seconds")
    return Table("", heads, cells)


def _numbers(measure: Evaluator, model: nn.Module, batches: Any) -> Row:
    return {"params": count_params(model), **measured(measure(model, batches))}
