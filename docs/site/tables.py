"""Marks tables of prose, which a phone shows as a list, and names the column of each cell."""

import re
from itertools import count

MOST_CHARACTERS = 40  # of a cell in a table that stays one


def plain(cell: str) -> str:
    """Return the text of a cell, as an attribute may hold it."""
    return re.sub(r"<[^>]*>", "", cell).replace('"', "&quot;").strip()


def marked(table: str) -> str:
    """Return a table with the names of its columns, if it has several and a cell of prose."""
    heads = [plain(cell) for cell in re.findall(r"<th\b[^>]*>(.*?)</th>", table, re.DOTALL)]
    cells = [plain(cell) for cell in re.findall(r"<td\b[^>]*>(.*?)</td>", table, re.DOTALL)]
    if len(heads) < 3 or max(map(len, cells), default=0) <= MOST_CHARACTERS:
        return table
    at = count()
    label = lambda cell: f'<td data-head="{heads[next(at) % len(heads)]}"'  # noqa: E731
    return re.sub(r"<td\b", label, table).replace("<table", "<table data-prose", 1)


def on_page_content(html: str, **_: object) -> str:
    """Mark the tables of a page; mkdocs calls it."""
    return re.sub(r"<table>.*?</table>", lambda found: marked(found[0]), html, flags=re.DOTALL)
