"""Checkpoints: save a pruned model, load it, prove that it is the one that was saved."""

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

from liar_ext.checkpoint.loading import load_model, load_pruned
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import wear
from liar_ext.models.liar_loader import resize

__all__ = ["load_model", "load_pruned", "register", "save_pruned"]

# Transformers has no place to register sizes at, so post_init of the models that it has here, which
# ends the building of each, looks for them first.
MODELING = "transformers.modeling_utils"


def register() -> None:
    """Let transformers build the sizes in a config, now or as soon as somebody imports it."""
    if MODELING in sys.modules:
        _extend(sys.modules[MODELING])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Extends the module after its import, which takes seconds and may never be wanted."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODELING:
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
            wear(self)
        stock(self)

    post_init.builds_pruned = True
    module.PreTrainedModel.post_init = post_init
