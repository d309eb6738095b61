"""What liar_ext changes in transformers: sizes are built from a config, and some of its logs go.

Without the first a folder with layers of unequal sizes needs ``trust_remote_code=True``.
Transformers has no place to register sizes at, so ``PreTrainedModel.post_init``, which ends the
building of every model, looks for them first.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

from liar_ext.models.liar_loader import resize

MODULE = "transformers.modeling_utils"
QUIETENED = (
    "transformers.integrations.heterogeneity.configuration_utils",
    "transformers.modeling_utils",
    "accelerate.big_modeling",
)


def register() -> None:
    """Let transformers build the sizes in a config, now or as soon as somebody imports it."""
    if MODULE in sys.modules:
        _extend(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Extends the module after its import, which takes seconds and may never be wanted."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _extend(module)

            spec.loader.exec_module = exec_module
        return spec


def _extend(module: Any) -> None:
    stock = module.PreTrainedModel.post_init
    if hasattr(stock, "builds_pruned"):
        return

    @functools.wraps(stock)
    def post_init(self: Any) -> None:
        if resize(self):
            from liar_ext.checkpoint.stock_config import wear

            wear(self)
        stock(self)

    post_init.builds_pruned = True
    module.PreTrainedModel.post_init = post_init


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
