"""A plan by seconds beside those by parameters and by blocks that are as fast: speed, perplexity.

For each phase, the units of two plans are chosen by the same scores, error curves and
sensitivities. The first is given the fraction `1 / SPEEDUP` of the dense seconds. The second is the
largest fraction of the prunable parameters that, by the same table of seconds, takes no longer. The
third keeps as many whole blocks as take no longer, and all of their units. All are solved layer by
layer, saved, loaded again, and timed beside the dense model in turns. With one thread times are of
the processor, so that other jobs of the machine don't count. Writes latency.json and latency.md,
after every phase; phases that are there are kept.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common import calibrated_on, read_rows, table, text_parser, windows_of, write_json
from torch import Tensor, nn

from liar_ext import Budget, Plan, allocate, apply_plan, calibrate, perplexity, score, sites
from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import probe_batches
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.job.state import Speed
from liar_ext.measure.latency import ratios
from liar_ext.models.residual_stream import Weights
from liar_ext.models.sites import Site
from liar_ext.reconstruction.layerwise import reconstruct_layerwise
from liar_ext.reconstruction.solve import with_bias
from liar_ext.selection.costs import Costs
from liar_ext.selection.error_curves import (
    energy_shares,
    error_curves,
    losses_of,
    probe_sites,
    sensitivities_of,
)
from liar_ext.selection.sensitivity import site_divergences
from liar_ext.selection.whole_blocks import choose_blocks

ROUNDS = 15


def main() -> None:
    """Measure phase by phase."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "latency.json"
    rows = read_rows(record)
    todo = [each for each in options.phases if each not in {row["phase"] for row in rows}]
    if todo:
        model, tokenizer = load_model(options.model)
        batches = calibrated_on(options, tokenizer).batches()
        texts = {
            Path(name).stem: windows_of(name, tokenizer, 512, options.eval_samples).batches()
            for name in options.eval
        }
        job = Job(model, tokenizer, batches, texts, options)
        for phase in todo:
            rows += job.measure(phase)
            write_json(record, rows)
    (options.out / "latency.md").write_text(markdown(rows))
    print(markdown(rows))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = text_parser(__doc__, samples=64, seq_len=512)
    add = parser.add_argument
    add("--eval", nargs="+", required=True)
    add("--phases", nargs="+", choices=("prefill", "decode", "both"), default=["prefill", "decode"])
    add("--speedup", type=float, default=1.25)
    add("--eval-samples", type=int, default=None)
    add("--out", type=Path, default=Path("out/latency"))
    return parser.parse_args()


class Job:
    """What both plans of all phases are made of."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: object,
        batches: Sequence[Mapping[str, Tensor]],
        texts: Mapping[str, Sequence[Mapping[str, Tensor]]],
        options: argparse.Namespace,
    ) -> None:
        self.model, self.tokenizer, self.texts, self.options = model, tokenizer, texts, options
        self.batches = batches
        self.at: list[Site] = sites(model)
        self.bank: MomentBank = calibrate(model, batches, self.at)
        self.scores = score(model, self.bank, self.at, "wifv")
        given = model, self.bank, self.at
        curves, budget = error_curves(*given, self.scores), Budget(1 / options.speedup)
        probes = probe_sites(*given, self.scores, curves, budget)
        text = probe_batches(batches)
        measured = site_divergences(model, text, probes.plan, probes.weights)
        sensitivities = sensitivities_of(probes.errors, measured)
        self.losses = losses_of(curves, sensitivities, energy_shares(*given))
        self.dense = {name: perplexity(model, some)["perplexity"] for name, some in texts.items()}

    def measure(self, phase: str) -> list[dict[str, object]]:
        """Return a row for each plan."""
        budget = Budget(1 / self.options.speedup, "latency", latency_phase=phase)
        start = time.process_time()
        speed = Speed(self.model, self.at, budget)
        costs = speed.settle(lambda costs: self.allocate(budget, costs))
        seconds = time.process_time() - start
        plans = {"seconds": self.allocate(budget, costs)}
        plans["parameters"] = self.as_fast(costs, costs.kept_fraction(plans["seconds"]))
        loaded, predicted, spent = {"dense": self.model}, {}, {}
        for name, plan in plans.items():
            clock = time.process_time()
            plan = plans[name] = with_bias(plan, self.model, "auto")
            weights, _ = reconstruct_layerwise(self.model, self.batches, plan)
            spent[name] = time.process_time() - clock
            loaded[name] = self.written(f"{phase}-{name}", plan, weights)
            predicted[name] = costs.kept_fraction(plan)
        clock, fixed = time.process_time(), speed.table.fixed
        count = len({site.block for site in self.at})
        share = (predicted["seconds"] * costs.total - fixed) / (costs.total - fixed)
        blocks = choose_blocks(self.model, self.batches, share)
        plans["blocks"] = replace(plans["seconds"], sites={}, blocks=blocks.plan)
        spent["blocks"] = time.process_time() - clock
        loaded["blocks"] = self.written(f"{phase}-blocks", plans["blocks"], blocks.weights)
        left = len(blocks.plan.kept) / count * (costs.total - fixed)
        predicted["blocks"] = (fixed + left) / costs.total
        found = ratios(loaded, budget, rounds=ROUNDS)
        total = sum(site.params for site in self.at)
        return [
            {
                "phase": phase,
                "budget": name,
                "kept_parameters": kept(self.at, plan) / total,
                "kept_attention": part(self.at, plan, "attn"),
                "kept_mlp": part(self.at, plan, "mlp"),
                "predicted": 1 / predicted[name],
                "measured": [1 / found[name].median, 1 / found[name].high, 1 / found[name].low],
                "perplexity": {
                    text: [self.dense[text], perplexity(loaded[name], some)["perplexity"]]
                    for text, some in self.texts.items()
                },
                "dense_seconds": costs.total,
                "outside_of_sites": speed.table.fixed / costs.total,
                "seconds_to_measure": seconds,
                "seconds_to_solve": spent[name],
                "table": speed.table.to_dict(),
            }
            for name, plan in plans.items()
        ]

    def written(self, name: str, plan: Plan, weights: Weights) -> nn.Module:
        """Return the model of a plan as it is loaded from its folder."""
        pruned, folder = copy.deepcopy(self.model), self.options.out / name
        apply_plan(pruned, plan, weights)
        save_pruned(pruned, folder, plan, tokenizer=self.tokenizer, overwrite=True)
        return load_model(folder)[0]

    def allocate(self, budget: Budget, costs: Costs | None = None) -> Plan:
        """Return the plan of least predicted divergence."""
        how = {"model_type": self.model.config.model_type, "losses": self.losses, "costs": costs}
        return allocate(self.at, self.scores, budget, "curve", **how)

    def as_fast(self, costs: Costs, fraction: float) -> Plan:
        """Return the plan of most parameters that takes at most a fraction of the dense seconds."""
        low, high = 0.2, 1.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            fits = costs.kept_fraction(self.allocate(Budget(middle))) <= fraction
            low, high = (middle, high) if fits else (low, middle)
        return self.allocate(Budget(low))


def kept(at: Sequence[Site], plan: Plan) -> int:
    """Return the parameters that the sites keep."""
    if plan.blocks is not None:
        return sum(site.params for site in at if site.block in plan.blocks.kept)
    return sum(site.unit_params * len(plan.sites[site.name].kept) for site in at)


def part(at: Sequence[Site], plan: Plan, kind: str) -> float:
    """Return the fraction of the parameters of a kind of site that stays."""
    some = [site for site in at if site.kind == kind]
    return kept(some, plan) / sum(site.params for site in some)


def markdown(rows: Sequence[Mapping]) -> str:
    """Return the rows as a table."""
    texts = list(rows[0]["perplexity"])
    columns = ["phase", "budget", "predicted", "measured (quartiles)"]
    columns += ["parameters kept: all, attention, MLP"]
    columns += [f"perplexity, {text} (dense)" for text in texts]
    cells = []
    for row in rows:
        median, low, high = row["measured"]
        judged = [
            f"{row['perplexity'][text][1]:.2f} ({row['perplexity'][text][0]:.2f})" for text in texts
        ]
        sizes = ", ".join(
            f"{row[f'kept_{kind}']:.3f}" for kind in ("parameters", "attention", "mlp")
        )
        measured = f"×{median:.3f} ({low:.3f}–{high:.3f})"
        predicted = f"×{row['predicted']:.3f}"
        cells.append([row["phase"], row["budget"], predicted, measured, sizes, *judged])
    outside = {row["phase"]: f"{row['outside_of_sites']:.1%} of {row['phase']}" for row in rows}
    return f"{table(columns, cells)}\n\nOutside of the sites: {', '.join(outside.values())}.\n"


if __name__ == "__main__":
    main()
