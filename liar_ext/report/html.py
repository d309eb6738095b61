"""HTML from the templates of this folder, which escape whatever is shown but SVG of our own."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

MOST_ROWS = 512  # of a table


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["code"] = lambda value: Markup(
        re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(value)))
    )
    environment.globals["most_rows"] = MOST_ROWS
    return environment


def render(template: str, **parts: Any) -> str:
    """Return a template of this folder as HTML, with the parts that it names."""
    return _templates().get_template(f"{template}.html").render(**parts)
