"""A sentence encoder, pruned and quantised: STS-B and sentences per second, in two runtimes.

Takes a sentence encoder (all-MiniLM-L6-v2, say) as a folder, and STS-B as a folder with
`sts-train.csv` and `sts-test.csv` (tab-separated, score in column 5, sentences in 6 and 7). Prunes
it with `liar prune` on training sentences without their scores, exports both with `liar export`, as
float32 and as int8, and measures each folder through sentence-transformers (torch; int8 by torch's
own dynamic quantisation) and through ONNX Runtime: Spearman correlation of the cosine similarity
with the human score on the test pairs, and sentences per second of one thread's CPU time, in rounds
that take turns, from text to embedding.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from assets import write_documents
from common import parser_of, table, write_json
from encoder_tasks import read_sts

from liar_ext.checkpoint.readers import longest_text
from liar_ext.measure.embeddings import pair_quality

Encode = Callable[[Sequence[str], int], np.ndarray]
EXPORTS = {"float32": (), "int8": ("--quantize", "int8")}
BATCHES = {1: 48, 32: 192}  # sentences of a round, by batch size


def main() -> None:
    """Prune, export, measure, and write a table."""
    options = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    folders = {"dense": options.encoder, "pruned": make_pruned(options)}
    graphs = {
        (name, kind): make_graph(folder, options.out / f"{name}-{kind}", flags)
        for name, folder in folders.items()
        for kind, flags in EXPORTS.items()
    }
    runs: dict[tuple[str, str, str], Encode] = {}
    for (name, kind), graph in graphs.items():
        runs["ONNX Runtime", name, kind] = onnxruntime_encoder(graph)
        runs["sentence-transformers", name, kind] = torch_encoder(folders[name], kind)
    test = read_sts(options.stsb / "sts-test.csv")
    rows = {run: {"spearman": spearman(encode, test)} for run, encode in runs.items()}
    for run, row in rows.items():
        row["bytes"] = size_of(graphs[run[1:]]) if run[0] == "ONNX Runtime" else None
        same = runs[("sentence-transformers", *run[1:])]
        some = [text for _, *pair in test[:40] for text in pair]
        row["difference"] = float(np.abs(runs[run](some, 8) - same(some, 8)).max())
    for run, speeds in speeds_of(runs, test, options.rounds).items():
        rows[run]["sentences_per_second"] = speeds
    found = [
        dict(zip(("runtime", "model", "weights"), run, strict=True)) | rows[run] for run in rows
    ]
    write_json(options.out / "sentences.json", found)
    (options.out / "sentences.md").write_text(markdown(rows))
    print(markdown(rows))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("encoder", type=Path, help="folder of the sentence encoder")
    add("--stsb", type=Path, required=True, help="folder of STS-B")
    add("--keep", type=float, default=0.5)
    add("--samples", type=int, default=4096, help="calibration sentences")
    add("--rounds", type=int, default=7)
    add("--out", type=Path, default=Path("out/sentences"))
    return parser.parse_args()


def make_pruned(options: argparse.Namespace) -> Path:
    """Return the folder that `liar prune` writes, from an earlier run if there is one."""
    folder = options.out / "pruned"
    if not folder.exists():
        train = read_sts(options.stsb / "sts-train.csv")
        sentences = dict.fromkeys(text for _, *pair in train for text in pair)
        (text,) = write_documents(options.out, {"train": sentences})
        choices = {"keep": options.keep, "samples": options.samples, "seq-len": 128}
        choices["batch-size"] = 64
        flags = [word for name, value in choices.items() for word in (f"--{name}", str(value))]
        liar("prune", options.encoder, "--calibration", text, *flags, "--out", folder, "--quiet")
    return folder


def make_graph(folder: Path, out: Path, flags: Sequence[str]) -> Path:
    """Return the folder that `liar export` writes, from an earlier run if there is one."""
    if not out.exists():
        liar("export", folder, "--to", "onnx", "--out", out, *flags)
    return out


def liar(*arguments: object) -> None:
    """Run the command."""
    print("liar", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "liar_ext", *map(str, arguments)], check=True)


def torch_encoder(folder: Path, kind: str) -> Encode:
    """Return sentence-transformers' encoding, on torch."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    if kind == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)

    def encode(texts: Sequence[str], batch: int) -> np.ndarray:
        return model.encode(list(texts), batch_size=batch, show_progress_bar=False)

    return encode


def onnxruntime_encoder(folder: Path) -> Encode:
    """Return the encoding by the graph of a folder."""
    import onnxruntime
    from transformers import AutoTokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options)
    inputs = {each.name for each in session.get_inputs()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = longest_text(folder) or tokenizer.model_max_length

    def encode(texts: Sequence[str], batch: int) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        found: list[np.ndarray] = [None] * len(texts)
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            fed = tokenizer(
                [texts[at] for at in rows],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="np",
            )
            fed = {name: each for name, each in fed.items() if name in inputs}
            for at, vector in zip(rows, session.run(["sentence_embedding"], fed)[0], strict=True):
                found[at] = vector
        return np.stack(found)

    return encode


def spearman(encode: Encode, test: Sequence[tuple[float, str, str]]) -> float:
    """Return the rank correlation of cosine similarities with the scores."""
    scores, *sides = zip(*test, strict=True)
    first, second = (torch.from_numpy(encode(each, 32)) for each in sides)
    return pair_quality(first, second, sides[1], scores)["spearman"]


def speeds_of(
    runs: dict[tuple[str, str, str], Encode], test: Sequence[tuple], rounds: int
) -> dict[tuple[str, str, str], dict[int, float]]:
    """Return medians of sentences per second of CPU time, by batch size."""
    texts = [text for _, *pair in test for text in pair]
    seconds: dict = {run: {batch: [] for batch in BATCHES} for run in runs}
    for at in range(rounds + 1):
        for run, encode in runs.items():
            for batch, count in BATCHES.items():
                start = time.process_time()
                encode(texts[:count], batch)
                if at:  # the first round warms up
                    seconds[run][batch].append(time.process_time() - start)
    return {
        run: {batch: BATCHES[batch] / statistics.median(each) for batch, each in taken.items()}
        for run, taken in seconds.items()
    }


def size_of(folder: Path) -> int:
    """Return the bytes of a graph with its weights."""
    return sum(path.stat().st_size for path in (folder / "onnx").iterdir())


def markdown(rows: dict) -> str:
    """Return the table."""
    columns = ("runtime", "model", "weights", "STS-B Spearman", "sentences/s, batch 1", "batch 32")
    lines = []
    for run in sorted(rows, key=lambda run: (-len(run[0]), run[1], run[2])):
        row = rows[run]
        speeds = [f"{row['sentences_per_second'][batch]:.0f}" for batch in BATCHES]
        size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""
        lines.append([*run, f"{row['spearman']:.4f}", *speeds, size])
    return table([*columns, "MB"], lines) + "\n"


if __name__ == "__main__":
    main()
