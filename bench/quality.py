"""Perplexity and divergence of pruned models: methods × fractions removed × seeds.

A method is written criterion+allocation+reconstruction, with `+equal` for layers of equal sizes
(which plain transformers loads), `+refine=N` for N whole plans measured after `curve`,
`+layerwise` for the layerwise schedule, and `+tile=N` for channels in multiples of N: without it
the tile is 1, whatever the default is. Some are what others publish:

    wanda+uniform+none      Wanda-sp
    wifv+global+bias        FLAP
    wanda+uniform+linear    one of GRAIL's configurations
    wifv+global+linear      another
    obs+uniform+linear      like SlimGPT; which solves layer by layer, as +layerwise does

`liar` is what `liar_ext.prune` does by default, wifv+curve+auto, at tile 1; on the models here the
default is `liar+tile=32`. `steps` are ablations of it. All methods of a seed see the same
calibration text; the texts to evaluate on share no document with it.
Writes quality.json, quality.md and quality.png. Rows that the output folder has already are kept
and not measured again. Seconds are CPU seconds of all that a method needs, calibration included.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from quality_report import OTHERS, markdown, plot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from liar_ext import Budget, Plan, Recipe, allocate, apply_plan, calibrate, score, sites
from liar_ext.calibration.moments import MomentBank
from liar_ext.checkpoint import load_model
from liar_ext.data.batches import probe_batches
from liar_ext.data.texts import calibration_sequences, evaluation_sequences, read_documents
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site, get_consumer_bias
from liar_ext.reconstruction.layerwise import reconstruct_layerwise
from liar_ext.reconstruction.one_pass import reconstruct, with_bias
from liar_ext.reconstruction.settings import form_at
from liar_ext.selection.curve_allocation import measure_losses
from liar_ext.selection.refine import check_refine, refine_plan

STEPS = (
    "wifv+uniform+linear",
    "wifv+curve+none",
    "wifv+curve+auto+equal",
    "obs+curve+auto",
    "wifv+curve+auto+layerwise",
)
KEY = ("model", "sites", "seq_len", "calibration_tokens", "seed", "ratio", "method", "text")
KL_EVERY = 4  # windows: the dense outputs of a window of 512 tokens are 100 MB of float32


def main() -> None:
    """Measure, and write after every row, so that an interrupted run keeps what it has."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "quality.json"
    rows = json.loads(record.read_text()) if record.exists() else []
    for row in measure(options, {tuple(row[key] for key in KEY) for row in rows}):
        rows.append(row)
        print(
            f"{row['method']:28} remove {row['ratio']:.2f} seed {row['seed']} {row['text']}: "
            f"perplexity {row['perplexity']:.2f}, dense {row['dense']:.2f}, KL {row['kl']:.3f}, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
        record.write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "quality.md").write_text(markdown(rows))
    plot(rows, options.out / "quality.png")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, hub id or GGUF file")
    add("--calibration", nargs="+", required=True)
    add("--eval", nargs="+", required=True, help="texts to evaluate on, the plot is of the first")
    add("--methods", nargs="+", default=["liar", *OTHERS], help="steps stands for ablations")
    add("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.5], help="fractions removed")
    add("--sites", choices=("all", "attn", "mlp"), default="all")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--samples", type=int, default=128)
    add("--eval-samples", type=int, default=None)
    add("--eval-dtype", default="float32", help="dtype that models are judged in")
    add("--seq-len", type=int, default=512)
    add("--out", type=Path, default=Path("out/quality"))
    return parser.parse_args()


@dataclass(frozen=True)
class Method:
    """How to prune."""

    criterion: str
    allocation: str
    mode: str
    equal: bool = False
    layerwise: bool = False
    refine: int = 0
    tile: int = 1

    @classmethod
    def read(cls, name: str) -> Method:
        """Return the method that a name stands for."""
        first, *words = name.split("+")
        if first == "liar":
            default = Recipe()
            first, allocation, mode = default.criterion, default.allocation, default.reconstruct
            words += ["layerwise"] * (default.schedule == "layerwise")
        else:
            allocation, mode, *words = words
        options = {key: value for key, _, value in (word.partition("=") for word in words)}
        refine = options.pop("refine", "0")
        tile = options.pop("tile", "1")
        unknown = set(options) - {"equal", "layerwise"}
        if unknown or not (refine + tile).isdigit() or any(options.values()):
            raise SystemExit(f"quality: no such option in method {name}")
        check_refine(int(refine), allocation)
        return cls(
            first,
            allocation,
            mode,
            equal="equal" in options,
            layerwise="layerwise" in options,
            refine=int(refine),
            tile=int(tile),
        )


@dataclass
class Case:
    """What all methods of one seed share, and what they have computed already."""

    model: nn.Module
    at: Sequence[Site]
    batches: Sequence[dict[str, Tensor]]
    bank: MomentBank
    seed: int
    calibrating: float
    scores: dict[tuple, tuple[dict[str, Tensor], float]] = field(default_factory=dict)
    losses: dict[tuple, tuple[dict[str, Tensor], float]] = field(default_factory=dict)

    def prune(self, method: Method, ratio: float) -> tuple[nn.Module, Plan, float]:
        """Return a pruned copy, its plan, and the seconds that the method takes by itself."""
        budget = Budget(1 - ratio, uniform_layers=method.equal, tile=method.tile)
        # As in liar_ext.prune: FLAP's allocation standardises scores of features.
        per = "feature" if method.allocation == "global" else "unit"
        scores, seconds = self._scores(method.criterion, per)
        seconds += self.calibrating
        losses = None
        if method.allocation == "curve":
            losses, more = self._losses(method, ratio)
            seconds += more
        start = time.process_time()
        plan = allocate(
            self.at,
            scores,
            budget,
            method.allocation,
            model_type=self.model.config.model_type,
            losses=losses,
        )
        plan = with_bias(plan, self.model, method.mode)
        if method.refine:
            plan, _ = refine_plan(
                self.model,
                self.bank,
                self.at,
                scores,
                budget,
                probe_batches(self.batches),
                losses,
                plan,
                rounds=method.refine,
                mode=method.mode,
            )
        if method.layerwise:
            weights, _ = reconstruct_layerwise(self.model, self.batches, plan, mode=method.mode)
        else:
            weights, _ = reconstruct(self.model, self.bank, plan, mode=method.mode)
        pruned = copy.deepcopy(self.model)
        apply_plan(pruned, plan, weights)
        return pruned, plan, seconds + time.process_time() - start

    def _scores(self, criterion: str, per: str = "unit") -> tuple[dict[str, Tensor], float]:
        if (criterion, per) not in self.scores:
            start = time.process_time()
            scores = score(self.model, self.bank, self.at, criterion, seed=self.seed, per=per)
            self.scores[criterion, per] = scores, time.process_time() - start
        return self.scores[criterion, per]

    def _losses(self, method: Method, ratio: float) -> tuple[dict[str, Tensor], float]:
        biased = any(get_consumer_bias(self.model, site) is not None for site in self.at)
        key = (method.criterion, form_at(method.mode, biased), ratio)
        if key not in self.losses:
            start = time.process_time()
            losses, _ = measure_losses(
                self.model,
                self.bank,
                self.at,
                self._scores(method.criterion)[0],
                Budget(1 - ratio),  # what is measured is the same whatever the tile is
                probe_batches(self.batches),
                mode=method.mode,
            )
            self.losses[key] = losses, time.process_time() - start
        return self.losses[key]


class HeldOut:
    """A text to judge models by, and what the dense model gives for it.

    Models are judged in ``dtype``, the dense one as well.
    """

    def __init__(
        self, dense: nn.Module, windows: Sequence[dict[str, Tensor]], dtype: torch.dtype
    ) -> None:
        self.windows, self.dtype = windows, dtype
        self.outputs: list[Tensor] = []
        self.dense = self.judge(dense)["perplexity"]

    @torch.no_grad()
    def judge(self, model: nn.Module) -> dict[str, float]:
        """Return a model's perplexity, and its divergence from the one that was judged first."""
        model = copy.deepcopy(model).to(self.dtype)
        loss, tokens, lost, rows, outputs = 0.0, 0, 0.0, 0, []
        with evaluating(model):
            for index, window in enumerate(self.windows):
                ids = window["input_ids"]
                logits = model(ids).logits[0].float().log_softmax(-1)
                loss += float(cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
                tokens += len(logits) - 1
                if index % KL_EVERY == 0:
                    outputs.append(logits)
        self.outputs = self.outputs or outputs
        for p, q in zip(self.outputs, outputs, strict=True):
            lost += float(kl_div(q, p, reduction="sum", log_target=True))
            rows += len(p)
        return {
            "tokens": tokens,
            "dense": getattr(self, "dense", math.nan),
            "perplexity": math.exp(loss / tokens),
            "kl": lost / rows,
        }


def measure(options: argparse.Namespace, known: Set[tuple]) -> Iterator[dict]:
    """Yield one row per seed, fraction, method and text, less those of a known key."""
    names = [name for wish in options.methods for name in (STEPS if wish == "steps" else (wish,))]
    methods = {name: Method.read(name) for name in names}
    model, tokenizer = load_model(options.model)
    at = sites(model, ("attn", "mlp") if options.sites == "all" else (options.sites,))
    held_out = {}
    for source in options.eval:
        windows = evaluation_sequences(
            read_documents(source),
            tokenizer,
            seq_len=options.seq_len,
            samples=options.eval_samples,
        )
        held_out[Path(source).name] = HeldOut(
            model, windows.batches(1), getattr(torch, options.eval_dtype)
        )
    sources = [read_documents(source) for source in options.calibration]
    for seed in options.seeds:
        batches = calibration_sequences(
            sources,
            tokenizer,
            samples=options.samples,
            seq_len=options.seq_len,
            seed=seed,
            lone="halves",  # as the rows of docs/quality.md were drawn
        ).batches()
        start = time.process_time()
        bank = calibrate(model, batches, at)
        case = Case(model, at, batches, bank, seed, time.process_time() - start)
        for ratio in options.ratios:
            for name, method in methods.items():
                shared = {
                    "model": Path(options.model).name,
                    "method": name,
                    "tile": method.tile,
                    "ratio": ratio,
                    "sites": options.sites,
                    "seq_len": options.seq_len,
                    "calibration": [Path(source).name for source in options.calibration],
                    "calibration_tokens": bank.source["tokens"],
                    "seed": seed,
                }
                wanted = [
                    text
                    for text in held_out
                    if tuple((shared | {"text": text})[key] for key in KEY) not in known
                ]
                if not wanted:
                    continue
                pruned, plan, seconds = case.prune(method, ratio)
                for text in wanted:
                    yield shared | {
                        "removed": removed(plan, at),
                        "text": text,
                        **held_out[text].judge(pruned),
                        "seconds": seconds,
                    }


def removed(plan: Plan, at: Sequence[Site]) -> float:
    """Return the fraction of the sites' parameters that is gone."""
    gone = sum(len(plan.sites[site.name].removed) * site.unit_params for site in at)
    return gone / sum(site.params for site in at)


if __name__ == "__main__":
    main()
