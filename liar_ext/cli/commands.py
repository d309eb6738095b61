"""The commands of ``liar`` and their options; those of a job are the fields of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli import options as kinds
from liar_ext.cli.options import COUNT, DIR, FILE, FLAG, NAME, YES_OR_NO, add, add_field, path
from liar_ext.export import FORMATS
from liar_ext.healing import TRAIN
from liar_ext.models.recipe_fields import DTYPES, PRESETS, recipe_fields

# Fields of the recipe that are options of heal, too: by default as in the recipe of the folder.
HEAL_FIELDS = ("calibration", "self_text", "eval", "seq_len", "batch_size", "seed", "device")
UNSET = {"default": argparse.SUPPRESS}
BARS = "auto: a bar in a terminal, else a line every 30 s; plain: lines also in a terminal"
JSON = ("--json", FLAG, "print one JSON object and nothing else")
SHOWN = (
    ("--progress", {"choices": ("auto", "plain", "none"), "default": "auto"}, BARS),
    ("--quiet", FLAG, "no progress, no summary, no warnings"),
    JSON,
)
SAVED = "save progress in DIR; resume with the same command or liar resume DIR"
CHECKPOINT = ("--checkpoint", DIR, SAVED)
OVERWRITE = ("--overwrite", FLAG, "replace what is there, if it is of the same kind")
DTYPE = ("--dtype", {"choices": DTYPES, "default": "float32"}, "data type of the weights")
DEVICE = ("--device", {**NAME, "default": "cpu"}, "cpu, cuda, cuda:1, ...; auto: all GPUs")


def _prune(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="prune a model, reconstruct, save it",
        usage="liar prune MODEL --calibration TEXT [TEXT ...] --out DIR [options]",
        description="Prune MODEL, compensate for what was removed by activation statistics of the "
        "calibration text, and write an ordinary model folder with a report. Three arguments are "
        "enough: MODEL, --calibration and --out; every other option has a default that was "
        "measured.",
        epilog="Example: liar prune gpt2 --calibration text.txt --keep 0.5 --out gpt2-half",
    )
    what = "only print the plan: sizes, memory, passes, minutes, how the result loads"
    size = "prune a model larger than memory block by block, in at most SIZE, such as 12GiB"
    job = _add_start(parser)
    add(job, ("--dry-run", FLAG, what))
    healing = "train the result for TIME, such as 1h, as liar heal does (5m with --preset best)"
    add(job, ("--heal", {"type": kinds.read_minutes, "metavar": "TIME"}, healing))
    add(job, ("--max-memory", {"type": kinds.read_size, "metavar": "SIZE"}, size))
    kinds.add_fields(parser, recipe_fields(), "out", "preset", "heal", "max_memory")
    log = "log recipe, sizes, perplexity and seconds as a run of MLflow or Weights & Biases"
    add(
        parser.add_argument_group("Output"),
        ("--out -o", DIR, "folder to write"),
        CHECKPOINT,
        OVERWRITE,
        *SHOWN,
        ("--log", {"type": kinds.read_tracker, "choices": kinds.TRACKERS}, log),
    )


def _add_start(parser: Any) -> argparse._ArgumentGroup:
    """Add where a recipe begins; return the group of the job."""
    group = parser.add_argument_group("Job")
    kind = {"choices": PRESETS, "default": "balanced"}
    recipe = "settings of an earlier run, DIR/liar/recipe.yaml; options override them"
    add(
        group.add_mutually_exclusive_group(),
        ("--preset", kind, "trade run time for quality (default: balanced)"),
        ("--recipe", FILE, recipe),
    )
    bank = "reuse the activation statistics and the text of a file written by liar calibrate"
    add(group, ("--bank", FILE, bank))
    return group


def _calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="sum the activation statistics of a model into a file, a moment bank",
        usage="liar calibrate MODEL --calibration TEXT [TEXT ...] --out FILE [options]",
        description="Run MODEL once over the calibration text and write the sums that pruning "
        "needs, so that liar prune and liar sweep decide and solve by them in seconds, any number "
        "of times. liar merge adds the banks of several texts or machines.",
        epilog="Example: liar calibrate gpt2 --calibration text.txt --out gpt2.bank",
    )
    kinds.add_fields(parser, recipe_fields(group="model") + recipe_fields(in_bank="text"), "out")
    sensitivities = parser.add_argument_group("Sensitivities")
    for each in recipe_fields(in_bank="sensitivities"):
        add_field(sensitivities, each)
    measured = "also measure sensitivities, with 0.8 kept; a sweep then never runs the model"
    add(sensitivities, ("--sensitivities", FLAG, measured))
    no_text = "do not store token ids; steps that run the model over the text are then rejected"
    add(
        parser.add_argument_group("Output"),
        CHECKPOINT,
        ("--out -o", FILE, "file to write"),
        ("--no-text", FLAG, no_text),
        OVERWRITE,
        *SHOWN,
    )


def _merge(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="add moment banks of one model: shards, data sets, machines",
        description="Write the sum of the banks A, B, ... of one model. Counts add up exactly, "
        "sums in float64; the order of the arguments changes no bit. Banks that have text in "
        "common are refused.",
    )
    add(
        parser,
        ("banks", {**path("BANK"), "nargs": "+"}, "file written by liar calibrate"),
        ("-o --out", {**FILE, "required": True}, "bank to write"),
        OVERWRITE,
        ("--quiet", FLAG, "no summary"),
    )


def _resume(commands: Any) -> None:
    parser = commands.add_parser(
        "resume",
        help="go on with a job that was stopped",
        description="Say what the checkpoint DIR holds and go on with its job, a liar calibrate, "
        "liar prune or liar heal with --checkpoint DIR, in the folder that it was started in. Run "
        "it only on checkpoints that you trust: like a script, one says what is read and where "
        "results go.",
    )
    add(parser, ("folder", DIR, "a checkpoint"), OVERWRITE, *SHOWN)


def _sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="several budgets from one calibration: a table, and pruned models",
        usage="liar sweep MODEL --bank FILE [--keep F ...] [-o DIR] [options]",
        description="Decide what each budget keeps and print a table of predicted divergence, "
        "parameters, operations and, with --eval, perplexity. With --out the pruned models are "
        "written, too, a folder for each budget. Scores, error curves and sensitivities are "
        "computed once.",
        epilog="Example: liar sweep gpt2 --bank gpt2.bank --keep 0.9 0.7 0.5 --out sweep",
    )
    keep = [0.9, 0.8, 0.7, 0.6, 0.5]
    kind = {"type": kinds.read_number, "nargs": "+", "default": keep, "metavar": "F"}
    said = f"fractions to keep (default: {' '.join(map(str, keep))})"
    add(_add_start(parser), ("--keep", kind, said))
    chosen = [each for each in recipe_fields(with_bank=True) if each.name != "keep"]
    chosen += recipe_fields(affects="inputs", with_bank=False)
    kinds.add_fields(parser, chosen, "bank", "keep", "out", "preset")
    add(
        parser.add_argument_group("Output"),
        ("-o --out", DIR, "also write pruned models: DIR/keep-0.9 and so on"),
        OVERWRITE,
        *SHOWN,
    )


def _heal(commands: Any) -> None:
    parser = commands.add_parser(
        "heal",
        help="train a pruned folder for a short while towards its dense model",
        usage="liar heal DIR (--tokens N | --minutes N | --steps N) [options]",
        description="Distil the dense model into the pruned folder DIR: train on the calibration "
        "text, without labels, and keep the state that is best on held-out text. Optional: pruning "
        "needs no training. DIR is replaced, unless --out is given.",
        epilog="Example: liar heal gpt2-half --tokens 100k --out gpt2-half-healed",
    )
    default = " (default: %(default)s)"
    add(parser, ("folder", DIR, "folder written by liar prune"))
    add(
        parser.add_mutually_exclusive_group(required=True),
        ("--tokens", {"type": kinds.read_count, "metavar": "N"}, "train on N tokens, as 100k, 2M"),
        ("--minutes", {"type": kinds.above_zero, "metavar": "N"}, "train for N minutes"),
        ("--steps", COUNT, "train for N steps"),
    )
    add(
        parser,
        ("--train", {"choices": TRAIN, "default": TRAIN[0]}, f"weights to train{default}"),
        (
            "--lr",
            {"type": kinds.above_zero, "metavar": "F"},
            "highest learning rate (default: 2e-4; of a matrix of a causal language model in "
            "proportion to its size)",
        ),
        ("--grad-accumulation", {**COUNT, "default": 1}, f"batches per step{default}"),
    )
    text = parser.add_argument_group("Models and text (default: those of the pruning job)")
    add(text, ("--teacher", path("MODEL"), "the dense model"))
    for each in recipe_fields():
        if each.name in HEAL_FIELDS:
            add_field(text, each, shows_default=False)
    add(
        parser.add_argument_group("Output"),
        ("--out -o", path("OUT"), "write OUT, and keep DIR"),
        CHECKPOINT,
        OVERWRITE,
        *SHOWN,
    )


def _eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="quality of a model on a text, or tasks of lm-eval",
        description="Cut TEXT into windows of --seq-len tokens and print the model's perplexity; "
        "of an encoder, print how much it keeps of the dense model's embeddings or predictions; "
        "or run tasks of lm-eval, and print its table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = "as for prune --calibration; transcripts beside recordings give the word error rate"
    tasks = {"type": kinds.read_names, "metavar": "TASK[,...]"}
    pairs = "encoders: lines of two texts and a score, or two texts that belong together"
    dense = "encoders: the dense model (default: the one that the report names)"
    files = "tasks: folder of task files (YAML); their Python functions (!function) are run"
    none = {"type": kinds.at_least(0), "metavar": "N"}
    length = {"type": kinds.at_least(2), "default": 512, "metavar": "N"}
    add(parser, ("model", path("MODEL"), "model folder, hub id, or GGUF file"))
    add(
        parser.add_mutually_exclusive_group(),
        ("--text", NAME, text),
        ("--tasks", tasks, "tasks, groups or tags of lm-eval"),
    )
    add(
        parser,
        ("--against", path("DENSE"), dense),
        ("--pairs", FILE, pairs),
        ("--include-path", DIR, files),
        ("--limit", COUNT, "tasks: use the first N items of each"),
        ("--num-fewshot", none, "tasks: examples in each prompt"),
        ("--out -o", FILE, "also write the result as JSON"),
        ("--samples", COUNT, "use N evenly spread windows"),
        ("--seq-len", length, "tokens per window"),
        ("--batch-size", {**COUNT, "default": 4}, "windows, or requests, per forward pass"),
        *(DTYPE, DEVICE, *SHOWN),
    )


def _verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="reload a pruned model and compare its outputs with those it was saved with",
        description="Reload DIR by every loader that it is meant for, and each of its exports, in "
        "processes of their own; compare the outputs with those recorded when it was saved.",
    )
    device = ("--device", {**NAME, "default": "cpu"}, "device to run on")
    add(parser, ("folder", DIR), ("--text", NAME, "also measure perplexity on it"), device, JSON)


def _bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed and memory of a pruned model beside the dense one",
        description="Time prompts (prefill, first token) and greedy decoding of DIR and MODEL in "
        "alternating rounds, encoders by inputs per second, and print medians with the quartiles "
        "of pruned / dense. Peak resident memory is that of a process of its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add(
        parser,
        ("folder", DIR, "pruned model"),
        ("--against", {**path("MODEL"), "required": True}, "the dense model"),
        ("--rounds", {**COUNT, "default": 5}, "timed rounds"),
        ("--prompt-length", {**COUNT, "default": 128}, "tokens of a prompt"),
        ("--new-tokens", {**COUNT, "default": 32}, "tokens to decode"),
        ("--batch", {**COUNT, "nargs": "+", "default": [1, 32]}, "batch sizes"),
        *(DTYPE, DEVICE),
        ("--threads", COUNT, "CPU threads of torch"),
        ("--memory", {**YES_OR_NO, "default": True}, "measure memory"),
        ("--out -o", FILE, "file for the numbers (DIR.bench.json)"),
        *SHOWN,
    )


def _page(where: str, default: str | None = None) -> list[tuple]:
    return [
        ("--out -o", {**FILE, "default": default}, f"page to write (default: {where})"),
        ("--png", path("FOLDER"), "also write the pictures as PNG"),
    ]


def _report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write a page about a pruned model, with pictures",
        description="Write one HTML page about DIR that needs no other file: sizes, perplexity, "
        "units kept and errors per layer, time spent and, after liar bench, speed.",
    )
    add(parser, ("folder", DIR), *_page("DIR.html, beside DIR"))


def _compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="write a page that compares pruned models",
        description="Write one HTML page about several pruned models: perplexity and speed "
        "against parameters. Speed is what liar bench stored.",
    )
    add(parser, ("folders", {**DIR, "nargs": "+"}), *_page("compare.html", "compare.html"))


def _compare_methods(commands: Any) -> None:
    parser = commands.add_parser(
        "compare-methods",
        help="quality of several pruning methods on one model, over several seeds",
        usage="liar compare-methods MODEL --calibration TEXT --eval TEXT [options]",
        description="Prune a copy of MODEL by each method and seed, and print a table of "
        "perplexity, or of an encoder's cosine with the dense one: the mean over seeds, the lowest "
        "and the highest. Methods on the same calibration text share its statistics. Nothing is "
        "saved.",
        epilog="Example: liar compare-methods gpt2 --calibration text.txt --eval held_out.txt",
    )
    methods = ["flap", "wanda-sp", "liar"]
    kind = {"nargs": "+", "choices": ("liar", *PRESETS), "default": methods}
    said = f"presets, and liar for balanced (default: {' '.join(methods)})"
    seeds = {"type": kinds.at_least(0), "nargs": "+", "default": [0, 1], "metavar": "N"}
    group = parser.add_argument_group("Methods")
    add(group, ("--methods", kind, said), ("--seeds", seeds, "random seeds"))
    chosen = [each for each in recipe_fields() if each.name not in ("seed", "certify")]
    kinds.add_fields(parser, chosen, "methods", "seeds")
    add(parser.add_argument_group("Output"), *SHOWN)


def _export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a folder in the format of another runtime",
        description="Write the model folder DIR, pruned or not, in another format, beside DIR by "
        "its name unless --out says otherwise. What a format cannot express is refused, with the "
        "reason and the alternative.",
    )
    formats = "; ".join(f"{each}: {row.what}" for each, row in FORMATS.items())
    types = "gguf: f32, f16, bf16, q8_0, ... (default: as the weights); onnx: int8 (default: "
    check = "gguf: run the file with llama.cpp, if its library is installed (default: on)"
    padded = "uniform: round the padded MLP size up to a multiple of N"
    add(
        parser,
        ("folder", DIR, "model folder"),
        ("--to", {"required": True, "choices": FORMATS}, formats),
        ("--out -o", path("OUT"), "file or folder to write"),
        OVERWRITE,
        ("--quantize", {**path("TYPE"), **UNSET}, f"{types}float32)"),
        ("--check", {**YES_OR_NO, **UNSET}, check),
        ("--multiple-of", {**COUNT, **UNSET}, padded),
        *SHOWN,
    )


def _families(commands: Any) -> None:
    parser = commands.add_parser(
        "families",
        help="which model families are known, and a row for one that isn't",
        description="Print what can be removed from the models of each family, and why something "
        "can't; or look for the row of a family that is lacking, prove it on tiny random models, "
        "and print it as Python code.",
    )
    row = "propose a family definition for a model folder or hub id; only its config is read"
    add(parser, ("--suggest", path("MODEL"), row), JSON)


def _doctor(commands: Any) -> None:
    add(commands.add_parser("doctor", help="check that this installation works here"), JSON)


COMMANDS = (  # in the order of the help
    *(_prune, _calibrate, _merge, _resume, _sweep, _heal, _eval, _verify),
    *(_bench, _report, _compare, _compare_methods, _export, _families, _doctor),
)
