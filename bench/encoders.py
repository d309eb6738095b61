"""Encoders at 50, 35 and 25 % of the parameters of their heads and channels, judged by three tasks.

Takes a sentence encoder (all-MiniLM-L6-v2, say) as a folder, and data as folders: STS-B with
`sts-train.csv` and `sts-test.csv` (tab-separated, score in column 5, sentences in 6 and 7), SST-2
with `train.tsv` and `test.tsv` (sentence, label), and news as a folder of articles, a title and a
body each; what is not given is left out. `--judge dev` takes the dev files instead, and other
articles, for choices that the test data must not decide.

    STS-B     Spearman correlation of cosine similarities with the scores
    news      recall@1: of 300 articles or more, is the body nearest to a title its own
    SST-2     accuracy; the encoder is fine-tuned before pruning, once, and kept

The encoder is pruned on training sentences of STS-B, and again on news articles that are not
judged; both of these models are judged by both tasks, so that each task has a row of a calibration
text of its own kind and one of another kind. Calibration takes no labels, and is drawn as
`liar prune` draws it. Rows lie in `encoders.json`; a second run makes what is missing.

`--keep-hidden` measures STS-B with hidden features sliced, and with all that read them solved, and
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
from encoder_tasks import News, Sentiment, Similarity, fine_tuned, news_apart, read_sts
from transformers import AutoModel, AutoTokenizer

from liar_ext import Plan, apply_plan, narrow, prune
from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.data.random_tokens import RANDOM_TOKENS
from liar_ext.data.texts import calibration_sequences

# All but the default with tile 1, as the older rows of docs/quality.md.
PLAIN = {"criterion": "wifv", "allocation": "uniform", "schedule": "one-pass", "tile": 1}
METHODS = {
    "default": {},
    "one-pass": {"schedule": "one-pass"},
    "branch": {"schedule": "layerwise", "target": "branch"},
    "obs": {"criterion": "obs"},
    "rescale": {"rescale": True},
    "tile=1": {"tile": 1},
    "uniform": {"allocation": "uniform"},
    "none": {**PLAIN, "reconstruct": "none"},
    "bias": {**PLAIN, "reconstruct": "bias"},
    "linear": {**PLAIN, "reconstruct": "linear"},
    "affine": {**PLAIN, "reconstruct": "affine"},
}
SEQ_LEN, BATCH = 128, 64


def main() -> None:
    """Run what is missing, and write a table."""
    options = parse()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "encoders.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    jobs = [sentences_of(options, tokenizer), classifier_of(options, tokenizer)]
    for model, texts, tasks in filter(None, jobs):
        for row in compare(model, texts, tasks, tokenizer, options, rows):
            rows.append(row)
            print(row, flush=True)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            (options.out / "encoders.md").write_text(markdown(rows))
    print(markdown(rows))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("encoder", type=Path, help="folder of the sentence encoder")
    add("--stsb", type=Path, help="folder of STS-B")
    add("--sst2", type=Path, help="folder of SST-2")
    add("--news", type=Path, help="folder of articles, in folders or not")
    add("--keep", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--samples", type=int, default=512, help=f"times {SEQ_LEN} calibration tokens")
    add("--random-tokens", type=float, default=RANDOM_TOKENS, help="as of `liar prune`")
    add("--methods", nargs="*", choices=METHODS, default=["default"])
    add("--judge", choices=("test", "dev"), default="test")
    add("--keep-hidden", nargs="+", type=float, default=[], help="fractions of the hidden size")
    add("--out", type=Path, default=Path("out/encoders"))
    options = parser.parse_args()
    if options.stsb is None and options.sst2 is None and options.news is None:
        parser.error("give the folder of a task: --stsb, --news, --sst2, or several")
    return options


def sentences_of(options: argparse.Namespace, tokenizer) -> tuple | None:
    """Return the encoder, calibration texts and tasks by name."""
    texts: dict[str, list[str]] = {}
    tasks: dict[str, Callable] = {}
    if options.stsb is not None:
        train = read_sts(options.stsb / "sts-train.csv")
        texts["STS-B"] = list(dict.fromkeys(text for _, *pair in train for text in pair))
        judged = read_sts(options.stsb / f"sts-{options.judge}.csv")
        tasks["STS-B, Spearman"] = Similarity(judged, tokenizer)
    if options.news is not None:
        texts["news"], judged = news_apart(options.news, options.judge)
        tasks[f"news, recall@1 of {len(judged)}"] = News(judged, tokenizer)
    if not tasks:
        return None
    return AutoModel.from_pretrained(options.encoder).eval(), texts, tasks


def classifier_of(options: argparse.Namespace, tokenizer) -> tuple | None:
    """Return the fine-tuned classifier, its calibration text and its task."""
    if options.sst2 is None:
        return None
    task = Sentiment(options.sst2 / f"{options.judge}.tsv", tokenizer)
    model, train = fine_tuned(options.encoder, options.sst2, tokenizer, options.out)
    return model, {"SST-2": train}, {"SST-2, accuracy": task}


def compare(
    dense,
    texts: dict[str, list[str]],
    tasks: dict[str, Callable],
    tokenizer,
    options: argparse.Namespace,
    known: Sequence[dict],
) -> Iterator[dict]:
    """Yield the rows that are missing: each pruned model by each of the tasks."""
    done = {key_of(row) for row in known}
    mine = [row for row in known if row["judge"] == options.judge and row["task"] in tasks]
    before: dict[str, float] = {}

    def judged(model, facts: dict) -> Iterator[dict]:
        for task, measure in tasks.items():
            row = {"judge": options.judge, "task": task, **facts}
            if key_of(row) in done:  # a run was stopped between the tasks
                continue
            earlier = next((row["dense"] for row in mine if row["task"] == task), None)
            before[task] = before.get(task) or earlier or measure(dense)
            after = measure(model)
            scores = {"dense": before[task], "pruned": after, "retained": after / before[task]}
            yield {**row, **scores}

    def missing(facts: dict) -> bool:
        rows = ({"judge": options.judge, "task": task, **facts} for task in tasks)
        return not all(key_of(row) in done for row in rows)

    for keep, seed in [(keep, seed) for seed in options.seeds for keep in options.keep]:
        for (calibration, documents), method in [
            (each, method) for each in texts.items() for method in options.methods
        ]:
            facts = {"calibration": calibration, "method": method, "asked": keep, "seed": seed}
            facts |= {"samples": options.samples, "random_tokens": options.random_tokens}
            if not missing(facts):
                continue
            batches = draw(documents, tokenizer, options, seed)
            model, start = copy.deepcopy(dense), time.process_time()
            report = prune(model, batches, keep, seed=seed, **METHODS[method])
            facts["seconds"] = time.process_time() - start
            facts["keep"] = report.params["prunable_after"] / report.params["prunable_before"]
            facts["tokens"] = report.settings["calibration_tokens"]
            yield from judged(model, facts)
    for fraction in options.keep_hidden:
        narrowed_before = ("hidden" in row["method"] and row["asked"] == fraction for row in mine)
        if any(narrowed_before):
            continue
        yield from narrowed(dense, next(iter(texts.values())), fraction, tokenizer, options, judged)


def draw(documents: Sequence[str], tokenizer, options, seed: int) -> list[dict]:
    """Return calibration batches as `liar prune` draws them for an encoder."""
    settings = {"samples": options.samples, "seq_len": SEQ_LEN, "seed": seed, "packed": False}
    settings["random_tokens"] = options.random_tokens
    return calibration_sequences([documents], tokenizer, **settings).batches(BATCH)


def narrowed(
    dense, documents: Sequence[str], fraction: float, tokenizer, options, judged: Callable
) -> Iterator[dict]:
    """Yield the rows of a smaller hidden size: sliced, and solved."""
    seed, start = options.seeds[0], time.process_time()
    done = narrow(dense, draw(documents, tokenizer, options, seed), fraction)
    seconds = time.process_time() - start
    plan = Plan(dense.config.model_type, "auto", {}, hidden=done.kept)
    for name, weights in (("sliced", {}), ("solved", done.weights)):
        model = copy.deepcopy(dense)
        apply_plan(model, plan, weights)
        method = f"{len(done.kept.kept)} of {done.kept.units} hidden features, {name}"
        facts = {"calibration": "", "method": method, "asked": fraction, "seed": seed}
        facts |= {"samples": options.samples, "seconds": seconds, "tokens": done.source["tokens"]}
        facts["random_tokens"] = options.random_tokens
        yield from judged(model, {**facts, "keep": count_params(model) / count_params(dense)})


def key_of(row: dict) -> tuple:
    """Return what tells a row from others; rows of before are of text alone."""
    names = "judge task calibration method asked seed samples"
    return (*(row[name] for name in names.split()), row.get("random_tokens", 0.0))


def markdown(rows: list[dict]) -> str:
    """Return the table."""
    lines = [
        "| judged by | calibrated on | method | kept | tokens | seed | dense | pruned | retained "
        "| CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (*key_of(row)[:4], -row["asked"], row["seed"])):
        lines.append(
            f"| {row['task']}{' (dev)' * (row['judge'] == 'dev')} | {row['calibration']} "
            f"| {row['method']} | {row['keep']:.3f} | {row['tokens']:,} | {row['seed']} "
            f"| {row['dense']:.4f} | {row['pruned']:.4f} | {row['retained']:.1%} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
