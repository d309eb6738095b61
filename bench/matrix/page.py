"""The matrix as Markdown: ticks for the README, every number and reason for its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from make_folders import FAMILIES, LAYERS
from measures import script

START, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
CONSUMERS = (
    "transformers",
    "transformers, code of the folder",
    "second save",
    "vLLM",
    "llama.cpp",
    "ONNX Runtime",
    "sentence-transformers",
    "llm-compressor W4A16",
    "llm-compressor W8A8",
    "lm-eval",
    "peft",
)


def compact(rows: dict[str, dict[str, Any]]) -> str:
    """Return a row for each consumer, a column for each family."""
    lines = [f"| | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
    for consumer in CONSUMERS:
        cells = [
            _short([rows.get(key(consumer, family, layers)) for layers in LAYERS])
            for family in FAMILIES
        ]
        lines.append(f"| {consumer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def key(consumer: str, family: str, layers: str) -> str:
    """Return the name of a cell."""
    return f"{consumer} / {family} / {layers}"


def _short(rows: list[dict[str, Any] | None]) -> str:
    """Return a tick for what ran and agrees, a dash for what is refused, of all kinds of layers."""
    states = [row["state"] if row else "not run" for row in rows]
    if "not run" in states or "bad" in states:
        return "**fails**" if "bad" in states else "not run"
    good = [layers for layers, state in zip(LAYERS, states, strict=True) if state == "good"]
    if len(good) in (0, len(states)):
        return "✓" if good else "–"
    return f"✓ {', '.join(good)}"


def _number(row: dict[str, Any]) -> str:
    number = row["number"].replace("0e+00", "0").replace("e-0", "e-")
    return re.sub(r"\d(\.\d+)?e\+\d+", lambda found: f"{float(found[0]):,.0f}", number)


def full(rows: dict[str, dict[str, Any]]) -> str:
    """Return a table for each family, the reasons below it, and the versions."""
    lines: list[str] = []
    for family, model in FAMILIES.items():
        reasons: list[str] = []
        lines += [f"### {family}: {model}", "", f"| | {' | '.join(LAYERS)} |"]
        lines += ["|---|" + "---|" * len(LAYERS)]
        for consumer in CONSUMERS:
            cells = [_long(rows.get(key(consumer, family, each)), reasons) for each in LAYERS]
            lines.append(f"| {consumer} | {' | '.join(cells)} |")
        lines += ["", *(f"{at}. {reason}" for at, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines + _versions(rows))


def _long(row: dict[str, Any] | None, reasons: list[str]) -> str:
    if row is None:
        return "not run"
    if row["state"] == "good":
        return _number(row)
    said = row["reason"].replace("|", "/")
    if said not in reasons:
        reasons.append(said)
    words = {"cannot": "no", "not run": "not run", "bad": f"**{row.get('number') or 'fails'}**"}
    return f"{words[row['state']]} ({reasons.index(said) + 1})"


def _versions(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the versions that were run, with the consumers of each environment."""
    lines = ["### Versions", "", "| packages | date | run |", "|---|---|---|"]
    environments: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for consumer in CONSUMERS:
        for name, row in rows.items():
            if name.startswith(f"{consumer} / ") and row.get("versions"):
                packages = tuple(sorted(f"{n} {v}" for n, v in row["versions"].items()))
                environments.setdefault(packages, []).append({**row, "consumer": consumer})
    for packages, of in environments.items():
        consumers = list(dict.fromkeys(row["consumer"] for row in of))
        dates = sorted({row["date"] for row in of})
        cells = [", ".join(packages), ", ".join(dates), ", ".join(consumers)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def write(page: Path, table: str) -> None:
    """Replace what is between the marks of a page."""
    placed = script("bench/common.py").placed
    text = placed(page.read_text(encoding="utf-8"), table.rstrip("\n"), START, END)
    page.write_text(text, encoding="utf-8")
