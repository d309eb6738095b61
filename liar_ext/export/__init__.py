"""Exports: write a folder, pruned or not, in the format of another runtime."""

from liar_ext.export.exporting import export
from liar_ext.export.formats import FORMATS, Exported

__all__ = ["FORMATS", "Exported", "export"]
