"""Documents: read text from files, folders and datasets, and keep what judges apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unicodedata import normalize

from liar_ext.system.errors import InputError, asking_hub, refusing

JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".json", ".csv", ".tsv")  # read as they are
SUFFIXES = (".txt", *JSON_LINES, *TABLES)  # of files, not of datasets
LONGEST = 255  # name of a file
# Of a dataset, characters that are read: some 16 million tokens, and seconds to read them.
MOST_OF_A_DATASET = 1 << 26
# Headings and boilerplate of fewer characters stand in many texts and prove nothing.
TELLING = 100


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
    elif max(map(len, source.split("/"))) > LONGEST:
        raise InputError(
            "text: a source is the name of a file, a folder or a dataset, got text of "
            f"{len(source):,} characters; write texts to a file"
        )
    elif (path := Path(source)).exists():
        every = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in every if file == path or file.is_file()]
        read = {file: _read_file(file) for file in files}
        documents = Documents(text for texts in read.values() for text in texts)
        if tables := [file for file, texts in read.items() if _is_table(file, texts)]:
            more = f" and {len(tables) - 1} more were" if len(tables) > 1 else " was"
            documents.notes.append(
                f"{tables[0]}{more} read as plain text, with field names and quotes: write "
                '{"text": "..."} on each line of a .jsonl file.'
            )
    elif path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in SUFFIXES:
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

    Documents are compared by their :func:`document_digest`. Those of less than ``TELLING``
    characters, such as headings, count if at least half of the evaluation is shared.
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
    how = "it is binary or UTF-16: unpack or convert it first, or remove its NUL bytes"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" not in text:
            return text
        came = f"NUL at position {text.index(chr(0))}"
    except UnicodeDecodeError as error:
        came = f"byte {error.object[error.start]:#04x} at position {error.start}"
        if b"\0" not in error.object:  # any bytes are text in latin1
            how = "convert it first, e.g. iconv -f latin1 -t utf-8"
    raise InputError(f"text: {path} must be UTF-8, got {came}; {how}")


def read_lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a file that aren't blank, each after its place: file and number."""
    # str.splitlines breaks at U+2028 and U+0085, too, which a JSON string may hold.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(f"{path} line {number}", line) for number, line in lines if line.strip()]


def _is_table(path: Path, texts: Sequence[str]) -> bool:
    """Tell whether a file that was read as it is has fields, by its name or as it begins."""
    suffix = path.suffix.lower()
    return suffix in TABLES or (suffix not in JSON_LINES and texts[0].startswith('{"'))


def _read_file(path: Path) -> list[str]:
    if path.suffix.lower() not in JSON_LINES:
        return [read_text(path)]
    return [_read_line(line, place) for place, line in read_lines(path)]


def _read_line(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(
            f'text: {place} is no JSON; write {{"text": "..."}} on each line'
        ) from None
    fields = row if isinstance(row, dict) else {}
    if not isinstance(fields.get("text"), str):
        came = f"fields {', '.join(fields)[:80]}" if fields else "none"
        came = f"text {json.dumps(fields['text'])[:80]}" if "text" in fields else came
        raise InputError(
            f'text: {place} must be a JSON object with a field "text", a string, got {came}; write '
            '{"text": "..."} on each line'
        )
    second = fields.get("text_pair")
    if not isinstance(second, str | None):
        raise InputError(
            f"text: {place} must have a string in its field text_pair, got "
            f"{type(second).__name__}; write the second of two texts, or leave it out"
        )
    return _document(fields["text"], second, place)


def _document(text: str, second: str | None, place: str) -> str:
    text = checked(text, place)
    return text if second is None else Pair(text, checked(second, place))


def checked(text: str, place: str) -> str:
    """Return a text; raise InputError if it holds half a character, which no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: {place} must be Unicode, got the lone surrogate "
            f"U+{ord(text[error.start]):04X}; write the whole character, or leave it out"
        ) from None
    return text


def _of_rows(rows: Iterator[Mapping[str, object]], source: str) -> Documents:
    documents, characters, missing = Documents(), 0, 0
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or "text" not in row:
            came = ", ".join(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise InputError(
                f"text: dataset {source} must have a column text, got {came}; give rows such "
                'as {"text": "..."}, or the name of one file'
            )
        text = row["text"]
        if text is None:
            missing += 1
            continue
        second = row.get("text_pair")
        for name, value in {"text": text, "text_pair": second}.items():
            if not isinstance(value, str) and not (value is None and name == "text_pair"):
                raise InputError(
                    f"text: dataset {source} must have text in its column {name}, got "
                    f"{type(value).__name__} in row {number}"
                )
        if characters >= MOST_OF_A_DATASET:
            documents.notes.append(
                f"Of the dataset {source} the first {len(documents):,} documents were read, "
                f"{characters:,} characters."
            )
            break
        documents.append(_document(text, second, f"dataset {source} row {number}"))
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
        from datasets import load_dataset
    name, config, split = (*source.split(":"), "", "")[:3]
    _reach_hub(name)
    failure = None
    for streaming in (True, False):
        try:
            rows = load_dataset(name, config or None, split=split or "train", streaming=streaming)
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


def _reach_hub(name: str) -> None:
    """Raise InputError unless there is a local copy of a dataset, or the hub answers.

    It is asked once: the library asks twelve times, which takes 47 seconds without a network.
    """
    from datasets import config
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    failure = f"text: there is no file {name} here; the hub can't be reached for a dataset"
    with asking_hub(failure):
        if not Path(config.HF_DATASETS_CACHE, name.replace("/", "___")).exists():
            get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"))
