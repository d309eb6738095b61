"""Print how long the sentences of README, docs, help and docstrings are: ``make prose``.

It counts what docs should keep low and fails on nothing. Tables and code are no prose.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from liar_ext.cli.main import parser

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)(```|~~~).*?^ *\2 *$|<!--.*?-->|^\$\$.*?\$\$$", re.DOTALL | re.MULTILINE)
END = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?][\"')\]*_]*\s+")
ITEM = re.compile(r"^ *(?:[-*+]|\d+\.) +")
NUMBER = re.compile(r"(?<![\w.])[\d][\d.,]*")
LONG, LONGER, MANY, WIDE = 25, 30, 12, 5


def paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs and list items of Markdown, code as one word, links as their text."""
    text = FENCE.sub("\n\n", text)
    text = re.sub(r"^(?: {4}|\t)(?! *(?:[-*+]|\d+\.) ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>", "", re.sub(r"`+[^`]+`+", "code", text))
    text = re.sub(rf"(?m)(?={ITEM.pattern})", "\n", text)
    for block in re.split(r"\n\s*\n", text):
        block = ITEM.sub("", block.strip("\n")).strip()
        if block and not block.startswith(("|", "#", ":::", "---")):
            yield re.sub(r"\s+", " ", block)


def sentences(block: str) -> list[str]:
    """Return the sentences of a paragraph."""
    return [each for each in END.split(block) if re.search(r"\w", each)]


def helps() -> Iterator[str]:
    """Yield the texts of the command's help."""
    for command in parser().of_command.values():
        yield from (text for text in (command.description, command.epilog) if text)
        yield from (action.help for action in command._actions if action.help)


def docstrings() -> Iterator[str]:
    """Yield the docstrings of public modules, classes and functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted((ROOT / "liar_ext").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds) and not getattr(node, "name", path.stem).startswith("_"):
                yield re.split(r"\n[A-Z]\w+\n-{3,}", ast.get_docstring(node) or "")[0]


def wide(text: str) -> int:
    """Count the tables of more than five columns."""
    rules = re.findall(r"^\|[-:| ]+\|$", FENCE.sub("", text), re.MULTILINE)
    return sum(rule.count("|") - 1 > WIDE for rule in rules)


def row(name: str, texts: list[str]) -> str:
    """Return the counts of some texts as a row of a table."""
    blocks = [block for text in texts for block in paragraphs(text)]
    sizes = [len(each.split()) for block in blocks for each in sentences(block)]
    words, count = max(sum(sizes), 1), max(len(sizes), 1)
    over = [sum(size > limit for size in sizes) / count for limit in (LONG, LONGER)]
    many = sum(len(NUMBER.findall(block)) >= MANY for block in blocks)
    you = sum(len(re.findall(r"\byou(?:r|rs)?\b", block, re.IGNORECASE)) for block in blocks)
    tables = sum(map(wide, texts))
    return (
        f"| {name} | {sum(sizes):,} | {over[0]:.1%} | {over[1]:.1%} | {many} "
        f"| {1000 * you / words:.1f} | {tables} |"
    )


def main() -> None:
    """Print the table."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {page.relative_to(ROOT).as_posix(): [page.read_text("utf-8")] for page in pages}
    everything = [text for page in texts.values() for text in page]
    texts |= {"**README and docs**": everything, "**help**": [*helps()]}
    texts |= {"**docstrings**": [*docstrings()]}
    print(
        f"| text | words | sentences over {LONG} words | over {LONGER} | paragraphs of {MANY} "
        f"or more numbers | you per 1,000 words | tables over {WIDE} columns |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, page in texts.items():
        print(row(name, page))


if __name__ == "__main__":
    main()
