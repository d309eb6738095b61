"""The ``liar`` command."""

from liar_ext.cli.main import main

__all__ = ["main"]
