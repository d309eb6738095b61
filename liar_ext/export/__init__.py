"""Exports: write a folder, pruned or not, in the format of another runtime.

An exporter is ``export(folder: Path, out: Path, **options) -> list[str]`` of a module of its own.
Its options are named arguments with defaults. Before it writes, it refuses what its format can't
express, with the reason and the alternative. It writes one file or one folder of the name ``out``,
and returns sentences for the user; place and record are for :mod:`liar_ext.export.exporting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liar_ext.export.exporting import export

__all__ = ["FORMATS", "Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What was exported.

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
    """A row of the table of formats."""

    module: str  # of the exporter, imported when it is used
    what: str  # is written, for the help of the command
    suffix: str | None  # of the folder's name if no output is named; None: nothing is written
    packages: tuple[str, ...] = ()  # that the exporter needs, by the name that is imported
    extra: str = ""  # of this package, which installs them


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


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Return the name of the dtype that a config says its weights have."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def __getattr__(name: str) -> Any:
    """Import `export` and torch when it is first asked for; the command reads FORMATS alone."""
    if name == "export":
        from liar_ext.export.exporting import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
