"""Tables of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bench import common
from bench.quality import peers
from bench.quality.methods import DENSE, OTHERS, is_layerwise

Rows = Sequence[dict[str, Any]]


def markdown(rows: Rows) -> str:
    """Return the tables: by model and what it was calibrated on, a summary and one per text."""
    lines = ["# Quality", ""]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] != DENSE:
            key = (row["model"], tuple(row["calibration"]), row["calibration_tokens"])
            groups.setdefault((*key, row["judged_digest"]), []).append(row)
    for (model, calibration, tokens, judged), some in groups.items():
        dense = [
            row for row in rows
            if (row["method"], row["model"], row["judged_digest"]) == (DENSE, model, judged)
        ]  # fmt: skip
        lines += [f"## {model}, calibrated on {tokens:,} tokens of {', '.join(calibration)}", ""]
        lines += group(some, dense[-1] if dense else None)
    if any(row["model"] == peers.MODEL for row in rows):
        lines += ["## Peers' own code", "", *peers.markdown(), ""]
    return "\n".join(lines)


def group(rows: Rows, dense: dict[str, Any] | None) -> list[str]:
    """Return the tables of one model and calibration set."""
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    judged = rows[0]["judged"]
    lines = [
        f"Seeds {seeds}: perplexities are geometric means over them, other figures means. Models "
        f"are judged in {judged['dtype']}, in windows of {judged['seq_len']} tokens. Columns: "
        "fraction removed of the parameters of attention and MLP.",
        "",
        "Mean over the texts of log(perplexity / dense), less is better:",
        "",
        *table(rows, lambda some: f"{mean(row['summary'] for row in some):.3f}"),
        "",
    ]
    if rows[0]["choices"]:
        count = rows[0]["choices"]["questions"]
        of_dense = dense and 100 * dense["choices"]["accuracy"]
        lines += [
            f"Accuracy in per cent on {count} questions{_dense(of_dense, '.1f')}; one standard "
            f"error is {100 * math.sqrt(0.25 / count):.1f} at most:",
            "",
            *table(rows, lambda s: f"{100 * mean(row['choices']['accuracy'] for row in s):.1f}"),
            "",
        ]
    lines += [
        f"Greedy continuations of {judged['prompts']} prompts: tokens of 32 until the first that "
        "the dense model would not have written (KL along the dense model's continuation):",
        "",
        *table(rows, _continuation),
        "",
    ]
    for text in rows[0]["texts"]:
        lines += [*of_text(rows, text), ""]
    lines += ["Removed of attention and of MLP, in per cent:", "", *table(rows, _removed), ""]
    return [*lines, *labels(rows)]


def of_text(rows: Rows, text: str) -> list[str]:
    """Return the table of a text, with the gaps beside others."""
    here = rows[0]["texts"][text]
    bits = here["bits_per_byte"] * math.log(here["dense"]) / math.log(here["perplexity"])
    lines = [
        f"{text}, {here['tokens']:,} tokens: perplexity, bits per byte (KL to the dense model in "
        f"nats per token). Dense {here['dense']:.2f}, {bits:.3f}.",
        "",
        *table(rows, lambda some: _of_text(some, text)),
    ]
    for method in (name for name in methods_of(rows) if name not in OTHERS):
        rivals = [
            name
            for name in methods_of(rows)
            if name in OTHERS and (is_layerwise(method) or not is_layerwise(name))
        ]
        ratios = ratios_of(rows)
        ours = [_gap(rows, method, ratio, text) for ratio in ratios]
        others = {
            "best gap of our configurations of others": [
                _least_gap(rows, rivals, ratio, text) for ratio in ratios
            ],
            "best gap of a peer's own code, calibrated on WikiText-2": [
                _peer_gap(rows, ratio, text) for ratio in ratios
            ],
        }
        for title, gaps in others.items():
            shares = [
                f"{own / gap:.2f}" if gap > 0 and not math.isnan(own) else ""
                for own, gap in zip(ours, gaps, strict=True)
            ]
            if any(shares):
                lines.append(f"| gap of `{method}` / {title} | " + " | ".join(shares) + " |")
    return lines


def labels(rows: Rows) -> list[str]:
    """Say which rows are configurations of ours after what others publish."""
    named = [f"`{name}`: {OTHERS[name]}" for name in methods_of(rows) if name in OTHERS]
    if not named:
        return []
    return [f"Configurations of ours, in this package's code: {'; '.join(named)}.", ""]


def table(rows: Rows, cell: Callable[[Rows], str]) -> list[str]:
    """Return a table, methods down and fractions removed across."""
    ratios, lines = ratios_of(rows), []
    for method in methods_of(rows):
        own = " (configuration of ours)" if method in OTHERS else ""
        found = (matching(rows, method, ratio) for ratio in ratios)
        lines.append([f"`{method}`{own}", *(cell(some) if some else "" for some in found)])
    return common.table(["method", *(f"{ratio:g}" for ratio in ratios)], lines).splitlines()


def matching(rows: Rows, method: str, ratio: float) -> list[dict[str, Any]]:
    """Return the rows of a method and a fraction: the last one of each seed."""
    found = [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
    return list({row["seed"]: row for row in found}.values())


def methods_of(rows: Rows) -> list[str]:
    """Return the methods, each once."""
    return list(dict.fromkeys(row["method"] for row in rows))


def ratios_of(rows: Rows) -> list[float]:
    """Return the fractions removed, each once, ascending."""
    return sorted({row["ratio"] for row in rows})


def mean(values: Any) -> float:
    """Return the mean."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _dense(value: float | None, form: str) -> str:
    return "" if value is None else f" (dense {value:{form}})"


def _removed(rows: Rows) -> str:
    attn, mlp = (100 * mean(row["removed"][kind] for row in rows) for kind in ("attn", "mlp"))
    return f"{attn:.1f}, {mlp:.1f}"


def _continuation(rows: Rows) -> str:
    equal = mean(row["continuation"]["equal_tokens"] for row in rows)
    return f"{equal:.2f} ({mean(row['continuation']['kl'] for row in rows):.3f})"


def _of_text(rows: Rows, text: str) -> str:
    found = [row["texts"][text] for row in rows]
    perplexity = math.exp(mean(math.log(each["perplexity"]) for each in found))
    bits, kl = mean(e["bits_per_byte"] for e in found), mean(e["kl"] for e in found)
    return f"{perplexity:.2f}, {bits:.3f} ({kl:.3f})"


def _gap(rows: Rows, method: str, ratio: float, text: str) -> float:
    return mean(row["texts"][text]["log_ratio"] for row in matching(rows, method, ratio))


def _least_gap(rows: Rows, methods: Sequence[str], ratio: float, text: str) -> float:
    gaps = [_gap(rows, name, ratio, text) for name in methods]
    return min((gap for gap in gaps if not math.isnan(gap)), default=math.nan)


def _peer_gap(rows: Rows, ratio: float, text: str) -> float:
    found = peers.best(rows[0]["model"], text, ratio, rows[0]["texts"][text]["dense"])
    return math.nan if found is None else found[1]
