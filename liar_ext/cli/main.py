"""The ``liar`` command."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from liar_ext.checkpoint.quietening import no_bars
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
from liar_ext.cli.several import PATIENCE, check_shared, join, say, silence_of_others, what_was_lost
from liar_ext.errors import InputError, is_out_of_memory
from liar_ext.ranks import RankLost, Ranks

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
    for it; 3: another rank of torchrun ended; 130: interrupted; 141: whoever reads the output, such
    as ``head``, has enough of it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that can't show a name shows a "?"
            stream.reconfigure(errors="replace")
    with silence_of_others():
        options = parse(arguments)
    ranks = join(options)
    try:
        with no_bars() if getattr(options, "quiet", False) else nullcontext():
            code, error = _run(options, ranks)
    except BaseException:
        ranks.tells()  # so that the others don't
        raise
    if error is not None:
        say(ranks, one_line(error))
    return code


def _run(options: argparse.Namespace, ranks: Ranks) -> tuple[int, object]:
    """Run the command; return its exit code, and what to say of it."""
    try:
        check_shared(options, ranks)
        code = COMMANDS[options.command](options) or 0
        sys.stdout.flush()
        ranks.leave()
        return code, None
    except BrokenPipeError as error:
        return (141, None) if _nobody_reads() else (2, error)
    except (InputError, OSError) as error:  # OSError: no permission, disk full, no such file
        return 2, error
    except RankLost as error:
        return 3, what_was_lost(ranks, options, str(error), PATIENCE)
    except (MemoryError, RuntimeError) as error:
        said = str(error) or "out of memory"
        if is_out_of_memory(error):
            return 2, (
                f"{said.split('. ')[0]}; give smaller --batch-size or --memory, --dtype bfloat16, "
                "--device auto for several GPUs, or --max-memory to prune block by block"
            )
        return _interrupted(error, ranks)
    except BaseException as error:
        return _interrupted(error, ranks)


def _interrupted(error: BaseException, ranks: Ranks) -> tuple[int, None]:
    """Return the exit code of an interrupt; raise an error that came of nothing of the kind.

    An interrupt in the middle of a context can leave that unable to close, so that another error
    comes out, with the interrupt behind it.
    """
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__context__
    if behind is None:
        raise error
    ranks.tells()
    return 130, None


def _nobody_reads() -> bool:
    """Tell whether the standard output is closed at its other end; what is left goes nowhere."""
    output, end = sys.stdout.fileno(), select.poll()
    end.register(output, 0)
    closed = any(event & select.POLLERR for _, event in end.poll(0))
    if closed:  # Python would try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed
