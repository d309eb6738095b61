"""Models of speech and of images before and after pruning, by one table: `make kinds`.

Takes what `bench/kinds_models.py` and `bench/kinds_data.py` make of packages. A model is pruned by
`liar prune` on a folder of files, and judged on others:

    speech   word error rate on ten utterances of people, and on synthetic speech of another program
             than the calibration set's; CPU seconds for a minute of audio
    images   CIFAR-10 by nearest neighbours and by a linear probe; cosine with the dense model's
             embeddings; images per second

Rows lie in `kinds.json` of the output folder, and a second run
makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import forward, parser_of, read_rows, table, write_json
from kinds_data import cifar, news, people, speak
from kinds_models import WHISPER, dinov2, whisper

from liar_ext import cli
from liar_ext.calibration.media import AUDIO, IMAGES, evaluation_inputs, read_files
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.readers import load_reader
from liar_ext.measure.evaluation import word_errors
from liar_ext.models.running import output_of

COLUMNS = "kind,model,kept,measure,dense,pruned,speed,minutes".split(",")
SPEECH = {  # the fraction to keep, and of which layers
    "both 80 %": (0.8, "all"),
    "encoder 50 %": (0.5, "encoder"),
    "encoder 80 %": (0.8, "encoder"),
}
VISION = {"80 %": 0.8, "65 %": 0.65, "50 %": 0.5}
SPOKEN, JUDGED = 64, 12  # sentences to calibrate on, and to judge on
PICTURES = {"calibration": 128, "held_out": 64, "train": 600, "test": 600}
NEIGHBOURS, ROUNDS, MORE_ROUNDS = 20, 3, 15  # more of what takes a second
MOST_TOKENS = 64  # of an utterance: a model that repeats itself would go on to 448


def main() -> None:
    """Run what is missing, and print a table."""
    options = parse()
    torch.set_num_threads(1)
    path = options.out / "kinds.json"
    rows = read_rows(path)
    jobs: dict[str, Callable] = {"speech": speech, "images": images}
    for kind in options.kinds:
        for found in jobs[kind](options, {tuple(row[:3]) for row in rows}):
            rows += found
            write_json(path, rows)
            print(table(COLUMNS, found), flush=True)
    print(table(COLUMNS, rows))
    if options.docs is not None:
        facts = json.loads(options.docs.read_text())
        write_json(options.docs, facts | {"columns": COLUMNS, "rows": rows})


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--people", type=Path, required=True, help="the unpacked package pocketsphinx-testdata")
    add("--cifar", type=Path, required=True, help="bigbench-1.0.0.tar.gz")
    add("--kinds", nargs="+", choices=("speech", "images"), default=["speech", "images"])
    add("--models", nargs="+", choices=WHISPER, default=[*WHISPER], help="of speech: Whisper's")
    add("--prune", nargs="*", default=[], metavar="OPTION", help="of liar prune, without dashes")
    add("--out", type=Path, default=Path("out/kinds"))
    add("--docs", type=Path, help="file of docs/data to write the rows to")
    options = parser.parse_args()
    options.prune = [f"--{each}" for each in options.prune]
    return options


def pruned(model: Path, data: Path, out: Path, *options: object) -> tuple[Path, str]:
    """Return the folder that `liar prune` writes, and the minutes that it took."""
    start = time.perf_counter()
    job = ["prune", model, "--calibration", data, "--out", out, "--overwrite", "--quiet", *options]
    if cli.main([str(each) for each in job]):
        raise SystemExit(f"liar {' '.join(map(str, job))} failed")
    return out, f"{(time.perf_counter() - start) / 60:.1f}"


def speech(options: argparse.Namespace, done: set):
    """Yield the rows of the Whisper models."""
    out, sentences = options.out, news()
    data = speak(out / "spoken", sentences[:SPOKEN], judging=False)
    judging = {
        "people": people(out / "people", options.people),
        "synthetic": speak(out / "judged", sentences[SPOKEN : SPOKEN + JUDGED], judging=True),
    }
    for name in options.models:
        yield from transcribed(options, done, name, data, judging)


def transcribed(options: argparse.Namespace, done: set, name: str, data: Path, judging: dict):
    """Yield the rows of one Whisper model, calibrated on a folder and judged on others."""
    folder, called = whisper(name), f"Whisper {name}"
    dense, _ = load_model(folder)
    dense.generation_config.max_length = MOST_TOKENS
    reader = load_reader(AUDIO, str(folder), dense)
    for kept, (keep, sites) in SPEECH.items():
        if ("speech", called, kept) in done:
            continue
        out = options.out / f"whisper-{name}-{sites}-{keep}"
        chosen = ("--keep", keep, "--sites", sites, *options.prune)
        small, minutes = pruned(folder, data, out, *chosen)
        model, _ = load_model(small)
        model.generation_config.max_length = MOST_TOKENS
        rows = []
        for spoken, each in judging.items():
            items = read_files(each, AUDIO).items
            jobs = [partial(word_errors, each, reader, items) for each in (dense, model)]
            timed = spoken == "people"
            found, taken = in_turns(ROUNDS if timed else 1, *jobs)
            rates = [f"{each['word_error_rate']:.1%}".replace("%", " %") for each in found]
            speed = f"{taken[0] / taken[1]:.2f} ×" if timed else "–"
            measure = f"word error rate, {spoken}, {found[0]['words']} words"
            rows.append(["speech", called, kept, measure, *rates, speed, minutes])
            if timed:
                seconds = [f"{each / found[0]['minutes']:.1f}" for each in taken]
                measure = f"CPU seconds for a minute of audio, {spoken}"
                rows.append(["speech", called, kept, measure, *seconds, speed, minutes])
        before, after = encoders_in_onnxruntime(dense, model)
        measure = "encoder in ONNX Runtime, CPU seconds for 30 seconds"
        cells = (f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f} ×", minutes)
        yield [*rows, ["speech", called, kept, measure, *cells]]


def in_turns(rounds: int, *jobs: Callable) -> tuple[list, list[float]]:
    """Return the results of jobs and their CPU seconds, the least of rounds in turns.

    Other work on the machine can only add to them.
    """
    taken = [[] for _ in jobs]
    for _ in range(rounds):
        found = []
        for job, seconds in zip(jobs, taken, strict=True):
            start = time.process_time()
            found.append(job())
            seconds.append(time.process_time() - start)
    return found, [min(each) for each in taken]


class Encoder(torch.nn.Module):
    """The encoder of a model, with one output."""

    def __init__(self, model) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_features):
        """Return its hidden states."""
        return self.encoder(input_features).last_hidden_state


@torch.no_grad()
def encoders_in_onnxruntime(*models) -> list[float]:
    """Return the CPU seconds that each encoder takes for one window, timed in turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    jobs = []
    for each in map(Encoder, models):
        graph = torch.onnx.export(each.eval(), (features,), input_names=["features"], dynamo=True)
        made = graph.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(made, options)
        jobs.append(partial(session.run, None, {"features": features.numpy()}))
        found = jobs[-1]()[0]
        torch.testing.assert_close(torch.tensor(found), each(features), rtol=1e-3, atol=1e-3)
    return in_turns(MORE_ROUNDS, *jobs)[1]


def images(options: argparse.Namespace, done: set):
    """Yield the rows of DINOv2-small."""
    data = options.out / "cifar"
    labels = cifar(data, options.cifar, PICTURES)
    folder = dinov2()
    dense, _ = load_model(folder)
    reader = load_reader(IMAGES, str(folder), dense)
    inputs = {
        name: evaluation_inputs(read_files(data / name, IMAGES), reader).batches(25)
        for name in ("held_out", "train", "test")
    }
    before = None
    for kept, keep in VISION.items():
        if ("images", "DINOv2-small", kept) in done:
            continue
        small, minutes = pruned(
            *(folder, data / "calibration", out := options.out / f"dinov2-{keep}"),
            *("--keep", keep, "--eval", data / "held_out", *options.prune),
        )
        model, _ = load_model(small)
        before = before or classified(dense, inputs, labels)
        after = classified(model, inputs, labels)
        report = json.loads((out / "liar/report.json").read_text())["evaluation"]["pruned"]
        after["cosine"], before["cosine"] = report["cosine"], 1.0
        jobs = [partial(forward, each, inputs["held_out"]) for each in (dense, model)]
        turns = [in_turns(1, *jobs)[1] for _ in range(ROUNDS)]
        speed = f"{median(dense / pruned for dense, pruned in turns):.2f} ×"
        yield [
            ["images", "DINOv2-small", kept, name, *shown(name, before, after), speed, minutes]
            for name in before
        ]


def shown(name: str, before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Return the numbers of both models."""
    form = "{:.3f}" if name == "cosine" else "{:.1%}"
    return [form.format(each[name]).replace("%", " %") for each in (before, after)]


@torch.no_grad()
def classified(model, inputs: dict, labels: dict[str, list[int]]) -> dict[str, float]:
    """Return accuracies on pictures of the test set, by embeddings of the training pictures."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    found = {}
    for name in ("train", "test"):
        rows = [
            output_of(model, model(pixel_values=batch["pixel_values"]))[1][:, 0]
            for batch in inputs[name]
        ]
        found[name] = torch.nn.functional.normalize(torch.cat(rows)).numpy()
    # A lone set takes turns in its folds, by which batches are ordered.
    order = {
        name: [*range(0, len(labels[name]), 2), *range(1, len(labels[name]), 2)] for name in found
    }
    classes = {name: [labels[name][at] for at in order[name]] for name in found}
    ways = {
        f"{NEIGHBOURS} nearest neighbours": KNeighborsClassifier(NEIGHBOURS, weights="distance"),
        "linear probe": LogisticRegression(C=100, max_iter=2000),
    }
    scores = {
        name: way.fit(found["train"], classes["train"]).score(found["test"], classes["test"])
        for name, way in ways.items()
    }
    return {f"CIFAR-10, {name}": each for name, each in scores.items()}


if __name__ == "__main__":
    main()
