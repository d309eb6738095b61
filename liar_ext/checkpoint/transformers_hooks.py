"""What liar_ext changes in transformers: sizes are built from a config.

Without it a folder with layers of unequal sizes needs ``trust_remote_code=True``.
Transformers has no place to register sizes at, so ``PreTrainedModel.post_init``, which ends the
building of every model, looks for them first.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

from liar_ext.models.liar_loader import resize

MODULE = "transformers.modeling_utils"


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
