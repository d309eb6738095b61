"""Sentence encoders at 50, 35 and 25 % of their heads' and channels' parameters, by three tasks.

Takes the encoders of `bench/encoder_models.py`, by name, and data as folders: STS-B with
`sts-train.csv` and `sts-test.csv` (tab-separated, score in column 5, sentences in 6 and 7), SST-2
with `train.tsv` and `test.tsv` (sentence, label), and news as a folder of articles, a title and a
body each; what is not given is left out. `--judge dev` takes the dev files instead, and other
articles, for choices that the test data must not decide. `--judge all --calibration STS-B` takes
all 2,061 articles, none of which such a model has seen.

    STS-B     Spearman correlation of cosine similarities with the scores
    news      recall@1: of 300 articles or more, is the body nearest to a title its own
    SST-2     accuracy; the encoder is fine-tuned before pruning, once, and kept

An encoder is pruned on training sentences of STS-B, and again on news articles that are not judged;
both of these models are judged by both tasks, so that each task has a row of a calibration text of
its own kind and one of another kind. `--calibration both` takes both texts at once. `--heal TOKENS`
also trains each pruned encoder on all of the text, as `liar heal` does. Calibration takes no
labels, and is drawn as `liar prune` draws it. Methods share sums, scores, error curves and
sensitivities; the seconds of a row count what it would have spent alone. Rows lie in
`encoders.json`; a second run makes what is missing.

`--keep-hidden` measures with hidden features sliced, and with all that read them solved, and
nothing else removed. What those rows keep is of all parameters, not of the units'.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from common import parser_of, read_rows, table, write_json
from encoder_models import folders
from encoder_tasks import Pairs, Sentiment, fine_tuned, news_apart, read_sts
from quality.sharing import Case

from liar_ext import Plan, Recipe, apply_plan, heal, narrow
from liar_ext.calibration.texts import calibration_sequences
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.folder import count_params
from liar_ext.job.solving import JUDGED

# Those of no or partial reconstruction are uniform, with single channels, as others' methods are.
PLAIN = {"criterion": "wifv", "allocation": "uniform", "schedule": "one-pass", "tile": 1}
METHODS = {
    "auto": {},
    "one-pass": {"schedule": "one-pass"},
    "layerwise": {"schedule": "layerwise"},
    "one-pass, random tokens": {"schedule": "one-pass", "random_tokens": 0.25},
    "layerwise, random tokens": {"schedule": "layerwise", "random_tokens": 0.25},
    "obs": {"criterion": "obs"},
    "rescale": {"rescale": True},
    "tile=1": {"tile": 1},
    "uniform": {"allocation": "uniform"},
    "none": {**PLAIN, "reconstruct": "none"},
    "bias": {**PLAIN, "reconstruct": "bias"},
    "linear": {**PLAIN, "reconstruct": "linear"},
    "affine": {**PLAIN, "reconstruct": "affine"},
}
DEFAULT = ("auto", "one-pass", "layerwise")
SEQ_LEN, BATCH, ALL = 128, 64, 4096


def main() -> None:
    """Run what is missing, and write a table."""
    options = parse()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "encoders.json"
    rows = read_rows(path)
    for name in options.encoders:
        folder = folders()[name] if name in folders() else Path(name)
        model, tokenizer = load_model(folder)
        jobs = [sentences_of(model, options, tokenizer)]
        if options.sst2 is not None:
            jobs.append(classifier_of(name, folder, options, tokenizer))
        for dense, texts, tasks in filter(None, jobs):
            for row in compare(name, dense, texts, tasks, tokenizer, options, rows):
                rows.append(row)
                print(row, flush=True)
                write_json(path, rows)
                (options.out / "encoders.md").write_text(markdown(rows))
    print(markdown(rows))
    if options.docs is not None:
        write_docs(rows, options.docs)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("encoders", nargs="*", default=list(folders()), help="names or folders of encoders")
    add("--stsb", type=Path, help="folder of STS-B")
    add("--sst2", type=Path, help="folder of SST-2")
    add("--news", type=Path, help="folder of articles, in folders or not")
    texts = ("STS-B", "news", "both")
    add("--calibration", nargs="+", choices=texts, default=["STS-B", "news"])
    add("--heal", type=int, nargs="*", default=[], metavar="TOKENS", help="train pruned encoders")
    add("--keep", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--samples", type=int, default=128, help=f"times {SEQ_LEN} calibration tokens")
    add("--methods", nargs="*", choices=METHODS, default=DEFAULT)
    add("--judge", choices=("test", "dev", "all"), default="test")
    add("--keep-hidden", nargs="+", type=float, default=[], help="fractions of the hidden size")
    add("--out", type=Path, default=Path("out/encoders"))
    add("--docs", type=Path, metavar="FOLDER", help="write rows there for the docs")
    options = parser.parse_args()
    if options.judge == "all" and (options.calibration != ["STS-B"] or options.sst2 is not None):
        parser.error("--judge all goes with --calibration STS-B, and without --sst2")
    if options.stsb is None and options.sst2 is None and options.news is None:
        parser.error("give the folder of a task: --stsb, --news, --sst2, or several")
    return options


def sentences_of(model, options: argparse.Namespace, tokenizer) -> tuple | None:
    """Return the encoder, calibration texts and tasks by name."""
    texts: dict[str, list[list[str]]] = {}
    tasks: dict[str, Callable] = {}
    if options.stsb is not None:
        train = read_sts(options.stsb / "sts-train.csv")
        texts["STS-B"] = [list(dict.fromkeys(text for _, *pair in train for text in pair))]
        part = "test" if options.judge == "all" else options.judge
        judged = read_sts(options.stsb / f"sts-{part}.csv")
        tasks["STS-B, Spearman"] = Pairs.of_sts(tokenizer, judged)
    if options.news is not None:
        articles, judged = news_apart(options.news, options.judge)
        texts["news"] = [articles]
        tasks[f"news, recall@1 of {len(judged)}"] = Pairs(tokenizer, *zip(*judged, strict=True))
    texts["both"] = [each for sources in texts.values() for each in sources]
    texts = {name: each for name, each in texts.items() if name in options.calibration}
    return (model, texts, tasks) if tasks else None


def classifier_of(name: str, folder: Path, options: argparse.Namespace, tokenizer) -> tuple:
    """Return the fine-tuned classifier, its calibration text and its task."""
    task = Sentiment(options.sst2 / f"{options.judge}.tsv", tokenizer)
    model, train = fine_tuned(folder, options.sst2, tokenizer, options.out / Path(name).name)
    return model, {"SST-2": [train]}, {"SST-2, accuracy": task}


def compare(
    name: str,
    dense,
    texts: dict[str, list[list[str]]],
    tasks: dict[str, Callable],
    tokenizer,
    options: argparse.Namespace,
    known: Sequence[dict],
) -> Iterator[dict]:
    """Yield the rows that are missing: each pruned model by each of the tasks."""
    done = {key_of(row) for row in known}
    same = {"encoder": name, "judge": options.judge}
    before = {row["task"]: row["dense"] for row in known if same.items() <= row.items()}

    def judged(model, facts: dict) -> Iterator[dict]:
        for task, measure in tasks.items():
            row = {**same, "task": task, **facts}
            if key_of(row) in done:  # a run was stopped between the tasks
                continue
            before[task] = before.get(task) or measure(dense)
            after = measure(model)
            scores = {"dense": before[task], "pruned": after, "retained": after / before[task]}
            yield {**row, **scores}

    def missing(facts: dict) -> bool:
        return not all(key_of({**same, "task": task, **facts}) in done for task in tasks)

    for seed in options.seeds:
        for calibration, sources in texts.items():
            cases: dict[float, Case] = {}
            for keep, method in [(keep, way) for keep in options.keep for way in options.methods]:
                facts = {"calibration": calibration, "method": method, "asked": keep, "seed": seed}
                facts |= {"samples": options.samples}
                healed = [{**facts, "method": f"{method}, {n:,} tokens"} for n in options.heal]
                if not any(map(missing, (facts, *healed))):
                    continue
                choices = dict(METHODS[method])
                random_tokens = choices.pop("random_tokens", 0.0)
                if random_tokens not in cases:
                    start = time.process_time()
                    given = draw(sources, tokenizer, options, seed, random_tokens)
                    cases[random_tokens] = Case(dense, *given, time.process_time() - start)
                recipe = Recipe(keep=keep, seed=seed, **choices)
                model, report, facts["seconds"] = cases[random_tokens].prune(recipe)
                facts["keep"] = report.params["prunable_after"] / report.params["prunable_before"]
                facts["tokens"] = report.settings["calibration_tokens"]
                facts["schedule"] = report.settings["schedule"]
                facts["schedules"] = report.settings.get("schedules", {})
                yield from judged(model, facts)
                for tokens, each in zip(options.heal, healed, strict=True):
                    work, start = copy.deepcopy(model), time.process_time()
                    train(work, dense, sources, tokenizer, seed, tokens)
                    more = time.process_time() - start
                    yield from judged(work, {**facts, **each, "seconds": facts["seconds"] + more})
    for fraction in options.keep_hidden:
        yield from narrowed(dense, next(iter(texts.values())), fraction, tokenizer, options, judged)


def train(
    model, dense, sources: Sequence[Sequence[str]], tokenizer, seed: int, tokens: int
) -> None:
    """Train an encoder on all of the text, without an eighth of it."""
    settings = {"samples": ALL, "seq_len": SEQ_LEN, "seed": seed, "packed": False, "judge": 64}
    drawn = calibration_sequences(sources, tokenizer, **settings)
    how = {"held_out": drawn.judging.batches(16), "budget": {"tokens": tokens}, "lr": 3e-4}
    heal(model, dense, drawn.batches(16), **how)


def draw(
    sources: Sequence[Sequence[str]], tokenizer, options, seed: int, random_tokens: float
) -> tuple:
    """Return batches to calibrate on, and others to judge by, as `liar prune` draws them."""
    settings = {"samples": options.samples, "seq_len": SEQ_LEN, "seed": seed, "packed": False}
    settings |= {"random_tokens": random_tokens, "judge": min(JUDGED, options.samples // 8)}
    drawn = calibration_sequences(sources, tokenizer, **settings)
    return drawn.batches(BATCH), drawn.judging.batches(BATCH)


def narrowed(
    dense, sources: Sequence[Sequence[str]], fraction: float, tokenizer, options, judged: Callable
) -> Iterator[dict]:
    """Yield the rows of a smaller hidden size: sliced, and solved."""
    seed, start = options.seeds[0], time.process_time()
    done = narrow(dense, draw(sources, tokenizer, options, seed, 0.0)[0], fraction)
    seconds = time.process_time() - start
    plan = Plan(dense.config.model_type, "auto", {}, hidden=done.kept)
    for name, weights in (("sliced", {}), ("solved", done.weights)):
        model = copy.deepcopy(dense)
        apply_plan(model, plan, weights)
        method = f"{len(done.kept.kept)} of {done.kept.units} hidden features, {name}"
        facts = {"calibration": "", "method": method, "asked": fraction, "seed": seed}
        facts |= {"samples": options.samples, "seconds": seconds, "tokens": done.source["tokens"]}
        facts |= {"schedule": "", "schedules": {}}
        yield from judged(model, {**facts, "keep": count_params(model) / count_params(dense)})


def key_of(row: dict) -> tuple:
    """Return what tells a row from others."""
    return tuple(row[name] for name in KEY.split())


KEY = "encoder judge task calibration method asked seed samples"


def markdown(rows: list[dict]) -> str:
    """Return the table: a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = ("encoder", "judge", "task", "calibration", "asked", "seed")
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in names), {})[row["method"]] = row
    columns = ["encoder", "judged by", "calibrated on", "kept", "seed", "dense", *methods]
    lines = []
    for (encoder, judge, task, calibration, asked, seed), found in sorted(
        cells.items(), key=lambda cell: (*cell[0][:4], -cell[0][4], cell[0][5])
    ):
        dense = next(iter(found.values()))["dense"]
        shown = [_shown(found[method]) if method in found else "" for method in methods]
        task += " (dev)" * (judge == "dev")
        lines.append([encoder, task, calibration, asked, seed, f"{dense:.4f}", *shown])
    return table(columns, lines) + "\n"


SHOWN = {
    "auto": "`auto`, the default",
    "one-pass": "one pass",
    "layerwise": "layer by layer",
    "layerwise, random tokens": "with random tokens",
}


def write_docs(rows: list[dict], folder: Path) -> None:
    """Write the tables of docs/quality.md: models that were calibrated on either text.

    A cell that no row fills stays as it is, so that a run may add a column or an encoder.
    """
    cost = []
    found = {
        "encoders": _quality(rows, "STS-B", cost),
        "encoders_seed_1": _quality(rows, "STS-B", [], seed=1),
        "encoders_news": _quality(rows, "news", []),
        "encoder_cost": cost,
    }
    for name, cells in found.items():
        path = folder / f"{name}.json"
        facts = json.loads(path.read_text())
        keys = 3 if name != "encoder_cost" else 2
        known = {tuple(row[:keys]): row for row in facts["rows"]}
        for row in cells:
            before = known.get(tuple(row[:keys]), row)
            known[tuple(row[:keys])] = [new or old for new, old in zip(row, before, strict=True)]
        write_json(path, facts | {"rows": list(known.values())})


def _quality(
    rows: list[dict], calibration: str, cost: list[list[str]], seed: int = 0
) -> list[list[str]]:
    """Return what is kept of the dense score, by task, encoder and fraction; add to the costs."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if (row["judge"], row["calibration"], row["seed"]) == ("test", calibration, seed):
            at = row["task"].partition(",")[0], row["encoder"], str(row["asked"])
            cells.setdefault(at, {})[row["method"]] = row
    quality = []
    for at, found in sorted(
        cells.items(), key=lambda cell: (cell[0][0] != "STS-B", cell[0][1], -float(cell[0][2]))
    ):
        dense = f"{next(iter(found.values()))['dense']:.4f}"
        kept = [f"{found[each]['retained']:.1%}" if each in found else "" for each in SHOWN]
        quality.append([*at, dense, *(each.replace("%", " %") for each in kept)])
        if at[0] == "STS-B" and {"auto", "one-pass"} <= found.keys():
            one, auto = found["one-pass"]["seconds"], found["auto"]["seconds"]
            both = " / ".join(f"{value:.4f}" for value in found["auto"]["schedules"].values())
            cost.append([*at[1:], f"{one:.0f}", f"{auto:.0f}", f"{auto / one:.2f}", both])
    return quality


def _shown(row: dict) -> str:
    taken = f", {row['schedule']}" if row["schedules"] else ""
    return f"{row['retained']:.1%} ({row['seconds']:.0f} s{taken})"


if __name__ == "__main__":
    main()
