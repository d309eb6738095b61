"""One run: models, seeds, fractions and methods, less the rows that are there already."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import liar_ext
from bench.common import write_whole
from bench.quality import models
from bench.quality.judging import Judges
from bench.quality.methods import DENSE, expand, is_layerwise, read_method
from bench.quality.plot import plot
from bench.quality.record import Record, alone_in
from bench.quality.report import markdown
from bench.quality.sharing import Case
from bench.quality.texts import Texts, choose_texts, digest_of, write_texts
from liar_ext import InputError, Recipe, sites
from liar_ext.job.preparing import settled_for
from liar_ext.models.plan import sites_left

# CPU seconds of a row beside others of its seed, by what the method has to do; where there are such
# rows already, what they took. One core of an AMD EPYC with AVX-512, taken from single steps.
SECONDS = {"layerwise": 850, "curve": 450, "other": 120}


def run(options: argparse.Namespace) -> None:
    """Measure what is missing; write rows, tables and the picture after each."""
    names = expand(options.methods)
    for name in names:
        for ratio in options.ratios:
            read_method(name, keep=1 - ratio, seed=0)  # a wrong name fails before anything is run
    chosen = choose_texts(options.texts, options.calibration, options.eval, options.wikitext)
    if any(Path(source).parent == options.texts for some in chosen for source in some.values()):
        write_texts(options.texts)
    texts = Texts(*chosen)
    with alone_in(options.out):
        record = Record(options.out / "quality.json")
        code = digest_of(*_sources())
        print(estimate(record, options, names), flush=True)
        for model_name in options.models:
            for row in measure(options, model_name, names, texts, record):
                record.add(row | {"code": code})
                print(line_of(row), flush=True)
                print(estimate(record, options, names), flush=True)
                write(record, options.out)
        write(record, options.out)
        stale = {row.get("code") for row in record.rows} - {code}
        if stale:
            print(
                f"Rows of {len(stale)} other state(s) of liar_ext are in {record.path}; remove "
                "them, or name another --out, to measure them anew."
            )
        print(options.out / "quality.md")


def measure(
    options: argparse.Namespace, name: str, methods: list[str], texts: Texts, record: Record
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a model that the record lacks, that of the dense model first."""
    model, tokenizer, called = models.load(name)
    judges = Judges.read(options, texts, tokenizer)
    shared = {
        "model": called,
        "weights": models.weights_digest(model),
        "judged_digest": judges.digest,
        "judged": {
            "seq_len": options.seq_len,
            "dtype": options.eval_dtype,
            "prompts": len(judges.prompts),
        },
    }
    wanted = {}
    for seed, (beside, some) in product(options.seeds, by_what_is_beside(methods).items()):
        self_text, random_tokens = beside
        clock = Stopwatch()
        drawn = texts.draw(
            model,
            tokenizer,
            samples=options.samples,
            seq_len=options.seq_len,
            seed=seed,
            lone=options.lone,
            judge=options.judge,
            self_text=self_text,
            random_tokens=random_tokens,
        )
        drawing = clock.lap()
        of_seed = shared | {
            "seed": seed,
            "calibration": list(texts.calibration),
            "calibration_tokens": drawn.tokens,
            "calibration_digest": digest_of(drawn.input_ids, drawn.fold),
        }
        rows = []
        for ratio in options.ratios:
            for method in some:
                recipe = read_method(method, keep=1 - ratio, seed=seed)
                facts = {"method": method, "ratio": ratio, "recipe": recipe.to_dict()}
                if record.find(of_seed | facts) is None:
                    rows.append((recipe, of_seed | facts))
        if rows:
            wanted[seed, beside] = drawn, drawing, rows
    dense = shared | {"method": DENSE, "ratio": 0.0, "seed": 0, "recipe": {}}
    dense |= {"calibration": [], "calibration_tokens": 0, "calibration_digest": ""}
    known = record.find(dense) is not None
    if not wanted and known:
        return
    clock, cast = Stopwatch(), copy.deepcopy(model)
    judges.start(cast)
    if not known:
        found = judges.judge(cast, judges.dense)
        spent = clock.lap()
        yield dense | found | {"removed": {}, "seconds": {"judge": spent, "spent": spent}}
    del cast
    for drawn, drawing, rows in wanted.values():
        judging = None if drawn.judging is None else drawn.judging.batches()
        yield from judged(Case(model, drawn.batches(), judging, drawing), rows, judges, clock)


def judged(
    case: Case, rows: Sequence[tuple[Recipe, dict[str, Any]]], judges: Judges, clock: Stopwatch
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one calibration set; a job that has two names is done once."""
    known: dict[Recipe, dict[str, Any]] = {}
    for recipe, facts in rows:
        job = settled_for(recipe, sites(case.model, recipe.prunable_kinds, recipe.attn_unit))
        if job in known:  # liar and liar+one-pass of Gemma, for one
            seconds = known[job]["seconds"] | {"spent": clock.lap()}
            yield facts | known[job] | {"seconds": seconds}
            continue
        try:
            pruned, report, seconds = case.prune(recipe)
        except InputError as error:  # a size that a method can't reach on this model
            print(f"{facts['method']}, remove {facts['ratio']:g}: {error}", flush=True)
            continue
        start = time.process_time()
        found = judges.judge(pruned)
        taken = {"prune": seconds, "judge": time.process_time() - start, "spent": clock.lap()}
        known[job] = found | {
            "removed": removed(case.model, report.plan),
            "predicted_divergence": report.settings.get("predicted_divergence"),
            "seconds": taken,
        }
        yield facts | known[job]
        del pruned


def by_what_is_beside(methods: Sequence[str]) -> dict[tuple[float, float | str], list[str]]:
    """Return methods by the fractions of written text and random tokens in their sets."""
    found: dict[tuple[float, float | str], list[str]] = {}
    for name in methods:
        recipe = read_method(name, keep=1.0, seed=0)
        found.setdefault((recipe.self_text, recipe.random_tokens), []).append(name)
    return found


class Stopwatch:
    """CPU seconds from one row to the next, which share what they can."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def lap(self) -> float:
        """Return the seconds since the last time, and begin anew."""
        now = time.process_time()
        spent, self.last = now - self.last, now
        return spent


def removed(model: Any, plan: liar_ext.Plan) -> dict[str, float]:
    """Return the fraction of the sites' parameters that is gone, of all and by kind."""
    found = {}
    at = sites(model, attn_unit=plan.attn_unit)
    for kind in ("all", "attn", "mlp"):
        some = {site.name: site for site in at if kind in ("all", site.kind)}
        left = sum(
            site.unit_params * (len(plan.sites[name].kept) if name in plan.sites else site.units)
            for name, site in sites_left(some, plan.blocks).items()
        )
        found[kind] = 1 - left / sum(site.params for site in some.values())
    return found


def line_of(row: dict[str, Any]) -> str:
    """Return a row in one line."""
    shown = ", ".join(f"{name} {text['perplexity']:.2f}" for name, text in row["texts"].items())
    choices = row["choices"]
    accuracy = "" if choices is None else f", questions {100 * choices['accuracy']:.1f} %"
    return (
        f"{row['model']} {row['method']}, remove {row['ratio']:g}, seed {row['seed']}: {shown}; "
        f"summary {row['summary']:.3f}{accuracy}, equal tokens "
        f"{row['continuation']['equal_tokens']:.2f}, {row['seconds']['spent']:.0f} s"
    )


def estimate(record: Record, options: argparse.Namespace, methods: list[str]) -> str:
    """Return how long the rows take that are missing, by what rows like them took."""
    missing, seconds = 0, 0.0
    for model in options.models:
        rows = [row for row in record.rows if row["model"] == Path(model).name]
        for seed in options.seeds:
            for ratio in options.ratios:
                for method in methods:
                    place = {"method": method, "ratio": ratio, "seed": seed}
                    if not any(place.items() <= row.items() for row in rows):
                        missing += 1
                        seconds += _expected(rows, method)
    return f"{missing} rows to measure: about {seconds / 60:.0f} minutes of one core"


def _expected(rows: list[dict[str, Any]], method: str) -> float:
    known = [row["seconds"] for row in rows if row["method"] == method]
    like = [seconds["spent"] for seconds in known if "spent" in seconds]
    if like:
        return sum(like) / len(like)
    if is_layerwise(method):
        return SECONDS["layerwise"]
    return SECONDS["curve" if method.startswith("liar") or "+curve+" in method else "other"]


def write(record: Record, out: Path) -> None:
    """Write the tables and the picture."""
    write_whole(out / "quality.md", markdown(record.rows))
    plot(record.rows, out / "quality.png")


def _sources() -> list[str]:
    """Return the package's sources, which made the rows."""
    root = Path(liar_ext.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))]
