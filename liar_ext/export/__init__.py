"""Exports: write a folder, pruned or not, in the format of another runtime."""

from typing import TYPE_CHECKING, Any

from liar_ext.export.formats import FORMATS, Exported

if TYPE_CHECKING:
    from liar_ext.export.exporting import export

__all__ = ["FORMATS", "Exported", "export"]


def __getattr__(name: str) -> Any:
    """Import `export` and torch when it is first asked for; the command reads FORMATS alone."""
    if name == "export":
        from liar_ext.export.exporting import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
