"""Tampered folders against everything that reads a folder: no traceback, no code, no hang."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import liar_ext
from liar_ext import cli
from liar_ext.checkpoint import load_model
from liar_ext.system.errors import InputError
from reliability.outcome import LIMIT, Outcome, in_child
from reliability.tampering import tampered

TITLE = "tampered folders"
FULL, SHORT = 252, 36


def run(count: int, seed: int, work: Path) -> Iterator[Outcome]:
    """Attack ``count`` folders by three calls each, and every sixth by the command as well.

    The command starts a process for each loader of a folder that it doesn't refuse.
    """
    good = [_save(name, work / name, equal) for name, equal in (("llama", False), ("qwen2", True))]
    calls: dict[str, Callable] = {
        "load_pruned": liar_ext.load_pruned,
        "verify_pruned": lambda folder: liar_ext.verify_pruned(folder)["agrees"],
        "load_model": load_model,
        "liar verify": _verify,
    }
    attacked = tampered(good, count, seed, work / "tampered")
    for index, (case, folder, pwned) in enumerate(attacked):
        for name, call in calls.items():
            limit = LIMIT
            if name == "liar verify":
                limit = 4 * LIMIT
                if index % 6:
                    continue
            kind, answer, seconds = in_child(
                lambda call=call, folder=folder: _call(call, folder), limit
            )
            verdict, detail = answer if kind == "value" else (kind, str(answer))
            if kind == "error":
                verdict = "traceback"
            if pwned.exists():
                pwned.unlink()
                verdict = "code run"
            yield Outcome(TITLE, case, name, verdict, seconds, detail)


def _call(call: Callable, folder: Path) -> tuple[str, str]:
    """Return the verdict of one call; what is no InputError of one line gets out."""
    warnings.simplefilter("ignore")
    try:
        result = call(folder)
    except InputError as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        assert len(str(error)) < 1000, f"too long: {error}"
        return "refused", str(error)
    return ("other outputs" if result is False else "done"), ""


def _verify(folder: Path) -> bool:
    """Run the command: 0 and 1 are answers, 2 a refusal with one line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["verify", str(folder)])
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if code == 2:
        assert len(lines) == 1, said.getvalue()
        raise InputError(lines[0])
    assert code in (0, 1) and not lines, (code, lines)
    return code == 0


def _save(name: str, folder: Path, equal: bool) -> Path:
    from folders import equal_plan, make_plan, pruned, tokenizer

    model, plan = pruned(name, equal_plan if equal else make_plan)
    liar_ext.save_pruned(model, folder, plan, tokenizer=tokenizer())
    assert liar_ext.verify_pruned(folder)["agrees"]
    return folder
