"""What the process of the ``liar`` command needs before torch is imported, and its children.

OpenMP reads its environment when its library is loaded, and torch loads it. With the active wait
policy of GNU OpenMP two busy processes starve one another: threads that wait at a barrier spin, and
take the core from those that they wait for. A process that only uses the package keeps its own
environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import PurePath
from types import TracebackType

MODULES = ("liar_ext", "liar_ext.cli")
# Isolated until the search path is the parent's: no file of the current folder is imported.
CHILD = """\
import sys, json, runpy
sys.path[:] = json.loads(sys.argv.pop(1))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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


def child(script: str | os.PathLike[str], *arguments: object) -> list[str]:
    """Return the command that runs a script in a process of its own.

    The process imports from where this one does, and from no other folder: neither from the current
    one, nor from that of the script.
    """
    paths = json.dumps([os.path.abspath(path) for path in sys.path])
    return [sys.executable, "-I", "-c", CHILD, paths, os.fspath(script), *map(str, arguments)]


def _quietly_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Show no traceback of Ctrl-C, which may come while modules are imported."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if is_command(sys.argv, sys.orig_argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.excepthook = _quietly_interrupted
