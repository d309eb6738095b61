"""Features of images and sound, computed once while only the language model behind them changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from liar_ext.calibration.taps import replaced
from liar_ext.models.registry import family_of
from liar_ext.models.running import body_of, device_of
from liar_ext.reconstruction.streams import Held, HiddenStates

METHODS = ("get_image_features", "get_audio_features")  # of base models of transformers
UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # where there is a pooler_output


@contextmanager
def features_once(model: nn.Module, states: HiddenStates) -> Iterator[None]:
    """Let the encoder of images or sound of a model run once for each input, not in every pass.

    Its output is held in ``states``. Where the encoder itself is pruned, as in CLIP, nothing
    changes. A copy of the model that is made meanwhile has the features of the model.
    """
    body, alone = body_of(model), not family_of(model).parts
    with ExitStack() as stack:
        for name in METHODS:
            if alone and hasattr(body, name):
                once = _once(getattr(body, name), states, device_of(model))
                stack.enter_context(replaced(body, once, name))
        yield


def _once(
    compute: Callable[..., Any], states: HiddenStates, device: torch.device
) -> Callable[..., Any]:
    """Return a method that computes what it has not computed for the same arguments."""
    known: dict[bytes, Any] = {}

    @wraps(compute)
    @torch.no_grad()
    def features(*args: Any, **kwargs: Any) -> Any:
        key = _key((args, kwargs))
        if key not in known:
            output = compute(*args, **kwargs)
            if isinstance(output, ModelOutput) and output.get("pooler_output") is not None:
                output = type(output)(**{n: v for n, v in output.items() if n not in UNREAD})
            known[key] = pytree.tree_map_only(Tensor, states.hold, output)
        return pytree.tree_map_only(Held, lambda held: held.get().to(device), known[key])

    return features


def _key(arguments: Any) -> bytes:
    """Return a digest of arguments, and of all that their tensors hold."""
    leaves, names = pytree.tree_flatten(arguments)
    digest = blake2b(repr(names).encode(), digest_size=16)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()
