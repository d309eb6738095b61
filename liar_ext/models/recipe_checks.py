"""Checks of what a recipe is given: values, keywords and settings that go together."""

from __future__ import annotations

import math
import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from typing_extensions import TypedDict

from liar_ext.models.plan import KINDS, PARTS, Budget, is_number
from liar_ext.system.errors import InputError, did_you_mean, refusing

# What a check is: name and value in, the value in its own type out, or InputError.
Check = Callable[[str, Any], Any]
# What a criterion is computed from beside weights, by its name; @liar_ext.criterion adds others.
CRITERIA = dict.fromkeys(("magnitude", "obs", "random", "wanda", "wifv"), "moments")
CRITERIA |= dict.fromkeys(("fisher", "snip", "taylor"), "gradient")
THOUSAND = 1024  # 32k is 32,768 tokens, as vocabularies are counted
BYTES = {f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)}
BYTES |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)}
BYTES |= {each(unit): size for unit, size in BYTES.items() for each in (str.lower, str.upper)}
MOST = 2**63 - 1  # what torch's generators, sizes and JSON readers take


def wrong(name: str, must: str, value: Any) -> InputError:
    """Return the error for a field that must be something else."""
    return InputError(f"recipe: {name} must {must}, got {shown(value)}")


def checked(
    must: str,
    accepts: Callable[[Any], bool] | None = None,
    make: Callable[[Any], Any] | None = None,
) -> Check:
    """Return the check of what a test accepts and ``make`` gives its type, or refuses."""

    def check(name: str, value: Any) -> Any:
        with suppress(ValueError, OverflowError):  # an integer beyond the largest float, for one
            if accepts is None or accepts(value):
                return value if make is None else make(value)
        raise wrong(name, must, value)

    return check


number = checked(
    "be a number such as 0.5", lambda value: is_number(value) and math.isfinite(value), float
)
number_or_auto = checked(
    'be a number of at least 0 or "auto"',
    lambda value: (
        value == "auto" or ((isinstance(value, str) or is_number(value)) and float(value) >= 0)
    ),
    lambda value: value if value == "auto" else float(value),
)
flag = checked("be true or false", lambda value: isinstance(value, bool))
digests = checked(
    "map names of texts to digests",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(each, str) for pair in value.items() for each in pair)
    ),
    dict,
)


def criterion(name: str, value: Any) -> str:
    """Check the name of a criterion."""
    if text(name, value) not in CRITERIA:
        known = f"known: {', '.join(sorted(CRITERIA))}; @liar_ext.criterion adds one in Python"
        hint = did_you_mean(value, CRITERIA, known)
        raise InputError(f"score: unknown criterion {value!r}; {hint}")
    return value


def optional(check: Check) -> Check:
    """Return a check that takes None as well."""
    return lambda name, value: None if value is None else check(name, value)


def whole(least: int) -> Check:
    """Return the check of an integer of at least ``least``."""
    return checked(
        f"be an integer of at least {least}, and below 2^63",
        lambda value: is_number(value, numbers.Integral) and least <= value <= MOST,
        int,
    )


share = checked(
    "be in (0, 1], such as 0.9", lambda value: is_number(value) and 0 < value <= 1, float
)


def _share_or_count(value: Any) -> float | int:
    """Return a fraction in (0, 1], or an integer above 1 that counts; else raise ValueError."""
    if is_number(value) and 0 < value <= 1:
        return float(value)
    if is_number(value, numbers.Integral) and 1 < value <= MOST:
        return int(value)
    raise ValueError(value)


experts = checked(
    "be a fraction in (0, 1], or a number of experts such as 48", make=_share_or_count
)


def _tokens(value: Any) -> float | int | str:
    found = read_tokens(value) if isinstance(value, str) else value
    return found if found == "auto" else _share_or_count(found)


# A number of tokens may be text.
vocabulary = checked(
    'be a fraction in (0, 1], a number of tokens such as 32k, or "auto"', make=_tokens
)


def quantity(text: str, units: Mapping[str, float]) -> float | None:
    """Read a number and its unit as so many units; None if text is not that."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w*)", text.strip())
    return float(found[1]) * units[found[2]] if found and found[2] in units else None


def _bytes(value: Any) -> int:
    found = quantity(value, BYTES) if isinstance(value, str) else value
    if found is None or not is_number(value, str | numbers.Integral) or not 1 <= found <= MOST:
        raise ValueError(value)
    return int(found)


# An integer is of bytes.
size = checked("be a number and a unit, such as 12GiB or 500MB", make=_bytes)


def scripts(name: str, value: Any) -> tuple[str, ...]:
    """Check a list of Unicode scripts."""
    import regex

    for script in texts(name, value):
        try:
            known = re.fullmatch(r"\w{3,40}", script) and regex.compile(rf"\p{{Script={script}}}")
        except regex.error:
            known = None
        if not known or script.lower() in ("common", "inherited", "unknown"):
            raise wrong(name, "name Unicode scripts such as latin, greek or cyrillic", script)
    return texts(name, value)


def read_tokens(text: str) -> float | int | str:
    """Read a fraction, a number of tokens, or thousands of them; other text is returned."""
    if found := re.fullmatch(r"(\d{1,9})\s*[kK]", text.strip()):
        return int(found[1]) * THOUSAND
    return read_number(text)


def read_number(text: str) -> float | int | str:
    """Read an integer or a fraction; other text is returned."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def read_sites(text: Any) -> Any:
    """Read which layers may be pruned; what is no name of some is returned."""
    known = {"all": KINDS, "attn": ("attn",), "mlp": ("mlp",)}
    known |= {part: (*KINDS, part) for part in PARTS}
    return known.get(text, text) if isinstance(text, str) else text


def text(name: str, value: Any) -> str:
    """Check a name or path; no file holds one that is not UTF-8."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise wrong(name, "be text, not empty and without NUL", value)
    with refusing(f"recipe: {name} must be UTF-8, got {value!r}", "rename it", UnicodeError):
        value.encode()
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Check a list of names or paths."""
    if not _is_list(value):
        raise wrong(name, "be a list of texts", value)
    return tuple(text(name, each) for each in value)


def one_of(names: Sequence[str]) -> Check:
    """Return the check of one of some names."""
    must = f"be one of {', '.join(names)}"
    check = checked(must, lambda value: isinstance(value, str) and value in names)
    check.names = tuple(names)
    return check


def some_of(names: Sequence[str]) -> Check:
    """Return the check of a list of different names, at least one."""

    def accepts(value: Any) -> bool:
        known = _is_list(value) and all(isinstance(each, str) and each in names for each in value)
        return known and 0 < len(value) == len(set(value))

    check = checked(f"be a list of some of {', '.join(names)}", accepts, tuple)
    check.names = tuple(names)
    return check


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


def shown(value: Any) -> str:
    """Return a value for an error message: one short line, whatever it is."""
    with suppress(ValueError):  # of an integer with more digits than Python writes
        return " ".join(SHORT.repr(value).split())
    return f"a {type(value).__name__} that is too long"


class TextOptions(TypedDict, total=False):
    """Text that :func:`liar_ext.prune` takes beside the calibration set."""

    evaluate_on: Sequence[Mapping[str, Any]] | None
    certify_on: Sequence[Mapping[str, Any]] | None
    judge_on: Sequence[Mapping[str, Any]] | None


class JobOptions(TypedDict, total=False):
    """Fields of a recipe that :func:`liar_ext.prune` uses, ``preset`` and ``sites``.

    A test compares names and types with :class:`liar_ext.Recipe`.
    """

    preset: str
    sites: str | Sequence[str]
    seed: int
    memory: int | str | None
    keep: float | Budget
    of: str
    latency_phase: str
    latency_batch: int
    latency_prompt: int
    latency_new_tokens: int
    latency_table: str | None
    tile: int | str
    uniform_layers: bool
    keep_hidden: float
    keep_blocks: float
    keep_experts: float | int
    kinds: Sequence[str]
    attn_unit: str
    criterion: str
    allocation: str
    reconstruct: str
    damp: float | str
    schedule: str
    rescale: bool


class PruneOptions(JobOptions, TextOptions, total=False):
    """Keywords of :func:`liar_ext.prune` beside its parameters."""


class CompressOptions(JobOptions, total=False):
    """Keywords of :func:`liar_ext.compress` beside its parameters."""

    heal: str | float | None
    max_memory: int | str | None
    overwrite: bool
    dtype: str
    device: str
    samples: int
    self_text: float
    random_tokens: float | str
    seq_len: int
    batch_size: int
    eval: str | None
    eval_samples: int | None
    certify: int
    keep_vocab: float | str
    vocab_text: tuple[str, ...]
    vocab_scripts: tuple[str, ...]


def check_keywords(
    operation: str, given: Iterable[str], known: Iterable[str], instead: Mapping[str, str]
) -> None:
    """Raise InputError for a keyword that a function lacks, with what does it ``instead``."""
    known = list(known)
    for name in given:
        if instead.get(name):
            raise InputError(f"{operation}: {name} is no keyword in Python: {instead[name]}")
        if name not in known:
            hint = did_you_mean(name, known, "docs/options.md has all of them")
            raise InputError(f"{operation}: there is no keyword {name}; {hint}")
