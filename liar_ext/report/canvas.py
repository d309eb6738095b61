"""What pictures are drawn on: sizes, colours and fonts, and how they become SVG or PNG.

Colours of an SVG are variables of the page's style, so that one picture serves light and dark.
Pictures are as wide as a phone, with text that can be read there.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from liar_ext.errors import InputError, one_line

# On white, and what the page's style calls it.
COLOURS = {
    "ink": "#1f2933",
    "faint": "#7b8794",
    "grid": "#e4e7eb",
    "pale": "#cbd2d9",
    "blue": "#2b6cb0",
    "orange": "#c05621",
    "green": "#2f855a",
}
PNG_MARK = {"Software": "liar_ext"}
WIDTH = 5.0  # inches; 360 points, which a phone shows at about their size
FONT = 11.0  # points
SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a "$" in a name is a "$"
    "text.usetex": False,
    "axes.unicode_minus": True,
    "font.family": "sans-serif",
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT - 1,
    "ytick.labelsize": FONT - 1,
    "legend.fontsize": FONT - 1,
    "axes.edgecolor": COLOURS["faint"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["faint"],
    "ytick.color": COLOURS["faint"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@contextmanager
def drawing(operation: str) -> Iterator[Any]:
    """Give the class of figures, with the settings of this module, and leave none behind.

    Raises
    ------
    InputError
        If matplotlib isn't there.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except Exception as error:  # a broken package raises anything
        raise InputError(
            f"{operation}: pictures need matplotlib ({one_line(error, 160)}): pip install "
            "'liar_ext[report]'"
        ) from error
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            yield Figure


def decades(limits: tuple[float, float]) -> tuple[float, float]:
    """Return limits widened to powers of ten, so that two of them at least have their ticks."""
    low, high = (math.log10(limit) for limit in limits)
    return 10.0 ** math.floor(low), 10.0 ** math.ceil(high)


def to_svg(figure: Any, name: str) -> str:
    """Return a figure as an ``<svg>`` element that follows the style of the page around it.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Drawn within :func:`drawing`.
    name : str
        Of our own; identifiers in the picture are made from it, so that several share a page.
    """
    import matplotlib

    output = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(output, format="svg", transparent=True, metadata=empty)
    picture = output.getvalue()
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<(metadata|style)\b.*?</\1>", "", picture, flags=re.DOTALL)
    picture = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", picture, count=1)
    picture = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", picture, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', picture))
    return re.sub(r"<[^!>][^>]*>", lambda tag: _restyled(tag[0], used), picture)


def is_png(path: Any) -> bool:
    """Tell whether a file is a picture that :func:`to_png` wrote."""
    with open(path, "rb") as file:
        return b"Software\0liar_ext" in file.read(1000)


def to_png(figure: Any, path: Any) -> None:
    """Write a figure as PNG, on white, with :data:`PNG_MARK` near its beginning."""
    figure.savefig(path, format="png", dpi=200, facecolor="white", metadata=PNG_MARK)


def _restyled(tag: str, used: set[str]) -> str:
    """Return a tag of an SVG with the page's colours and fonts, without names nobody refers to."""
    tag = re.sub(r' id="([^"]*)"', lambda name: name[0] if name[1] in used else "", tag)
    style = re.search(r'style="([^"]*)"', tag)
    if style is None:
        return tag
    said = style[1]
    for name, colour in COLOURS.items():
        said = said.replace(colour, f"var(--{name})")
    said = re.sub(r"font-family:[^;]*;?|(font: [\d.]+px)[^;]*", r"\1", said)
    said = re.sub(r"font: ([\d.]+px)", r"font-size: \1", said)
    return tag.replace(style[0], f'style="{said}"')
