"""What healing gains, and whether the start matters: prune by three methods, heal each, compare.

    make healing WIKITEXT=FOLDER QUESTIONS=FILE HEALING="--rows START:KEEP:TOKENS[:PART] ..."

Judged as by bench.quality, on its four texts and in bfloat16; models are pruned in float32, and
healed as `liar heal` does by default. PART is the part of the tokens that the dense model writes,
and the rest is more of the text that was calibrated on. Pruned folders and rows are kept in
out/healing by model and seed, and a row that is there is not measured again; docs/data has the
tables, healing.json and healing_rivals.json of SmolLM2, healing_gemma.json of Gemma, and those of
seeds but 0. Seconds are CPU seconds of one thread, and those of healing include the writing.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import read_rows, write_json
from bench.quality.continuation import greedy
from bench.quality.judging import Judges
from bench.quality.models import load
from bench.quality.texts import Texts, choose_texts, write_texts
from liar_ext import (
    MomentBank,
    Recipe,
    apply_plan,
    calibrate,
    heal,
    load_pruned,
    prune,
    save_pruned,
)
from liar_ext.calibration.batches import Sequences
from liar_ext.calibration.generated import (
    count_beside,
    fraction_of,
    of_no_text,
    random_sequences,
    write_sequences,
)

ROOT = Path(__file__).parents[1]
OUT, DATA = ROOT / "out" / "healing", ROOT / "docs" / "data"
MODEL = "SmolLM2-135M-Instruct"  # whose tables have no model in their names
# What each start is, as keywords of prune(), and how it is shown.
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "liar": ("`liar`", {}),
    "fast": ("`--preset fast`", {"preset": "fast"}),
    "flap": ("`--preset flap`", {"preset": "flap"}),
    # What others do with the same units; of keep 1, with the dense model.
    "plan": ("units of `liar`, no compensation", {}),
    "lora": ("LoRA on next tokens", {}),
}
RIVALS = ("plan", "lora")
ROWS = [
    f"{start}:{keep}:{tokens}"
    for keep in ("0.8", "0.5")
    for tokens in (0, 20_000, 100_000)
    for start in ("liar", "fast", "flap")
    if start == "liar" or (tokens < 100_000 and keep == "0.8")
]
ROWS += ["plan:0.8:0", "plan:0.8:20000", "lora:0.8:30000", "lora:1:30000"]
SEQ_LEN = 256
CALIBRATED, TRAINED, JUDGING = 64, 240, 4  # sequences; more are drawn for more tokens than these
# Windows of each text that is judged by, prompts to continue, and questions.
JUDGED = {"seq_len": SEQ_LEN, "eval_samples": 8, "prompts": 32, "question_count": 500}
WRITTEN, PHRASE = 64, 4  # tokens of a continuation in which repeated phrases are counted
# As LLM-Pruner (arXiv 2305.11627) trains; with its learning rate of 1e-4 so few steps do nothing.
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
LORA_RATE, STEP = 1e-3, 2  # sequences of a step, as `liar heal` has them


def main() -> None:
    """Measure what is missing, and write the table after each row."""
    options = parse()
    bench = Bench(options.wikitext, options.questions, options.model, options.seed)
    for name in options.rows:
        start, keep, tokens, part = (*name.split(":"), "0")[:4]
        wanted = {"start": start, "keep": float(keep), "tokens": int(tokens)}
        wanted |= {"written": float(part), "lr": options.lr if int(tokens) else None}
        if bench.find(wanted) is None:
            print(json.dumps(bench.measure(**wanted)), flush=True)
        write(bench)


class Bench:
    """A dense model, its texts, and the rows so far."""

    def __init__(self, wikitext: Path, questions: Path, model: str, seed: int) -> None:
        write_texts(OUT / "texts")
        texts = Texts(*choose_texts(OUT / "texts", ["encyclopaedia", "news"], [], wikitext))
        self.dense, self.tokenizer, self.model = load(model)
        self.seed, self.out = seed, OUT / (self.model + f"-seed-{seed}" * (seed > 0))
        self.out.mkdir(exist_ok=True)
        self.texts = texts
        self.drawn = self.draw(TRAINED)
        how = argparse.Namespace(**JUDGED, questions=questions, eval_dtype="bfloat16")
        self.judges = Judges.read(how, texts, self.tokenizer)
        self.judges.start(copy.deepcopy(self.dense))
        self.banks: dict[tuple[float, float], tuple[MomentBank, float]] = {}
        self.kept = self.out / "rows.json"
        rows = read_rows(self.kept)
        rates = [row.get("heal", {}).get("lr") for row in rows]
        self.rows = [{"written": 0.0, "lr": lr, **r} for r, lr in zip(rows, rates, strict=True)]
        if self.find({"start": "dense"}) is None:
            row = {"start": "dense", "keep": 1.0, "tokens": 0, "written": 0.0, "lr": None}
            row["seconds"] = {}
            self.add(row | self.judge(self.dense))

    def judge(self, model: nn.Module) -> dict[str, Any]:
        """Return all measures of a model, and how much of what it writes are repeated phrases."""
        cast = copy.deepcopy(model)
        found = self.judges.judge(cast)
        prompts = self.judges.prompts
        written = greedy(cast, prompts, WRITTEN)[:, prompts.shape[1] :]
        return {**found, "repeated": sum(map(repeated, written.tolist())) / len(written)}

    def draw(self, samples: int) -> Sequences:
        """Return sequences of text to calibrate and to train on, and some that judge."""
        how = {"lone": "blocks", "self_text": 0.0, "random_tokens": 0.0, "judge": JUDGING}
        how |= {"samples": samples, "seq_len": SEQ_LEN, "seed": self.seed}
        return self.texts.draw(self.dense, self.tokenizer, **how)

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row that has these values, if there is one."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row."""
        self.rows.append(row)
        write_json(self.kept, self.rows)
        return row

    def training(self, tokens: int, written: float) -> Sequences:
        """Return sequences to train on, of which the dense model writes a part."""
        samples = int(tokens * (1 - written)) // SEQ_LEN
        drawn = self.drawn if samples <= TRAINED else self.draw(samples)
        return self.written_beside(drawn, samples, written) if written else drawn

    def written_beside(self, text: Sequences, samples: int, part: float) -> Sequences:
        """Return sequences with others, a part of all, which the dense model writes."""
        how = {"count": count_beside(samples, part), "seq_len": SEQ_LEN, "seed": self.seed}
        return text.beside(write_sequences(self.dense, self.tokenizer, **how))

    def measure(
        self, start: str, keep: float, tokens: int, written: float = 0.0, lr: float | None = None
    ) -> dict[str, Any]:
        """Return a row, and keep it; a start that is missing is pruned first."""
        row: dict[str, Any] = {"start": start, "keep": keep, "tokens": tokens}
        row |= {"written": written, "lr": lr}
        if tokens:
            work, row["seconds"] = self.started(start, keep)
            clock = time.process_time()
            drawn = self.training(tokens, written)
            if start == "lora":
                work = train_lora(work, drawn, tokens, self.seed)
                row["heal"] = {"tokens": tokens}
            else:
                how = {"held_out": drawn.judging.batches(), "budget": {"tokens": tokens}, "lr": lr}
                found = heal(work, self.dense, drawn.batches(STEP), **how)
                facts = ("after", "tokens", "curve", "precision", "lr")
                row["heal"] = {name: found[name] for name in facts}
            row["seconds"]["heal"] = time.process_time() - clock
        elif start == "plan":
            pruned, row["seconds"] = self.started("liar", keep)
            work = copy.deepcopy(self.dense)
            apply_plan(work, pruned.liar_plan)
            save_pruned(work, self.out / f"plan-{keep:g}", pruned.liar_plan, overwrite=True)
        else:
            bank, before = self.bank(start)
            work, clock = copy.deepcopy(self.dense), time.process_time()
            report = prune(work, bank=bank, keep=keep, **STARTS[start][1])
            row["seconds"] = {"prune": before + time.process_time() - clock}
            folder = self.out / f"{start}-{keep:g}"
            save_pruned(work, folder, report.plan, report=report, overwrite=True)
        return self.add(row | self.judge(work))

    def started(self, start: str, keep: float) -> tuple[nn.Module, dict[str, float]]:
        """Return what is trained, and the seconds that it took; it is pruned first if missing."""
        if keep == 1.0:  # what a training gains that knows no dense model
            return copy.deepcopy(self.dense), {"prune": 0.0}
        start = "liar" if start == "lora" else start
        row = {"start": start, "keep": keep, "tokens": 0}
        row = self.find(row) or self.measure(**row)
        pruned = load_pruned(self.out / f"{start}-{keep:g}", dtype=torch.float32)
        return pruned, dict(row["seconds"])

    def bank(self, start: str) -> tuple[MomentBank, float]:
        """Return activation statistics, which jobs on the same text share, and what they took."""
        recipe = Recipe.build(**STARTS[start][1])
        beside = recipe.self_text, fraction_of(recipe.random_tokens, True, recipe.self_text > 0)
        if beside not in self.banks:
            clock = time.process_time()
            bank = calibrate(self.dense, self.calibration(*beside).batches())
            self.banks[beside] = bank, time.process_time() - clock
        return self.banks[beside]

    def calibration(self, self_text: float, random_tokens: float) -> Sequences:
        """Return some of the drawn sequences, evenly, and what a preset has beside them."""
        rows = torch.arange(CALIBRATED) * len(self.drawn) // CALIBRATED
        inputs = {name: value[rows] for name, value in self.drawn.inputs.items()}
        fold, source = self.drawn.fold[rows], self.drawn.source[rows]
        text = replace(self.drawn, inputs=inputs, fold=fold, source=source)
        if self_text:
            return self.written_beside(text, CALIBRATED, self_text)
        ids = text.input_ids.tolist()
        copies = random_sequences(ids, self.tokenizer, random_tokens, self.seed)
        return text.beside(of_no_text(torch.tensor([ids for _, ids in copies]))) if copies else text


def train_lora(model: nn.Module, drawn: Sequences, tokens: int, seed: int) -> nn.Module:
    """Return a model after LoRA on the next tokens of the text, in bfloat16, merged."""
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LORA_RATE)
    steps = tokens // (STEP * SEQ_LEN)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = torch.randperm(len(drawn)).repeat(-(-steps * STEP // len(drawn)))
    model.train()
    for chosen in rows.split(STEP)[:steps]:
        ids = drawn.input_ids[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.merge_and_unload().eval()


def repeated(ids: Sequence[int]) -> float:
    """Return the share of phrases, runs of tokens, that are further up already."""
    phrases = [tuple(ids[at : at + PHRASE]) for at in range(len(ids) - PHRASE + 1)]
    return 1 - len(set(phrases)) / len(phrases)


def percent(part: float) -> str:
    """Return a cell."""
    return f"{100 * part:.1f} %"


def write(bench: Bench) -> None:
    """Write the tables: perplexities after healing, and what others do with the same units."""
    model, seed = bench.model, bench.seed
    dense, *others = bench.rows
    whole = {name: text["perplexity"] for name, text in dense["texts"].items()}
    titles = {"wikitext-2": "WikiText-2"}
    texts = [f"{titles.get(name, name)}, dense {value:.2f}" for name, value in whole.items()]
    healed, beside, order = [], [], list(STARTS)
    rates = {row["lr"] for row in others if row["tokens"] and row["start"] != "lora"}
    others.sort(key=lambda row: (row["tokens"], row["written"], row["lr"] or 0))
    others.sort(key=lambda row: (-row["keep"], order.index(row["start"])))
    for row in others:
        found = row["texts"].values()
        seconds = [f"{row['seconds'].get(name, 0):,.0f}" for name in ("prune", "heal")]
        tokens = row["heal"]["tokens"] if row["tokens"] else 0
        title = [f"{100 * (1 - row['keep']):.0f} %", STARTS[row["start"]][0], f"{tokens:,}"]
        title[1] += f", `--lr {row['lr']:g}`" if row["lr"] and len(rates) > 1 else ""
        title[1] += f", {100 * row['written']:.0f} % of its own text" * (row["written"] > 0)
        lost = f"{row['summary']:.3f}".replace("-", "−")
        if row["start"] not in RIVALS:
            values = [f"{text['perplexity']:,.2f}" for text in found]
            right, equal = row["choices"]["accuracy"], row["continuation"]["equal_tokens"]
            more = percent(right), f"{equal:.2f}", percent(row["repeated"])
            healed.append([*title, *values, lost, *seconds, *more])
        divergence = sum(text["kl"] for text in found) / len(found)
        if model == MODEL and not seed:
            beside.append([*title, lost, f"{divergence:.3f}", seconds[1]])
    note = f"{model}, seed {seed}, {CALIBRATED} calibration sequences of {SEQ_LEN} tokens; {{}} in "
    note += f"{JUDGED['eval_samples']} windows of {SEQ_LEN} tokens of each text"
    rate = f"--lr {min(rates):g} " if len(rates) == 1 and None not in rates else ""
    note += f"; healed with {rate.strip()}" * bool(rate)
    note += "; rows with --lr take that option in HEALING" * (len(rates) > 1)
    start = ["removed", "start", "healed tokens"]
    columns = [*start, *texts, "mean gap", "CPU s to prune", "CPU s to heal"]
    right, again = percent(dense["choices"]["accuracy"]), percent(dense["repeated"])
    columns += [f"ARC-easy, dense {right}", "equal tokens of 32"]
    columns += [f"repeated phrases, dense {again}"]
    both = [*start, "mean gap", "divergence from the dense model", "CPU s to train"]
    command, own = "make healing WIKITEXT=FOLDER QUESTIONS=FILE", ""
    if model != MODEL or seed or rate:
        made = dict.fromkeys(
            f"{row['start']}:{row['keep']:g}:{row['tokens']}"
            + f":{row['written']:g}" * (row["written"] > 0)
            for row in others
        )
        named = rate + f"--model {model} " * (model != MODEL) + f"--seed {seed} " * (seed > 0)
        command += f' HEALING="{named}--rows {" ".join(made)}"'
        own = f"_{model.partition('-')[0].lower()}" * (model != MODEL)
        own += f"_seed_{seed}" * (seed > 0)
    for name, facts in (
        ("healing", {"note": note.format("perplexity"), "columns": columns, "rows": healed}),
        ("healing_rivals", {"note": note.format("means"), "columns": both, "rows": beside}),
    ):
        if facts["rows"]:
            write_json(DATA / f"{name}{own}.json", {"command": command, **facts})


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of WikiText-2")
    parser.add_argument("--questions", type=Path, required=True, help="file of ARC-easy")
    parser.add_argument("--model", default=MODEL, help="a model of bench.quality, or a folder")
    parser.add_argument("--seed", type=int, default=0, help="of text and training")
    parser.add_argument("--lr", type=float, help="learning rate of healing, if not its default")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="START:KEEP:TOKENS[:PART]")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
