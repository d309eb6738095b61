"""Greedy tokens and log-probabilities of pruned models, in vLLM beside transformers.

``make check-vllm`` runs it: it makes pruned folders (of a real model with the ``liar`` command, of
tiny random ones with ``save_pruned``), lets each runtime continue the same prompts in a process of
its own, and prints a row for each folder, which ``--write PAGE`` puts into a page. A row is wrong
if a token differs, a log-probability differs by more than ``TOLERANCE`` and ``ROUNDINGS`` times as
much as that of transformers does from float64, a dense model isn't built by vLLM's own class, or a
folder that must be refused isn't.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

NEW_TOKENS = 32
TOLERANCE = 1e-3  # natural logarithm, float32; the runtimes sum in another order
ROUNDINGS = 4  # a model with fewer hidden features has tokens where float32 itself is off by 8e-4
TEXTS = (
    "The history of the city began",
    "In a large bowl, mix the flour and",
    "def fibonacci(n):\n",
    "The most important thing about science is",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")
# vLLM's attention on a CPU wants heads of 32; vLLM's dense Qwen2 has hidden / heads of them.
SIZES = {
    "hidden_size": 256,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
PRUNE = {
    "equal": ["--uniform-layers", "--allocation", "uniform"],
    "equal, affine": ["--uniform-layers", "--allocation", "uniform", "--reconstruct", "affine"],
    "equal, hidden": ["--uniform-layers", "--allocation", "uniform", "--keep-hidden", "0.75"],
    "unequal": ["--allocation", "global"],
    "unequal, affine": ["--allocation", "global", "--reconstruct", "affine"],
}
# More rows: what a row says, its folder, and options of vLLM.
ALONE = "without the plug-in"
MORE: list[tuple[str, str, dict[str, Any]]] = [
    *((ALONE, f"SmolLM2-135M: {name}", {}) for name in PRUNE if name.startswith("equal")),
    *((ALONE, f"tiny {name}: equal", {}) for name in FAMILIES if name != "qwen2"),
    ("compiled", "tiny llama: unequal", {"enforce_eager": False}),
    ("engine and worker apart", "SmolLM2-135M: unequal", {"distributed_executor_backend": "mp"}),
    ("two ranks", "tiny llama: unequal, even", {"tensor_parallel_size": 2}),
    ("two ranks", "tiny qwen3: unequal, even", {"tensor_parallel_size": 2}),
    ("refused: two ranks", "tiny llama: unequal", {"tensor_parallel_size": 2}),
    (f"refused: {ALONE}", "tiny llama: unequal", {}),
    (f"refused: {ALONE}", "tiny qwen2: equal", {}),
    (f"refused: {ALONE}", "tiny qwen3: equal, affine", {}),
]
MARK = "\n| row | "


def make_real(model: str, text: str, out: Path) -> None:
    """Prune a real model in every way of ``PRUNE``."""
    for name, options in PRUNE.items():
        folder = out / f"SmolLM2-135M: {name}"
        if not folder.exists():
            job = ["--calibration", text, "--samples", "8", "--seq-len", "128", "--keep", "0.6"]
            command = [sys.executable, "-m", "liar_ext", "prune", model, *job, *options]
            subprocess.run([*command, "--quiet", "--out", str(folder)], check=True)


def make_tiny(out: Path) -> None:
    """Save tiny random models: dense, with equal and unequal layers, the latter with biases too."""
    from folders import equal_plan, make_plan
    from tiny import tiny

    from liar_ext import apply_plan, save_pruned, sites
    from liar_ext.models.sites import get_consumer_bias

    ways: dict[str, Callable] = {
        "equal": equal_plan,
        "equal, affine": lambda model: equal_plan(model, bias=True),
        "unequal": make_plan,
        "unequal, affine": lambda model: make_plan(model, bias=True),
        "unequal, heads": lambda model: make_plan(model, attn_unit="head"),
        "unequal, even": even_plan,
    }
    for family in FAMILIES:
        dense = out / f"tiny {family}: dense"
        if not dense.exists():
            tiny(family, **SIZES).save_pretrained(dense)
        for name, plan_of in ways.items():
            folder = out / f"tiny {family}: {name}"
            if folder.exists():
                continue
            model = tiny(family, **SIZES)
            plan = plan_of(model)
            apply_plan(model, plan)
            for site in sites(model):
                bias = get_consumer_bias(model, site)
                if bias is not None:
                    bias.data.normal_()
            save_pruned(model, folder, plan)


def even_plan(model: Any) -> Any:
    """Keep 2, 4 and 2 KV groups and 48, 80 and 64 channels, which two ranks can share."""
    from liar_ext import Plan, sites
    from liar_ext.models.plan import SitePlan

    kept = {"attn": ((0, 1), range(4), (1, 3)), "mlp": (range(48), range(80), range(64))}
    plans = {s.name: SitePlan(s.units, tuple(kept[s.kind][s.block])) for s in sites(model)}
    return Plan(model.config.model_type, "auto", plans)


def make_bad(out: Path) -> None:
    """Copy a folder of unequal layers, and spoil what its config says of them."""

    def spoil(name: str, change: Callable[[dict], Any]) -> None:
        folder = out / f"refused: {name}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(out / "tiny llama: unequal", folder)
        fields = json.loads((folder / "config.json").read_text())
        change(fields)
        (folder / "config.json").write_text(json.dumps(fields))

    def layer(fields: dict[str, Any]) -> dict[str, Any]:
        return fields["per_layer_config"]["1"]

    fewer_heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    spoil("fewer channels than the weights", lambda f: layer(f).update(intermediate_size=8))
    spoil("more channels than the weights", lambda f: layer(f).update(intermediate_size=95))
    spoil("fewer heads than the weights", lambda f: layer(f).update(fewer_heads))
    spoil("a layer is missing", lambda f: f["per_layer_config"].pop("1"))
    spoil("no sizes of layers", lambda f: f.pop("per_layer_config"))
    spoil("a layer too many", lambda f: f["per_layer_config"].update({"7": dict(layer(f))}))


def prompts_of(folder: Path) -> list[list[int]]:
    """Return the same prompts for both runtimes, as tokens."""
    if (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    return [[(7 * i + 11 * n) % 55 + 3 for i in range(5 + 3 * n)] for n in range(4)]


def by_transformers(folder: Path) -> dict[str, Any]:
    """Return the tokens that follow each prompt, and their log-probabilities."""
    import torch

    from liar_ext.checkpoint import load_model

    torch.set_num_threads(1)
    model = load_model(folder)[0]
    exact = load_model(folder, dtype="float64")[0]
    found: dict[str, Any] = {"tokens": [], "logprobs": [], "built by": type(model).__module__}
    found["rounding"] = 0.0
    for prompt in prompts_of(folder):
        tokens, logprobs, cache = list(prompt), [], None
        while len(logprobs) < NEW_TOKENS:
            given = tokens if cache is None else tokens[-1:]
            with torch.no_grad():
                output = model(torch.tensor([given]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].double().log_softmax(-1).max(-1)
            tokens.append(int(best.indices))
            logprobs.append(float(best.values))
        with torch.no_grad():
            rows = exact(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        chosen = zip(rows[len(prompt) - 1 :], tokens[len(prompt) :], logprobs, strict=True)
        errors = [abs(float(row[token]) - logprob) for row, token, logprob in chosen]
        found["rounding"] = max(found["rounding"], *errors)
        found["tokens"].append(tokens[len(prompt) :])
        found["logprobs"].append(logprobs)
    return found


def by_vllm(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the same of vLLM: in this process, or as options ask in processes of its own."""
    several = "tensor_parallel_size" in options or "distributed_executor_backend" in options
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(several))
    from vllm import LLM, SamplingParams

    settings = {"max_model_len": 96, "max_num_seqs": 4, "enforce_eager": True, **options}
    engine = LLM(str(folder), dtype="float32", skip_tokenizer_init=True, **settings)
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(folder)]
    done = [each.outputs[0] for each in engine.generate(prompts, sampling, use_tqdm=False)]
    tokens = [list(each.token_ids) for each in done]
    logprobs = [
        [at[token].logprob for at, token in zip(each.logprobs, row, strict=True)]
        for each, row in zip(done, tokens, strict=True)
    ]
    builder = engine.apply_model(attrgetter("__class__.__module__"))[0]
    if several:
        engine.llm_engine.engine_core.shutdown()
    return {"tokens": tokens, "logprobs": logprobs, "built by": builder}


def run_all(runtime: str, out: Path, rows: dict[str, tuple[str, dict]]) -> None:
    """Run one runtime over the rows (name: folder, options), and write what it gave to a file."""
    results: dict[str, Any] = {}
    for name, (folder, options) in rows.items():
        print(f"{MARK}{name}", flush=True)
        if runtime == "vllm":
            results[name] = forked(by_vllm, out / folder, options, ALONE in name)
        else:
            results[name] = by_transformers(out / folder)
    (out / f"{runtime}.json").write_text(json.dumps(results))


def forked(run: Callable, folder: Path, options: dict, alone: bool) -> dict[str, Any]:
    """Run in a process of its own, forked of this one, which has imported vLLM but started none."""
    importlib.import_module("vllm.entrypoints.llm")
    path = folder.parent / "row.json"
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        if alone:
            os.environ["VLLM_PLUGINS"] = ""
        try:
            result = run(folder, **options)
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        path.write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(path.read_text()) if path.exists() else {"error": "the process died"}


def judge(name: str, ours: dict[str, Any], theirs: dict[str, Any], log: str) -> tuple[str, bool]:
    """Return a row of the table, and whether it is as it must be."""
    if "error" in theirs or "error" in ours:
        # An engine of several processes says only that it failed, and its worker's log why.
        told = re.findall(r"InputError: (.*)", log) or [theirs.get("error", ours.get("error", ""))]
        error = " ".join(told[-1].split()).replace("|", "/")
        clear = re.search("InputError: |per_layer_config", log + error) or ALONE in name
        return f"| {name} | | {error[:230]} | |", name.startswith("refused") and bool(clear)
    if name.startswith("refused"):
        return f"| {name} | | it was not | |", False
    tokens, wanted = sum(theirs["tokens"], []), sum(ours["tokens"], [])
    pairs = zip(sum(theirs["logprobs"], []), sum(ours["logprobs"], []), strict=True)
    greatest = max(abs(a - b) for a, b in pairs)
    same = sum(a == b for a, b in zip(tokens, wanted, strict=True))
    near = math.isfinite(greatest) and greatest <= max(TOLERANCE, ROUNDINGS * ours["rounding"])
    good = same == len(wanted) and near
    native = theirs["built by"].startswith("vllm.")
    good = good and native == ("dense" in name or ALONE in name)
    builder = "vLLM" if native else "plug-in"
    return f"| {name} | {builder} | {same} of {len(wanted)} | {greatest:.0e} |", good


def run_both(out: Path, python: str, rows: dict[str, tuple[str, dict]]) -> list[tuple[str, bool]]:
    """Run transformers here and vLLM in its own environment, and judge every row."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the workers for the model's class
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    results = {}
    for runtime, program in (("transformers", sys.executable), ("vllm", python)):
        wanted = rows
        if runtime == "transformers":  # once for each folder
            wanted = {f: (f, {}) for n, (f, _) in rows.items() if not n.startswith("refused")}
        else:  # what is installed there, not this source tree
            environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
            environment["PYTHONSAFEPATH"] = "1"
        with (out / f"{runtime}.log").open("w") as log:
            subprocess.run(
                [program, __file__, "--run", runtime, "--out", str(out)],
                input=json.dumps(wanted),
                text=True,
                check=True,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        results[runtime] = json.loads((out / f"{runtime}.json").read_text())
    logs = dict(  # by row
        part.split("\n", 1) for part in (out / "vllm.log").read_text().split(MARK) if "\n" in part
    )
    return [
        judge(name, results["transformers"].get(folder, {}), results["vllm"][name], logs[name])
        for name, (folder, _) in rows.items()
    ]


def grouped(rows: list[str]) -> list[str]:
    """Return rows for the page: those of tiny models that differ in the family alone are one."""
    found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for row in rows:
        name, builder, tokens, difference = (cell.strip() for cell in row.split("|")[1:-1])
        parts = re.fullmatch(r"(.*)tiny (\w+)(: .*)", name) if difference else None
        before, family, after = parts.groups() if parts else ("", "", name)
        found.setdefault((before, after, builder, tokens), []).append((family, difference))
    lines = []
    for (before, after, builder, tokens), each in found.items():
        tiny = f"tiny {', '.join(family for family, _ in each)}" if each[0][0] else ""
        greatest = max((difference for _, difference in each), key=lambda cell: float(cell or 0))
        lines.append(f"| {before}{tiny}{after} | {builder} | {tokens} | {greatest} |")
    return lines


def main() -> None:
    """Make the folders, run both runtimes, print the table; exit with 1 if a row isn't right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/check-vllm"))
    parser.add_argument("--python", default="build/vllm/bin/python", help="that has vLLM")
    parser.add_argument("--model", help="real model to prune")
    parser.add_argument("--text", help="its calibration text")
    parser.add_argument("--only", default="", help="regular expression: rows to run")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    parser.add_argument("--run", choices=("vllm", "transformers"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run_all(given.run, given.out, json.loads(sys.stdin.read()))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    if given.model:
        make_real(given.model, given.text, given.out)
    make_tiny(given.out)
    make_bad(given.out)
    folders = sorted(path.name for path in given.out.iterdir() if path.is_dir())
    rows = {name: (name, {}) for name in folders}
    rows |= {f"{told}: {folder}": (folder, options) for told, folder, options in MORE}
    rows = {name: each for name, each in rows.items() if re.search(given.only, name)}
    rows = {name: each for name, each in rows.items() if each[0] in folders}
    judged = run_both(given.out, given.python, rows)
    for line, good in judged:
        print(line, "" if good else "<-- wrong")
    if given.write:
        lines = ["| folder | built by | tokens equal | Δ log-probability |", "|---|---|---|---|"]
        lines += grouped([line for line, _ in judged])
        page = given.write.read_text(encoding="utf-8")
        table = re.compile(r"\| folder \| built by .*?\n(?=\n|\Z)", re.DOTALL)
        given.write.write_text(table.sub(lambda _: "\n".join(lines) + "\n", page), encoding="utf-8")
    raise SystemExit(not all(good for _, good in judged))


if __name__ == "__main__":
    main()
