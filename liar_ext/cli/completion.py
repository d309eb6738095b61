"""``liar --print-completion SHELL``: a script that completes ``liar`` in a shell, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

PATHS = ("MODEL", "TEXT", "FILE", "DIR", "FOLDER")  # how the help names values that are paths


class PrintCompletion(argparse.Action):
    """Print the script and leave."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Print the script for the shell ``values``."""
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab; run pip install '.[completion]'")
        for action in _actions(parser):
            if action.metavar in PATHS:
                action.complete = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
