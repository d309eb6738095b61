"""The processor of a model that reads recordings or pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liar_ext.calibration.media import AUDIO, Reader, kind_read
from liar_ext.checkpoint.inspection import read_config, read_json
from liar_ext.checkpoint.names import PROCESSOR_FILES, TOKENIZER_FILES
from liar_ext.checkpoint.reading import reading, stock_class
from liar_ext.errors import InputError


def kind_of(name: str) -> str | None:
    """Return what a model reads by its config: "audio", "images", or None for text.

    What can't be told is text: the loader says what is wrong.
    """
    path = Path(name)
    try:
        if path.is_dir():
            fields = read_config(path, "load_model")
        elif path.exists() or path.is_absolute() or path.suffix == ".gguf":
            return None
        else:
            from transformers import AutoConfig

            fields = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
        return kind_read(stock_class(fields, "load_model").main_input_name)
    except Exception:  # transformers raises a dozen kinds
        return None


def load_reader(kind: str, name: str, model: Any) -> Reader:
    """Return what makes the inputs of a model from files, without running code of its folder.

    Raises
    ------
    InputError
        If there is no processor, or one of another kind of model.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    path, given = Path(name), {"trust_remote_code": False}
    wanted = (PROCESSOR_FILES, TOKENIZER_FILES)
    there, texts = ([file for file in files if (path / file).exists()] for files in wanted)
    if path.is_dir() and not there:
        raise InputError(
            f"load_model: {name} has no processor to read {kind} with; put its "
            f"{PROCESSOR_FILES[0]} into the folder, or call liar_ext.prune with batches of your own"
        )
    for file in there:
        read_json(path / file, "load_model")
    with reading(f"the processor of {name}", "load_model"):
        if kind == AUDIO:
            processor = AutoFeatureExtractor.from_pretrained(name, **given)
        else:  # by pillow, whose numbers don't depend on what else is installed
            processor = AutoImageProcessor.from_pretrained(name, backend="pil", **given)
    tokenizer = None
    if kind == AUDIO and (texts or not path.is_dir()):
        with reading(f"the tokenizer of {name}", "load_model"):
            tokenizer = AutoTokenizer.from_pretrained(name, **given)
    return Reader(kind, model, processor, tokenizer)
