"""The one exception for input that cannot be used, and how errors of others are quoted."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What torch says where an allocation on the CPU fails, for which it has no exception of its own.
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "out of memory",
)


class InputError(ValueError):
    """Input that breaks a rule: operation, rule, what came, what to do.

    The command turns it into one line and exit code 2; any other exception is a defect of ours.
    """


def one_line(error: object, length: int = 300) -> str:
    """Return what an error or a message says as one line, cut to ``length`` characters."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= length else f"{text[: length - 3]}..."


def printable(text: str) -> str:
    """Return text that drives no terminal: what is not printable is shown as U+FFFD."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


# What other tools, and other commands, call an option.
ELSEWHERE = {
    "keep": ("amount", "budget", "compression_ratio", "pruning_ratio", "ratio", "sparsity"),
    "calibration": ("data", "dataset", "text"),
    "text": ("calibration", "data", "dataset"),
    "out": ("output", "output_dir", "save", "save_dir", "save_path"),
    "samples": ("nsamples", "num_calibration_samples", "num_samples"),
    "seq_len": ("max_length", "max_seq_length", "seqlen"),
}


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", count: int = 1) -> str:
    """Return a question with the known names nearest to a wrong one, if some are near."""
    plain = {each.strip("-").replace("-", "_"): each for each in known}
    given = str(name)[:40].strip("-").replace("-", "_")
    same = [own for own, others in ELSEWHERE.items() if given in others and own in plain]
    near = [plain[own] for own in same or difflib.get_close_matches(given, plain, count)]
    meaning = ", the fraction that stays" if same == ["keep"] else ""  # of others what goes
    return f"did you mean {', '.join(near)}{meaning}?" if near else otherwise


def typed(path: object) -> str:
    """Return a path as one types it: quoted, and ``./-name``, which is no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def install(extra: str) -> str:
    """Return the command that installs the packages of an extra, wherever it is run."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needs = requires("liar_ext") or []
    except PackageNotFoundError:
        needs = []
    some = (need.partition(";") for need in needs)
    named = [need.strip() for need, _, at in some if re.search(rf"extra == ['\"]{extra}['\"]", at)]
    return shlex.join(["pip", "install", *(named or [f".[{extra}]"])])


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that an allocation failed, on the CPU or on a GPU."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError) or said


@contextmanager
def naming_memory(what: str) -> Iterator[None]:
    """Let an allocation that fails say what it was for, unless its error says so already."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or ": out of memory" in str(error):
            raise
        # torch says first which check failed, and last which process holds what.
        said = ". ".join(one_line(error).split("err == 0. ")[-1].split(". ")[:2])
        raise MemoryError(f"{what}: {said}") from error


@contextmanager
def refusing(
    what: str,
    hint: str,
    *kinds: type[BaseException],
    named: bool = False,
    but: tuple[type[BaseException], ...] = (),
    own: str | tuple[str, ...] = "",
) -> Iterator[None]:
    """Turn errors of some kinds into an InputError of one line: what failed, why, what to do.

    With ``named`` the line says the kind of the error. Errors of the kinds ``but``, those of
    memory, and an InputError that begins with ``own``, pass. Around the import of an optional
    package, kinds are ``Exception``: a broken one raises anything.
    """
    try:
        yield
    except kinds as error:
        is_own = isinstance(error, InputError) and str(error).startswith(own)
        if is_own or isinstance(error, but) or is_out_of_memory(error):
            raise
        kind = f"{type(error).__name__}: " if named else ""
        end = f"; {hint}" if hint else ""
        raise InputError(f"{what}: {kind}{one_line(error)}{end}") from error


@contextmanager
def asking_hub(failure: str) -> Iterator[None]:
    """Turn an error of the way to the hub into an InputError; what the hub says of a name passes.

    To ask it once beforehand saves a user the library's own attempts, which take up to a minute
    without a network.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError):
        pass  # a download says more of it
    except Exception as error:  # of httpx, or of requests
        raise InputError(f"{failure}: {one_line(error, 160)}") from error
