"""The ``liar`` command within a test."""

from __future__ import annotations

from liar_ext import cli


def run(*arguments: object) -> int:
    """Run the command and return its exit code."""
    return cli.main([str(argument) for argument in arguments])


def quick(model: object, text: object, out: object, *more: object) -> list[str]:
    """Return a ``liar prune`` of few sequences by the fastest settings, with options more."""
    command = ["prune", model, "--calibration", text, "--out", out, "--preset", "fast"]
    return [str(each) for each in (*command, "--samples", 16, "--seq-len", 32, *more)]


def refused(capsys, *arguments: object) -> str:
    """Run a command that must be refused; return its error and hint as one line."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines(keepends=True)
    said = "".join(line for line in lines if not line.startswith("warning: "))
    said = said.replace("\nhint: ", "; ")
    assert said.startswith("error: ") and said.count("\n") == 1
    return said
