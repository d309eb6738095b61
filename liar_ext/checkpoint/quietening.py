"""Keep back what transformers logs of unequal layers, and of weights that are refused here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

QUIETENED = (
    "transformers.integrations.heterogeneity.configuration_utils",
    "transformers.modeling_utils",
    "accelerate.big_modeling",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back logs of sizes that differ by layer, as is meant, and of weights refused here."""
    loggers = [logging.getLogger(name) for name in QUIETENED]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep back the progress bars of transformers; afterwards they are as they were."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def obedient_bar() -> Iterator[None]:
    """Let the bar of a GGUF file obey the switch of transformers' other bars, which it ignores."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as bars

    own = vars(reader).get("tqdm")
    if own is not None:
        reader.tqdm = bars.tqdm
    try:
        yield
    finally:
        if own is not None:
            reader.tqdm = own


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    refused = "LOAD REPORT" in text and any(word in text for word in ("MISSING", "MISMATCH"))
    offloaded = "were offloaded to the" in text  # as was asked for
    return not (refused or offloaded or "per-layer attribute" in text)
