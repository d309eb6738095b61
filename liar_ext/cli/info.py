"""Commands about models that there are: proof, speed, exports, pages; and about this machine."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liar_ext import ops
from liar_ext.calibration.documents import read_documents
from liar_ext.calibration.texts import evaluation_sequences
from liar_ext.checkpoint.placing import check_place
from liar_ext.cli.inputs import load_with_tokenizer
from liar_ext.cli.main import show
from liar_ext.export import export
from liar_ext.export.verify import table as loaders_table
from liar_ext.export.verify import verify_everywhere
from liar_ext.measure.speed import BENCH_MARK, Settings, benchmark
from liar_ext.models.registry import COLUMNS, Entry, overview
from liar_ext.models.running import positions_of, predicts_next_token
from liar_ext.report.page import write_comparison, write_page
from liar_ext.report.reading import bench_file, report_digest
from liar_ext.report.report import versions
from liar_ext.report.sections import speed
from liar_ext.report.tables import Table, to_text
from liar_ext.system.environment import available_memory, version_of
from liar_ext.system.errors import InputError, install, one_line
from liar_ext.system.files import begins_with, write_whole

PLACE = str(Path(__file__).parents[1])
# Optional packages, and the extra of a checkout that installs each.
PACKAGES = {
    "gguf": "gguf",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "vllm": "vllm",
    "llmcompressor": "llmcompressor",
    "lm-eval": "eval",
    "datasets": "eval",
    "accelerate": "large",
    "matplotlib": "report",
    "shtab": "completion",
    "sentence-transformers": None,  # no extra has it alone
}
LEAST = 1 << 30  # bytes of memory and of disk below which hardly any job ends
MOST_ERROR = 1e-5  # of the Gram operator, whose products are summed in float32


def run_doctor(options: argparse.Namespace) -> int:
    """Print the facts, and last ``ok`` or what to do; return 1 if something is to be done."""
    found = facts()
    show(options, found, lines(found))
    return 1 if found["problems"] else 0


def facts() -> dict:
    """Return what there is, the result of the self-check, and the problems with their remedies."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    checked = {each: self_check(each) for each in devices}  # first: it chooses backends
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "versions": versions(),
        "folder": PLACE,
        "devices": {
            each: "" if each == "cpu" else torch.cuda.get_device_name(each) for each in devices
        },
        "threads": {"used": torch.get_num_threads(), "cores": cores},
        "memory_free": available_memory(),
        "disk_free": {
            each: shutil.disk_usage(each).free for each in (os.getcwd(), tempfile.gettempdir())
        },
        "packages": {name: version_of(name) for name in PACKAGES},
        "self_check": checked,
    }
    return {**found, "problems": problems(found)}


def self_check(device: str) -> float | str:
    """Return the relative error of a small Gram matrix against float64, or why there is none."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    exact = (x.double().T @ x.double()).tril()
    gram, total, count = (torch.zeros(size, dtype=torch.float64) for size in ((64, 64), 64, 2))
    try:
        gram, total, count, x = (each.to(device) for each in (gram, total, count, x))
        ops.gram_update_(gram, total, count, x)
        return float((gram.cpu().tril() - exact).abs().max() / exact.abs().max())
    except RuntimeError as error:  # of the driver, or no kernel for this device
        return one_line(error)


def problems(found: dict) -> list[str]:
    """Return what keeps jobs from running here, each with what to do."""
    said = []
    for device, error in found["self_check"].items():
        if isinstance(error, str) or not error <= MOST_ERROR:
            wrong = error if isinstance(error, str) else f"its error is {error:.2g}"
            cpu = device == "cpu"
            todo = "set LIAR_CPU_KERNEL=portable" if cpu else "use --device cpu, see docs/cuda.md"
            said.append(
                f"the Gram operator fails on {device}: {wrong}; compile again in the checkout "
                f"(pip install --no-build-isolation --force-reinstall --no-deps .), or {todo}"
            )
    room = {f"disk are free in {folder}": free for folder, free in found["disk_free"].items()}
    for what, free in {"memory are free": found["memory_free"], **room}.items():
        if free is not None and free < LEAST:
            said.append(f"only {_size(free)} of {what}; make room")
    return said


def lines(found: dict) -> list[str]:
    """Return the screen."""
    known = found["versions"]
    build = {key.removeprefix("liar_ext."): value for key, value in known.items()}
    cuda = build["cuda"]
    if cuda == "compiled":
        cuda = f"kernels for {build.get('cuda_archs', 'unknown architectures')}; "
        cuda += f"CUDA {build['cuda_runtime']}, driver {build['cuda_driver']}"
    loaded = "loaded, uses {cpu_kernel} of {cpu_kernels}"
    rows = {"liar_ext": f"{known['liar_ext']} in {found['folder']}"}
    rows |= {name: known[name] for name in ("python", "torch", "transformers")}
    rows |= {"extension": build.get("extension") or loaded.format(**build), "CUDA": cuda}
    backends = {f"{name} backend": build.get(name.lower()) for name in ("Gram", "solve", "curve")}
    rows |= {name: each for name, each in backends.items() if each}
    rows["devices"] = ", ".join(
        f"{device} ({name})" if name else device for device, name in found["devices"].items()
    )
    rows["threads"] = "{used}, on {cores} cores".format(**found["threads"])
    rows["free memory"] = _size(found["memory_free"])
    rows["free disk"] = ", ".join(
        f"{_size(free)} in {folder}" for folder, free in found["disk_free"].items()
    )
    rows["self-check"] = "; ".join(
        f"{device}: {error if isinstance(error, str) else f'error {error:.1e} against float64'}"
        for device, error in found["self_check"].items()
    )
    for name, extra in PACKAGES.items():
        missing = install(extra) if extra else f"pip install {name}"
        rows[name] = found["packages"][name] or f"missing: {missing}"
    return [*(f"{name:22} {value}" for name, value in rows.items()), *(found["problems"] or ["ok"])]


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / (1 << 30):.1f} GiB"


# Options of the command that export() has no keywords for.
OWN = ("command", "folder", "to", "out", "quiet", "json")


def run_export(options: argparse.Namespace) -> None:
    """Export, and print what was written and how to load it."""
    own = {name: value for name, value in vars(options).items() if name not in OWN}
    done = export(options.folder, options.to, options.out, **own)
    lines = [f"{path}: {done.format}, {done.bytes / 1e6:,.1f} MB" for path in done.paths]
    if not options.quiet or not done.paths:
        lines += done.notes
    show(options, asdict(done), lines)


def run_families(options: argparse.Namespace) -> None:
    """Print the table, or a proposed row."""
    if options.suggest:
        return _suggest(options)
    table = overview()
    facts = {n: {key: each._asdict() for key, each in row.items()} for n, row in table.items()}
    return show(options, facts, families_in_text(table))


def families_in_text(table: Mapping[str, Mapping[str, Entry]]) -> list[str]:
    """Return the lines of the table of families, with the reasons below it."""
    heads = ["family", *COLUMNS.values()]
    rows = [[name, *(each.applies for each in row.values())] for name, row in table.items()]
    reasons = [
        f"{name}, {COLUMNS[key]}: {each.reason}"
        for name, row in table.items()
        for key, each in row.items()
        if each.reason and key != "biases"
    ]
    return [*to_text(Table("", heads, rows, range(len(heads)))), "", *reasons]


def _suggest(options: argparse.Namespace) -> None:
    """Print a row as Python code, with what is known of it in comments; or all as JSON."""
    from liar_ext.suggest.suggest import suggest_for

    found = suggest_for(options.suggest)
    name, missing = found.family.name, dict(found.family.without)
    facts = {"family": name, "known": found.known, "code": found.code, "proved": found.proved}
    facts |= {"missing": missing, "notes": found.notes}
    said = [f"{name}: proposed, and proved on tiny random models"]
    if found.known:
        said = [f"{name} is in the table of families; nothing was tried"]
    said += [f"proved: {each}" for each in found.proved]
    said += [f"lacking: {each}: {why}" for each, why in missing.items()]
    said += [f"note: {each}" for each in found.notes]
    comments = [f"# {' '.join(line.split())}" for line in said]
    show(options, facts, [*comments, found.code.rstrip()])


def run_report(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    for path in write_page(options.folder, options.out, options.png):
        print(f"{path}: written")


def run_compare(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    for path in write_comparison(options.folders, options.out, options.png):
        print(f"{path}: written")


SEQ_LEN, SAMPLES = 256, 16  # of the text of verify, which every runtime reads


def run_bench(options: argparse.Namespace) -> None:
    """Measure, print a table, and store the numbers: as told, or beside a folder."""
    target = Path(options.out) if options.out is not None else None
    if target is None and Path(options.folder).is_dir():  # and not a hub id
        target = bench_file(options.folder)
    if target is not None:
        check_place(target, "bench", "--out", partial(begins_with, BENCH_MARK))
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
    lines += loaders_table(facts["rows"])
    if "tokenizer_agrees" in facts:
        verdict = "same tokens" if facts["tokenizer_agrees"] else "OTHER TOKENS"
        lines.append(f"tokenizer: {verdict} for the stored texts")
    lines += [f"{name}: CHANGED since it was saved" for name in facts["changed"]]
    show(options, {**facts, "rows": [asdict(row) for row in facts["rows"]]}, lines)
    return 0 if facts["agrees"] else 1


def _ids(folder: str, text: str) -> Any:
    """Return token ids of a text, as many sequences as a check in every runtime bears."""
    documents = read_documents(text)
    model, tokenizer = load_with_tokenizer(folder, "float32", "cpu")
    if not predicts_next_token(model):
        kind = type(model).__name__
        raise InputError(f"verify: --text needs a causal language model, got {kind}")
    length = min(SEQ_LEN, positions_of(model) or SEQ_LEN)
    sequences = evaluation_sequences(documents, tokenizer, seq_len=length, samples=SAMPLES)
    return np.concatenate([batch["input_ids"].numpy() for batch in sequences.batches(1)])
