"""Which formats there are, and what an exporter gives back.

An exporter is one module with a function::

    export(folder: Path, out: Path, *, progress: bool = True, **options) -> Exported

``folder`` is an existing model folder. ``out`` doesn't exist yet, and its parent does: the function
writes one file or one folder of that very name and nothing else; where it goes in the end, what may
be replaced there and the record of it are the business of :mod:`liar_ext.export.exporting`. Its own
options are named arguments with defaults. It imports optional packages inside of functions, and
refuses what its format can't express with the reason and the alternative, before it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote.

    Parameters
    ----------
    format : str
        Name of the format.
    paths : tuple of Path
        The file or folder that was written; empty where nothing had to be.
    notes : tuple of str
        Sentences for the user: how to load it, what differs from the folder.
    bytes : int
        Size of all of it.
    """

    format: str
    paths: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Parameters
    ----------
    module : str
        The module of the exporter, imported when it is used.
    what : str
        What is written, for the help of the command.
    suffix : str or None
        Added to the folder's name where no output is named; None: nothing is written.
    packages : tuple of str
        Packages, by the name that is imported, which the exporter needs.
    extra : str
        The extra of this package that installs them.
    """

    module: str
    what: str
    suffix: str | None
    packages: tuple[str, ...] = ()
    extra: str = ""


FORMATS = {
    "gguf": Format("liar_ext.export.gguf", "a GGUF file for llama.cpp", ".gguf", ("gguf",), "gguf"),
    "onnx": Format(
        "liar_ext.export.onnx",
        "a folder with an ONNX graph for onnxruntime and sentence-transformers",
        "-onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        "onnx",
    ),
    "vllm": Format("liar_ext.export.vllm", "nothing: says how vLLM takes the folder", None),
    "uniform": Format(
        "liar_ext.export.uniform",
        "a folder with equal layers, which needs no code to load",
        "-uniform",
    ),
}


def is_unequal(config: Mapping[str, Any]) -> bool:
    """Tell whether a config says that the stock class can't build the layers of its folder."""
    mark = config.get("liar")
    return isinstance(mark, Mapping) and mark.get("layers") == "unequal"
