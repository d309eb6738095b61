"""The certificate: held-out errors as predicted from moments, and as measured on fresh text.

For several amounts of calibration text: calibrate, plan, reconstruct; then compare the held-out
error that the report of a site shows with the same site's error on text that no decision has seen,
and both with plain dropping of the same units at that site. With `--schedule layerwise` the fresh
text takes the same walk, through the weights solved before, and errors are those to the same
targets. Writes certificate.json and certificate.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from liar_ext import Budget, Plan, apply_plan, calibrate, perplexity, reconstruct, score, sites
from liar_ext.calibration.moments import Moments
from liar_ext.checkpoint import load_model
from liar_ext.data.texts import calibration_sequences, evaluation_sequences, read_documents
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site, get_consumer_weight
from liar_ext.recipe import SCHEDULES
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.reconstruction.layerwise import reconstruct_layerwise
from liar_ext.reconstruction.targets import Shortfall
from liar_ext.reconstruction.walk import Walk
from liar_ext.selection.curve_allocation import decide

PERPLEXITY_EVERY = 2  # windows of the fresh text
Weights = dict[str, tuple[Tensor, Tensor | None]]


def main() -> None:
    """Measure, and write after every row."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measure(options):
        rows.append(row)
        (options.out / "certificate.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "certificate.md").write_text(markdown(rows))
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, hub id or GGUF file")
    add("--calibration", nargs="+", required=True)
    add("--fresh", required=True, help="text of the same kind, none of it calibrated on")
    add("--samples", nargs="+", type=int, default=[2, 16, 64], help="calibration sequences")
    add("--fresh-samples", type=int, default=16)
    add("--seq-len", type=int, default=512)
    add("--keep", type=float, default=0.8)
    add("--criterion", default="obs")
    add("--allocation", default="uniform", help="curve takes the most time by far")
    add("--schedule", choices=SCHEDULES, default="one-pass")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/certificate"))
    return parser.parse_args()


def measure(options: argparse.Namespace):
    """Yield one row per amount of calibration text."""
    model, tokenizer = load_model(options.model)
    at = sites(model)
    fresh = evaluation_sequences(
        read_documents(options.fresh),
        tokenizer,
        seq_len=options.seq_len,
        samples=options.fresh_samples,
    ).batches(1)
    # The folds do not matter here: both are summed.
    folded = [{**b, "fold": torch.tensor([i % 2])} for i, b in enumerate(fresh)]
    judge = calibrate(model, folded, at)
    sources = [read_documents(source) for source in options.calibration]
    for samples in options.samples:
        batches = calibration_sequences(
            sources, tokenizer, samples=samples, seq_len=options.seq_len, seed=options.seed
        ).batches()
        start = time.process_time()
        bank = calibrate(model, batches, at)
        scores = score(model, bank, at, options.criterion, seed=options.seed)
        budget = Budget(options.keep, tile=1)  # as the rows of docs/quality.md
        plan, _ = decide(model, bank, at, scores, budget, options.allocation, batches)
        row = {
            "model": Path(options.model).name,
            "calibration": [Path(source).name for source in options.calibration],
            "fresh": Path(options.fresh).name,
            "fresh_tokens": judge.source["tokens"],
            "tokens": bank.source["tokens"],
            "seq_len": options.seq_len,
            "seed": options.seed,
            "keep": options.keep,
            "method": f"{options.criterion}+{options.allocation}, {options.schedule}",
            "seconds": time.process_time() - start,
            "sites": [],
        }
        dropped, _ = reconstruct(model, bank, plan, mode="none")
        if options.schedule == "layerwise":
            weights, reports = reconstruct_layerwise(model, batches, plan)
            found = walk_through(model, folded, plan, weights, dropped)
        else:
            weights, reports = reconstruct(model, bank, plan)
            found = {
                site.name: [
                    errors(model, site, plan, some[site.name][0], judge[site.name])
                    for some in (weights, dropped)
                ]
                for site in at
            }
        for report in reports:
            if not plan.sites[report.name].removed:
                continue
            (error, energy), (without, _) = found[report.name]
            row["sites"].append(
                {
                    "name": report.name,
                    "damp": report.damp if math.isfinite(report.damp) else "inf",
                    "predicted": report.holdout_error,
                    "measured": error / energy,
                    "dropped": without / energy,
                    "energy": energy,
                }
            )
        for name, chosen in (("reconstructed", weights), ("dropped", dropped)):
            pruned = copy.deepcopy(model)
            apply_plan(pruned, plan, chosen)
            after = perplexity(pruned, fresh[::PERPLEXITY_EVERY])
            row[f"perplexity_{name}"] = after["perplexity"]
        yield row


def errors(
    model: nn.Module,
    site: Site,
    plan: Plan,
    weight: Tensor,
    moments: Moments,
    shortfall: Shortfall | None = None,
) -> tuple[float, float]:
    """Return the error ``Σ |W' x_K − W x − r|²`` of a consumer without a bias, and ``Σ |W x|²``."""
    gram, _, _ = moments.pooled()
    gram = gram.tril() + gram.tril(-1).mT
    dense = get_consumer_weight(model, site).double()
    change = -dense.clone()
    change[:, site.features(plan.sites[site.name].kept)] += weight
    error, energy = (float(((w @ gram) * w).sum()) for w in (change, dense))
    if shortfall is not None:
        error -= float(2 * (change.mT * shortfall.cross.sum(0)).sum() - shortfall.energy.sum())
    return error, energy


class Judged(Walk):
    """A walk through weights that are given: where another one solves, this one judges."""

    def judge(self, batches: Sequence[dict], weights: Weights, dropped: Weights) -> dict:
        """Return the errors and energies by site name, with the weights and with units dropped."""
        self.given, self.dropped, self.found = weights, dropped, {}
        self.start(batches)
        for index in range(len(self.blocks)):
            self.step(index)
        return self.found

    def _solve(self, layer, target, consumers):
        (site,), (sums,) = layer, self._collect(layer, target, consumers)
        self.found[site.name] = [
            errors(self.model, site, self.plan, weights[site.name][0], sums.moments, sums.shortfall)
            for weights in (self.given, self.dropped)
        ]
        weight = self.given[site.name][0].to(self.model.dtype)
        features = site.features(self.plan.sites[site.name].kept)
        return lambda x: nn.functional.linear(x[..., features], weight)


@torch.no_grad()
def walk_through(
    model: nn.Module, batches: Sequence[dict], plan: Plan, weights: Weights, dropped: Weights
) -> dict:
    """Return what :meth:`Judged.judge` does."""
    with evaluating(model), Blocks(model, sites(model)).opened() as blocks:
        walk = Judged(model, blocks, plan, "auto", "auto", "auto", refit=False)
        return walk.judge(batches, weights, dropped)


def summary(row: dict) -> dict[str, float]:
    """Return the numbers of a row over all its sites."""
    sites = row["sites"]

    def pooled(key: str) -> float:
        return sum(site[key] * site["energy"] for site in sites) / sum(s["energy"] for s in sites)

    ratios = torch.tensor([site["measured"] / site["predicted"] for site in sites])
    return {
        "predicted": pooled("predicted"),
        "measured": pooled("measured"),
        "dropped": pooled("dropped"),
        "mean": float(ratios.log().mean().exp()),
        "within": float(((ratios - 1).abs() <= 0.1).double().mean()),
        "low": float(ratios.min()),
        "high": float(ratios.max()),
        "worse": sum(site["measured"] > site["dropped"] for site in sites),
    }


def markdown(rows: Sequence[dict]) -> str:
    """Return the table."""
    first = rows[0]
    lines = [
        f"{first['model']}, {first['method']}, keep {first['keep']}: calibrated on "
        f"{', '.join(first['calibration'])}, measured on {first['fresh_tokens']:,} tokens of "
        f"{first['fresh']}, windows of {first['seq_len']}, seed {first['seed']}. Errors relative "
        "to the energy of the outputs, pooled over sites.",
        "",
        "| calibration tokens | held-out error predicted | measured | by dropping "
        "| measured / predicted per site: mean (lowest to highest) | sites within 10 % "
        "| sites worse than dropping | perplexity | by dropping |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        s = summary(row)
        lines.append(
            f"| {row['tokens']:,} | {s['predicted']:.4f} | {s['measured']:.4f} "
            f"| {s['dropped']:.4f} | {s['mean']:.3f} ({s['low']:.2f} to {s['high']:.2f}) "
            f"| {s['within']:.0%} | {s['worse']} of {len(row['sites'])} "
            f"| {row['perplexity_reconstructed']:.2f} | {row['perplexity_dropped']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
