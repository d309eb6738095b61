"""Features of images and sound, computed once while only the language model behind them changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from liar_ext.calibration.bank_source import update_digest
from liar_ext.models.registry import family_of
from liar_ext.models.running import body_of, device_of
from liar_ext.reconstruction.streams import Held, HiddenStates

METHODS = ("get_image_features", "get_audio_features")  # of base models of transformers
UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # the model reads the rest


@contextmanager
def features_once(model: nn.Module, states: HiddenStates) -> Iterator[None]:
    """Let the encoder of images or sound of a model run once for each input, not in every pass.

    What it gives is held in ``states``. Where the encoder is pruned, as in CLIP, it runs as ever.
    """
    body, once = body_of(model), []
    if not family_of(model).parts:
        once = [name for name in METHODS if hasattr(body, name)]
    for name in once:
        setattr(body, name, _once(getattr(body, name), states, device_of(model)))
    try:
        yield
    finally:
        for name in once:
            delattr(body, name)


def _once(
    compute: Callable[..., Any], states: HiddenStates, device: torch.device
) -> Callable[..., Any]:
    """Return a method that computes what it has not computed for the same arguments."""
    known: dict[bytes, Any] = {}

    @wraps(compute)
    @torch.no_grad()
    def features(*args: Any, **kwargs: Any) -> Any:
        digest = blake2b(digest_size=16)
        for name, value in [*enumerate(args), *sorted(kwargs.items())]:
            update_digest(digest, str(name), value)
        key = digest.digest()
        if key not in known:
            output = compute(*args, **kwargs)
            for name in UNREAD:
                if getattr(output, name, None) is not None:
                    setattr(output, name, None)
            known[key] = pytree.tree_map_only(Tensor, states.hold, output)
        return pytree.tree_map_only(Held, lambda held: held.get().to(device), known[key])

    return features
