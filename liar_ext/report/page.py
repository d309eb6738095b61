"""The parts that every page is made of: HTML that needs no script, no font and no other file.

Whatever is not markup of our own goes through :func:`escape`. A content policy forbids scripts and
requests, should anything slip through all the same.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

# The first line of every page, by which it may be overwritten.
MARK = "<!DOCTYPE html><!-- liar report -->\n"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f5f7fa; --line: #d9dee4;
  --ink: #1f2933; --faint: #616e7c; --grid: #e4e7eb; --pale: #cbd2d9; --blue: #2b6cb0;
  --orange: #c05621; --green: #2f855a; --warn: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --back: #14181d; --card: #1d232a; --line: #38424d;
  --ink: #e4e7eb; --faint: #9aa5b1; --grid: #2f3842; --pale: #4a5561; --blue: #63a4e8;
  --orange: #f0975a; --green: #5cc28c; --warn: #3a2f18; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p { margin: 0.5rem 0; }
.note, figcaption, footer { color: var(--faint); font-size: 0.875rem; }
.tiles { display: grid; gap: 0.75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem;
  padding: 0.75rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; }
.tile span { color: var(--faint); font-size: 0.875rem; display: block; }
.bar { height: 0.5rem; background: var(--pale); border-radius: 0.25rem; margin-top: 0.5rem; }
.bar i { display: block; height: 100%; background: var(--blue); border-radius: 0.25rem; }
.warn { background: var(--warn); border-left: 4px solid var(--orange); padding: 0.5rem 0.75rem;
  margin: 0.5rem 0; }
.pictures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; }
figure h2 { margin-top: 0.5rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 40rem;
  font-family: system-ui, "DejaVu Sans", sans-serif; stroke-linejoin: round; }
code { font-size: 0.9em; background: var(--card); padding: 0.1em 0.25em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; width: 100%; }
th, td { text-align: left; padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { min-width: 5.5rem; }
th { color: var(--faint); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal;
  min-width: 0; }
.facts td { overflow-wrap: anywhere; }
.facts td:first-child { color: var(--faint); width: 40%; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; padding: 0.4rem 0; }
@media (max-width: 30rem) { main { padding: 0.75rem; } h1 { font-size: 1.3rem; }
  th, td { padding: 0.3rem 0.35rem; } }
@media print { details > * { display: block; } }
"""


def escape(value: object) -> str:
    """Return a value as text of HTML, also within quotes."""
    return html.escape(str(value), quote=True)


def with_code(value: str) -> str:
    """Return text as HTML, what stands between backticks as code."""
    parts = escape(value).split("`")
    closed = len(parts) - 1 + len(parts) % 2  # a last backtick without its pair is itself
    inner = [f"<code>{each}</code>" if at % 2 else each for at, each in enumerate(parts[:closed])]
    return "".join(inner) + "".join(f"`{each}" for each in parts[closed:])


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page of parts that are HTML already; the title is plain text."""
    head = (
        f'{MARK}<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
    )
    return "\n".join([head, *(part for part in parts if part), "</main></body></html>"]) + "\n"


def tile(title: str, value: str, under: str = "", share: float | None = None) -> str:
    """Return a number with what it is, and a bar of the share that stays."""
    bar = ""
    if share is not None:
        bar = f'<div class="bar"><i style="width:{100 * min(max(share, 0), 1):.1f}%"></i></div>'
    return (
        f'<div class="tile"><span>{escape(title)}</span><b>{escape(value)}</b>'
        f"<span>{escape(under)}</span>{bar}</div>"
    )


def section(title: str, *parts: str, missing: str = "") -> str:
    """Return a section of parts that are HTML already; without any it says what is missing."""
    inner = "".join(parts) or f'<p class="note">Not measured. {escape(missing)}</p>'
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def picture(title: str, svg: str | None, caption: str, missing: str = "") -> str:
    """Return a figure with title and caption, or that there is none."""
    if svg is None:
        return f"<figure>{section(title, missing=missing)}</figure>"
    label = escape(f"{title}. {caption}")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return (
        f"<figure><h2>{escape(title)}</h2>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(
    heads: Sequence[str], rows: Sequence[Sequence[object]], texts: Sequence[int] = (0,)
) -> str:
    """Return a table, all columns but ``texts`` right-aligned; one that is too wide scrolls."""

    def cells(row: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if at in texts else ' class=n'}>{escape(value)}</{tag}>"
            for at, value in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells(heads, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(rows: dict[str, str]) -> str:
    """Return a table of names and values."""
    body = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def folded(title: str, inner: str) -> str:
    """Return a part that is shown when its title is pressed."""
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def warning(said: str) -> str:
    """Return a line that has to be seen."""
    return f'<p class="warn">{escape(said)}</p>'


def footer(command: str, said: str = "") -> str:
    """Return what stands below every page."""
    return (
        f'<footer><p class="note">{escape(said)} Written by liar {command}. Nothing in this page '
        "is fetched from elsewhere, and it runs no script.</p></footer>"
    )
