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
INTRODUCTION = """# Reliability: attacks, and what came of them

See here which faults the package was attacked with. No attack led to lost data, or foreign code
that ran, unless the last column says so. `load_pruned` takes weights as they are in the file, as
transformers does: `liar verify` tells whether bytes changed. `make reliability` runs all attacks,
in some twenty minutes of an idle core, and writes this page.
This run took {minutes:.0f} minutes. `make test-all` runs a few of each, `make test` of the short
ones.

## Results

{table}

"Bad" counts {bad}.

{where}. Seeds and counts are in `docs/reliability.json`.

## The attacks

### Tampered folders

A saved folder is damaged:

- bytes flipped, files cut, deleted, linked elsewhere or replaced by pipes;
- JSON fields with nasty values, or sizes that the weights do not have;
- foreign code, or pickles in place of weights.

`load_pruned`, `verify_pruned` and `load_model` read each folder, and `liar verify` every sixth.
Each call must refuse in one line, or load or judge what is there. It must run none of the code. It
may take 60 seconds (the command 240) and 12 GiB of address space.

### Files of strangers

- a checkpoint with nasty values in its job, with a result of the user, with links or pipes;
- a record of exports that names a pipe;
- a GGUF file with code or an adapter beside it, without one of its weights, or damaged;
- a result and a checkpoint in one place; a standard output that is closed or full;
- files in the current folder with names of modules.

Nothing may wait or show a traceback. None of the code may run. Models and banks of the user must
stay unchanged.

### Kills in the save phase

SIGKILL, SIGINT and SIGTERM arrive at file operations of a save and at random times. An older folder
to replace may be there, and the system may lack the exchange of two folders. The folder must be
absent, the old one or the new one. The next run must find it or restore it, and leave nothing else
behind.

### Jobs that are stopped

SIGKILL, SIGINT and SIGTERM arrive at random times. The jobs are `liar calibrate` (with
sensitivities), `liar merge`, and `liar prune` in one pass, layerwise, by blocks and from a bank.
Each is stopped fifty times, with a checkpoint that is written as often as possible, and continued
by `liar resume`.

After every stop the output must be absent or whole, and each file of the checkpoint whole. In the
end bank, weights and plan must have the bytes of an uninterrupted job.

### Ranks that are stopped

`liar calibrate` and `liar prune` run with two ranks of torchrun's launcher and a checkpoint.
SIGKILL arrives at a rank; SIGKILL, SIGTERM and SIGINT arrive at the launcher. Then 1, 2 or 3 ranks
continue, are stopped again, and finish.

The requirements are those above, but weights must agree within rounding. All ranks must end within
60 seconds, with one line at most and never a traceback.

### Faults of disks, files and memory

- a disk of some KiB, mounted in memory (or a limit of the file size), then room again;
- an output or a checkpoint in a folder without write permission;
- a model, or a bank, with a cut file;
- the error curves and solve of a wide model with little memory to spare.

Each job must do its work, or say in one line what is wrong. Out of memory, it must name the site.
It may leave nothing behind but its checkpoint, and with room again must end in the same bytes.

A solve that does not fit the memory of the CPU must use a file, and the report must say so.
Weights must be the same up to rounding. Otherwise the job must end in that line. One that does not
fit a GPU must run on the CPU (in the tests of a GPU).

### Bad command lines

`liar` gets unusable arguments and input. It must say so in one line, exit with 2 and write nothing.

### Operator calls

Every operator gets shapes, strides, types and values of every kind. Calls must agree with the
float64 oracle or, if spoilt on purpose, be refused by name.
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
    minutes = max(sum(row["seconds"] for row in rows) / 60, 1)
    head = ["attack", "calls", "answered", "refused", "bad"]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in rows:
        count = Counter(row["verdicts"])
        answered = count["done"] + count["other outputs"]
        bad = ", ".join(f"{count[name]} {name}" for name in COLUMNS if count[name]) or 0
        lines.append(_row([row["check"], row["calls"], answered, count["refused"], bad]))
    said = f"{', '.join(COLUMNS[:-1])} and {COLUMNS[-1]}"
    return INTRODUCTION.format(
        minutes=minutes, table="\n".join(lines), bad=said, where=record["where"]
    )


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
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"{platform.system()}, Python {platform.python_version()}, {versions}"
    for check in load_checks(options.checks):
        count = check.SHORT if options.short else check.FULL
        row = rows[check.TITLE] = attack(check, count, options.seed)
        said = f"{check.TITLE}: {row['cases']} cases, {row['calls']} calls, {row['verdicts']}"
        print(said, flush=True)
        if not options.short:  # a run that is stopped leaves what it has done
            record = {"where": where, "checks": list(rows.values())}
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            TABLE.write_text(to_markdown(record), encoding="utf-8")
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    return int(any(row["bad"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
