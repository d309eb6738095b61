"""Folds: which documents decide, which judge, and which neither may see."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

# A lone text is cut into blocks of this many sequences or more, at most so many for each part; of
# a block an eighth at most is left out, so that neighbours in different folds do not touch.
BLOCK_SEQUENCES, MOST_BLOCKS, GAP = 16, 8, 8
CHARACTERS = 4  # per token, about, in English
_BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"\s"))


def split_documents(
    documents: Sequence[str], shares: Sequence[int], seed: int, seq_len: int, most: int
) -> tuple[list[list[str]], str]:
    """Split the documents of one source into parts, none of them in two parts.

    Documents, in an order drawn with ``seed``, go to the part that has least of its share. Where
    there are fewer documents than parts, they are cut into blocks first, see :func:`cut_blocks`.

    Parameters
    ----------
    documents : sequence of str
        The source.
    shares : sequence of int
        Sequences wanted of each part.
    seed : int
        Of the draw.
    seq_len : int
        Tokens per sequence.
    most : int
        Characters of a part to return, about; which of them is drawn with ``seed``.

    Returns
    -------
    parts : list of list of str
        Documents, or blocks, by part.
    note : str
        What was done to a source of few documents; empty otherwise.
    """
    if len(documents) < len(shares):
        parts = cut_blocks("\n\n".join(documents), len(shares), seq_len, most)
        blocks = sum(map(len, parts))
        return parts, (
            f"A calibration text of {len(documents)} document(s) was cut into {blocks} blocks of "
            f"consecutive paragraphs, {blocks // len(shares)} for each of {len(shares)} parts, "
            "with a gap between them: held-out errors are those on the same document. Give more "
            "documents."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    sizes, parts = [0] * len(shares), [[] for _ in shares]
    for index in order:
        filled = [size / share for size, share in zip(sizes, shares, strict=True)]
        least = filled.index(min(filled))
        if sizes[least] < most:
            parts[least].append(documents[index])
        sizes[least] += len(documents[index])
    return parts, ""


def cut_blocks(text: str, parts: int, seq_len: int, most: int) -> list[list[str]]:
    """Cut a text into blocks of consecutive paragraphs that take turns in going to the parts.

    A block begins at a paragraph, or line or word where there is none near, and the paragraph
    before it, or an eighth of a block if that is less, belongs to no block. So what one part holds
    is never the next sentence of another.

    Returns
    -------
    list of list of str
        Blocks by part.
    """
    spans = block_spans(text, parts, seq_len)
    each = max(most * parts // len(spans), 1)
    result: list[list[str]] = [[] for _ in range(parts)]
    for index, (start, end) in enumerate(spans):
        result[index % parts].append(text[start : min(end, start + each)])
    return result


def block_spans(text: str, parts: int, seq_len: int) -> list[tuple[int, int]]:
    """Return where the blocks of a text begin and end, a multiple of ``parts`` of them."""
    long = parts * BLOCK_SEQUENCES * seq_len * CHARACTERS
    blocks = parts * min(max(len(text) // long, 1), MOST_BLOCKS)
    size, gap = len(text) / blocks, max(int(len(text) / blocks / GAP), 1)
    spans = []
    for index in range(blocks):
        start = 0 if index == 0 else _break_after(text, int(index * size), gap)
        end = int((index + 1) * size)
        if index + 1 < blocks:
            end = _gap_before(text, _break_after(text, end, gap), gap)
        spans.append((start, end))
    return spans


def cut_pieces(text: str, characters: int) -> list[str]:
    """Return the consecutive pieces of a text of that many characters, cut at spaces."""
    pieces, start = [], 0
    while start < len(text):
        end = start + characters
        space = text.rfind(" ", start, end + 1) if end < len(text) else -1
        end = space if space > start else end
        pieces.append(text[start:end].strip())
        start = end
    return [piece for piece in pieces if piece]


def halve(text: str) -> list[str]:
    """Return the two halves of a text, cut at a white space."""
    middle = text.find(" ", len(text) // 2)
    middle = middle if middle >= 0 else len(text) // 2
    return [text[:middle], text[middle:]]


def _break_after(text: str, at: int, reach: int) -> int:
    """Return where the first paragraph, line or word after ``at`` begins, or ``at``."""
    for pattern in _BREAKS:
        found = pattern.search(text, at, at + reach)
        if found:
            return found.end()
    return at


def _gap_before(text: str, at: int, reach: int) -> int:
    """Return where the paragraph that ends at ``at`` begins, or what begins within ``reach``."""
    low = max(at - reach, 0)
    for pattern in _BREAKS:
        # The break right before ``at`` is the one that ends the paragraph.
        found = [match.start() for match in pattern.finditer(text, low, at) if match.end() < at]
        if found:
            return found[-1] if pattern is _BREAKS[0] else found[0]
    return low
