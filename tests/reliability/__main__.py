"""Run every attack and write docs/reliability.json and docs/reliability.md: ``make reliability``.

A check is a module of this package with a ``TITLE``, numbers of cases ``FULL`` and ``SHORT``, and
``run(count, seed, folder)``, which yields an :class:`~reliability.outcome.Outcome` per attack.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD, TABLE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
CHECKS = (
    *("folders_attacked", "strangers", "kills", "stops", "rank_stops", "faults", "commands"),
    "operators",
)
COLUMNS = ("traceback", "crash", "wrong answer", "hang", "code run", "data lost", "left behind")
INTRODUCTION = """# Reliability

What was done to the package to break it, and what came of it. `make reliability` runs all of it
({minutes:.0f} minutes on one core here) and writes this page; `make test` runs a few of each.

- **tampered folders**: a saved folder with bytes flipped, files cut, deleted, linked elsewhere or
  replaced by pipes, fields of its JSON replaced by nasty values, sizes that its weights don't have,
  code of a stranger, pickles for weights; given to `load_pruned`, `verify_pruned` and `load_model`,
  and every sixth to `liar verify`. Each call must refuse in one line, or do its work, within 60
  seconds (the command, which starts a process for each loader, within 240) and 12 GiB of address
  space, and run none of the code.
- **files of strangers**: a checkpoint whose job has nasty values or names a result of the
  user, with links and pipes among its files; a record of exports that names a pipe; a GGUF file
  with code and an adapter beside it, without one of its weights, or damaged; a result and a
  checkpoint in one place; a standard output that is closed or full; files in the current folder
  that are named as modules. Nothing may wait or show a traceback, none of the code may run, and the
  models and banks of the user must stay as they are.
- **kills in the save phase**: SIGKILL, SIGINT and SIGTERM at file operations of a save and at
  random times, with and without an older folder to replace, with and without the system's exchange
  of two folders. The folder must be absent, the old one or the new one, and the next run must find
  what was there, or move it back, and leave nothing else behind.
- **jobs that are stopped**: SIGKILL, SIGINT and SIGTERM at random times of `liar calibrate` (with
  sensitivities), `liar prune` in one pass, layerwise, by blocks (`--max-memory`) and from a bank,
  and `liar merge`, fifty each, with a checkpoint that is written as often as can be; the next
  process goes on by `liar resume` and is stopped again. After every stop the output must be absent
  or whole and each file of the checkpoint whole, and in the end bank, weights and plan the bytes of
  a job that nobody stopped.
- **ranks that are stopped**: `liar calibrate`, and `liar prune` in one pass, layerwise and by
  blocks, by two ranks of torchrun's launcher with a checkpoint, at random times: SIGKILL to one of
  the ranks, and SIGKILL, SIGTERM and SIGINT to the launcher (one that is killed leaves its ranks
  behind). 1, 2 or 3 ranks, as drawn, go on and are stopped again, and in the end 1, 2 or 3 finish.
  The demands are those of jobs that are stopped, and all ranks must end within 60 seconds; where a
  rank was killed one line must say so, and never a traceback.
- **faults of disks, files and memory**: a quarter each: a disk of some KiB (mounted in memory;
  where that isn't allowed, a limit of the size of files), with and without a checkpoint, and with
  room again after that; an output or a checkpoint in a folder without write permission; a model, or
  a bank, whose file was cut; and the error curves and solve of a wide model with little address
  space, or little private memory, to spare. Each job must do its work, or say in one line what is
  wrong (out of memory: at which site), leave nothing behind but its checkpoint, and with room again
  end in the same bytes. What doesn't fit the CPU's memory must give the same weights but for
  rounding, in a file, and say so in the report (a solve in the row of its site), or end in that
  line; what a GPU has no room for is done on the CPU (in the tests of a GPU).
- **bad command lines**: `liar` with arguments and input that cannot be used, which must say so in
  one line, exit with 2 and write nothing.
- **operator calls**: every operator with shapes, strides, types and values of every kind. Each call
  must agree with the float64 oracle or, where it was spoilt on purpose, be refused by name.
"""


def load_checks(names: Iterable[str] = CHECKS) -> list:
    """Return the modules of the checks that there are."""
    return [
        import_module(f"reliability.{name}") for name in names if find_spec(f"reliability.{name}")
    ]


def attack(check, count: int, seed: int) -> dict:
    """Run a check and return what is recorded of it."""
    work = Path(tempfile.mkdtemp(prefix="reliability"))
    start, verdicts, bad, slowest, cases = time.monotonic(), Counter(), [], 0.0, set()
    try:
        for outcome in check.run(count, seed, work):
            verdicts[outcome.verdict] += 1
            cases.add(outcome.case)
            slowest = max(slowest, outcome.seconds)
            if outcome.bad:
                bad.append(vars(outcome))
                text = f"{outcome.verdict}: {outcome.case}: {outcome.call}\n{outcome.detail}\n"
                print(ascii(text), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "check": check.TITLE,
        "cases": len(cases),
        "calls": sum(verdicts.values()),
        "seed": seed,
        "verdicts": dict(sorted(verdicts.items())),
        "bad": bad,
        "slowest_seconds": round(slowest, 1),
        "seconds": round(time.monotonic() - start),
    }


def to_markdown(record: dict) -> str:
    """Return the page."""
    rows = record["checks"]
    minutes = sum(row["seconds"] for row in rows) / 60
    head = ["attack", "cases", "calls", "answered", "refused", *COLUMNS, "slowest, s"]
    lines = [INTRODUCTION.format(minutes=max(minutes, 1)), _row(head), _row(["---"] * len(head))]
    for row in rows:
        count = Counter(row["verdicts"])
        answered = count["done"] + count["other outputs"]
        cells = [row["check"], row["cases"], row["calls"], answered, count["refused"]]
        lines.append(_row([*cells, *(count[name] for name in COLUMNS), row["slowest_seconds"]]))
    where = record["where"]
    lines += ["", f"{where}. Seeds and counts: `docs/reliability.json`."]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Run the checks; exit code 1 if anything bad came of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", nargs="+", default=CHECKS, help="which; the others stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few cases each; writes nothing")
    options = parser.parse_args()

    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # before transformers is imported
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    old = json.loads(RECORD.read_text(encoding="utf-8"))["checks"] if RECORD.exists() else []
    rows = {row["check"]: row for row in old}
    for check in load_checks(options.checks):
        count = check.SHORT if options.short else check.FULL
        row = rows[check.TITLE] = attack(check, count, options.seed)
        print(f"{check.TITLE}: {row['cases']} cases, {row['calls']} calls, {row['verdicts']}")
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"{platform.system()}, Python {platform.python_version()}, {versions}"
    record = {"where": where, "checks": list(rows.values())}
    if not options.short:
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        TABLE.write_text(to_markdown(record), encoding="utf-8")
    return int(any(row["bad"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
