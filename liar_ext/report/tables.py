"""The one model of a table, its forms as text, Markdown and HTML, and numbers as people read them.

The numbers may have been read from a file: one that is missing is shown as "–".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from liar_ext.system.errors import printable

MOST_ROWS = 512  # of a table in HTML
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MEASURES = {  # of the whole model on held-out inputs, and what they are
    "perplexity": "perplexity",
    "cosine": "cosine with the dense embeddings",
    "neighbours": "shared part of the ten nearest neighbours",
    "agreement": "agreement with the dense predictions",
    "correlation": "correlation with the dense scores",
    "divergence": "divergence from the dense predictions",
}


@dataclass(frozen=True)
class Table:
    """A table whose cells are text already."""

    title: str
    columns: Sequence[str]  # heads; all empty for a table of names and values
    rows: Sequence[Sequence[str]]  # cells, as many in each row as there are columns
    text_columns: Sequence[int] = (0,)  # aligned left; the others hold numbers
    note: str = ""  # sentences that stand before it


def to_text(table: Table) -> list[str]:
    """Return the lines of a table in columns of equal width, without title and notes."""
    rows = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if at in table.text_columns else ">" for at in range(len(widths))]
    return ["  ".join(map("{:{}{}}".format, row, sides, widths)).rstrip() for row in rows]


def to_markdown(table: Table) -> list[str]:
    """Return the lines of a table with its note, without its title."""
    rule = ["---" if at in table.text_columns else "---:" for at in range(len(table.columns))]
    rows = [table.columns, rule, *table.rows]
    lines = [f"| {' | '.join(map(in_markdown, row))} |" for row in rows]
    return [in_markdown(table.note), "", *lines] if table.note else lines


def render(template: str, **parts: Any) -> str:
    """Return a template of this folder; one of HTML escapes all parts but SVG of our own."""
    return TEMPLATES.get_template(template).render(**parts)


def in_markdown(value: str) -> str:
    """Return text that is no markup of Markdown's or HTML's, on one line."""
    line = " ".join(value.split()).replace("[", "&#91;")
    return line.replace("<", "&lt;").replace("|", "&#124;")


def plain(value: str) -> str:
    """Return text of a stranger as one line of Markdown that shows it as it is."""
    line = printable(" ".join(value.split()))
    return re.sub(r"([\\`&#|\[\]])", r"\\\1", line).replace("<", "&lt;")


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
)
TEMPLATES.globals["most_rows"] = MOST_ROWS
TEMPLATES.filters |= {
    "code": lambda value: Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(value)))),
    "in_markdown": in_markdown,
    "plain": plain,
    "table": lambda table: "\n".join(to_markdown(table)),
}


def figure(value: float | None, form: str = ".3g") -> str:
    """Return a number as a person reads it, "–" for None."""
    return "–" if value is None else format(value, form)


def quality(value: float | None) -> str:
    """Return a perplexity, or another of the measures, as text."""
    return figure(value, ".2f" if value is not None and 1 < value < 1e4 else ".4g")


def rate(value: float | None) -> str:
    """Return a rate to four digits, without an exponent."""
    return figure(value, ",.0f" if value is not None and value >= 1000 else ".4g")


def ratio(before: float | None, after: float | None) -> str:
    """Return ``after / before`` as text, "" where that is no number."""
    return f"{after / before:.3f}" if before and after is not None else ""


def arrow(form: str, before: float | None, after: float | None) -> str:
    """Return two numbers with an arrow between them."""
    return f"{figure(before, form)} → {figure(after, form)}"


def pair(before: int | None, after: int | None) -> str:
    """Return a count before and after, once if it is the same."""
    return figure(before, ",") if before == after else arrow(",", before, after)


def magnitude(value: float) -> str:
    """Return a count in millions or billions, as models are named by."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}\u00a0{word}"
    return f"{value:,}"


def megabytes(params: float, dtype: str) -> str:
    """Return how large so many weights are, in units of 10⁶ bytes."""
    return f"{params * BYTES[dtype] / 1e6:,.1f}\u00a0MB"


def cost(evaluation: Mapping) -> str:
    """Return what pruning cost in quality, in a few words; "" if it was not measured."""
    for name, before, after in measures(evaluation):
        if name == "perplexity":
            change = after / before - 1
            return f"perplexity {abs(change):,.0%} {'lower' if change < 0 else 'higher'}"
        return f"{name} {figure(after)}"
    certified = evaluation.get("certified")
    return f"divergence {figure(certified['divergence'])}" if certified else ""


def measured(found: Mapping[str, float]) -> dict[str, float]:
    """Return the measures among some numbers of a model."""
    return {name: found[name] for name in MEASURES if name in found}


def measured_on(found: Mapping[str, float]) -> str:
    """Return what a measure was measured on."""
    if "perplexity" not in found and "sequences" in found:
        longest = f" of at most {found['seq_len']} tokens" if "seq_len" in found else ""
        return f"{found['sequences']:,} inputs{longest}"
    if "tokens" not in found or "seq_len" not in found:
        return "text of unknown length"
    return f"{found['tokens']:,} tokens in windows of {found['seq_len']}"


def measures(evaluation: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """Return the names of what was measured of both models, with the dense and pruned numbers."""
    dense, pruned = (measured(evaluation.get(of, {})) for of in ("dense", "pruned"))
    return [(name, dense[name], pruned[name]) for name in dense if name in pruned]
