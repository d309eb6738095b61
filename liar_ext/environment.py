"""What the process of the ``liar`` command needs before torch is imported.

OpenMP reads its environment when its library is loaded, and torch loads it. With the active wait
policy of GNU OpenMP two busy processes starve one another: threads that wait at a barrier spin, and
take the core from those that they wait for. A process that only uses the package keeps its own
environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

MODULES = ("liar_ext", "liar_ext.cli")


def is_command(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Tell whether a process is the ``liar`` command: its script, or ``python -m liar_ext``.

    Parameters
    ----------
    argv : sequence of str
        ``sys.argv``; while the package of ``python -m`` is imported its first item is ``-m``.
    original : sequence of str
        ``sys.orig_argv``.
    """
    if argv and argv[0] == "-m":
        at = original.index("-m") + 1 if "-m" in original else len(original)
        return original[at : at + 1] in ([name] for name in MODULES)
    name = PurePath(argv[0]) if argv else PurePath()
    return name.stem == "liar" and name.suffix in ("", ".exe")


if is_command(sys.argv, sys.orig_argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
