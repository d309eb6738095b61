"""``liar eval``: perplexity of a model on a text, what an encoder keeps, or tasks of lm-eval."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from liar_ext.atomic_write import begins_with, check_place, write_whole
from liar_ext.cli.encoders import judge, read_texts
from liar_ext.cli.inputs import check_causal, load_with_tokenizer, not_causal
from liar_ext.data import texts
from liar_ext.errors import InputError
from liar_ext.evaluation import perplexity
from liar_ext.models.running import predicts_next_token
from liar_ext.report.report import versions


def run(options: argparse.Namespace) -> None:
    """Print the perplexity, what an encoder keeps, or lm-eval's table."""
    _check_together(options)
    if options.tasks:
        check_causal(options.model, "eval:")
    output = Path(options.out) if options.out else None
    if output is not None:
        check_place(output, "eval", "--out", begins_with('{\n "model": '))
    result, line = (_tasks if options.tasks else _on_text)(options)
    print(json.dumps(result) if options.json else line, flush=True)
    if output is not None:
        facts = json.dumps({"model": options.model, **result, "versions": versions()}, indent=1)
        write_whole(output, facts + "\n", "eval", "--out")


def _check_together(options: argparse.Namespace) -> None:
    """Refuse options of the other kind, which would change nothing."""
    of_text = ("samples", "against", "pairs")
    names = of_text if options.tasks else ("include_path", "limit", "num_fewshot")
    for name in names:
        if getattr(options, name) is not None:
            option, kind = "--" + name.replace("_", "-"), "--text" if options.tasks else "--tasks"
            raise InputError(f"eval: {option} goes with {kind}; leave one of them out")
    if not (options.text or options.tasks or options.pairs):
        raise InputError("eval: needs --text TEXT, --tasks TASK, or of an encoder --pairs FILE")


def _on_text(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the perplexity on a text or what an encoder keeps, and the line that says it."""
    documents, pairs = read_texts(options)
    model, tokenizer = load_with_tokenizer(options.model, options.dtype, options.device)
    texts.check_seq_len(model, options.seq_len)
    if not predicts_next_token(model):
        return judge(options, model, tokenizer, documents, pairs)
    if options.against or options.pairs:
        option = "--against" if options.against else "--pairs"
        raise InputError(
            f"eval: {option} is for encoders, got {type(model).__name__}, which has a perplexity; "
            "leave it out"
        )
    sequences = texts.evaluation_sequences(
        documents, tokenizer, seq_len=options.seq_len, samples=options.samples
    )
    result = perplexity(model, sequences.batches(options.batch_size), progress=options.progress)
    return result, (
        f"perplexity {result['perplexity']:.3f} over {result['tokens']:,} tokens in "
        f"{result['sequences']} windows of {result['seq_len']}"
    )


def _tasks(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return what lm-eval measures, and its table."""
    from liar_ext.integrations.lm_eval import evaluate_tasks, load_tasks

    tasks = load_tasks(options.tasks, options.include_path)
    model, tokenizer = load_with_tokenizer(options.model, options.dtype, options.device)
    if not predicts_next_token(model):
        raise not_causal(type(model).__name__, "eval:")
    result = evaluate_tasks(
        model,
        tokenizer,
        tasks,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        progress=options.progress,
    )
    return result, result.pop("table").rstrip()
