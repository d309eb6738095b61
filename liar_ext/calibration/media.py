"""Recordings and pictures: read from files, folders and datasets, decoded, made into batches."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Sequences, in_turns
from liar_ext.calibration.documents import Documents, read_text, rows_of_dataset
from liar_ext.calibration.texts import padded
from liar_ext.models.running import DECODER_IDS, DECODER_MASK, device_of, evaluating, inputs_read
from liar_ext.system.environment import errors_alone
from liar_ext.system.errors import InputError, install, refusing

AUDIO, IMAGES, IMAGES_WITH_TEXT = "audio", "images", "images with text"
SUFFIXES = {
    AUDIO: (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    IMAGES: (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
}
COLUMNS = {AUDIO: "audio", IMAGES: "image"}
TEXTS = ("text", "transcription", "transcript", "sentence", "caption")  # columns of a dataset
MOST_FILES = 4096  # of one source; each of them is hashed

WAVES = "input_values"  # samples as they are
INPUTS = {"input_features": AUDIO, WAVES: AUDIO, "pixel_values": IMAGES}
PIECE = 5  # seconds of sound that a model of waves reads at a time
WRITTEN = 8  # recordings that a model writes down at a time
Clip = tuple[Any, str]  # samples or a picture, and what is said in it
Part = list[tuple[Any, int]]  # files, and the source of each


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
        with refusing(f"data: can't read {self.place}", "take it out", OSError):
            if not self.content.is_file():  # a pipe waits for a writer, and a device never ends
                raise OSError("it is no ordinary file")
            return self.content.read_bytes()

    def digest(self) -> str:
        """Return a digest so long that, unlike a heading, it tells documents apart."""
        return blake2b(self.read(), digest_size=64).hexdigest()  # of more characters than TELLING


class Files(Documents):
    """Recordings or pictures of one source; as documents they are digests of their bytes."""

    def __init__(self, items: Sequence[Item], notes: Sequence[str] = ()) -> None:
        super().__init__((item.digest() for item in items), notes)
        self.items = list(items)
        self.said: list[str] = []  # what tells a changed source apart beside its files


def read_files(source: str | os.PathLike[str], kind: str) -> Files:
    """Return the recordings or pictures, ``kind``, of a file, a folder or a dataset.

    What is said in ``NAME.wav`` of a folder stands in ``NAME.txt`` beside it, if anywhere. A
    dataset has a column ``audio`` or ``image``, and maybe one of :data:`TEXTS`.
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
    beside = path.with_suffix(".txt")
    text = read_text(beside) if beside.is_file() else ""
    return Item(os.fspath(path), path, " ".join(text.split()))


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
    """Return a picture in RGB, turned as its EXIF orientation says."""
    with _decoding(item, "an image", "images are read by the package pillow", "vision"):
        from PIL import Image, ImageOps

        return ImageOps.exif_transpose(Image.open(io.BytesIO(item.read()))).convert("RGB")


def decode_audio(item: Item, rate: int) -> Any:
    """Return the samples of a recording at a rate, float32, the mean of its channels."""
    packages = "recordings are read by the packages soundfile and soxr"
    with _decoding(item, "a recording", packages, "speech"):
        import soundfile
        import soxr

        samples, own = soundfile.read(io.BytesIO(item.read()), dtype="float32", always_2d=True)
        if not len(samples) or not np.isfinite(samples).all():
            raise ValueError("it has no samples, or some that are NaN or infinite")
        mono = samples.mean(1)
        return mono if own == rate else soxr.resample(mono, own, rate)


@contextmanager
def _decoding(item: Item, what: str, packages: str, extra: str) -> Iterator[None]:
    """Name the packages that are missing, or the file that a library can't decode."""
    failure, hint = f"data: {item.place} can't be read as {what}", "copy it again, or take it out"
    try:  # each library has errors of its own
        with refusing(failure, hint, Exception, but=(ImportError,)):
            yield
    except ImportError:
        raise InputError(f"data: {packages}; {install(extra)}") from None


class Reader:
    """Makes the inputs of a model from files of a ``kind``, by its ``processor``.

    If the model writes what it hears, its decoder reads what is said, or what it writes itself.
    """

    def __init__(self, kind: str, model: nn.Module, processor: Any, tokenizer: Any = None) -> None:
        self.kind, self.model, self.processor, self.tokenizer = kind, model, processor, tokenizer
        needed = inputs_read(model)
        self.name = next((name for name in needed if INPUTS.get(name) == kind), "")
        self.writes = DECODER_IDS in needed
        if beside := needed.keys() - {self.name, DECODER_IDS}:
            raise InputError(
                f"data: {type(model).__name__} reads {' and '.join(sorted(beside))} beside {kind}; "
                "call liar_ext.prune with batches of your own"
            )
        if self.writes and tokenizer is None:
            raise InputError(
                f"data: {type(model).__name__} has no tokenizer for what is said in recordings; "
                "put one into its folder"
            )

    def clips(self, items: Sequence[Item]) -> Iterator[Clip]:
        """Yield pictures, or pieces of recordings that are no longer than the model hears.

        Of a recording in several pieces nobody knows what is said where.
        """
        if self.name == WAVES:  # which may know no padding: all are one, repeated if it is short
            rate = self.processor.sampling_rate
            sound, size = np.concatenate([decode_audio(each, rate) for each in items]), PIECE * rate
            sound = np.resize(sound, max(size, len(sound)))
            yield from ((sound[at : at + size], "") for at in range(0, len(sound) - size + 1, size))
            return
        for item in items:
            if self.kind == IMAGES:
                yield decode_image(item), item.text
                continue
            samples = decode_audio(item, self.processor.sampling_rate)
            most = getattr(self.processor, "n_samples", len(samples))
            text = item.text if len(samples) <= most else ""
            for at in range(0, len(samples), most):
                yield samples[at : at + most], text

    def joined(self, clips: Sequence[Clip]) -> list[Clip]:
        """Return recordings put together as long as the model hears them, with no silence."""
        most = getattr(self.processor, "n_samples", None)
        if most is None:
            return list(clips)
        windows: list[list[Clip]] = []
        room = 0
        for clip in clips:
            if len(clip[0]) > room:
                windows.append([])
                room = most
            windows[-1].append(clip)
            room -= len(clip[0])
        pairs = (zip(*some, strict=True) for some in windows)
        return [(np.concatenate(x), " ".join(said) if all(said) else "") for x, said in pairs]

    def sequences(self, clips: Sequence[Clip], *facts: Any) -> Sequences:
        """Return the inputs of the model's forward pass, with folds and the like."""
        content, said = zip(*clips, strict=True)
        inputs = self.features(content)
        if not self.writes:
            return Sequences(inputs, *facts)
        said = list(said)
        unknown = [row for row, text in enumerate(said) if not text]
        for some in (unknown[at : at + WRITTEN] for at in range(0, len(unknown), WRITTEN)):
            heard = self.write_down(inputs[self.name][some])
            for row, text in zip(some, heard, strict=True):
                said[row] = text
        return Sequences(inputs | self._decoder_inputs(said, self._spoken(inputs)), *facts)

    def features(self, content: Sequence[Any]) -> dict[str, Tensor]:
        """Return what the processor makes of pictures or samples."""
        given = {"return_tensors": "pt"}
        if self.kind == AUDIO:
            given["sampling_rate"] = self.processor.sampling_rate
        failure = f"data: {type(self.processor).__name__} can't make one batch of {self.kind}"
        with refusing(failure, "give the processor one size for all of them", Exception):
            found = self.processor(list(content), **given)[self.name]
        return {self.name: found.to(self.model.dtype)}

    @torch.no_grad()
    def write_down(self, features: Tensor) -> list[str]:
        """Return what the model hears, as text."""
        with errors_alone():  # generate warns of its own arguments
            found = self.model.generate(features.to(device_of(self.model)))
        return self.tokenizer.batch_decode(found, skip_special_tokens=True)

    @torch.no_grad()
    def _spoken(self, inputs: Mapping[str, Tensor]) -> list[list[int]]:
        """Return the tokens of language and task that a multilingual Whisper writes first."""
        features = inputs[self.name]
        how = getattr(self.model, "generation_config", None)
        known = getattr(how, "lang_to_id", None)
        if not known or getattr(self.tokenizer, "language", None):
            return [[] for _ in features]
        tasks = getattr(how, "task_to_id", None) or {}
        told = getattr(how, "task", None) or "transcribe"
        task = [tasks[told]] if told in tasks else []
        given = known.get(f"<|{language_of(self.model)}|>")
        if given is not None:
            return [[given, *task] for _ in features]
        device = device_of(self.model)
        with evaluating(self.model), errors_alone():
            found = [self.model.detect_language(x.to(device)) for x in features.split(WRITTEN)]
        return [[each, *task] for each in torch.cat(found).tolist()]

    def _decoder_inputs(
        self, said: Sequence[str], spoken: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        """Return what the decoder reads, with ``spoken`` after the first token, and its mask."""
        most = getattr(self.model.config, "max_target_positions", None)
        how = {"truncation": most is not None, "max_length": most, "verbose": False}
        rows = self.tokenizer(list(said), **how)["input_ids"]
        rows = [row[:-1] if len(row) > 1 else row for row in rows]
        rows = [[*a[:1], *b, *a[1:]][:most] for a, b in zip(rows, spoken, strict=True)]
        read = padded(rows, self.tokenizer.pad_token_id)
        return {DECODER_IDS: read["input_ids"], DECODER_MASK: read["attention_mask"]}


def language_of(model: nn.Module) -> str:
    """Return the code of the language that a generation config names, such as ``en``, or ""."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    how = getattr(model, "generation_config", None)
    said = (getattr(how, "language", None) or "").lower().strip("<|>")
    return TO_LANGUAGE_CODE.get(said, said)


def calibration_inputs(
    sources: Sequence[Files],
    reader: Reader,
    *,
    samples: int = 128,
    seed: int = 0,
    certify: int = 0,
    judge: int = 0,
    must_judge: bool = False,
) -> Sequences:
    """Draw files of several sources, in two folds; each source contributes evenly.

    ``samples`` files, or all, are for calibration; ``certify`` and ``judge`` come beside them. Of
    few files two are certified with before the rest is shared, and two judged by if ``must_judge``.
    """
    shares = [samples // FOLDS, samples - samples // FOLDS, certify, judge]
    least = [1, 1, FOLDS * bool(certify), FOLDS * bool(judge)]
    ways = [[0, 0]]
    if must_judge or not judge:  # else the caller may do without
        ways.append(least[FOLDS:])
    for pooled, first in product((False, True), ways):
        parts = split_files(sources, shares, first, seed, pooled=pooled)
        if all(len(part) >= few for part, few in zip(parts, least, strict=True)):
            break
    else:
        count = sum(len(files) for files in sources)
        raise InputError(
            f"calibration: {count} file(s) or line(s) of {reader.kind} are too few for two folds"
            f"{' and what is kept apart' if certify or judge else ''}; give more of them"
        )
    notes = [note for files in sources for note in files.notes]
    drawn = len(parts[0]) + len(parts[1])
    if drawn < samples:
        notes.append(f"The calibration set gave {drawn} of {samples} files.")
    apart = [_read(reader, [part]) if part else None for part in parts[FOLDS:]]
    return _read(reader, parts[:FOLDS], "", *apart, tuple(notes))


def _read(reader: Reader, parts: Sequence[Part], *more: Any, join: bool = True) -> Sequences:
    """Return the inputs of parts: each a fold, or of a lone one in turns."""
    clips, folds, sources = [], [], []
    for fold, part in enumerate(parts):
        for source in dict.fromkeys(source for _, source in part):
            found = list(reader.clips([item for item, of in part if of == source]))
            found = reader.joined(found) if join else found
            clips += found
            folds += [fold] * len(found)
            sources += [source] * len(found)
    fold = torch.tensor(folds) if len(parts) > 1 else in_turns(len(clips))
    return reader.sequences(clips, fold, torch.tensor(sources), *more)


def split_files(
    sources: Sequence[Any], shares: Sequence[int], first: Sequence[int], seed: int, *, pooled: bool
) -> list[Part]:
    """Split files, each with its source, into two folds and parts kept apart.

    Each source contributes evenly, unless they are ``pooled``. Parts kept apart get ``first`` files
    before the rest is shared.
    """
    parts: list[Part] = [[] for _ in shares]
    generator = torch.Generator().manual_seed(seed)
    pools = [
        [(digest, (item, place)) for digest, item in zip(files, files.items, strict=True)]
        for place, files in enumerate(sources)
    ]
    for pool in [[each for some in pools for each in some]] if pooled else pools:
        alike: dict[str, Part] = {}  # copies of a file go to one part
        for digest, item in pool:
            alike.setdefault(digest, []).append(item)
        groups, count = list(alike.values()), 1 if pooled else len(pools)
        order = torch.randperm(len(groups), generator=generator).tolist()
        wanted = [-(-share // count) for share in shares]
        if sum(wanted) > len(pool):  # as many of each part as there are
            wanted = [share * len(pool) // sum(wanted) for share in wanted]
        if any(first):
            few = [-(-each // count) for each in first]
            apart = [max(pair) for pair in zip(few, wanted[FOLDS:], strict=True)]
            most = max(len(pool) - sum(apart), 0) // FOLDS
            wanted = [*(min(share, most) for share in wanted[:FOLDS]), *apart]
        pairs = [*zip(parts, wanted, strict=True)]
        for part, share in reversed(pairs) if any(first) else pairs:
            taken: Part = []
            while order and len(taken) < share:
                taken += groups[order.pop(0)]
            part += taken[:share]
    return parts


def evaluation_inputs(files: Files, reader: Reader, samples: int | None = None) -> Sequences:
    """Return the inputs of files to judge on: of all, or of ``samples`` evenly spread ones."""
    part = [(item, 0) for item in spread(files.items, samples)]
    return _read(reader, [part], "", None, None, tuple(files.notes), join=False)
