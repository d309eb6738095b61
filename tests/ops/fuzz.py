"""Call the operators at random: `python tests/ops/fuzz.py --calls 10000 --seed 0`.

Every call agrees with the float64 oracle, or was spoilt on purpose and is refused with an error
that names the operator. Prints one line of JSON; exit code 1 if a call was wrong, ended in another
exception, or crashed the process. `--only I` runs call I alone, with its traceback; `--library DIR`
takes liar_ext from there, such as a build with sanitizers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

OPERATORS = ("gram_update_", "obs_curve", "reconstruct")
OUTCOMES = ("agreed", "refused", "wrong", "tracebacks", "crashed")


def run_one(seed: int, number: int) -> str:
    """Make call ``number`` of a seed and check it; return what came of it."""
    from fuzz_calls import RandomChoices
    from fuzz_checks import check_call, make_call

    choices = RandomChoices((seed, number))
    return check_call(make_call(choices, OPERATORS[number % len(OPERATORS)]), choices)


def work(seed: int, first: int, end: int) -> None:
    """Run calls and print a line for each, so that whoever reads sees where a crash was."""
    import torch

    for number in range(first, end):
        torch.set_num_threads(1 + number // len(OPERATORS) % 2)
        try:
            outcome = run_one(seed, number)
        except AssertionError as error:
            outcome = "wrong"
            print(f"call {number}: {error}", file=sys.stderr)
        except Exception:
            outcome = "tracebacks"
            print(f"call {number}: {traceback.format_exc()}", file=sys.stderr)
        print(number, outcome, flush=True)


def use_library(folder: Path) -> None:
    """Import liar_ext from a folder, and from nowhere else."""
    sys.path.insert(0, str(folder.resolve()))
    from liar_ext import _C

    if folder.resolve() not in Path(_C.__file__).parents:
        raise SystemExit(f"fuzz.py: --library {folder} has no liar_ext")


def outcomes(seed: int, calls: int, options: Sequence[str] = ()) -> Iterator[tuple[int, str]]:
    """Yield number and outcome of ``calls`` calls, made in processes that may crash."""
    done, barren = 0, 0
    while done < calls:
        first = done
        command = [sys.executable, __file__, "--seed", str(seed), *options]
        command += ["--work", str(done), str(calls)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                number, outcome = line.split()
                done = int(number) + 1
                yield int(number), outcome
        barren = barren + 1 if done == first else 0
        if barren == 3:
            raise SystemExit(
                f"fuzz.py: no process made a call, the last ended {process.returncode}"
            )
        if done < calls:
            print(f"call {done}: the process ended with {process.returncode}", file=sys.stderr)
            yield done, "crashed"
            done += 1


def run(seed: int, calls: int, options: Sequence[str]) -> dict:
    """Return the counts of ``calls`` calls."""
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    counts.update(outcome for _, outcome in outcomes(seed, calls, options))
    return {
        "what": "operator calls",
        "tried": calls,
        "survived": calls - counts["crashed"],
        **counts,
        "seed": seed,
    }


def main() -> int:
    """Run the calls and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="run call I alone")
    parser.add_argument("--library", type=Path, metavar="DIR")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = [] if arguments.library is None else ["--library", str(arguments.library)]
    if options and (arguments.only is not None or arguments.work):
        use_library(arguments.library)
    if arguments.only is not None:
        print(run_one(arguments.seed, arguments.only))
        return 0
    if arguments.work:
        work(arguments.seed, *arguments.work)
        return 0
    counts = run(arguments.seed, arguments.calls, options)
    print(json.dumps(counts))
    return int(any(counts[name] for name in ("wrong", "tracebacks", "crashed")))


if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:2]]
    sys.exit(main())
