"""Recordings and pictures: read from files, folders and datasets, and decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from liar_ext.calibration.documents import TELLING, Documents, read_text, rows_of_dataset
from liar_ext.errors import InputError, one_line

AUDIO, IMAGES = "audio", "images"
SUFFIXES = {
    AUDIO: (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    IMAGES: (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
}
COLUMNS = {AUDIO: "audio", IMAGES: "image"}
TEXTS = ("text", "transcription", "transcript", "sentence", "caption")  # columns of a dataset
# Of one source, files that are read; each of them is hashed.
MOST_FILES = 4096


@dataclass(frozen=True)
class Item:
    """One recording or picture."""

    place: str  # its file, or its row of a dataset, for messages
    content: Path | bytes  # the file, or the bytes of one
    text: str = ""  # what is said in it; empty if unknown

    def read(self) -> bytes:
        """Return the bytes of the file; raise InputError if they can't be read."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            # A pipe waits for a writer, and a device never ends.
            if self.content.exists() and not self.content.is_file():
                raise InputError(f"data: {self.place} is no ordinary file; take it out")
            return self.content.read_bytes()
        except OSError as error:
            raise InputError(f"data: can't read {self.place}: {error.strerror}") from error

    def digest(self) -> str:
        """Return a digest so long that, unlike a heading, it tells documents apart."""
        digest = blake2b(self.read(), digest_size=64).hexdigest()
        assert len(digest) >= TELLING
        return digest


class Files(Documents):
    """Recordings or pictures of one source; as documents they are digests of their bytes.

    So :func:`liar_ext.calibration.documents.check_apart` and its like serve for files.
    """

    def __init__(self, items: Sequence[Item], notes: Sequence[str] = ()) -> None:
        super().__init__((item.digest() for item in items), notes)
        self.items = list(items)


def read_files(source: str | os.PathLike[str], kind: str) -> Files:
    """Return the recordings or pictures, ``kind``, of a file, a folder or a dataset.

    A folder holds one per file, in folders or not; other files are passed over. What is said in
    ``NAME.wav`` stands in ``NAME.txt`` beside it, if anywhere. A dataset, written
    ``NAME[:CONFIG[:SPLIT]]``, has a column ``audio`` or ``image``, and maybe one of
    :data:`TEXTS`. Of more than :data:`MOST_FILES` evenly spread ones are read, or the first ones
    of a dataset. If there is none, InputError is raised.
    """
    source, suffixes = os.fspath(source), SUFFIXES[kind]
    path, notes = Path(source), []
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix.lower() in suffixes)
        if len(found) > MOST_FILES:
            notes.append(f"Of {len(found):,} files of {source} {MOST_FILES:,} were read.")
        items = [_item(each) for each in spread(found, MOST_FILES)]
    elif path.exists():
        items = [_item(path)] if path.suffix.lower() in suffixes else []
    elif path.is_absolute() or source.startswith(".") or path.suffix.lower() in suffixes:
        raise InputError(f"data: {source} does not exist; give a folder of {kind}, or a dataset")
    else:
        items, notes = _of_dataset(source, kind)
    if not items:
        raise InputError(
            f"data: {source} holds no {kind}, which the model reads; give a folder with files "
            f"that end in {', '.join(suffixes)}, or a dataset with a column {COLUMNS[kind]}"
        )
    return Files(items, notes)


def spread(items: Sequence[Any], most: int | None) -> list[Any]:
    """Return all of some files, or at most ``most`` evenly spread ones."""
    count = len(items) if most is None else min(most, len(items))
    return [items[at * len(items) // count] for at in range(count)]


def _item(path: Path) -> Item:
    text = path.with_suffix(".txt")
    said = " ".join(read_text(text).split()) if text.is_file() else ""
    return Item(os.fspath(path), path, said)


def _of_dataset(source: str, kind: str) -> tuple[list[Item], list[str]]:
    column, items, notes = COLUMNS[kind], [], []
    for number, row in enumerate(rows_of_dataset(source, _undecoded)):
        place = f"dataset {source} row {number}"
        file = row.get(column)
        if column not in row or not isinstance(file, Mapping | None):
            raise InputError(
                f"data: dataset {source} must have {kind} in a column {column}, got columns "
                f"{', '.join(row)}"
            )
        if file is None:
            continue
        if len(items) == MOST_FILES:
            notes.append(f"Of the dataset {source} the first {MOST_FILES:,} {kind} were read.")
            break
        said = next((row[name] for name in TEXTS if isinstance(row.get(name), str)), "")
        content = file.get("bytes") or Path(str(file.get("path")))
        items.append(Item(place, content, " ".join(said.split())))
    return items, notes


def _undecoded(rows: Any) -> Any:
    """Return a dataset that gives bytes: decoding is done here, alike for files and rows."""
    from datasets import Audio, Image

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Audio | Image):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def decode_image(item: Item) -> Any:
    """Return a picture in RGB; raise InputError if the file can't be read."""
    with _decoding(item, "an image", "images are read by the package pillow", "vision"):
        from PIL import Image

        return Image.open(io.BytesIO(item.read())).convert("RGB")


def decode_audio(item: Item, rate: int) -> Any:
    """Return the samples of a recording at a rate, float32, the mean of its channels.

    Raise InputError if the file can't be read, or is empty.
    """
    packages = "recordings are read by the packages soundfile and soxr"
    with _decoding(item, "a recording", packages, "speech"):
        import soundfile
        import soxr

        samples, own = soundfile.read(io.BytesIO(item.read()), dtype="float32", always_2d=True)
        if not len(samples):
            raise ValueError("it has no samples")
        mono = samples.mean(1)
        return mono if own == rate else soxr.resample(mono, own, rate)


@contextmanager
def _decoding(item: Item, what: str, packages: str, extra: str) -> Iterator[None]:
    """Name the packages that are missing, or the file that a library can't decode."""
    try:
        yield
    except InputError:
        raise
    except ImportError:
        raise InputError(f"data: {packages}; pip install 'liar_ext[{extra}]'") from None
    except Exception as error:  # each library has errors of its own
        raise InputError(
            f"data: {item.place} can't be read as {what}: {one_line(error)}; copy it again, or "
            "take it out"
        ) from error
