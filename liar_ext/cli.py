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

from liar_ext import ops
from liar_ext.criteria import get_criterion, list_criteria
from liar_ext.errors import InputError
from liar_ext.families import FAMILIES
from liar_ext.plan import BUDGET_UNITS, Budget

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done; 1: ``verify`` found other outputs; 2: input that cannot be used; 130: interrupted.
    """
    options = _parser().parse_args(arguments)
    if getattr(options, "quiet", False):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        return options.run(options) or 0
    except (InputError, OSError) as error:  # OSError: no permission, disk full, no such file
        print(f"liar: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="liar",
        description="Prune transformers without retraining: remove attention heads and MLP "
        "channels and fold what they did into the weights that stay.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prune(commands)
    _add_eval(commands)
    _add_verify(commands)
    info = commands.add_parser("info", help="versions, kernels in use, what can be loaded")
    info.set_defaults(run=_info)
    return parser


def _add_prune(commands) -> None:
    parser = commands.add_parser(
        "prune",
        help="prune a model, reconstruct, save it",
        description="Prune MODEL, reconstruct what was removed from activation statistics of the "
        "calibration text, and write an ordinary model folder with a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(parser)
    add = parser.add_argument
    add(
        "--calibration",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="text files, .jsonl files with a field text, folders of text files, or names of the "
        "datasets library (NAME[:CONFIG[:SPLIT]]); sequences are drawn evenly from all",
    )
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace DIR if it exists")
    add("--keep", type=float, default=0.8, help="fraction to keep, in (0, 1]")
    add("--of", choices=BUDGET_UNITS, default="prunable", help="what the fraction counts")
    add("--multiple-of", type=int, default=1, metavar="N", help="kept features per site")
    add("--at-least", type=int, default=1, metavar="N", help="units that every site keeps")
    add(
        "--uniform-layers",
        action="store_true",
        help="all layers keep equally many units, so that stock loaders take the result",
    )
    add(
        "--keep-hidden",
        type=float,
        default=1.0,
        metavar="F",
        help="fraction of the hidden size to keep; narrowed first, and --keep counts the rest. Use "
        "--keep 1 to narrow only. Takes two passes over the calibration text, more where the sums "
        "of all norms are over 8 GiB",
    )
    add(
        "--sites",
        choices=("all", "attn", "mlp"),
        default="all",
        help="sites that may be pruned; prunable parameters are theirs",
    )
    add(
        "--attn-unit",
        choices=("auto", "kv_group", "head"),
        default="auto",
        help="attention unit; auto takes KV groups where query heads share keys",
    )
    add(
        "--criterion",
        default="obs",
        metavar="NAME",
        help="who goes: " + ", ".join(known.name for known in list_criteria()),
    )
    add(
        "--allocation",
        choices=("uniform", "global", "curve"),
        default="curve",
        help="how many go where: the same fraction everywhere, by standardised scores, or by error "
        "curves and the measured sensitivity of each site (a few more forward passes)",
    )
    add(
        "--refine",
        type=int,
        default=0,
        metavar="N",
        help="curve: measure N whole plans more, and keep the best",
    )
    add(
        "--reconstruct",
        choices=("auto", "none", "bias", "linear", "affine"),
        default="auto",
        help="what is put back: nothing, means (bias), a linear map of what stays, both (affine); "
        "auto is affine where a consumer has a bias and linear elsewhere; bias and affine give "
        "consumers a bias if they lack one",
    )
    add("--damp", default="auto", metavar="LAMBDA", help="ridge, or auto: by held-out error")
    add(
        "--schedule",
        choices=("one-pass", "layerwise"),
        default="one-pass",
        help="solve all layers on the dense model's activations, or walk them on the pruned one's",
    )
    add(
        "--target",
        choices=("dense-input", "branch", "stream", "auto"),
        help="layerwise: restore what a layer loses, its dense output, the dense residual stream, "
        "or as much of the latter as held-out text bears out (auto, the default)",
    )
    add("--refit", action="store_true", help="layerwise: solve layers that lose nothing, too")
    add("--samples", type=int, default=128, help="calibration sequences")
    add("--batch-size", type=int, default=4, help="sequences per forward pass")
    add("--seed", type=int, default=0, help="of the draw and the folds")
    add("--eval", metavar="TEXT", help="held-out text: report perplexity before and after")
    add("--eval-samples", type=int, metavar="N", help="evaluate on N windows, evenly spread")
    parser.set_defaults(run=_prune)


def _add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity of a model on a text",
        description="Cut TEXT into windows of --seq-len tokens and print the model's perplexity.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("--text", required=True, help="as for prune --calibration")
    parser.add_argument("--samples", type=int, metavar="N", help="N windows, evenly spread")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per forward pass")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_eval)


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="reload a pruned model and compare its outputs with those it was saved with",
        description="Reload DIR by every loader that it is meant for, compare the outputs with "
        "those recorded when it was saved, and count its parameters.",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_verify)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, hub id, or GGUF file")
    add("--seq-len", type=int, default=512, help="tokens per sequence")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--quiet", action="store_true", help="no progress bars")


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
    _check_apart(options.calibration, options.eval)

    from liar_ext import texts
    from liar_ext.pipeline import prune
    from liar_ext.saving import check_folder, save_pruned

    check_folder(options.out, options.overwrite)
    sources = [texts.read_documents(source) for source in options.calibration]
    held_out = texts.read_documents(options.eval) if options.eval else None
    model, tokenizer = _load(options)
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
        progress=not options.quiet,
    )
    report.model = options.model
    report.settings |= {"calibration": options.calibration, "seq_len": options.seq_len}
    if options.eval:
        report.settings["eval"] = options.eval
    if len(calibration) < options.samples:
        report.warnings.append(
            f"The calibration text gave {len(calibration)} of {options.samples} sequences."
        )
    saving = time.perf_counter()
    report.seconds = {"load": load_seconds, **report.seconds}
    report.seconds["save"] = 0.0
    save_pruned(
        model,
        options.out,
        report.plan,
        report=report,
        tokenizer=tokenizer,
        overwrite=options.overwrite,
    )
    now = time.perf_counter()
    report.seconds |= {"save": now - saving, "total": now - start}
    report.save(options.out)
    if not options.quiet:
        lines = "\n".join(report.to_markdown().splitlines()[2:])
        print(re.split("\n## (?:Sites|Hidden)", lines)[0])
        print(f"{options.out}: saved in {report.seconds['total']:.0f} s")


def _eval(options: argparse.Namespace) -> None:
    from liar_ext import texts
    from liar_ext.evaluation import perplexity

    documents = texts.read_documents(options.text)
    model, tokenizer = _load(options)
    if not _is_causal(model):
        raise InputError(f"eval: MODEL must be a causal language model, got {type(model).__name__}")
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
    from liar_ext.report import versions

    for key, value in versions().items():
        print(f"{key:32} {value}")
    print(f"{'criteria':32} {', '.join(known.name for known in list_criteria())}")
    optional = {"gguf": "GGUF files", "datasets": "datasets by name", "accelerate": "device_map"}
    for package, what in optional.items():
        state = "available" if find_spec(package) else f"pip install {package}"
        print(f"{what:32} {state}")
    print(f"{'families':32} {', '.join(FAMILIES)}")
    print(f"{'extension':32} {Path(ops.__file__).parent}")


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


def _check_apart(calibration: Sequence[str], held_out: str | None) -> None:
    """Refuse a held-out text that is calibrated on."""
    if held_out and Path(held_out).resolve() in {Path(source).resolve() for source in calibration}:
        raise InputError(
            f"prune: --eval {held_out} is calibrated on too; perplexity on it would prove nothing"
        )


def _is_causal(model) -> bool:
    return model.can_generate()


if __name__ == "__main__":
    sys.exit(main())
