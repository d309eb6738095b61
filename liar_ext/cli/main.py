"""The ``liar`` command."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence

from liar_ext.cli import (
    bench,
    calibrate,
    compare,
    evaluate,
    export,
    families,
    info,
    merge,
    prune,
    report,
    resume,
    sweep,
    verify,
)
from liar_ext.cli.options import one_line, parse
from liar_ext.errors import InputError, is_out_of_memory

COMMANDS = {
    "prune": prune.run,
    "calibrate": calibrate.run,
    "merge": merge.run,
    "resume": resume.run,
    "sweep": sweep.run,
    "eval": evaluate.run,
    "verify": verify.run,
    "bench": bench.run,
    "report": report.run,
    "compare": compare.run,
    "export": export.run,
    "families": families.run,
    "info": info.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done; 1: ``verify`` found other outputs; 2: input that cannot be used, or too little memory
    for it; 130: interrupted; 141: whoever reads the output, such as ``head``, has enough of it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that can't show a name shows a "?"
            stream.reconfigure(errors="replace")
    options = parse(arguments)
    if getattr(options, "quiet", False):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        code = COMMANDS[options.command](options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        return 141 if _nobody_reads() else _fail(error)
    except (InputError, OSError) as error:  # OSError: no permission, disk full, no such file
        return _fail(error)
    except (MemoryError, RuntimeError) as error:
        said = str(error) or "out of memory"
        if is_out_of_memory(error):
            return _fail(
                f"{said.split('. ')[0]}; give smaller --batch-size or --memory, --dtype bfloat16, "
                "--device auto for several GPUs, or --max-memory to prune block by block"
            )
        raise
    except KeyboardInterrupt:
        return 130


def _nobody_reads() -> bool:
    """Tell whether the standard output is closed at its other end; what is left goes nowhere."""
    output, end = sys.stdout.fileno(), select.poll()
    end.register(output, 0)
    closed = any(event & select.POLLERR for _, event in end.poll(0))
    if closed:  # Python would try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed


def _fail(error: object) -> int:
    print(f"liar: error: {one_line(error)}", file=sys.stderr)
    return 2
