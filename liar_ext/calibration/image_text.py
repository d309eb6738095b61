"""Images with text: lines of a file, captioned pictures, and inputs of a model that reads both."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from liar_ext.calibration.batches import Sequences
from liar_ext.calibration.documents import (
    JSON_LINES,
    checked,
    parsed,
    read_lines,
    rows_of_dataset,
)
from liar_ext.calibration.generated import SELF
from liar_ext.calibration.media import (
    IMAGES,
    IMAGES_WITH_TEXT,
    MOST_FILES,
    SUFFIXES,
    Files,
    Item,
    Reader,
    decode_image,
    read_files,
    spread,
)
from liar_ext.models.running import positions_of
from liar_ext.system.errors import InputError, refusing

EXAMPLE = '{"image": "a.png", "text": "..."}'
KEYS = ("image", "images", "messages")  # of a line, one of which says that it may hold images


@dataclass(frozen=True)
class Example:
    """What a model reads at once: images, and text or a chat around them."""

    place: str  # file and line, for messages
    images: tuple[Item, ...] = ()
    text: str = ""
    # A chat in the format of transformers, without its images; empty if there is a text.
    messages: Sequence[Mapping[str, Any]] = ()

    @property
    def said(self) -> str:
        """Text or chat, as a string."""
        return json.dumps(self.messages) if self.messages else self.text

    def digest(self) -> str:
        """Return a digest of the images, so that questions on one share a fold, or else of text."""
        if not self.images:
            return blake2b(self.said.encode(), digest_size=64).hexdigest()
        return "".join(image.digest() for image in self.images)


def holds_images(source: str) -> bool:
    """Tell whether a source, if it can be read, holds images: in lines, files or a column."""
    path = Path(source)
    try:
        if path.is_dir():
            return any(each.suffix.lower() in SUFFIXES[IMAGES] for each in path.rglob("*"))
        if path.suffix.lower() in JSON_LINES:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            # To look for the key before parsing is faster for long texts.
            rows = (parsed(each) for each in lines if any(f'"{key}"' in each for key in KEYS))
            return any(isinstance(row, dict) and not row.keys().isdisjoint(KEYS) for row in rows)
        named = path.exists() or path.is_absolute() or source.startswith(".")
        if named or source == SELF or path.suffix.lower() in (".txt", *SUFFIXES[IMAGES]):
            return path.suffix.lower() in SUFFIXES[IMAGES]
        return "image" in next(rows_of_dataset(source), {})
    except (InputError, OSError, ValueError):
        return False


def read_examples(source: str | os.PathLike[str]) -> Files:
    """Return the images with text of a file, a folder or a dataset.

    In a line of a ``.jsonl`` file ``image`` is the path of a picture below the folder of the file,
    or a list of several; ``text`` goes with it, or ``messages``: a chat in the format of
    transformers, in which ``{"type": "image"}`` stands for the next image of the line, or that of
    its own path. A line may have text alone. In a folder or dataset each picture needs a text.
    """
    source = os.fspath(source)
    path, notes = Path(source), []
    if path.suffix.lower() in JSON_LINES and path.is_file():
        lines = read_lines(path)
        if len(lines) > MOST_FILES:
            notes.append(f"Of {len(lines):,} lines of {source} {MOST_FILES:,} were read.")
        examples = [_of_line(line, place, path.parent) for place, line in spread(lines, MOST_FILES)]
    else:
        files = read_files(source, IMAGES)
        examples = [Example(item.place, (item,), item.text) for item in files.items]
        notes = files.notes
        if silent := [each.place for each in examples if not each.text]:
            raise InputError(
                f"data: {silent[0]} has no text, which the model reads with each image; write it "
                f"beside NAME.png into NAME.txt, or give a .jsonl file with lines {EXAMPLE}"
            )
    files = Files(examples, notes)
    files.said = [each.said for each in examples]
    return files


def _of_line(line: str, place: str, folder: Path) -> Example:
    hint = (
        f"write {EXAMPLE} on each line, or messages as transformers has them, "
        '[{"role": "user", "content": [{"type": "image", "image": "a.png"}, '
        '{"type": "text", "text": "..."}]}, ...], with images by their paths below the folder'
    )
    kinds = (ValueError, LookupError, TypeError, AttributeError)  # of messages in another form
    with refusing(f"data: {place}", hint, *kinds):
        row = parsed(line)
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object")
        named = next((row[key] for key in ("images", "image") if row.get(key) is not None), [])
        named = named if isinstance(named, list) else [named]
        images = [_image(each, place, folder) for each in named]
        if "messages" in row:
            messages, images = _chat(row["messages"], place, folder, images)
            return Example(place, tuple(images), messages=messages)
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("it must have a text beside its image, a string, or messages, a chat")
        return Example(place, tuple(images), checked(text, place))


def _image(name: object, place: str, folder: Path) -> Item:
    """Return the image at a path below a folder; the path is as it is written, links included."""
    if not isinstance(name, str):
        raise ValueError(f"it must name an image by its path, got {type(name).__name__}")
    said = repr(name if len(name) <= 80 else f"{name[:80]}...")
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
        raise ValueError(f"it names the image {said}, which is outside of the folder {folder}")
    path = folder / inside
    if not os.path.isfile(path):  # which raises nothing for a name that is too long
        raise ValueError(f"it names the image {said}, which is no file below {folder}")
    return Item(f"{place}, image {said},", path)


def _chat(
    messages: Any, place: str, folder: Path, images: list[Item]
) -> tuple[list[dict[str, Any]], list[Item]]:
    """Return a chat without its images, and the images in the order of the chat."""
    left, used, chat = list(images), [], []
    for message in messages:
        content, parts = message["content"], []
        if isinstance(content, str):
            chat.append({"role": message["role"], "content": checked(content, place)})
            continue
        for part in content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": checked(part["text"], place)})
            elif part["type"] == "image":
                named = next((part[n] for n in ("image", "path", "url") if n in part), None)
                if named is None and not left:
                    raise ValueError("its chat has an image without a path, and it names none")
                used.append(left.pop(0) if named is None else _image(named, place, folder))
                parts.append({"type": "image"})
            else:
                raise ValueError("a content must be text, or a list of parts of type text or image")
        chat.append({"role": message["role"], "content": parts})
    if left or not chat:
        raise ValueError(f"{len(left)} of its images are in none of {len(chat)} messages")
    return chat, used


class ImageTextReader(Reader):
    """Makes the inputs of a model that reads images with text, by its ``processor``."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.kind, self.name, self.writes = IMAGES_WITH_TEXT, "", False
        self.model, self.processor = model, processor

    def clips(self, items: Sequence[Example]) -> Iterator[Example]:
        """Yield the examples."""
        yield from items

    def sequences(self, clips: Sequence[Example], *facts: Any) -> Sequences:
        """Return the inputs of the model's forward pass, for each example its own."""
        return Sequences([self._one(each) for each in clips], *facts)

    def _one(self, example: Example) -> dict[str, Tensor]:
        images = [decode_image(image) for image in example.images]
        failure = f"data: {type(self.processor).__name__} can't read {example.place}"
        with refusing(failure, "change the line, or take it out", Exception):
            made = self._processed(example, images)
        most, tokens = positions_of(self.model), made["input_ids"].shape[1]
        if most is not None and tokens > most:
            raise InputError(
                f"data: {example.place} is {tokens:,} tokens with its images, and "
                f"{type(self.model).__name__} has {most:,} positions; shorten it, or take it out"
            )
        dtype = self.model.dtype
        return {n: x.to(dtype) if x.is_floating_point() else x for n, x in made.items()}

    def _processed(self, example: Example, images: Sequence[Any]) -> Mapping[str, Tensor]:
        if example.messages:
            given = iter(images)
            chat = [_with_images(message, given) for message in example.messages]
            how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            return self.processor.apply_chat_template(chat, **how)
        mark = self._token("boi") or self._token("image")  # Gemma's processor wants the first
        lacking = len(images) - example.text.count(mark) if mark else 0
        holder = f"{self._token('vision_start')}{mark}{self._token('vision_end')}"
        text = holder * max(0, lacking) + example.text
        # One of two towers side by side takes no more; where images stand in the text nothing may
        # be cut off.
        how = {} if mark else {"truncation": True}
        return self.processor(images=images or None, text=[text], return_tensors="pt", **how)

    def _token(self, name: str) -> str:
        return getattr(self.processor, f"{name}_token", None) or ""


def _with_images(message: Mapping[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [p if p["type"] == "text" else p | {"image": next(images)} for p in content]
    return {**message, "content": content}
