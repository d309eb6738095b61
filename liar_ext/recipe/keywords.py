"""The choices of a recipe as keywords of functions, with their types for editors and mypy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from typing_extensions import TypedDict

from liar_ext.errors import InputError, did_you_mean
from liar_ext.plan import Budget


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
