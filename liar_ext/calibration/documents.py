"""Documents: read from files, folders and datasets, told apart, and split into parts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch

from liar_ext.system.errors import InputError, asking_hub, refusing

JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".json", ".csv", ".tsv")  # read as they are
SUFFIXES = (".txt", *JSON_LINES, *TABLES)  # of files, not of datasets
# Of a dataset, characters that are read: some 16 million tokens, and seconds to read them.
MOST_OF_A_DATASET = 1 << 26
# Headings and boilerplate of fewer characters stand in many texts and prove nothing.
TELLING = 100
# A lone text is cut into blocks of this many sequences or more, at most so many for each part; of
# a block an eighth at most is left out, so that neighbours in different folds do not touch.
BLOCK_SEQUENCES, MOST_BLOCKS, GAP = 16, 8, 8
CHARACTERS = 4  # per token, about, in English
_BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"\s"))


class Documents(list):
    """A list of texts, with ``notes``: sentences for the report on how they were read."""

    def __init__(self, texts: Iterable[str] = (), notes: Sequence[str] = ()) -> None:
        super().__init__(texts)
        self.notes = list(notes)


class Pair(str):
    """Two texts that a model reads at once, such as a question and a passage; as a string, lines.

    ``texts`` has both, as a tokenizer takes them.
    """

    texts: tuple[str, str]

    def __new__(cls, text: str, text_pair: str) -> Pair:
        """Return the pair of two texts."""
        pair = super().__new__(cls, f"{text}\n{text_pair}")
        pair.texts = (text, text_pair)
        return pair


def read_documents(source: str | os.PathLike[str] | Iterable[Mapping[str, object]]) -> Documents:
    """Return the documents of a text file, a JSON-lines file, a folder or a dataset.

    A file is one document, a line of a ``.jsonl`` file one in its field ``text``, and a folder has
    one per file. A dataset of the ``datasets`` library, ``NAME[:CONFIG[:SPLIT]]``, split ``train``
    if not given, or a ``Dataset`` itself, has one per row in its column ``text``; the first
    ``MOST_OF_A_DATASET`` characters are read, and the notes say so if there is more. A line or row
    with a ``text_pair`` is a :class:`Pair`.

    Raises
    ------
    InputError
        If the source does not exist, is not UTF-8, lacks the field or holds no text.
    """
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(source, str):
        documents, source = _of_rows(iter(source), "given"), "the dataset given"
    elif not source.strip():
        raise InputError("text: the source is empty; give a text file, a folder or a dataset")
    elif os.path.exists(source):
        path = Path(source)
        inside = sorted(each for each in path.rglob("*") if each.is_file())
        documents = _of_files(inside if path.is_dir() else [path])
    elif source.startswith(("/", ".", "~")) or Path(source).suffix.lower() in SUFFIXES:
        where = "" if source.startswith(("/", "~")) else f" in {os.getcwd()}"
        raise InputError(
            f"text: {source} does not exist{where}; give a text file, a folder or a dataset"
        )
    else:
        documents = _of_rows(rows_of_dataset(source), source)
    documents[:] = [text for text in documents if text.strip()]
    if not documents:
        raise InputError(f"text: {source} holds no text; give a file with text in it")
    return documents


def check_apart(known: set[int], evaluation: Iterable[str]) -> None:
    """Raise InputError if documents of the evaluation are among those of ``known`` digests.

    Those of less than ``TELLING`` characters count if at least half of the evaluation is shared.
    """
    documents = list(evaluation)
    shared = [text for text in documents if document_digest(text) in known]
    telling = any(len(text) >= TELLING for text in shared)
    if telling or (shared and 2 * len(shared) >= len(documents)):
        raise InputError(
            f"evaluation: {len(shared)} of {len(documents)} documents are in the calibration text "
            "too, and a model judged on what it was calibrated on proves nothing; evaluate on "
            "other documents"
        )


def document_digests(documents: Iterable[str]) -> set[int]:
    """Return the :func:`document_digest` of each document."""
    return {document_digest(each) for each in documents}


def document_digest(document: str) -> int:
    """Return a digest of 8 bytes, alike for copies of other white space, case or Unicode form."""
    plain = normalize("NFC", "".join(document.split()).casefold())
    digest = blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def text_digest(documents: Iterable[str]) -> str:
    """Return a digest of all documents of a text, in their order, and of what is ``said`` there."""
    digest = blake2b(digest_size=16)
    for text in (*documents, *getattr(documents, "said", ())):
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def check_unchanged(known: Mapping[str, str], read: Mapping[str, Iterable[str]]) -> None:
    """Raise InputError if a text that was read hasn't the digest that is known of it."""
    changed = [name for name in known if name in read and text_digest(read[name]) != known[name]]
    if changed:
        raise InputError(
            f"recipe: {', '.join(changed)} changed since the job of this recipe, which can't be "
            "repeated with it; name the texts with --calibration or --eval to prune by what they "
            "are now"
        )


def read_text(path: Path) -> str:
    """Return the text of a file; raise InputError if it is not UTF-8, or holds NUL bytes."""
    with refusing(
        f"text: {path} must be UTF-8",
        "if it is text, convert it first, e.g. iconv -f latin1 -t utf-8",
        UnicodeDecodeError,
    ):
        text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise InputError(f"text: {path} holds NUL bytes, it is binary or UTF-16; convert it first")
    return text


def read_lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a file that aren't blank, each after its place: file and number."""
    # str.splitlines breaks at U+2028 and U+0085, too, which a JSON string may hold.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(f"{path} line {number}", line) for number, line in lines if line.strip()]


def parsed(line: str) -> Any:
    """Return the JSON of a line, or the line itself if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _of_files(files: Sequence[Path]) -> Documents:
    documents, tables = Documents(), []
    for path in files:
        suffix = path.suffix.lower()
        if suffix in JSON_LINES:
            documents += [_document(parsed(line), place) for place, line in read_lines(path)]
            continue
        documents.append(read_text(path))
        if suffix in TABLES or documents[-1].startswith('{"'):
            tables.append(path)
    if tables:
        more = f" and {len(tables) - 1} more were" if len(tables) > 1 else " was"
        documents.notes.append(
            f"{tables[0]}{more} read as plain text, with field names and quotes: write "
            '{"text": "..."} on each line of a .jsonl file.'
        )
    return documents


def _document(row: object, place: str) -> str:
    """Return the text, or the two texts, of a line of a file or a row of a dataset."""
    fields = row if isinstance(row, Mapping) else {}
    text, second = fields.get("text"), fields.get("text_pair")
    if not isinstance(text, str) or not isinstance(second, str | None):
        raise InputError(
            f'text: {place} must have a string in its field "text", and in "text_pair" if it has '
            f'one, got {str(row)[:80]}; write {{"text": "..."}} on each line of a .jsonl file, or '
            "give such rows"
        )
    text = checked(text, place)
    return text if second is None else Pair(text, checked(second, place))


def checked(text: str, place: str) -> str:
    """Return a text; raise InputError if it holds half a character, which no tokenizer reads."""
    hint = "write the whole character, or leave it out"
    with refusing(f"text: {place} must be Unicode", hint, UnicodeEncodeError):
        text.encode("utf-8")
    return text


def _of_rows(rows: Iterator[Mapping[str, object]], source: str) -> Documents:
    documents, characters, missing = Documents(), 0, 0
    for number, row in enumerate(rows):
        if isinstance(row, Mapping) and row.get("text", "") is None:
            missing += 1
            continue
        if characters >= MOST_OF_A_DATASET:
            documents.notes.append(
                f"Of the dataset {source} the first {len(documents):,} documents were read, "
                f"{characters:,} characters."
            )
            break
        documents.append(_document(row, f"dataset {source} row {number}"))
        characters += len(documents[-1])
    if missing:
        documents.notes.append(f"Rows of the dataset {source} without text: {missing:,}.")
    return documents


def rows_of_dataset(source: str, prepared: Callable[[Any], Any] = lambda rows: rows) -> Iterator:
    """Return the rows of a dataset, ``NAME[:CONFIG[:SPLIT]]``, after ``prepared`` has changed it.

    They are streamed, or read from the cache if there is no network.
    """
    what = f"text: no file {source}, and dataset names need the package datasets"
    with refusing(what, "pip install datasets, or give a text file", Exception):
        from datasets import config, load_dataset
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
    name, subset, split = (*source.split(":"), "", "")[:3]
    # Asked once: the library asks twelve times, which takes 47 seconds without a network.
    with asking_hub(f"text: there is no file {name} here; the hub can't be reached for a dataset"):
        if not Path(config.HF_DATASETS_CACHE, name.replace("/", "___")).exists():
            get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"))
    failure = None
    for streaming in (True, False):
        try:
            rows = load_dataset(name, subset or None, split=split or "train", streaming=streaming)
            rows = prepared(rows)
            first = next(iter(rows), None)  # a stream asks for nothing before that
        except Exception as error:  # the library raises a dozen kinds for a name it cannot serve
            failure = error
            continue
        return iter(()) if first is None else iter(rows)
    raise InputError(
        f"text: neither a file nor a dataset: {source} ({failure}); give a text file, a folder or "
        "the name of a dataset"
    ) from failure


def split_documents(
    documents: Sequence[str],
    digests: Sequence[int],
    shares: Sequence[int],
    seed: int,
    seq_len: int,
    most: int,
    home: dict[int, int],
) -> tuple[list[list[str]], str]:
    """Split the documents of one source into parts, and say what was done to few documents.

    In an order drawn with ``seed`` each goes to the part that has least of its share, until a part
    has ``most`` characters, about. Those of one digest go together: ``home`` is the part of each,
    of all sources. Fewer texts than parts are cut into blocks, but for those of another source.
    """
    if (few := len(set(digests))) < len(shares):
        if any(isinstance(document, Pair) for document in documents):
            raise InputError(
                f"calibration: {few} pair(s) of texts are too few for {len(shares)} parts that "
                "share none; give more lines with a text and a text_pair"
            )
        unlike = dict(zip(digests, documents, strict=True))
        own = [document for digest, document in unlike.items() if digest not in home]
        home |= dict.fromkeys(unlike, 0)
        if not own:
            return [[] for _ in shares], "A calibration text that is in another one was left out."
        parts = cut_blocks("\n\n".join(own), len(shares), seq_len, most)
        blocks, few = sum(map(len, parts)), len(own)
        return parts, (
            f"A calibration text of {few} document{'s' * (few > 1)} was cut into {blocks} blocks "
            f"of consecutive paragraphs, {blocks // len(shares)} for each of {len(shares)} parts, "
            "with a gap between them: held-out errors are those on the same document. Give more "
            "documents."
        )
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    sizes, parts = [0] * len(shares), [[] for _ in shares]
    for index in order.tolist():
        filled = [size / share for size, share in zip(sizes, shares, strict=True)]
        part = home.setdefault(digests[index], filled.index(min(filled)))
        if sizes[part] < most:
            parts[part].append(documents[index])
        sizes[part] += len(documents[index])
    return parts, ""


def digests_for(documents: Sequence[str], parts: int) -> list[int]:
    """Return the digest that tells documents apart: of a pair its first text, if that is enough."""
    firsts = (each.texts[0] if isinstance(each, Pair) else each for each in documents)
    digests = list(map(document_digest, firsts))
    return digests if len(set(digests)) >= parts else list(map(document_digest, documents))


def cut_blocks(text: str, parts: int, seq_len: int, most: int) -> list[list[str]]:
    """Cut a text into blocks of consecutive paragraphs, and return them by part, in turns.

    The paragraph before a block, or an eighth of it if that is less, belongs to none, so that no
    part holds the next sentence of another.
    """
    spans = block_spans(text, parts, seq_len)
    each = max(most * parts // len(spans), 1)
    blocks = [text[start : min(end, start + each)] for start, end in spans]
    return [blocks[part::parts] for part in range(parts)]


def block_spans(text: str, parts: int, seq_len: int) -> list[tuple[int, int]]:
    """Return where the blocks of a text begin and end, a multiple of ``parts`` of them."""
    long = parts * BLOCK_SEQUENCES * seq_len * CHARACTERS
    blocks = parts * min(max(len(text) // long, 1), MOST_BLOCKS)
    size, gap = len(text) / blocks, max(int(len(text) / blocks / GAP), 1)
    # Each begins where a paragraph, line or word does.
    starts = [0]
    for index in range(1, blocks):
        at = int(index * size)
        found = (pattern.search(text, at, at + gap) for pattern in _BREAKS)
        starts.append(next((match.end() for match in found if match), at))
    ends = [*(_gap_before(text, at, gap) for at in starts[1:]), int(blocks * size)]
    return list(zip(starts, ends, strict=True))


def _gap_before(text: str, at: int, reach: int) -> int:
    """Return where the paragraph that ends at ``at`` begins, or what begins within ``reach``."""
    low = max(at - reach, 0)
    for pattern in _BREAKS:
        # The break right before ``at`` is the one that ends the paragraph.
        found = [match.start() for match in pattern.finditer(text, low, at) if match.end() < at]
        if found:
            return found[-1] if pattern is _BREAKS[0] else found[0]
    return low


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
