"""The ``liar`` command."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from liar_ext import ops
from liar_ext.cli.options import parser
from liar_ext.errors import InputError
from liar_ext.models.registry import FAMILIES
from liar_ext.plan import Budget
from liar_ext.selection.criteria import get_criterion, list_criteria


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done; 1: ``verify`` found other outputs; 2: input that cannot be used, or too little memory
    for it on the device; 130: interrupted.
    """
    options = parser().parse_args(arguments)
    if getattr(options, "quiet", False):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        return COMMANDS[options.command](options) or 0
    except (InputError, OSError) as error:  # OSError: no permission, disk full, no such file
        print(f"liar: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"liar: error: {str(error).split('. ')[0]}; give smaller --batch-size or --memory, "
            "--dtype bfloat16, or --device auto for several GPUs",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _prune(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    damp = _damp(options.damp)
    budget = Budget(
        options.keep,
        options.of,
        options.multiple_of,
        options.at_least,
        options.uniform_layers,
        options.seq_len,
    )
    get_criterion(options.criterion)

    from liar_ext.checkpoint.saving import check_folder, save_pruned
    from liar_ext.data import texts
    from liar_ext.pipeline import prune

    check_folder(options.out, options.overwrite)
    sources = [texts.read_documents(source) for source in options.calibration]
    held_out = texts.read_documents(options.eval) if options.eval else None
    if held_out is not None:
        texts.check_apart([text for documents in sources for text in documents], held_out)
    model, tokenizer = _load(options)
    texts.check_seq_len(model, options.seq_len)
    calibration = texts.calibration_sequences(
        sources,
        tokenizer,
        samples=options.samples,
        seq_len=options.seq_len,
        seed=options.seed,
        packed=_is_causal(model),
    )
    evaluation = None
    if held_out is not None:
        evaluation = texts.evaluation_sequences(
            held_out, tokenizer, seq_len=options.seq_len, samples=options.eval_samples
        ).batches(options.batch_size)
    load_seconds = time.perf_counter() - start

    report = prune(
        model,
        calibration.batches(options.batch_size),
        budget,
        criterion=options.criterion,
        allocation=options.allocation,
        refine=options.refine,
        reconstruct=options.reconstruct,
        damp=damp,
        schedule=options.schedule,
        target=options.target,
        refit=options.refit,
        keep_hidden=options.keep_hidden,
        kinds=("attn", "mlp") if options.sites == "all" else (options.sites,),
        attn_unit=options.attn_unit,
        seed=options.seed,
        evaluate_on=evaluation,
        memory=None if options.memory is None else int(options.memory * 2**30),
        progress=not options.quiet,
    )
    report.model = options.model
    report.settings |= {"calibration": options.calibration, "seq_len": options.seq_len}
    report.settings["bos"] = calibration.bos
    report.warnings += calibration.notes
    if options.eval:
        report.settings["eval"] = options.eval
    if len(calibration) < options.samples:
        report.warnings.append(
            f"The calibration text gave {len(calibration)} of {options.samples} sequences."
        )
    report.seconds = {"load": load_seconds, **report.seconds, "save": 0.0}
    report.seconds["total"] = time.perf_counter() - start  # save_pruned adds its own
    save_pruned(
        model,
        options.out,
        report.plan,
        report=report,
        tokenizer=tokenizer,
        overwrite=options.overwrite,
    )
    if not options.quiet:
        lines = "\n".join(report.to_markdown().splitlines()[2:])
        print(re.split("\n## (?:Sites|Hidden)", lines)[0])
        print(f"{options.out}: saved in {report.seconds['total']:.0f} s")


def _eval(options: argparse.Namespace) -> None:
    from liar_ext.data import texts
    from liar_ext.evaluation import perplexity

    documents = texts.read_documents(options.text)
    model, tokenizer = _load(options)
    if not _is_causal(model):
        raise InputError(f"eval: MODEL must be a causal language model, got {type(model).__name__}")
    texts.check_seq_len(model, options.seq_len)
    sequences = texts.evaluation_sequences(
        documents, tokenizer, seq_len=options.seq_len, samples=options.samples
    )
    result = perplexity(model, sequences.batches(options.batch_size), progress=not options.quiet)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"perplexity {result['perplexity']:.3f} over {result['tokens']:,} tokens in "
            f"{result['sequences']} windows of {result['seq_len']}"
        )


def _verify(options: argparse.Namespace) -> int:
    from liar_ext import checkpoint

    facts = checkpoint.verify_pruned(options.folder, options.device)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"{facts['params']:,} parameters, {facts['layers']} layers, {facts['dtype']}")
        for loader, result in facts["loaders"].items():
            verdict = "same outputs" if result["agrees"] else "OTHER OUTPUTS"
            print(f"{loader}: {verdict}, difference {result['max_abs_difference']:.1e}")
    return 0 if facts["agrees"] else 1


def _info(options: argparse.Namespace) -> None:
    from liar_ext.report.report import versions

    for key, value in versions().items():
        print(f"{key:32} {value}")
    print(f"{'criteria':32} {', '.join(known.name for known in list_criteria())}")
    optional = {"gguf": "GGUF files", "datasets": "datasets by name", "accelerate": "device_map"}
    for package, what in optional.items():
        state = "available" if find_spec(package) else f"pip install {package}"
        print(f"{what:32} {state}")
    print(f"{'families':32} {', '.join(FAMILIES)}")
    print(f"{'extension':32} {Path(ops.__file__).parents[1]}")


def _load(options: argparse.Namespace):
    from liar_ext import checkpoint

    model, tokenizer = checkpoint.load_model(options.model, options.dtype, options.device)
    if tokenizer is None:
        raise InputError(
            f"load_model: {options.model} has no tokenizer to read text with; put one into the "
            "folder, or call liar_ext.prune with batches of your own"
        )
    return model, tokenizer


def _damp(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f'prune: --damp must be a number or "auto", got {text!r}') from None


def _is_causal(model) -> bool:
    return model.can_generate()


COMMANDS = {"prune": _prune, "eval": _eval, "verify": _verify, "info": _info}
