"""Keep back what transformers logs of unequal layers, and of weights that are refused here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

QUIETENED = (
    "transformers.integrations.heterogeneity.configuration_utils",
    "transformers.modeling_utils",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what transformers logs of sizes that differ by layer, and of lacking weights.

    The one is meant, the other raises an error of one line here.
    """
    loggers = [logging.getLogger(name) for name in QUIETENED]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    refused = "LOAD REPORT" in text and any(word in text for word in ("MISSING", "MISMATCH"))
    return not refused and "per-layer attribute" not in text
