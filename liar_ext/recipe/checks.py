"""Checks of what a recipe is given: values, keywords and settings that go together."""

from __future__ import annotations

import math
import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from liar_ext.errors import InputError, did_you_mean
from liar_ext.plan import Budget

# What a check is: name and value in, the value in its own type out, or InputError.
Check = Callable[[str, Any], Any]
THOUSAND = 1024  # 32k is 32,768 tokens, as vocabularies are counted
MOST = 2**63 - 1  # what torch's generators, sizes and JSON readers take


def wrong(name: str, must: str, value: Any) -> InputError:
    """Return the error for a field that must be something else."""
    return InputError(f"recipe: {name} must {must}, got {shown(value)}")


def optional(check: Check) -> Check:
    """Return a check that takes None as well."""
    return lambda name, value: None if value is None else check(name, value)


def whole(least: int) -> Check:
    """Return the check of an integer of at least ``least``."""

    def check(name: str, value: Any) -> int:
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if is_whole and least <= value <= MOST:
            return int(value)
        beyond = " and below 2^63" if isinstance(value, numbers.Integral) and value > MOST else ""
        raise wrong(name, f"be an integer of at least {least}{beyond}", value)

    return check


def number(name: str, value: Any) -> float:
    """Check a finite number."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer beyond the largest float
            pass
    raise wrong(name, "be a number", value)


def share(example: str) -> Check:
    """Return the check of a number in (0, 1], with an example for the error."""

    def check(name: str, value: Any) -> float:
        found = number(name, value)
        if not 0.0 < found <= 1.0:
            raise InputError(f"recipe: {name} must be in (0, 1], got {found}; {example}")
        return found

    return check


def number_or_auto(name: str, value: Any) -> float | str:
    """Check a number of at least 0, infinity included, or "auto"; text may hold the number."""
    if value == "auto":
        return "auto"
    try:
        if isinstance(value, str | numbers.Real) and not isinstance(value, bool):
            if float(value) >= 0:
                return float(value)
    except (ValueError, OverflowError):
        pass
    raise wrong(name, 'be a number of at least 0 or "auto"', value)


def vocabulary(name: str, value: Any) -> float | int | str:
    """Check a fraction in (0, 1], a number of tokens, which may be text as 32k, or "auto"."""
    found = read_tokens(value) if isinstance(value, str) else value
    if found == "auto":
        return found
    if isinstance(found, numbers.Real) and not isinstance(found, bool):
        if 0 < found <= 1:
            return float(found)
        if isinstance(found, numbers.Integral) and found <= MOST and found > 1:
            return int(found)
    raise wrong(name, 'be a fraction in (0, 1], a number of tokens such as 32k, or "auto"', value)


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
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def flag(name: str, value: Any) -> bool:
    """Check true or false."""
    if isinstance(value, bool):
        return value
    raise wrong(name, "be true or false", value)


def text(name: str, value: Any) -> str:
    """Check a name or path."""
    if not isinstance(value, str):
        raise wrong(name, "be text", value)
    if not value.strip():
        raise InputError(f"recipe: {name} must not be empty, got {value!r}")
    check_printable(f"recipe: {name}", value)
    return value


def check_printable(what: str, value: str) -> None:
    """Raise InputError for text that no UTF-8 file holds, or no path."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} must be UTF-8, got {shown(value)}; rename it") from None
    if "\0" in value:
        raise InputError(f"{what} must hold no NUL character, got {shown(value)}")


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Check a list of names or paths."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise wrong(name, "be a list of texts", value)
    return tuple(text(name, each) for each in value)


def digests(name: str, value: Any) -> dict[str, str]:
    """Check a mapping of names to digests."""
    if isinstance(value, Mapping):
        if all(isinstance(each, str) for pair in value.items() for each in pair):
            return dict(value)
    raise wrong(name, "map names of texts to digests", value)


def one_of(names: Sequence[str]) -> Check:
    """Return the check of one of some names."""

    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in names:
            return value
        raise wrong(name, f"be one of {', '.join(names)}", value)

    check.names = tuple(names)
    return check


def some_of(names: Sequence[str]) -> Check:
    """Return the check of a list of different names, at least one."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        given = () if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
        known = all(isinstance(each, str) and each in names for each in given)
        if given and known and len(set(given)) == len(given):
            return given
        raise wrong(name, f"be a list of some of {', '.join(names)}", value)

    check.names = tuple(names)
    return check


def shown(value: Any) -> str:
    """Return a value for an error message: one short line, whatever it is."""
    if isinstance(value, numbers.Integral) and abs(value) > MOST:
        return f"an integer of {int(value).bit_length()} bits"
    if not isinstance(value, str | numbers.Number | None):
        kind = type(value).__name__
        return f"{kind} {reprlib.repr(value)[:80]}" if _small(value) else f"a {kind}"
    return repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."


def _small(value: Any) -> bool:
    """Tell whether a list holds a few plain things, so that showing it is safe and short."""
    plain = isinstance(value, list | tuple) and len(value) <= 8
    return plain and all(isinstance(each, str | float | bool) for each in value)


class PruneOptions(TypedDict, total=False):
    """Fields of a recipe that :func:`liar_ext.prune` uses, ``preset`` and ``sites``.

    A test compares names and types with :class:`liar_ext.Recipe`.
    """

    preset: str
    sites: str | Sequence[str]
    seed: int
    memory: int | None
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
    keep_experts: float
    kinds: Sequence[str]
    attn_unit: str
    criterion: str
    allocation: str
    reconstruct: str
    damp: float | str
    schedule: str
    rescale: bool


class CompressOptions(PruneOptions, total=False):
    """Fields of a recipe that :func:`liar_ext.compress` takes as keywords."""

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
